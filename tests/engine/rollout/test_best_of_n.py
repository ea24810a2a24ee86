"""Best-of-n: the bound on its KL and the estimator of its reward against enumeration, and the
choice itself on a model."""

import importlib.util
import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.engine.policy.test_closed_forms import PROMPTS, Tree
from tests.engine.stages.test_closed_forms_dpo import Completions, _logp

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.cli.main import main
from fusedrl.engine.config import GenerationConfig
from fusedrl.engine.data.readers import load_pairs
from fusedrl.engine.data.records import PromptExample
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.rollout.best_of_n import best_of_n, best_of_n_kl, expected_best, first_best


# ---- its distribution, enumerated ----------------------------------------------------------------
def distribution(p, scores, n):
    """[completions] of the best of n: how probable it is that the highest of n scores is this
    one's, and, within a tie, as probable as p has it."""
    below = (p[None, :] * (scores[None, :] < scores[:, None])).sum(1)
    tied = (p[None, :] * (scores[None, :] == scores[:, None])).sum(1)
    return p / tied * ((below + tied) ** n - below**n)


@pytest.mark.parametrize("rounded", [False, True], ids=["no ties", "ties"])
def test_the_kl_is_within_its_bound(rounded, device):
    tree = Tree.random(device)
    completions = Completions(tree)
    count = len(completions.prompts) // PROMPTS
    for p, scores in zip(
        _logp(completions, tree.ref.double()).exp().split(count),
        completions.rewards.split(count),
        strict=True,
    ):
        p, scores = p / p.sum(), scores.round() if rounded else scores
        assert len(scores.unique()) < count or not rounded
        reward = -math.inf
        for n in (1, 2, 4, 16, 64, 4096):
            best = distribution(p, scores, n)
            assert best.sum().item() == pytest.approx(1.0)
            kl = (best * (best / p).log()).nan_to_num(0.0).sum().item()
            assert -1e-12 < kl <= best_of_n_kl(n) + 1e-12
            assert (best * scores).sum().item() > reward, "and the reward rises with n"
            reward = (best * scores).sum().item()
        limit = -p[scores == scores.max()].sum().log().item()
        assert kl <= limit + 1e-12, "of a table that has a best row; the bound grows for ever"
        assert limit < best_of_n_kl(4096)


def test_the_bound_is_an_equality_without_atoms(device):
    """Scores uniform on (0, 1): the best has density n x^(n - 1), whose KL to the uniform is log n
    - (n - 1) / n. By the midpoint rule."""
    x = (torch.arange(200_000, dtype=torch.float64, device=device) + 0.5) / 200_000
    for n in (1, 2, 7, 50):
        density = n * x ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(
            (density * density.log()).nan_to_num(0.0).mean().item(), abs=1e-4
        )
    assert best_of_n_kl(1) == 0.0


def test_what_is_chosen_has_that_distribution(device):
    """first_best on drawn samples, ties among them, against the enumerated distribution:
    chi-square, fixed seed."""
    p, scores = (
        torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64, device=device),
        torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.float64, device=device),
    )
    drawn = (
        torch.multinomial(
            p.cpu(), 3 * 4000, replacement=True, generator=torch.Generator().manual_seed(0)
        )
        .to(device)
        .view(4000, 3)
    )
    chosen = Counter(row[first_best(scores[row].tolist())].item() for row in drawn)
    expected = 4000 * distribution(p, scores, 3)
    # 3 degrees of freedom, 0.1%
    assert sum((chosen[i] - e) ** 2 / e for i, e in enumerate(expected.tolist())) < 16.3


# ---- the estimator -------------------------------------------------------------------------------
def test_the_estimator_is_the_mean_over_all_subsets(device):
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 7, generator=draw, dtype=torch.float64).to(device)
    gold = torch.randn(3, 7, generator=draw, dtype=torch.float64).to(device)
    scores[2, :4] = 0.25  # ties
    for k in range(1, 8):
        found, of_gold = expected_best(scores, k), expected_best(scores[:2], k, gold[:2])
        for row in range(3):
            subsets = list(itertools.combinations(range(7), k))
            best = [max(subset, key=lambda i: scores[row, i].item()) for subset in subsets]
            assert found[row].item() == pytest.approx(
                sum(scores[row, i].item() for i in best) / len(subsets), rel=1e-12
            )
            if row < 2:
                assert of_gold[row].item() == pytest.approx(
                    sum(gold[row, i].item() for i in best) / len(subsets), rel=1e-12
                )
    assert torch.equal(expected_best(scores, 7), scores.amax(1))
    torch.testing.assert_close(expected_best(scores, 1), scores.mean(1), rtol=1e-12, atol=0)


def test_the_estimator_is_unbiased(device):
    """Over all 4^5 ways to draw 5 samples, each by its probability: exactly the expected best of k,
    ties included. The best of the first k wastes samples."""
    p, scores = (
        torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64, device=device),
        torch.tensor([0.0, 1.0, 1.0, 5.0], dtype=torch.float64, device=device),
    )
    ways = torch.tensor(list(itertools.product(range(4), repeat=5)), device=device)
    chance = p[ways].prod(1)
    for k in (1, 2, 3, 5):
        exact = (distribution(p, scores, k) * scores).sum().item()
        estimates = expected_best(scores[ways], k)
        assert (chance * estimates).sum().item() == pytest.approx(exact, rel=1e-12)
        first = scores[ways[:, :k]].amax(1)
        spread, wasteful = ((chance * (x - exact) ** 2).sum().item() for x in (estimates, first))
        assert spread <= wasteful * (1 + 1e-12)
        assert spread < 0.8 * wasteful or k == 5


def test_large_n(device):
    scores = torch.arange(800, dtype=torch.float64, device=device)[None]
    # the mean maximum of 400 of 1 .. 800, less 1
    assert expected_best(scores, 400).item() == pytest.approx(400 * 801 / 401 - 1, rel=1e-12)


def test_what_is_no_estimate_is_refused(device):
    scores = torch.zeros(1, 4, device=device)
    for k in (0, 5):
        with pytest.raises(
            ValueError, match=f"expected 1 <= k <= 4, the samples of a prompt, .* got k = {k}"
        ):
            expected_best(scores, k)
    with pytest.raises(ValueError, match="NaN among the scores"):
        expected_best(torch.tensor([[1.0, math.nan]], device=device), 1)


# ---- on a model ----------------------------------------------------------------------------------
def length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


GENERATION = GenerationConfig(max_new_tokens=8)
EXAMPLES = [PromptExample("w1 w2", {"bad": 0}), PromptExample("w3", {"bad": 1})]


def test_the_best_is_the_best_of_the_samples(tiny_model, device):
    actor = HybridActor.from_pretrained(tiny_model, dtype="float32", device=device)
    found = best_of_n(actor, EXAMPLES, RewardSet([load_reward(length)]), 6, GENERATION, seed=4)
    outs = actor.generate(
        [example.prompt for example in EXAMPLES], SamplingParams(max_new_tokens=8, n=6, seed=4)
    )
    for one, group in zip(found, outs, strict=True):
        lengths = [len(c.token_ids) for c in group]
        assert one.scores == lengths
        assert one.index == lengths.index(max(lengths))
        assert one.best.token_ids == group[one.index].token_ids
        assert one.score == max(lengths)
    assert len({len(set(one.scores)) for one in found} - {1}) >= 1


def test_invalid_rewards_are_never_best(tiny_model, device):
    def some(prompts, completions, completion_ids, bad, **columns):
        return [math.nan if b and i % 3 else -1.0 for i, b in enumerate(bad)]

    def none(prompts, completions, completion_ids, bad, **columns):
        return [math.nan if b else 1.0 for b in bad]

    actor = HybridActor.from_pretrained(tiny_model, dtype="float32", device=device)
    found = best_of_n(actor, EXAMPLES, RewardSet([load_reward(some)]), 3, GENERATION, seed=0)
    assert [one.score for one in found] == [-1.0, -1.0]
    with pytest.raises(
        RewardError, match="none of the 3 completions of prompt 2 has a valid reward"
    ):
        best_of_n(actor, EXAMPLES, RewardSet([load_reward(none)]), 3, GENERATION, seed=0)
    with pytest.raises(ValueError, match="temperature above 0"):
        best_of_n(
            actor,
            EXAMPLES,
            RewardSet([load_reward(length)]),
            3,
            GenerationConfig(temperature=0.0),
            seed=0,
        )


def test_the_command_line(tiny_model, tmp_path, capsys, device):
    (tmp_path / "r.py").write_text(
        "def longest(completion_ids, **columns):\n    return [float(len(ids)) for ids in "
        "completion_ids]\n"
    )
    reward = f"{tmp_path / 'r.py'}:longest"
    base = [
        "generate",
        "--model",
        str(tiny_model),
        "--device",
        "cpu",
        "--max_new_tokens",
        "8",
        "--prompt",
        "w1",
        "--prompt",
        "w2 w3",
        "--seed",
        "4",
    ]
    assert main([*base, "--best_of", "5", "--reward", reward]) == 0
    shown = capsys.readouterr().out
    found = best_of_n(
        HybridActor.from_pretrained(tiny_model, dtype="float32", device=device),
        [PromptExample("w1"), PromptExample("w2 w3")],
        RewardSet([load_reward(length)]),
        5,
        GENERATION,
        seed=4,
    )
    for number, one in enumerate(found):
        assert (
            f"[prompt {number + 1}, best of 5, score {one.score:g}, {one.best.finish_reason}]"
            in shown
        )
    assert shown.count("\n") == 4
    assert "\nw1" in shown
    assert "\nw2 w3" in shown


def test_pairs_of_own_samples(tiny_model, tmp_path, write_jsonl, monkeypatch, capsys):
    """examples/sample_pairs.py: what it writes is what `fusedrl train dpo` reads."""
    spec = importlib.util.spec_from_file_location(
        "sample_pairs", Path(__file__).resolve().parents[3] / "examples" / "sample_pairs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "r.py").write_text(
        "def longest(completion_ids, **columns):\n    return [float(len(ids)) for ids in "
        "completion_ids]\n"
    )
    data, out = (
        write_jsonl("p.jsonl", [{"prompt": f"w{i}"} for i in range(6)]),
        tmp_path / "pairs.jsonl",
    )
    monkeypatch.setattr(
        "sys.argv",
        [
            "x",
            "--model",
            str(tiny_model),
            "--data",
            data,
            "--reward",
            f"{tmp_path / 'r.py'}:longest",
            "--n",
            "4",
            "--max_new_tokens",
            "8",
            "--out",
            str(out),
        ],
    )
    module.main()
    assert "best of" in capsys.readouterr().out
    pairs, dropped = load_pairs(str(out))
    assert 0 < len(pairs) <= 6
    assert not dropped
    assert all(len(pair.chosen.split()) > len(pair.rejected.split()) for pair in pairs)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--best_of", "4"], "expected --best_of N together with --reward SPEC"),
        (["--reward", "r.py:f"], "expected --best_of N together with --reward SPEC"),
        (["--best_of", "4", "--reward", "r.py:f", "--n", "2"], "without --n"),
        (["--best_of", "4", "--reward", "r.py:f", "--greedy"], "temperature above 0"),
        (["--best_of", "0", "--reward", "r.py:f"], "expected a whole number above 0"),
        (["--best_of", "4", "--reward", "r.py"], "name the function"),
    ],
)
def test_contradictions_are_one_message(tiny_model, capsys, options, message):
    assert (
        main(
            ["generate", "--model", str(tiny_model), "--device", "cpu", "--prompt", "w1", *options]
        )
        == 2
    )
    assert message in capsys.readouterr().err
