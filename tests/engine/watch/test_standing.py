"""`fusedrl eval`: its figures against those counted from the same completions, alone and on two
devices; and judge on two devices."""

import json
import math
import os
import subprocess
import sys

import pytest
from tests.support.ranks import ROOT
from tests.support.tiny import write_model

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.cli.main import main
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.watch.standing import win_rate

pytestmark = pytest.mark.cpu_only("bits of a CPU")

REWARDS = """
def even(completions, gold, **_):
    return [float(len(c.split()) % 2 == 0) for c in completions]

def size(completions, **_):
    return [float(len(c.split())) for c in completions]

def odd_one(completions, **_):
    return [float('nan') if i == 1 else 1.0 for i in range(len(completions))]

def longer(a, b, **_):
    return ['a' if len(x) > len(y) else 'b' if len(x) < len(y) else 'tie' for x, y in zip(a, b)]

def fails(a, b, **_):
    raise ZeroDivisionError('no')
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standing")
    write_model(folder / "a")
    write_model(folder / "b", seed=1)
    rows = [{"prompt": f"w{i} w{i + 1}", "gold": i} for i in range(7)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.py").write_text(REWARDS)
    return folder


def told(capsys, *argv):
    code = main([str(word) for word in argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def evaluated(folder, capsys, *options, reward="even"):
    code, out, err = told(
        capsys,
        *("eval", folder / "a", "--data", folder / "prompts.jsonl"),
        *("--reward", f"{folder}/r.py:{reward}", "--max_new_tokens", 8, "--output-json", "-"),
        *options,
    )
    assert code == 0, err
    return json.loads(out)


def test_figures_by_hand(folder, capsys):
    found = evaluated(
        folder, capsys, "--n", 4, "--reference", folder / "b", "--against", folder / "b"
    )
    assert (found["prompts"], found["samples"]) == (7, 4)
    one, other = found["models"]
    actor, reference = (HybridActor.from_pretrained(folder / n, device="cpu") for n in "ab")
    # the command shuffles the prompts; each keeps the number of its place
    from fusedrl.engine.base.ordering import shuffled

    prompts = [f"w{i} w{i + 1}" for i in shuffled(7, 0, "judge")]
    ids = actor.generate(prompts, SamplingParams(max_new_tokens=1, temperature=0.0))
    params = SamplingParams(max_new_tokens=8, n=4)
    outs = actor.generate(prompts, params)
    flat = [c for out in outs for c in out]
    right = [sum(len(c.text.split()) % 2 == 0 for c in out) for out in outs]
    assert one["reward"]["value"] == pytest.approx(sum(right) / 28)
    assert one["pass_at_1"]["value"] == pytest.approx(sum(right) / 28)
    two = [1 - math.comb(4 - r, 2) / math.comb(4, 2) for r in right]
    assert one["pass_at_2"]["value"] == pytest.approx(sum(two) / 7)
    assert one["pass_at_4"]["value"] == pytest.approx(sum(r > 0 for r in right) / 7)
    assert one["completions/mean_length"]["value"] == pytest.approx(
        sum(len(c.token_ids) for c in flat) / 28
    )
    assert one["completions/clipped_ratio"]["value"] == pytest.approx(
        sum(c.finish_reason == "length" for c in flat) / 28
    )
    batch = PackedBatch.from_completions([out[0].prompt_ids for out in ids], outs)
    ours, theirs = (x.score(batch).logp[batch.action_mask].double() for x in (actor, reference))
    assert one["kl"]["value"] == pytest.approx((ours - theirs).sum().item() / 28, rel=1e-4)
    assert one["perplexity_ref"]["value"] == pytest.approx(
        math.exp(-theirs.mean().item()), rel=1e-4
    )
    assert one["perplexity"]["value"] == pytest.approx(math.exp(-ours.mean().item()), rel=1e-4)
    assert other["kl"]["value"] == pytest.approx(0.0, abs=1e-5)
    outs_b = reference.generate(prompts, params, range(7, 14))
    pairs = [
        (len(x.text.split()) % 2 == 0, len(y.text.split()) % 2 == 0)
        for a, b in zip(outs, outs_b, strict=True)
        for x, y in zip(a, b, strict=True)
    ]
    wins = sum((x > y) + 0.5 * (x == y) for x, y in pairs) / 28
    assert one["win_rate"]["value"] == pytest.approx(wins)
    assert "win_rate" not in other
    for name, row in one.items():
        if isinstance(row, dict):
            assert row["low"] <= row["value"] <= row["high"], name


def test_a_threshold_and_several_rewards(folder, capsys):
    found = evaluated(folder, capsys, "--right", 8, "--n", 2, reward="size")["models"][0]
    assert found["pass_at_2"]["value"] >= found["pass_at_1"]["value"]
    found = evaluated(folder, capsys, "--n", 2, reward="size")["models"][0]
    assert "pass_at_1" not in found
    found = evaluated(folder, capsys, "--reward", "length:budget=3", "--rows", 3, reward="size")
    assert found["prompts"] == 3
    assert {"rewards/size/mean", "rewards/length/mean"} <= set(found["models"][0])
    found = evaluated(folder, capsys, reward="odd_one")["models"][0]
    assert (found["invalid"], found["reward"]["value"]) == (1, 1.0)


def test_win_rates():
    assert win_rate([1, 2, 3, 4], [0, 2, 4, 4], 1).value == 0.5
    assert win_rate([math.nan, 1, math.nan], [1, math.nan, math.nan], 1).value == 0.5
    assert win_rate([1.0] * 6, [0.0] * 6, 3).low == pytest.approx(win_rate([1, 1], [0, 0], 1).low)


def test_the_table(folder, capsys):
    code, out, _ = told(
        capsys,
        *("eval", folder / "a", "--data", folder / "prompts.jsonl", "--reward", "length:target=4"),
        *("--max_new_tokens", 8, "--n", 2),
    )
    assert code == 0
    assert "7 prompts, 2 each" in out
    assert "cut off at max_new_tokens" in " ".join(out.replace("│", " ").split())


def test_mistakes(folder, capsys, tmp_path):
    other = write_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["v27"] = tokenizer["model"]["vocab"].pop("w27")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "w1 " * 70}) + "\n")
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "w1"}]}) + "\n"
    )
    usual = {
        "--data": folder / "prompts.jsonl",
        "--reward": f"{folder}/r.py:size",
        "--max_new_tokens": 8,
    }
    for changed, message in (
        ({"--n": 2, "--temperature": 0}, "expected --n 1 at --temperature 0"),
        ({"--right": "nan"}, "expected --right to be a number"),
        ({"--reference": other}, "to have the tokenizer of the models"),
        ({"--data": tmp_path / "empty.jsonl"}, "the file is empty"),
        ({"--data": tmp_path / "long.jsonl"}, "all 1 examples are longer than 56 tokens"),
        ({"--data": tmp_path / "chat.jsonl"}, "the tokenizer has no chat template"),
        ({"--max_new_tokens": 64}, "below the model's 64 positions"),
        ({"--reward": f"{folder}/r.py:none"}, "has no 'none'"),
        ({"--reward": "exact_match:column=none"}, "needs the column 'none'"),
        ({"--output-json": tmp_path / "no/x"}, "does not exist"),
        ({"--devices": 0}, "expected a whole number above 0"),
        ({"--place": "1"}, "--place is for processes that --devices starts"),
        ({"--stop_token_ids": 99}, "below the 32 of the model's vocabulary"),
    ):
        argv = [word for pair in (usual | changed).items() for word in pair]
        code, _, err = told(capsys, "eval", folder / "a", *argv)
        assert code == 2, (changed, err)
        assert message in err, err


# ---- two devices ---------------------------------------------------------------------------------
def ran(*argv):
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "fusedrl.engine.cli", *map(str, argv)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_eval_says_the_same_on_two_devices(folder, capsys):
    options = ["--n", 2, "--reference", folder / "b", "--against", folder / "b"]
    alone = evaluated(folder, capsys, *options)
    both = ran(
        *("eval", folder / "a", "--data", folder / "prompts.jsonl", "--reward"),
        *(f"{folder}/r.py:even", "--max_new_tokens", 8, "--output-json", "-", "--devices", 2),
        *options,
    )
    assert both.returncode == 0, both.stderr[-3000:]
    assert json.loads(both.stdout) == alone


@pytest.mark.full
def test_judge_says_the_same_on_two_devices(folder, capsys):
    usual = [
        *("judge", "--a", folder / "a", "--b", folder / "b", "--data", folder / "prompts.jsonl"),
        *("--max_new_tokens", 8, "--n", 2, "--output-json", "-"),
    ]
    by = ["--judge", f"{folder}/r.py:longer"]
    code, alone, err = told(capsys, *usual, *by)
    assert code == 0, err
    both = ran(*usual, *by, "--devices", 2)
    assert both.returncode == 0, both.stderr[-3000:]
    assert json.loads(both.stdout) == json.loads(alone)


@pytest.mark.full
def test_judge_by_reward_and_its_failure_on_two_devices(folder, capsys):
    usual = [
        *("judge", "--a", folder / "a", "--b", folder / "b", "--data", folder / "prompts.jsonl"),
        *("--max_new_tokens", 8, "--n", 2, "--output-json", "-"),
    ]
    by = ["--reward", f"{folder}/r.py:size"]
    _, alone, _ = told(capsys, *usual, *by)
    both = ran(*usual, *by, "--devices", 2)
    assert json.loads(both.stdout) == json.loads(alone)
    wrong = ran(*usual, "--judge", f"{folder}/r.py:fails", "--devices", 2)
    assert wrong.returncode == 2
    assert wrong.stderr.count("ZeroDivisionError") == 1
    assert "Traceback" not in wrong.stderr
