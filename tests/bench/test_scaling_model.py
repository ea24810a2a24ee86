"""The computed page about several GPUs, against the planner's count and its own generator."""

import json
import math
from pathlib import Path

import pytest
from bench import balance, scaling_model
from bench.scaling_model import MODELS, WORKS, exchanged_bytes, fits, memory, step

from fusedrl.engine.cli.main import main

pytestmark = pytest.mark.cpu_only("formulas")
HEADS = {"0.5B": (14, 2), "7B": (28, 4), "32B": (40, 8)}


@pytest.fixture(params=MODELS)
def planned(request, tmp_path, capsys):
    """Plans of a model for 1 to 8 devices, as `fusedrl plan` gives them."""
    model, (heads, key_values) = MODELS[request.param], HEADS[request.param]
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": model.hidden,
        "intermediate_size": model.feed_forward,
        "num_hidden_layers": model.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_values,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": 32768,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["plan", "grpo", "--model", str(tmp_path), "--memory", "8000GB", "--kl.coef", "0"]
    words += ["--dtype", "bfloat16", "--device", "cpu", "--output-json", "-", "--devices"]
    found = {}
    for devices in (1, 2, 4, 8):
        assert main([*words, str(devices)]) == 0
        found[devices] = json.loads(capsys.readouterr().out)
    return model, found


def test_memory_is_what_the_planner_counts(planned):
    model, plans = planned
    for devices, plan in plans.items():
        parts = plan["bytes"]
        held = parts["weights"] + parts["gradients"] + parts["optimizer"]
        # norms and biases are not in the formula
        assert memory(model, devices) == pytest.approx(held, rel=2e-3)
        rest = parts["kv_pool"] + parts["rotary"]
        for t, fixed in plan["tensor_parallel_fixed_bytes"].items():
            assert memory(model, devices, int(t)) == pytest.approx(fixed - rest, rel=2e-3), t
        assert [int(t) for t in plan["tensor_parallel_fixed_bytes"]] == [
            t for t in (2, 4, 8) if t <= devices
        ]


def test_the_tables_are_those_of_the_page(tmp_path):
    page = tmp_path / "scaling.md"
    page.write_text(scaling_model.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    scaling_model.write(page)
    same = page.read_text(encoding="utf-8") == scaling_model.PAGE.read_text(encoding="utf-8")
    assert same, "run python -m bench.scaling_model"


def test_what_the_page_says_about_sizes():
    """The sentences under the tables."""
    small, large = WORKS["small"], WORKS["large"]
    tiny, seven, big = MODELS["0.5B"], MODELS["7B"], MODELS["32B"]
    assert [fits(seven, devices) for devices in (2, 4, 8)] == [False, True, True]
    assert not fits(seven, 4, lanes=8)
    assert [fits(big, 8), fits(big, 8, 8), fits(big, 8, 8, moments=2)] == [False, False, True]
    assert round(exchanged_bytes(seven.parameters, 8, 4, 0) / 1e9, 1) == 26.7
    assert round(exchanged_bytes(seven.parameters, 8, 0, 2) / 1e9, 1) == 13.3
    assert all(
        step(tiny, work, 8, t).whole > step(tiny, work, 8).whole
        for work in (small, large)
        for t in (2, 4, 8)
    )
    assert round(1 - step(seven, large, 8, 4).whole / step(seven, large, 8).whole, 2) == 0.28
    assert round(1 - step(seven, small, 8, 4).whole / step(seven, small, 8).whole, 2) == 0.56
    assert memory(tiny, 4) == memory(tiny, 8), "the embedding's owner has most"


def test_more_devices_are_never_slower_and_parts_add_up():
    for model in MODELS.values():
        for work in WORKS.values():
            times = [step(model, work, devices) for devices in (1, 2, 4, 8)]
            assert all(math.isclose(sum(found), found.whole) for found in times)
            assert sorted((found.rollout for found in times), reverse=True) == [
                found.rollout for found in times
            ]
            assert times[0].exchange == times[0].apart == 0


def test_a_deal_that_knows_the_lengths_levels_the_tokens():
    case = balance.Case("0.5B", 4, 64, 0.5, 0.5, 200, 4096)
    found = {way: balance.judged(case, way, 3) for way in balance.WAYS}
    assert found["hindsight"][0] < 1.03 < found["by prompt"][0]
    assert found["hindsight"][0] < found["exact means"][0] < found["by prompt"][0]
    assert all(seconds > 0 for _, _, seconds in found.values())
    lone = balance.Case("0.5B", 4, 64, 0.0, 0.0, 200, 4096)
    assert balance.judged(lone, "by prompt", 1)[0] == pytest.approx(1.0)


def test_the_balance_study_is_the_page():
    """Its rows stand on the page; one is computed again."""
    text = (Path(scaling_model.PAGE)).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if "hindsight | " in line]
    assert len(rows) == len(balance.CASES)
