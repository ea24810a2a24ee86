"""`fusedrl bench`: workloads that reproduce, floors against arithmetic of their own, reports that
say what they measured, steps that learn what they should.

One file: the small model that all reports are of.
"""

import copy
import json
import math
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from fusedrl.engine import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.cli import bench as cli_bench
from fusedrl.engine.cli.main import main
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.tools import machine
from fusedrl.engine.tools.bench import (
    PHASES,
    Subject,
    generate_batch,
    interleaved,
    ours,
    padded_generate,
)
from fusedrl.engine.tools.bench_step import PolicyStep
from fusedrl.engine.tools.workloads import (
    SHAPES,
    WORKLOADS,
    Workload,
    count_weights,
    floor_of,
    forward_flops,
    group_workload,
    kv_bytes_per_token,
    needed,
    pairs_seen,
    random_workload,
    seed0_workload,
)

COPY, GEMM = 10e9, 50e9
TINY = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


@pytest.fixture
def ceilings(monkeypatch):
    """Those of the machine take seconds to measure."""
    monkeypatch.setattr("fusedrl.engine.tools.bench.copy_bandwidth", lambda device: COPY)
    for module in ("bench", "bench_step"):
        monkeypatch.setattr(f"fusedrl.engine.tools.{module}.gemm_rate", lambda device: GEMM)


@pytest.fixture
def bench(ceilings, tiny_model, tmp_path):
    """Run `fusedrl bench KIND` on the tiny model and return its JSON."""

    def run(kind: str, *arguments: str) -> dict:
        path = tmp_path / "found.json"
        assert (
            main(
                [
                    "bench",
                    kind,
                    "--model",
                    str(tiny_model),
                    "--device",
                    "cpu",
                    "--output-json",
                    str(path),
                    *arguments,
                ]
            )
            == 0
        )
        return json.loads(path.read_text())

    return run


# ---- workloads -----------------------------------------------------------------------------------
def test_the_seed_0_workload_is_nano_vllms():
    random.seed(0)
    prompts = [
        [random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)
    ]
    new = [random.randint(100, 1024) for _ in range(256)]
    made = seed0_workload(151936)
    assert made.output_tokens == 133_966
    assert made.input_tokens == 142_827
    assert made.prompts == tuple(map(tuple, prompts))
    assert made.new_tokens == tuple(new)
    small = seed0_workload(32)
    assert small.new_tokens == made.new_tokens
    assert all(0 <= token < 32 for prompt in small.prompts for token in prompt)


def test_workloads_are_of_the_sizes_asked_for():
    short = seed0_workload(64, num_prompts=40, input_len=64, output_len=32)
    assert all(6 <= len(prompt) <= 64 for prompt in short.prompts)
    assert all(3 <= n <= 32 for n in short.new_tokens)
    group = group_workload(64)
    assert (len(group.prompts), group.samples, group.num_sequences, group.output_tokens) == (
        64,
        16,
        1024,
        64 * 16 * 128,
    )
    one, again, other = (random_workload(64, 3, 5, 7, 2, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert one.lengths() == [12] * 6


def test_a_workload_that_is_too_long_is_refused():
    config = model_config(TINY)
    random_workload(32, 2, 60, 4).check(config)
    with pytest.raises(
        ConfigError,
        match=r"the model's 64 positions, got 60 \+ 5 = 65 tokens; lower --input-len or "
        r"--output-len",
    ):
        Workload("odd", ((1,) * 9, (1,) * 60), (9, 5)).check(config)


# ---- floors --------------------------------------------------------------------------------------
def test_published_shapes_are_those_of_the_models():
    published = {
        "qwen2.5-0.5b": (494_032_768, 12),
        "qwen2.5-1.5b": (1_543_714_304, 28),
        "qwen2.5-7b": (7_615_616_512, 56),
        "qwen3-0.6b": (596_049_920, 112),
    }
    for name, (parameters, cache_kib) in published.items():
        config = model_config(SHAPES[name])
        assert count_weights(config).parameters == parameters
        assert kv_bytes_per_token(config, 2) == cache_kib << 10
    assert set(published) == set(SHAPES)


def test_flops_of_single_tokens_are_what_torch_counts():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**TINY), attn_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(5, 1, dtype=torch.long), use_cache=False)
    assert forward_flops(model_config(TINY), [1] * 5, 5) == counter.get_total_flops()


def test_pairs():
    for n, window in ((1, 0), (7, 0), (7, 3), (7, 7), (7, 9)):
        assert pairs_seen([n], window) == sum(min(i, window or i) for i in range(1, n + 1))


@pytest.mark.parametrize(
    "raw",
    [
        TINY,
        {**TINY, "tie_word_embeddings": False},
        {**TINY, "model_type": "mistral", "sliding_window": 4},
    ],
)
@pytest.mark.parametrize("samples", [1, 3])
def test_needs_against_a_simulation_token_by_token(raw, samples):
    """Every sequence by itself, position by position, in a program as simple as the definition."""
    config, element = model_config(raw), 4
    work = Workload("odd", ((1,) * 6, (1,), (1,) * 3), (5, 7, 1), samples)
    H, F, L, window = 32, 48, 2, 4 if raw["model_type"] == "mistral" else 10**9
    matrices = L * (H * (4 + 2 * 2) * 8 + 4 * 8 * H + 3 * H * F)
    head, norms = 32 * H, (2 * L + 1) * H
    # keys and values of a token in a layer
    read, of_one = matrices + head + norms, 2 * 2 * 8 * element
    steps = max(work.new_tokens)
    moved, flops = [float(element * read)] * steps, [0.0] * steps
    for prompt, new in zip(work.prompts, work.new_tokens, strict=True):
        n = len(prompt)
        moved[0] += L * of_one * n
        flops[0] += (
            2 * matrices * n
            + 2 * head
            + L * sum(4 * 4 * 8 * min(i, window) for i in range(1, n + 1))
        )
        for t in range(1, new):
            positions = range(max(0, n + t - window), n + t)  # what token t of a sample sees
            shared = sum(position < n for position in positions)
            moved[t] += L * of_one * (shared + samples * (len(positions) - shared) + samples)
            flops[t] += samples * (2 * matrices + 2 * head + L * 4 * 4 * 8 * len(positions))
    found = needed(config, work, element)
    assert found[0].tolist() == moved
    assert found[1].tolist() == flops
    floor = floor_of(config, work, element, COPY, GEMM)
    each = [max(b / COPY, f / GEMM) for b, f in zip(moved, flops, strict=True)]
    assert math.isclose(floor.seconds, sum(each))
    assert math.isclose(floor.prefill_seconds, each[0])
    assert math.isclose(floor.decode_seconds, sum(each[1:]))


def test_a_floor_by_hand():
    """Qwen2.5-0.5B in bfloat16, one prompt of 100 tokens and two tokens out, 1 TB/s and 100
    TFLOP/s."""
    config = model_config(SHAPES["qwen2.5-0.5b"])
    floor = floor_of(config, random_workload(1000, 1, 100, 2), 2, 1e12, 100e12)
    # Prefill: 357,826,560 weights in the layers x 200, the head 2 x 151936 x 896, attention 24
    # layers x 4 x 896 x 5050; the weights take longer to read.
    assert floor.prefill_seconds == pytest.approx((2 * 494_032_768 + 100 * 12288) / 1e12)
    assert floor.decode_seconds == pytest.approx((2 * 494_032_768 + 102 * 12288) / 1e12)
    assert (
        floor.flops
        == 200 * 357_826_560
        + 2 * 151936 * 896
        + 24 * 4 * 896 * 5050
        + 2 * (357_826_560 + 151936 * 896)
        + 24 * 4 * 896 * 101
    )


# ---- throughput ----------------------------------------------------------------------------------
def test_throughput(bench, capsys):
    found = bench(
        "throughput",
        "--num-prompts",
        "3",
        "--input-len",
        "5",
        "--output-len",
        "4",
        "--n",
        "2",
        "--num-iters",
        "3",
        "--opponents",
        "generate",
    )
    assert found["num_requests"] == 6
    assert found["total_num_tokens"] == 3 * 5 + 6 * 4
    assert found["workload"] == {
        "name": "random",
        "num_prompts": 3,
        "n": 2,
        "input_tokens": 15,
        "output_tokens": 24,
    }
    assert set(found["contestants"]) == {"fusedrl", "generate"}
    for who in found["contestants"].values():
        assert len(who["elapsed_times"]) == 3
        assert who["elapsed_time"] == sorted(who["elapsed_times"])[1]
        assert who["output_tokens_per_second"] == pytest.approx(24 / who["elapsed_time"])
        assert who["tokens_per_second"] == pytest.approx(39 / who["elapsed_time"])
        assert who["requests_per_second"] == pytest.approx(6 / who["elapsed_time"])
        assert who["percent_of_roofline"] == pytest.approx(
            100 * found["floor"]["seconds"] / who["elapsed_time"]
        )
        assert who["times_ours"] == pytest.approx(who["elapsed_time"] / found["elapsed_time"])
        assert who["same_greedy_tokens"] == 1.0
    assert (
        found["machine"].items()
        >= {
            "copy_gb_per_s": COPY / 1e9,
            "gemm_gflop_per_s": GEMM / 1e9,
            "torch": torch.__version__,
        }.items()
    )
    assert {"cpu", "commit", "date", "threads", "transformers"} <= set(found["machine"])
    assert found["model"] | {"name": ""} == {
        "name": "",
        "dtype": "float32",
        "device": "cpu",
        "parameters": 16_544,
        "kv_bytes_per_token": 256,
    }
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 prompts x 2 samples (random): 15 tokens in, 24 out" in shown
    assert "of the roofline" in shown


def test_a_smaller_seed_0_workload_on_standard_output(ceilings, tiny_model, capsys):
    assert (
        main(
            [
                "bench",
                "throughput",
                "--model",
                str(tiny_model),
                "--dataset-name",
                "seed0",
                "--num-prompts",
                "4",
                "--input-len",
                "20",
                "--output-len",
                "10",
                "--num-iters",
                "1",
                "--num-iters-warmup",
                "0",
                "--output-json",
                "-",
            ]
        )
        == 0
    )
    assert (
        json.loads(capsys.readouterr().out)["workload"]["output_tokens"]
        == seed0_workload(32, 4, 20, 10).output_tokens
    )


def test_opponents_make_the_same_greedy_tokens(tiny_model, monkeypatch):
    """Ragged prompts, ragged lengths, several samples, more than a batch: each is given what it
    asks for, in order."""
    monkeypatch.setattr("fusedrl.engine.tools.bench._AT_ONCE", 4)
    subject = Subject(str(tiny_model), device="cpu")
    peer = subject.peer()
    actor = HybridActor.from_module(peer)
    actor.decoder.config = subject.decoder().config
    work = Workload("odd", ((1, 5), (1, 7, 9, 4, 8), (1, 6, 6)), (6, 2, 9), 2)
    expected = ours(actor, work, 0.0)()
    assert [len(row) for row in expected] == [6, 6, 2, 2, 9, 9]
    assert padded_generate(peer, work, 0.0)() == expected
    assert generate_batch(peer, work, 0.0)() == expected
    longer = Workload("odd", ((1, 5), (1, 7)), (20, 30))
    # what the first contestant kept is not the second's
    for make in (padded_generate, generate_batch):
        drawn = make(peer, longer, 1.0)()
        assert [len(row) for row in drawn] == [20, 30]
        assert drawn != ours(actor, longer, 0.0)()


def test_an_opponent_without_all_of_its_weights_is_refused(tiny_model, tmp_path):
    """transformers draws at random what it does not find."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        Subject(str(directory), device="cpu").peer()


def test_rounds_are_interleaved():
    order = []
    times = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, 1, torch.device("cpu")
    )
    assert order == ["a", "b"] * 3
    assert [len(seconds) for seconds in times.values()] == [2, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["throughput"], "one of the arguments --model --shape is required"),
        (["throughput", "--model", "m", "--shape", "qwen3-0.6b"], "not allowed with argument"),
        (["throughput", "--shape", "qwen9"], "invalid choice: 'qwen9'"),
        (["throughput", "--model", "/none"], "/none"),
        (
            ["throughput", "--model", "TINY", "--num-prompts", "0"],
            "expected a whole number above 0, got '0'",
        ),
        (
            ["latency", "--model", "TINY", "--batch-size", "few"],
            "expected a whole number above 0, got 'few'",
        ),
        (
            ["throughput", "--model", "TINY", "--num-iters-warmup", "-1"],
            "expected a whole number from 0 on, got '-1'",
        ),
        (
            ["throughput", "--model", "TINY", "--opponents", "vllm"],
            "unknown opponent 'vllm'; expected a list of generate, generate_batch",
        ),
        (
            ["throughput", "--model", "TINY", "--input-len", "40", "--output-len", "30"],
            "the model's 64 positions, got 40 + 30 = 70 tokens",
        ),
        (["latency", "--model", "TINY", "--output-len", "64"], "the model's 64 positions"),
        (["step", "--model", "TINY"], "the model's 64 positions"),
        (
            ["step", "--model", "TINY", "--algorithm", "grpo", "--n", "1"],
            "expected --n >= 2 for grpo",
        ),
        (
            ["step", "--model", "TINY", "--device", "gpu"],
            "expected device to be cpu, cuda or cuda:N",
        ),
        (["kernels", "gaee"], "unknown op 'gaee', did you mean gae?"),
        ([], "WHAT"),
        (["speed"], "invalid choice: 'speed'"),
    ],
)
def test_mistakes_exit_with_2_and_a_message(ceilings, tiny_model, capsys, arguments, message):
    assert main(["bench", *(str(tiny_model) if a == "TINY" else a for a in arguments)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_help_is_light_and_its_choices_are_all_there():
    for kind in ("throughput", "latency", "step", "kernels"):
        code = (
            "import sys; from fusedrl.engine.cli.main import main; done = main(['bench', "
            f"'{kind}', '--help']); sys.exit('torch' in sys.modules or done)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        if kind == "throughput":
            assert "{" + ",".join(SHAPES) + "}" in done.stdout.replace(" ", "").replace("\n", "")
            assert "{" + ",".join(WORKLOADS) + "}" in done.stdout.replace(" ", "").replace("\n", "")


# ---- latency -------------------------------------------------------------------------------------
def test_latency(bench, capsys):
    found = bench(
        "latency",
        "--batch-size",
        "2",
        "--input-len",
        "6",
        "--output-len",
        "5",
        "--num-iters",
        "4",
        "--num-iters-warmup",
        "1",
    )
    assert len(found["latencies"]) == 4
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 4)
    assert set(found["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert found["percentiles"]["50"] == pytest.approx(sum(sorted(found["latencies"])[1:3]) / 2)
    assert found["time_to_first_token"]["50"] > 0
    assert found["time_per_output_token"]["50"] < found["percentiles"]["99"]
    assert "to the first token" in capsys.readouterr().out
    assert (
        bench("latency", "--output-len", "1", "--num-iters", "1", "--num-iters-warmup", "0")[
            "time_per_output_token"
        ]
        is None
    )


# ---- steps ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm, strict", [("ppo", ["--strict"]), ("grpo", [])])
def test_the_phases_of_a_step_add_up(bench, capsys, algorithm, strict):
    found = bench(
        "step",
        "--algorithm",
        algorithm,
        "--num-prompts",
        "3",
        "--n",
        "2",
        "--input-len",
        "4",
        "--output-len",
        "6",
        "--num-iters",
        "2",
        *strict,
    )
    seconds = found["seconds"]
    assert set(seconds) == {*PHASES, "step"}
    assert sum(seconds[phase] for phase in PHASES) == pytest.approx(seconds["step"], rel=1e-9)
    assert 0 <= seconds["other"] < 0.2 * seconds["step"]
    assert min(seconds["generate"], seconds["train"], seconds["advantage"]) > 0
    assert seconds["step"] in found["steps"]
    assert found["tokens_per_second"] == pytest.approx(6 * 10 / seconds["step"])
    assert found["mfu"] == pytest.approx(sum(found["flops"].values()) / seconds["step"] / GEMM)
    forward = forward_flops(model_config(TINY), [10] * 6, 36)
    epochs, scorers = (4, 2) if algorithm == "ppo" else (1, 0)
    assert found["flops"] | {"generate": 0} == {
        "generate": 0,
        "score": scorers * forward,
        "train": 3 * epochs * forward,
    }
    assert found["peak_memory_gib"] > 0
    if strict:
        assert found["strict"]["times_the_step"] == pytest.approx(
            found["strict"]["seconds"]["step"] / seconds["step"]
        )
        assert "strict / not" in capsys.readouterr().out
    else:
        assert found["strict"] is None


def endless_decoder():
    return Decoder.random(model_config({**TINY, "eos_token_id": []}), 0)


def reference_gradients(decoder, batch, weight_of_token):
    """Of sum_t weight_t logp_t, from transformers' arithmetic on each sequence alone, in
    float64."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).double()
    from fusedrl.engine.model.weights import hf_views

    model.load_state_dict(
        {name: view.double() for name, view in hf_views(decoder).items()}, strict=False
    )
    model.tie_weights()
    loss, start = 0.0, 0
    for n in batch.lengths:
        ids = batch.token_ids[None, start : start + n]
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        loss = loss + (weight_of_token[start + 1 : start + n].double() * logp).sum()
        start += n
    return torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]


def test_a_grpo_step_follows_the_policy_gradient_of_its_group_advantages():
    decoder = endless_decoder()
    before = copy.deepcopy(decoder)
    step = PolicyStep(
        HybridActor(decoder),
        random_workload(32, 3, 4, 6, samples=4),
        algorithm="grpo",
        lr=1e-3,
        tokens_per_microbatch=20,
        reward=lambda prompt, tokens: float(sum(tokens)),
    )
    step()
    batch = step.batch
    scores = torch.tensor(
        [float(sum(ids.tolist())) for ids in batch.token_ids.split(list(batch.lengths))]
    ).view(3, 4)
    scores -= torch.tensor(
        [[float(sum(batch.token_ids[10 * 4 * g : 10 * 4 * g + 4].tolist()))] for g in range(3)]
    )  # of the completions alone
    advantages = (
        (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
    ).flatten()
    weights = (
        torch.where(batch.action_mask, advantages.repeat_interleave(10), 0.0)
        / batch.action_mask.sum()
    )
    expected = reference_gradients(before, batch, weights)
    moved = (decoder.embedding - before.embedding).detach().double()
    large = expected.abs() > expected.abs().max() / 50
    assert large.sum() > 50
    # AdamW's first step is lr x sign; uphill
    torch.testing.assert_close(moved[large], 1e-3 * expected[large].sign(), rtol=1e-2, atol=0.0)


def test_a_ppo_step_starts_at_ratio_1_and_moves_the_weights():
    decoder = endless_decoder()
    before = decoder.embedding.detach().clone()
    actor = HybridActor(decoder, value_head=ValueHead(32))
    step = PolicyStep(
        actor,
        random_workload(32, 4, 4, 6),
        algorithm="ppo",
        epochs=2,
        reference=HybridActor(copy.deepcopy(decoder)),
        lr=1e-3,
    )
    first = step()
    assert first["score"] > 0
    assert torch.equal(step.batch.old_logp, step.batch.ref_logp), (
        "the reference has the same weights, and scores in the same cuts"
    )
    assert (decoder.embedding - before).abs().max() > 1e-3
    one = step.batch
    step()
    assert step.batch.token_ids.tolist() != one.token_ids.tolist(), "no draw comes twice"
    assert not torch.equal(step.batch.old_logp, step.batch.ref_logp)


# ---- the rest ------------------------------------------------------------------------------------
def test_kernels_runs_the_contests_of_the_source_tree(monkeypatch, tmp_path):
    commands = []

    def run(command, cwd):
        commands.append(command)
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["bench", "kernels", "gae", "rope", "--output-json", str(tmp_path / "x.json")]) == 5
    assert [argument.rpartition("/")[2] for argument in commands[0][-2:]] == [
        "bench_gae.py",
        "bench_rope.py",
    ]
    assert f"--benchmark-json={tmp_path / 'x.json'}" in commands[0]
    assert main(["bench", "kernels"]) == 5
    assert len(commands[1]) > 10
    assert not any("bench_step" in argument for argument in commands[1])
    monkeypatch.setattr(cli_bench, "__file__", str(tmp_path / "engine" / "cli" / "bench.py"))
    assert main(["bench", "kernels"]) == 3


def test_ceilings_are_of_this_machine():
    device = torch.device("cpu")
    assert 1e8 < machine.copy_bandwidth(device) < 1e13
    assert 1e8 < machine.gemm_rate(device) < 1e15
    assert machine.describe_machine(device)["torch"] == torch.__version__
    assert machine.output_of(["no such program"]) == machine.read_text("/no/such/file") == ""
