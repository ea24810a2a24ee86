"""A loop of Tinker's calls over an actor, with the real types of the package tinker."""

import asyncio
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusedrl.engine import HybridActor
from fusedrl.engine.base.errors import CheckpointError, SetupError
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.rollout.tinker import TinkerClient
from fusedrl.engine.rollout.tinker_losses import LOSSES, loss_of
from fusedrl.engine.runs.checkpoint import latest_checkpoint, save_checkpoint

tinker = pytest.importorskip("tinker", reason="tinker is not installed: pip install tinker")
ADAM = tinker.AdamParams(learning_rate=1e-2)


@pytest.fixture
def make(tiny_model, tmp_path, device):
    def build(name="run", dtype="float32", lora=False, **options):
        actor = HybridActor.from_pretrained(
            tiny_model, dtype=dtype, device=device, strict=options.pop("strict", False)
        )
        if lora:
            actor.add_adapter(LoRAConfig(rank=4), seed=3)
        return TinkerClient(actor, tmp_path / name, **options)

    return build


def datum(tokens, seed=0, **inputs):
    """Tokens in, the next ones as targets; inputs by their kind, from a seed."""
    rng = np.random.default_rng(seed)
    n = len(tokens) - 1
    columns = {
        "weights": rng.random(n),
        "logprobs": -1 - 3 * rng.random(n),
        "advantages": rng.standard_normal(n) * (rng.random(n) < 0.8),
        "sequence_ratio_mask": (np.arange(n) > 0).astype(np.float64),
    }
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            **{k: columns[k] if v is True else v for k, v in inputs.items()},
        },
    )


def data_for(loss, seed=0):
    inputs = dict.fromkeys(LOSSES[loss].inputs, True)
    return [
        datum([1, 4, 9, 30, 7, 5], seed, **inputs),
        datum([1, 12, 6], seed + 1, **inputs),
        datum([1, 5, 5, 8, 21, 3, 17, 2], seed + 2, **inputs),
    ]


def token_losses(loss, logp, x, c):
    """The documented formulas, one token at a time."""
    if loss == "gspo":
        marked = [t for t, m in enumerate(x["sequence_ratio_mask"]) if m]
        s = math.exp(sum(logp[t] - x["logprobs"][t] for t in marked) / len(marked))
    for t, lp in enumerate(logp):
        if loss == "cross_entropy":
            yield -lp * x["weights"][t]
            continue
        q, a = x["logprobs"][t], x["advantages"][t]
        r = s if loss == "gspo" else math.exp(lp - q)
        clipped = min(max(r, c.get("clip_low_threshold", 0)), c.get("clip_high_threshold", 9e9))
        yield {
            "importance_sampling": -r * a,
            "ppo": -min(r * a, clipped * a),
            "gspo": -min(r * a, clipped * a),
            "cispo": -clipped * lp * a,
            "dro": -(lp * a - 0.5 * c.get("beta", 0) * (lp - q) ** 2),
        }[loss]


def token_gradients(loss, logp, x, c):
    """Their derivatives in log p, by hand."""
    values = list(token_losses(loss, logp, x, c))
    for t, lp in enumerate(logp):
        if loss == "cross_entropy":
            yield -x["weights"][t]
        elif loss == "dro":
            yield -(x["advantages"][t] - c["beta"] * (lp - x["logprobs"][t]))
        elif loss == "cispo":
            yield values[t] / lp
        elif loss == "importance_sampling":
            yield values[t]
        else:  # no gradient where the clipped term is chosen
            r, a = math.exp(lp - x["logprobs"][t]), x["advantages"][t]
            if loss == "gspo":
                marked = [i for i, m in enumerate(x["sequence_ratio_mask"]) if m]
                r = math.exp(sum(logp[i] - x["logprobs"][i] for i in marked) / len(marked))
            yield -r * a if abs(values[t] + r * a) < 1e-14 else 0.0


CONFIGS = {
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.6},
    "cispo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.6},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05},
    "dro": {"beta": 0.3},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_the_documented_formulas_in_float64(loss, device):
    config = CONFIGS.get(loss, {})
    for seed in range(12):
        rng = np.random.default_rng(seed)
        n = 7
        x = {
            "weights": rng.standard_normal(n),
            "logprobs": -1.5 + 0.5 * rng.standard_normal(n),
            "advantages": rng.standard_normal(n) * (np.arange(n) != 2),
            "sequence_ratio_mask": (np.arange(n) != 4).astype(float),
        }
        logp = -1.5 + 0.5 * rng.standard_normal(n)
        wanted = sum(token_losses(loss, logp.tolist(), x, config))
        leaf = torch.tensor(logp, device=device, requires_grad=True)
        inputs = {name: torch.tensor(values, device=device) for name, values in x.items()}
        example = type("Example", (), {"inputs": inputs})
        found = loss_of(loss, config)(example, leaf)
        (grad,) = torch.autograd.grad(found, leaf)
        assert float(found.detach()) == pytest.approx(wanted, rel=1e-12, abs=1e-12)
        by_hand = list(token_gradients(loss, logp.tolist(), x, config))
        assert grad.tolist() == pytest.approx(by_hand, rel=1e-11, abs=1e-12)


def test_tokens_without_weight_or_advantage_add_nothing(device):
    """The prompt's tokens have log-probabilities of 0 or of anything."""
    x = {
        "weights": [0.0, 1.0],
        "logprobs": [-1000.0, -2.0],
        "advantages": [0.0, 1.0],
    }
    inputs = {name: torch.tensor(values, device=device) for name, values in x.items()}
    example = type("Example", (), {"inputs": inputs})
    for loss in ("cross_entropy", "importance_sampling", "ppo", "cispo"):
        leaf = torch.tensor([-1.0, -2.0], device=device, requires_grad=True)
        found = loss_of(loss, None)(example, leaf)
        found.backward()
        assert leaf.grad[0] == 0
        assert leaf.grad[1] == -1
        assert math.isfinite(float(found.detach()))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_after_two_calls_is_adamw_on_the_formula_in_float64(
    loss, make, tiny_model, tmp_path
):
    """The model of transformers in float64, the documented formula, and torch's AdamW."""
    client = make(tokens_per_microbatch=8)
    adam = tinker.AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.9, eps=0.05, grad_clip_norm=0.3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.8, 0.9), eps=0.05, weight_decay=0.0
    )
    for step in range(2):
        total = 0.0
        for call in range(2):
            data = data_for(loss, 10 * step + call)
            out = client.forward_backward(data, loss, CONFIGS.get(loss)).result()
            expected = 0.0
            for one, told in zip(data, out.loss_fn_outputs, strict=True):
                targets = one.loss_fn_inputs["target_tokens"].to_torch()
                logits = model(torch.tensor([one.model_input.to_ints()])).logits[0]
                logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                assert told["logprobs"].tolist() == pytest.approx(logp.tolist(), abs=1e-5)
                x = {k: v.to_torch().double() for k, v in one.loss_fn_inputs.items()}
                at = {k: v.tolist() for k, v in x.items()}
                config = CONFIGS.get(loss, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
                value = sum(token_losses(loss, logp.tolist(), at, config))
                slope = torch.tensor(list(token_gradients(loss, logp.tolist(), at, config)))
                expected += value
                (logp * slope.double()).sum().backward()
            assert out.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
            total += expected
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        told = client.optim_step(adam).result()
        assert told.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    path = client.save_weights_for_sampler("end").result().path
    saved = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    before = dict(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).named_parameters()
    )
    reached = 0.0
    for (name, mine), (_, theirs) in zip(
        saved.named_parameters(), model.named_parameters(), strict=True
    ):
        moved = float((theirs - before[name]).detach().norm())
        assert float((mine - theirs).detach().norm()) <= 2e-3 * moved + 1e-7
        reached += moved
    assert reached > 1e-3


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"lora": True}, {"strict": True}])
def test_samples_have_the_trainers_log_probabilities(options, make):
    client = make(**options)
    prompt = tinker.ModelInput.from_ints([1, 6, 9])
    out = client.sample(prompt, 6, tinker.SamplingParams(max_tokens=12, seed=5)).result()
    assert len(out.sequences) == 6
    assert {s.stop_reason for s in out.sequences} <= {"stop", "length"}
    assert len({s.sequence_id for s in out.sequences}) == 6
    data = [datum([1, 6, 9, *s.tokens], weights=True) for s in out.sequences]
    told = client.forward(data, "cross_entropy").result()
    tolerance = 0.0 if options.get("strict") else 0.05 if options.get("dtype") else 1e-5
    for sequence, scored in zip(out.sequences, told.loss_fn_outputs, strict=True):
        gaps = np.abs(scored["logprobs"].to_numpy()[2:] - np.array(sequence.logprobs))
        assert gaps.max() <= tolerance
    # the prompt is scored like any text, and importance ratios of what was just drawn are 1
    whole = tinker.ModelInput.from_ints([1, 6, 9, *out.sequences[0].tokens])
    first, *rest = client.compute_logprobs(whole).result()
    assert first is None
    assert rest == pytest.approx(told.loss_fn_outputs[0]["logprobs"].tolist(), abs=1e-3)
    again = client.sample(
        whole, 1, tinker.SamplingParams(max_tokens=2), include_prompt_logprobs=True
    ).result()
    assert again.prompt_logprobs[0] is None
    assert again.prompt_logprobs[1:] == pytest.approx(rest, abs=1e-3)


def test_logprobs_of_truncated_and_scaled_samples_are_those_of_what_was_drawn_from(make):
    client = make()
    prompt = tinker.ModelInput.from_ints([1, 6, 9])
    params = tinker.SamplingParams(max_tokens=1, seed=5, top_k=3, temperature=0.7)
    out = client.sample(prompt, 64, params).result()
    found = {s.tokens[0]: s.logprobs[0] for s in out.sequences}
    assert len(found) == 3
    assert sum(math.exp(x) for x in found.values()) == pytest.approx(1, abs=1e-5)


def test_calls_run_in_order_and_samples_see_the_new_weights_at_once(make):
    client = make()
    prompt = tinker.ModelInput.from_ints([1, 6, 9])
    params = tinker.SamplingParams(max_tokens=8, seed=1)
    sampler = client.save_weights_and_get_sampling_client().result()
    before = sampler.sample(prompt, 4, params)
    told = [client.forward_backward(data_for("cross_entropy"), "cross_entropy") for _ in range(2)]
    step = client.optim_step(tinker.AdamParams(learning_rate=0.1))
    after = sampler.sample(prompt, 4, params)
    scored = client.compute_logprobs(tinker.ModelInput.from_ints([1, 6, 9, 4]))
    rows = [[s.logprobs for s in call.result().sequences] for call in (before, after)]
    assert rows[0] != rows[1]
    assert rows[1] == [s.logprobs for s in sampler.sample(prompt, 4, params).result().sequences]
    assert step.result().metrics["grad_norm"] > 0
    assert told[0].result().metrics == told[1].result().metrics
    assert scored.future().result()[0] is None
    assert client._actor.weights_version == 1


def test_many_samples_at_once_are_those_that_come_one_by_one(make):
    prompts = [tinker.ModelInput.from_ints([1, 4 + i % 20]) for i in range(40)]
    params = tinker.SamplingParams(max_tokens=10)

    async def at_once(client):
        return await asyncio.gather(*[client.sample_async(p, 2, params) for p in prompts])

    together = asyncio.run(at_once(make()))
    client = make()
    alone = [client.sample(p, 2, params).result() for p in prompts]
    rows = [[[s.tokens for s in out.sequences] for out in outs] for outs in (together, alone)]
    assert rows[0] == rows[1]
    assert rows[0][0] != rows[0][20], "equal prompts have draws of their own"

    async def awaited():
        future = await client.forward_backward_async(data_for("cross_entropy"), "cross_entropy")
        out = await future
        step = await client.optim_step_async(ADAM)
        return out, await step.result_async(), await step.coroutine()

    out, step, again = asyncio.run(awaited())
    assert out.metrics["loss:sum"] > 0
    assert step is again


def trained_on(client, steps):
    """What a few steps leave: samples and the bits of all that is trained."""
    told = []
    prompt = tinker.ModelInput.from_ints([1, 6, 9])
    for step in steps:
        told.append(client.sample(prompt, 3, tinker.SamplingParams(max_tokens=6)))
        client.forward_backward(data_for("ppo", step), "ppo")
        client.forward_backward(data_for("cross_entropy", step), "cross_entropy")
        client.optim_step(ADAM)
    client.compute_logprobs(prompt).result()
    rows = [[(s.tokens, s.logprobs) for s in call.result().sequences] for call in told]
    return rows, {
        name: p.detach().float().cpu().numpy().tobytes()
        for name, p in client._actor.named_parameters()
    }


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"lora": True}])
def test_a_state_is_resumed_bitwise(options, make):
    first = make("first", **options)
    trained_on(first, range(2))
    path = first.save_state("two", user_metadata={"note": "naïve 🙂"}).result().path
    wanted = trained_on(first, range(2, 4))
    second = make("second", **options)
    trained_on(second, [7])
    second.forward_backward(data_for("cross_entropy"), "cross_entropy")
    assert second.load_state_with_optimizer(path).result().path == path
    assert trained_on(second, range(2, 4)) == wanted
    # the weights alone: other moments, other weights
    second.load_state(path)
    other = trained_on(second, range(2, 4))
    assert other[1] != wanted[1]
    third = make("third", **options)
    third.load_state(path)
    assert trained_on(third, range(2, 4))[1] == other[1]


def test_states_are_named_once_and_verified(make, tmp_path):
    client = make()
    client.forward_backward(data_for("cross_entropy"), "cross_entropy")
    with pytest.raises(RuntimeError, match="make the step first"):
        client.save_state("a").result()
    client.optim_step(ADAM)
    path = client.save_state("a").result().path
    with pytest.raises(ValueError, match="exists; choose another name"):
        client.save_state("a").result()
    first, second = (client.save_weights_for_sampler("s") for _ in range(2))
    first.result()
    with pytest.raises(ValueError, match="exists; choose another name"):
        second.result()
    before = trained_on(client, [])[1]
    trained_on(client, [1])
    client.save_state("a", overwrite=True, ttl_seconds=3600).result()
    assert len(list((tmp_path / "run/states/a/checkpoints").iterdir())) == 1
    now = trained_on(client, [])[1]
    assert now != before
    trained_on(client, [2])
    client.load_state(path)
    assert trained_on(client, [])[1] == now
    found = latest_checkpoint(path)
    other = tmp_path / "of a run"
    save_checkpoint(other, 1, found.tensors, {})
    with pytest.raises(CheckpointError, match="is not a state that save_state wrote"):
        client.load_state_with_optimizer(other).result()
    assert trained_on(client, [])[1] == now
    for name in ("../b", "", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="expected a name of letters"):
            client.save_state(name)
    with pytest.raises(CheckpointError, match="no saved state"):
        client.load_state(tmp_path / "nothing").result()
    with pytest.raises(CheckpointError, match="is of another model"):
        make("lora", lora=True).load_state(path).result()
    (file,) = (tmp_path / "run/states/a").glob("checkpoints/*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="no saved state"):
        client.load_state(path).result()
    assert trained_on(client, [])[1] == now


def test_a_loss_of_ones_own_has_the_gradient_of_the_built_in_one(make):
    built, custom = make("built"), make("custom", tokens_per_microbatch=8)
    data = data_for("importance_sampling")

    def own(data, logprobs):
        loss = torch.zeros(())
        for one, logp in zip(data, logprobs, strict=True):
            x = {k: v.to_torch() for k, v in one.loss_fn_inputs.items()}
            loss = loss - ((logp - x["logprobs"]).exp() * x["advantages"]).sum()
        return loss, {"own": 3.0}

    first = built.forward_backward(data, "importance_sampling").result()
    second = custom.forward_backward_custom(data, own).result()
    assert second.metrics["own"] == 3.0
    assert second.metrics["loss:sum"] == pytest.approx(first.metrics["loss:sum"], rel=1e-5)
    norms = [c.optim_step(ADAM).result().metrics["grad_norm"] for c in (built, custom)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)

    before = trained_on(custom, [])[1]

    def broken(data, logprobs):
        raise KeyError("of the user")

    for loss, error in ((broken, KeyError), (lambda d, x: (torch.ones(()), {}), ValueError)):
        custom.forward_backward(data, "importance_sampling")
        failed = custom.forward_backward_custom(data, loss)
        step = custom.optim_step(ADAM)
        with pytest.raises(error):
            failed.result()
        with pytest.raises(RuntimeError, match="a call since the last step failed"):
            step.result()
    with pytest.raises(RuntimeError, match="has a gradient"):
        custom.optim_step(ADAM).result()
    # a gradient that is not finite leaves the weights as they are
    far = datum([1, 5, 6], logprobs=np.array([-300.0, -300.0]), advantages=np.ones(2))
    custom.forward_backward([far], "importance_sampling")
    with pytest.raises(RuntimeError, match="the norm of the gradient is"):
        custom.optim_step(ADAM).result()
    assert trained_on(custom, [])[1] == before


def test_targets_need_not_be_the_next_tokens(make):
    client = make()
    one = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 6, 9]),
        loss_fn_inputs={"target_tokens": np.array([20, 21, 22]), "weights": np.ones(3)},
    )
    out = client.forward([one], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist()
    for n, target in enumerate((20, 21, 22), 1):
        alone = tinker.ModelInput.from_ints([*[1, 6, 9][:n], target])
        assert client.compute_logprobs(alone).result()[-1] == pytest.approx(out[n - 1], abs=1e-5)


def test_what_cannot_be_done_is_refused_with_the_remedy(make):
    client = make()
    good = datum([1, 5, 6], weights=True)
    prompt = tinker.ModelInput.from_ints([1])
    params = tinker.SamplingParams(max_tokens=4)
    policy = {"logprobs": True, "advantages": True}
    for call, message in (
        (lambda: client.forward_backward([], "cross_entropy"), "at least one datum"),
        (lambda: client.forward_backward([good], "stable_reinforce"), "to be one of cross_entropy"),
        (lambda: client.forward_backward([good], "ppo"), "expected the inputs target_tokens, logp"),
        (
            lambda: client.forward_backward([datum([1, 5, 6], **policy)], "dro"),
            "dro needs beta in loss_fn_config",
        ),
        (
            lambda: client.forward_backward([datum([1, 5, 6], **policy)], "ppo", {"eps": 0.1}),
            "to have clip_low_threshold, clip_high_threshold, got eps",
        ),
        (
            lambda: client.forward_backward([datum([1, 5], weights=np.ones(4))], "cross_entropy"),
            r"expected \[1\], a number for each token of model_input, got \[4\]",
        ),
        (
            lambda: client.forward([datum([1, 5], weights=np.array([np.nan]))], "cross_entropy"),
            "expected finite numbers",
        ),
        (lambda: client.forward([datum([1, 99], weights=True)], "cross_entropy"), r"\[0, 32\)"),
        (lambda: client.forward([datum([1] * 66, weights=True)], "cross_entropy"), "1 to 63 tok"),
        (lambda: client.sample(tinker.ModelInput.empty(), 1, params), "1 to 64 tokens, got 0"),
        (lambda: client.sample(prompt, 1, params, topk_prompt_logprobs=3), "is not supported"),
        (
            lambda: client.sample(prompt, 1, tinker.SamplingParams(stop=[])),
            "run past its EOS",
        ),
        (
            lambda: client.sample(prompt, 1, tinker.SamplingParams(temperature=-1.0)),
            "expected temperature",
        ),
        (lambda: client.optim_step(tinker.AdamParams(beta1=1.0)), r"betas in \[0, 1\)"),
        *(
            (partial(client.optim_step, tinker.AdamParams(**{name: value})), "finite numbers")
            for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm")
            for value in (math.inf, math.nan)
        ),
        (lambda: client.optim_step(object()), "expected tinker.AdamParams"),
        (lambda: client.forward_backward_custom([good], "mean"), "expected a function"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    # stops by text and by id, and a sample without max_tokens ends where the positions do
    by_id = client.sample(prompt, 20, tinker.SamplingParams(stop=[5, 6], seed=2)).result()
    assert {s.tokens[-1] for s in by_id.sequences if s.stop_reason == "stop"} <= {2, 5, 6}
    by_text = client.sample(prompt, 20, tinker.SamplingParams(stop="w5", seed=2)).result()
    assert any(s.tokens[-1] == 4 + 5 for s in by_text.sequences if s.stop_reason == "stop")
    long = client.sample(tinker.ModelInput.from_ints([1] * 60), 8, tinker.SamplingParams(seed=0))
    assert max(len(s.tokens) for s in long.result().sequences) <= 4


def test_without_the_package_there_is_a_remedy(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(SetupError, match=r"pip install 'fusedrl\[tinker\]'"):
        make()


def test_a_policy_gradient_loop_of_tinkers_calls_learns(make):
    client = make(seed=3)
    sampler = client.save_weights_and_get_sampling_client().result()
    tokenizer = client.get_tokenizer()
    means = []
    for _ in range(12):
        prompts = [tokenizer(f"w{i}")["input_ids"] for i in range(4)]
        params = tinker.SamplingParams(max_tokens=8)
        calls = [sampler.sample(tinker.ModelInput.from_ints(p), 8, params) for p in prompts]
        data, rewards = [], []
        for prompt, call in zip(prompts, calls, strict=True):
            drawn = call.result().sequences
            scores = np.array([float(s.tokens.count(9)) for s in drawn])
            rewards.extend(scores)
            for s, advantage in zip(drawn, scores - scores.mean(), strict=True):
                ids, before = [*prompt, *s.tokens], len(prompt) - 1
                data.append(
                    datum(
                        ids,
                        logprobs=np.array([0.0] * before + s.logprobs),
                        advantages=np.array([0.0] * before + [advantage] * len(s.tokens)),
                    )
                )
        client.forward_backward(data, "importance_sampling")
        client.optim_step(tinker.AdamParams(learning_rate=2e-2))
        means.append(np.mean(rewards))
    assert np.mean(means[-3:]) > 3 * np.mean(means[:3]) + 0.5


@pytest.mark.real
def test_a_real_model_is_sampled_trained_and_resumed(smollm2, tmp_path):
    def new(name):
        actor = HybridActor.from_pretrained(smollm2, dtype="float32")
        actor.add_adapter(LoRAConfig(rank=4))
        return TinkerClient(actor, tmp_path / name)

    client = new("one")
    messages = [{"role": "user", "content": "Count to five \U0001f642 \u05d0\u05d7\u05ea"}]
    encoded = client.get_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )
    prompt = list(encoded["input_ids"])
    params = tinker.SamplingParams(max_tokens=24)
    drawn = client.sample(tinker.ModelInput.from_ints(prompt), 4, params).result().sequences
    before = [0.0] * (len(prompt) - 1)
    data = [
        datum(
            prompt + s.tokens,
            logprobs=np.array(before + s.logprobs),
            advantages=np.array(before + [sign] * len(s.tokens)),
        )
        for s, sign in zip(drawn, (1.0, -1.0, 1.0, -1.0), strict=True)
    ]
    told = client.forward_backward(data, "importance_sampling").result()
    for s, out in zip(drawn, told.loss_fn_outputs, strict=True):
        gap = np.abs(out["logprobs"].to_numpy()[len(before) :] - np.array(s.logprobs))
        assert gap.max() < 1e-3
    client.optim_step(ADAM).result()
    path = client.save_state("a").result().path
    other = new("two")
    other.load_state_with_optimizer(path).result()
    rows = []
    for each in (client, other):
        out = each.forward_backward(data, "ppo").result()
        norm = each.optim_step(ADAM).result().metrics["grad_norm"]
        drawn = each.sample(tinker.ModelInput.from_ints(prompt), 2, params).result().sequences
        rows.append((out.metrics, norm, [(s.tokens, s.logprobs) for s in drawn]))
    assert rows[0] == rows[1]
