"""Preference losses against their definitions in float64, and what they are for: true scores from
noisy labels."""

import json
import math
from itertools import permutations

import pytest
import torch
from transformers import AutoTokenizer

from fusedrl.engine.base.errors import DataError
from fusedrl.engine.data.readers import PairExample, RankedExample, Source
from fusedrl.engine.preference.comparisons import (
    Comparison,
    Pairs,
    centre_loss,
    encode_preferences,
    is_ranked,
    load_preferences,
    preference_loss,
    preference_nll,
)


def comparison(*ranks, **attributes):
    return Comparison([1], tuple([7 + i] for i in range(len(ranks))), ranks, **attributes)


MIXED = [
    comparison(1, 2, margin=0.7),
    comparison(2, 1, 2, 3),
    comparison(1, 2, label=0.5, weight=2.0),
    comparison(5, 1, 1, 9, 2, 7, 7, 3, 4),
    comparison(2, 1, label=0.8, margin=-0.3, weight=0.25),
]
PLAIN = [
    comparison(1, 2),
    comparison(3, 1, 2),
    comparison(2, 1),
    comparison(1, 1, 2, 4, 3, 6, 5, 8, 9),
]


def scores_of(device, comparisons, seed=0, scale=1.5):
    count = sum(len(c.ranks) for c in comparisons)
    return (
        torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
            device
        )
        * scale
    )


def by_definition(scores, comparisons, noise=0.0):
    """One pair after another, in Python's floats."""
    total = first = 0.0
    for c in comparisons:
        mine = scores[int(first) : int(first) + len(c.ranks)]
        terms = []
        for i, a in enumerate(c.ranks):
            for j, b in enumerate(c.ranks):
                if a < b:
                    win = 1 / (1 + math.exp(-(mine[i] - mine[j] - c.margin)))
                    said = (1 - noise) * win + noise * (1 - win)
                    terms.append(-c.label * math.log(said) - (1 - c.label) * math.log(1 - said))
        total += c.weight * sum(terms) / len(terms)
        first += len(c.ranks)
    return total / sum(c.weight for c in comparisons)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3, 0.49])
@pytest.mark.parametrize(
    "comparisons",
    [MIXED, PLAIN, PLAIN[:1], MIXED[2:3]],
    ids=["mixed", "plain", "one pair", "one tie"],
)
def test_the_loss_is_its_definition(comparisons, noise, device):
    scores = scores_of(device, comparisons)
    expected = by_definition(scores.tolist(), comparisons, noise)
    assert preference_loss(scores, comparisons, label_noise=noise).item() == pytest.approx(
        expected, rel=1e-12
    )
    assert preference_loss(scores.float(), comparisons, label_noise=noise).item() == pytest.approx(
        expected, rel=1e-5
    )
    assert torch.autograd.gradcheck(
        lambda s: preference_loss(s, comparisons, label_noise=noise),
        scores.clone().requires_grad_(),
    )


def test_known_answers(device):
    assert preference_loss(
        torch.tensor([1.0, 0.25], device=device), [comparison(1, 2)]
    ).item() == pytest.approx(math.log(1 + math.exp(-0.75)))
    assert preference_loss(
        torch.tensor([1.0, 0.25], device=device), [comparison(2, 1)]
    ).item() == pytest.approx(math.log(1 + math.exp(0.75)))
    assert preference_loss(
        torch.tensor([1.0, 0.25], device=device), [comparison(1, 2, margin=0.5)]
    ).item() == pytest.approx(math.log(1 + math.exp(-0.25)))
    three = torch.tensor([0.0, 2.0, 1.0], device=device)  # ranks 3, 1, 2: differences 2, 1, 1
    assert preference_loss(three, [comparison(3, 1, 2)]).item() == pytest.approx(
        (math.log(1 + math.exp(-2)) + 2 * math.log(1 + math.exp(-1))) / 3
    )
    assert preference_loss(torch.zeros(0, requires_grad=True, device=device), []).item() == 0.0


def test_a_list_counts_once_and_ties_are_no_pairs(device):
    long, short = comparison(*range(1, 10)), comparison(1, 2)
    scores = torch.cat(
        [torch.zeros(9, device=device), torch.tensor([0.0, 3.0], device=device)]
    ).double()
    assert preference_loss(scores, [long, short]).item() == pytest.approx(
        (math.log(2) + math.log(1 + math.exp(3))) / 2
    )  # not (36 log 2 + ...) / 37
    tied = torch.tensor([1.0, -4.0, 0.5], dtype=torch.float64, requires_grad=True, device=device)
    preference_loss(tied, [comparison(1, 1, 2)], label_noise=0.1).backward()
    alone = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True, device=device)
    preference_loss(alone, [comparison(1, 2)], label_noise=0.1).backward()
    assert tied.grad[0].item() == pytest.approx(alone.grad[0].item() / 2), (
        "two pairs, each half of the mean; none between the two of rank 1"
    )


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_micro_batches_sum_to_the_step(noise, device):
    scores = scores_of(device, MIXED + PLAIN)
    whole = MIXED + PLAIN
    weight = sum(c.weight for c in whole)
    sizes = [len(c.ranks) for c in whole]
    for cut in (1, 4, 6):
        parts = [
            preference_loss(s, cs, label_noise=noise, total_weight=weight)
            for s, cs in zip(
                scores.split([sum(sizes[:cut]), sum(sizes[cut:])]),
                (whole[:cut], whole[cut:]),
                strict=True,
            )
        ]
        assert sum(parts).item() == pytest.approx(
            preference_loss(scores, whole, label_noise=noise).item(), rel=1e-12
        )
    single = [
        preference_loss(s.float(), [c], label_noise=noise, total_weight=weight).item()
        for s, c in zip(scores.split(sizes), whole, strict=True)
    ]
    assert sum(single) == pytest.approx(
        preference_loss(scores, whole, label_noise=noise).item(), rel=1e-5
    )


def test_the_order_of_completions_changes_nothing(device):
    scores, ranks = [0.3, -1.0, 2.0], [1, 3, 2]
    found = {
        round(
            preference_loss(
                torch.tensor([scores[i] for i in order], device=device),
                [comparison(*(ranks[i] for i in order))],
            ).item(),
            6,
        )
        for order in permutations(range(3))
    }
    assert len(found) == 1


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.3])
def test_extreme_scores_stay_finite(noise, device):
    for x in (1e4, -1e4, 80.0, -80.0):
        d = torch.tensor([x], requires_grad=True, device=device)
        loss = preference_nll(d, noise).sum()
        loss.backward()
        assert d.grad.isfinite().all()
        limit = -math.log1p(-noise) if x > 0 else -math.log(noise) if noise else -x
        assert loss.item() == pytest.approx(limit, abs=1e-5)


def test_noise_likelihood_has_its_optimum_at_the_truth(device):
    """The expected gradient over labels that are drawn by Bradley and Terry and then flipped: 0 at
    the true difference, and nowhere near it for others."""
    for truth in (-2.0, 0.4, 3.0):
        for noise in (0.1, 0.3):
            prefer = (1 - noise) / (1 + math.exp(-truth)) + noise / (1 + math.exp(truth))

            def slope(loss, at, prefer=prefer):
                d = torch.tensor(at, dtype=torch.float64, requires_grad=True, device=device)
                (prefer * loss(d) + (1 - prefer) * loss(-d)).backward()
                return d.grad.item()

            assert slope(lambda d, e=noise: preference_nll(d, e), truth) == pytest.approx(
                0.0, abs=1e-12
            )
            plain = slope(preference_nll, truth) * math.copysign(1, truth)
            smoothed = slope(
                lambda d, e=noise: (1 - e) * preference_nll(d) + e * preference_nll(-d), truth
            ) * math.copysign(1, truth)
            assert smoothed > plain > 0.015, (
                "the plain loss draws scores towards each other, label smoothing even more"
            )


def test_scores_from_labels_of_which_three_in_ten_are_flipped(device):
    """Linear scores of 12 features, 6000 pairs: the likelihood with the flip rate in it says the
    true probabilities, the plain one does not."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(12, generator=draw, dtype=torch.float64).to(device) * 0.7
    better, worse = torch.randn(2, 6000, 12, generator=draw, dtype=torch.float64).to(device)
    probability = torch.sigmoid((better - worse) @ truth)
    label = torch.rand(6000, generator=draw, dtype=torch.float64).to(device) < probability
    label ^= torch.rand(6000, generator=draw, dtype=torch.float64).to(device) < 0.3
    ranks = [comparison(1, 2) if first else comparison(2, 1) for first in label.tolist()]
    found = {}
    for noise in (0.0, 0.3):
        w = torch.zeros(12, dtype=torch.float64, requires_grad=True, device=device)
        optimizer = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

        def closure(w=w, optimizer=optimizer, noise=noise):
            optimizer.zero_grad()
            loss = preference_loss(
                torch.stack([better @ w, worse @ w], 1).flatten(), ranks, label_noise=noise
            )
            loss.backward()
            return loss

        optimizer.step(closure)
        fresh = (
            torch.randn(
                4000, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            ).to(device)
            * 2**0.5
        )
        error = (
            (torch.sigmoid(fresh @ w.detach()) - torch.sigmoid(fresh @ truth))
            .square()
            .mean()
            .sqrt()
            .item()
        )
        found[noise] = (error, (w.detach().norm() / truth.norm()).item())
    assert found[0.3][0] < 0.08, "root of the mean squared error of the true probability"
    assert found[0.0][0] > 3 * found[0.3][0]
    assert found[0.3][1] == pytest.approx(1.0, abs=0.15)
    assert found[0.0][1] < 0.5, "scores shrunk to what flipped labels still show"


def test_centring_is_the_mean_square_of_sums(device):
    scores = torch.tensor([1.0, 3.0, -2.0, 0.5], dtype=torch.float64, device=device)
    assert centre_loss(scores, [comparison(1, 2), comparison(2, 1)]).item() == pytest.approx(
        (4.0**2 + 1.5**2) / 2
    )
    three = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, device=device)
    assert centre_loss(three, [comparison(1, 2, 3)]).item() == pytest.approx((9 + 25 + 36) / 3)
    assert centre_loss(three, [comparison(1, 1, 2)]).item() == pytest.approx((25 + 36) / 2)


def test_pairs_of_none():
    pairs = Pairs.of([])
    assert all(len(column) == 0 for column in pairs)
    assert pairs.better_P.dtype == torch.int64


def test_what_is_no_comparison():
    for completions, ranks in (
        ([[1]], (1,)),
        ([[1], [2]], (1, 1)),
        ([[1], [2]], (1, 2, 3)),
        ([], ()),
    ):
        with pytest.raises(
            DataError, match="expected completions and as many ranks, two of which differ"
        ):
            Comparison([1], tuple(completions), ranks)


def test_best_and_preferred():
    assert comparison(2, 1, 1, 3).best == [1, 2]
    assert comparison(2, 1, 1, 3).preferred == [1, 2]
    assert comparison(1, 2, label=0.5).best == [0]
    assert comparison(1, 2, label=0.5).preferred == []


# ---- files ---------------------------------------------------------------------------------------
LISTS = [
    {"prompt": "w1", "completions": ["w2 w3", "w4", "w5"], "ranks": [2, 1, 2]},
    {"prompt": "w6", "completions": ["w7", "w8"], "ranks": [1, 2]},
]
PAIRS = [
    {"prompt": "w1", "chosen": "w2", "rejected": "w3", "margin": 0.5},
    {"prompt": "w1", "chosen": "w4 w4", "rejected": "w5"},
]
WEBGPT = [
    {
        "question": {"full_text": "w1?"},
        "answer_0": "w2",
        "answer_1": "w3",
        "score_0": a,
        "score_1": -a,
    }
    for a in (0.5, 0.0, -1.0)
]


def test_files_are_recognised(write_jsonl, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lists, pairs, webgpt = (
        write_jsonl(name, rows)
        for name, rows in (("lists", LISTS), ("pairs", PAIRS), ("webgpt", WEBGPT))
    )
    assert [is_ranked(Source(path)) for path in (lists, pairs, webgpt)] == [True, False, False]
    assert is_ranked(Source(lists, "kwise"))
    assert not is_ranked(Source(pairs, "preference"))
    assert not is_ranked(Source(write_jsonl("bad", [])))
    examples, dropped = load_preferences(Source(lists), tokenizer)
    assert dropped == {}
    assert [type(e) for e in examples] == [RankedExample, RankedExample]
    assert load_preferences(Source(webgpt), tokenizer)[1] == {"a tie": 1}
    soft, dropped = load_preferences(Source(webgpt), tokenizer, soft_labels=True)
    assert dropped == {}
    assert [e.label for e in soft] == [1.0, 0.5, 1.0]


def test_a_bad_first_line_does_not_hide_the_format(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("not json\n[]\n" + json.dumps(LISTS[0]) + "\n")
    assert is_ranked(Source(str(path)))


def test_token_ids_are_those_of_pairs(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pairs = [
        PairExample("w1 w2", "w3", "w4 w5", margin=0.5, label=0.5, weight=3.0),
        PairExample("", "w3 w3 w3", "w4"),
    ]
    (first, second), dropped = encode_preferences(tokenizer, pairs, 2, 64)
    assert first == (pairs[0], Comparison([1, 5, 6], ([7, 2], [8, 9, 2]), (1, 2), 0.5, 0.5, 3.0))
    assert second == (pairs[1], Comparison([1], ([7, 7, 7, 2], [8, 2]), (1, 2)))
    assert dropped.count == 0
    (kept,), dropped = encode_preferences(tokenizer, pairs, 2, 5)
    assert (kept[0], dropped.count) == (pairs[1], 1)
    ranked = RankedExample("w1", ("w2", "w3 w4", "w5"), (3, 1, 1))
    ((example, c),) = encode_preferences(tokenizer, [ranked], 2, 64)[0]
    assert example is ranked
    assert c == Comparison([1, 5], ([6, 2], [7, 8, 2], [9, 2]), (3, 1, 1))
    assert c.tokens == 3 * 2 + 7
    with pytest.raises(DataError, match="longer than 4 tokens"):
        encode_preferences(tokenizer, [ranked], 2, 4)
