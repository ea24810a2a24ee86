"""What a shared model computes with beside its parameters: refused, followed or told of, at sharing
and later; never silent.

The judge is transformers: its own logits, of the model as it now is, against the actor's
log-probabilities.
"""

import functools
import types
import warnings

import pytest
import torch
from tests.engine.model.test_watch import PARAMS, PROMPTS, SIZES, off
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead

pytestmark = [
    pytest.mark.cpu_only(
        "hooks, attributes and configurations are Python, the same wherever the numbers lie"
    )
]
TIED = SIZES | {"tie_word_embeddings": False}


def model(**more) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**TIED | more)).eval()


def share(module: nn.Module) -> HybridActor:
    return HybridActor.from_module(module, cache=CacheConfig(block_size=4, num_blocks=64))


def told(call) -> list[str]:
    """What the actor warns of in a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [
        str(one.message)
        for one in found
        if "HybridActor" in str(one.message) or "from_module" in str(one.message)
    ]


def attention(m: nn.Module) -> nn.Module:
    return m.model.layers[1].self_attn


# ---- refused -------------------------------------------------------------------------------------
class Doubled(nn.Linear):
    """A layer with the same parameters that computes otherwise, as a quantising one does."""

    def forward(self, x):
        return super().forward(x) * 2


class DoubledOutput(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def swapped(m):
    old = attention(m).q_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    attention(m).q_proj = new


def of_class(m):
    attention(m).q_proj.__class__ = Doubled


def norm_swapped(m):
    new = type(m.model.norm)(SIZES["hidden_size"], eps=0.3)
    new.weight = m.model.norm.weight
    m.model.norm = new


def buffer_set(m):
    m.model.rotary_emb.inv_freq = m.model.rotary_emb.inv_freq * 0.5


def activation(m):
    m.model.layers[0].mlp.act_fn = nn.GELU()


REFUSED = {
    "a number": lambda m: setattr(m.model.norm, "variance_epsilon", 0.3),
    "attention's scale": lambda m: setattr(attention(m), "scaling", 0.1),
    "a rotary scale": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 2.0),
    "a flag": lambda m: setattr(attention(m), "is_causal", False),
    "a layer swapped": swapped,
    "a layer's class": of_class,
    "a norm swapped": norm_swapped,
    "an activation": activation,
    "a buffer in place": lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
    "a buffer through data": lambda m: m.model.rotary_emb.inv_freq.data.mul_(0.5),
    "a buffer replaced": buffer_set,
    "parametrize": lambda m: nn.utils.parametrize.register_parametrization(
        attention(m).q_proj, "weight", nn.Identity()
    ),
    "weight_norm": lambda m: nn.utils.weight_norm(attention(m).q_proj),
    "spectral_norm": lambda m: nn.utils.spectral_norm(attention(m).q_proj),
    "spectral_norm, new": lambda m: nn.utils.parametrizations.spectral_norm(attention(m).q_proj),
    "config, epsilon": lambda m: setattr(m.config, "rms_norm_eps", 0.3),
    "config, RoPE": lambda m: m.config.rope_parameters.__setitem__("rope_theta", 100.0),
    "config, activation": lambda m: setattr(m.config, "hidden_act", "gelu"),
    "config, another": lambda m: setattr(
        m, "config", AutoConfig.for_model(**TIED | {"rms_norm_eps": 0.3})
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_computation_is_refused_later(name):
    m = model()
    actor = share(m)
    batch = PackedBatch.from_completions(PROMPTS, actor.generate(PROMPTS, PARAMS))
    stream = actor.stream(PROMPTS, SamplingParams(max_new_tokens=8, n=4, seed=2))
    REFUSED[name](m)
    for read in (
        lambda: actor.generate(PROMPTS, PARAMS),
        lambda: actor.score(batch),
        lambda: actor.save_pretrained("nowhere"),
        lambda: next(stream),
    ):
        # memory is looked at by who generates or saves
        if name != "a buffer through data" or "score" not in read.__code__.co_names:
            with pytest.raises(
                RuntimeError, match=r"(?s)HybridActor: .*(load that|build a new actor)"
            ):
                read()


@pytest.mark.parametrize("name", REFUSED)
def test_another_computation_is_refused_at_sharing_and_nothing_is_changed(name):
    m = model()
    REFUSED[name](m)
    if name == "config, another":
        m.model.norm.variance_epsilon = 1e-6
    addresses = [p.data_ptr() for p in m.parameters()]
    with pytest.raises(ValueError, match=r"(?s)from_module|the configuration: expected hidden_act"):
        share(m)
    assert [p.data_ptr() for p in m.parameters()] == addresses


def test_what_is_undone_is_followed_again():
    m = model()
    actor = share(m)
    outs = actor.generate(PROMPTS, PARAMS)
    for change, undo in (
        (
            lambda: setattr(m.model.norm, "variance_epsilon", 0.3),
            lambda: setattr(m.model.norm, "variance_epsilon", 1e-6),
        ),
        (
            lambda: m.model.rotary_emb.inv_freq.mul_(2),
            lambda: m.model.rotary_emb.inv_freq.mul_(0.5),
        ),
        (
            lambda: setattr(m.config, "rms_norm_eps", 0.3),
            lambda: setattr(m.config, "rms_norm_eps", 1e-6),
        ),
    ):
        change()
        with pytest.raises(RuntimeError, match="HybridActor"):
            actor.generate(PROMPTS, PARAMS)
        undo()
        assert actor.generate(PROMPTS, PARAMS) == outs


@pytest.mark.parametrize(
    "change",
    [
        lambda d: setattr(d.layers[1], "window", 3),
        lambda d: setattr(d.layers[1], "rope", -1),
        lambda d: setattr(d, "config", model_config(TIED | {"rms_norm_eps": 0.3})),
        lambda d: setattr(d.layers[0], "config", model_config(TIED | {"rms_norm_eps": 0.3})),
        lambda d: setattr(d.layers[0], "__class__", type("Other", (type(d.layers[0]),), {})),
    ],
)
def test_a_decoder_computes_with_what_it_was_built_with(change):
    actor = HybridActor(Decoder.random(model_config(TIED), 0))
    actor.generate(PROMPTS, PARAMS)
    change(actor.decoder)
    with pytest.raises(RuntimeError, match=r"HybridActor: .*(load that|new actor)"):
        actor.generate(PROMPTS, PARAMS)


# ---- told of -------------------------------------------------------------------------------------
def replaced_forward(m):
    old = attention(m).q_proj.forward

    @functools.wraps(old)  # it says that it is torch's
    def forward(x):
        return old(x) * 2

    attention(m).q_proj.forward = forward


def bound_forward(m):
    def forward(self, x):
        return nn.functional.linear(x, self.weight) * 2

    attention(m).q_proj.forward = types.MethodType(
        torch.compile(forward, backend="eager"), attention(m).q_proj
    )


def accelerate_hook(m):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Halves(ModelHook):
        def post_forward(self, module, output):
            return output / 2

    add_hook_to_module(attention(m).q_proj, Halves())


def attention_of_ones_own(m):
    def mine(module, query, key, value, attention_mask, **kwargs):
        return value.repeat_interleave(module.num_key_value_groups, 1).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("one_of_mine", mine)
    m.config._attn_implementation = "one_of_mine"


def neftune(m):
    from transformers.integrations.neftune import neftune_post_forward_hook

    m.model.embed_tokens.neftune_noise_alpha = 5.0
    m.model.embed_tokens.register_forward_hook(neftune_post_forward_hook)


TOLD = {
    "forward hook": (
        lambda m: attention(m).q_proj.register_forward_hook(lambda module, args, out: out * 2),
        "q_proj: forward hook tests",
    ),
    "forward pre-hook": (
        lambda m: m.model.layers[0].register_forward_pre_hook(lambda module, args: None),
        "layers.0: forward pre-hook",
    ),
    "hook with keywords": (
        lambda m: m.register_forward_hook(lambda module, args, kwargs, out: out, with_kwargs=True),
        "the model: forward hook",
    ),
    "replaced forward": (replaced_forward, "q_proj: forward tests.engine.model.test_beside"),
    "bound forward": (bound_forward, "q_proj: forward tests.engine.model.test_beside"),
    "accelerate's hook": (accelerate_hook, "q_proj: forward by the hook tests"),
    "attention": (attention_of_ones_own, "attention tests.engine.model.test_beside"),
    "NEFTune": (neftune, "embed_tokens: forward hook transformers.integrations.neftune"),
    "attention's dropout": (
        lambda m: setattr(attention(m), "attention_dropout", 0.1),
        "attention_dropout 0.1 while it trains",
    ),
}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", TOLD)
def test_what_the_actor_does_not_run_is_told_once(name, later):
    m = model()
    change, expected = TOLD[name]
    if later:
        actor = share(m)
        outs = actor.generate(PROMPTS, PARAMS)
        change(m)
        found = told(lambda: actor.generate(PROMPTS, PARAMS))
    else:
        change(m)
        actors = []
        found = told(lambda: actors.append(share(m)))
        (actor,) = actors
        outs = actor.generate(PROMPTS, PARAMS)
    assert len(found) == 1
    assert expected in found[0]
    assert "take it off" in found[0]
    assert told(lambda: actor.generate(PROMPTS, PARAMS)) == []
    assert actor.generate(PROMPTS, PARAMS) == outs
    assert actor.weights_version == 0


def test_a_second_hook_in_the_place_of_a_first_is_told_as_well():
    m = model()
    m.enable_input_require_grads()
    actor = share(m)
    m.disable_input_require_grads()
    m.model.embed_tokens.register_forward_hook(lambda module, args, out: out * 2)
    assert len(told(lambda: actor.generate(PROMPTS, PARAMS))) == 1


def test_a_global_hook_a_patched_class_and_a_subclass_are_told(monkeypatch):
    m = model()
    actor = share(m)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        (found, *more) = told(lambda: actor.generate(PROMPTS, PARAMS))
    finally:
        handle.remove()
    assert "every module: global forward hook" in found
    assert len(more) <= 1  # the decoder and the shared model
    old = type(m.model.norm).forward
    monkeypatch.setattr(type(m.model.norm), "forward", lambda self, x: old(self, x) * 2)
    (found,) = told(lambda: actor.generate(PROMPTS, PARAMS))
    assert "input_layernorm: forward tests.engine.model.test_beside" in found
    monkeypatch.undo()
    other = DoubledOutput(AutoConfig.for_model(**TIED))
    (found,) = told(lambda: share(other))
    assert "the model: forward tests.engine.model.test_beside.DoubledOutput.forward" in found


def test_dropout_of_the_configuration_is_told():
    config = {
        "model_type": "gpt2",
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 6,
        "n_positions": 128,
        "n_inner": 20,
        "vocab_size": 48,
        "eos_token_id": None,
    }
    (found,) = told(
        lambda: share(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).train())
    )
    assert "transformer.drop: p 0.1 while it trains" in found
    assert "set dropout to 0" in found
    (found,) = told(lambda: share(model(attention_dropout=0.2)))
    assert "attention_dropout 0.2" in found


@pytest.mark.parametrize("place", [lambda d: d, lambda d: d.layers[1]])
def test_hooks_on_a_decoder_are_told(place):
    actor = HybridActor(Decoder.random(model_config(TIED), 0))
    actor.generate(PROMPTS, PARAMS)
    place(actor.decoder).register_forward_hook(lambda module, args, out: None)
    (found,) = told(lambda: actor.generate(PROMPTS, PARAMS))
    assert "the sampler does not run" in found
    assert told(lambda: actor.generate(PROMPTS, PARAMS)) == []


@pytest.fixture
def bfloat16_accelerator():
    """accelerate keeps its precision for the whole process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


# ---- autocast ------------------------------------------------------------------------------------
def test_autocast_changes_nothing_that_an_actor_computes(bfloat16_accelerator):
    """Neither around a call nor by a wrapped forward, with a value head."""
    actor = HybridActor.from_module(model(), value_head=True)
    with torch.no_grad():
        actor.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    outs = actor.generate(PROMPTS, PARAMS)
    batch = PackedBatch.from_completions(PROMPTS, outs)
    scored = actor.score(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert actor.generate(PROMPTS, PARAMS) == outs
        again = actor.score(batch)
        hidden = actor.forward(batch)
        assert torch.equal(
            actor.logprobs(batch, hidden)[0][batch.action_mask], scored.logp[batch.action_mask]
        )
    assert all(map(torch.equal, again, scored))
    bfloat16_accelerator.prepare(actor.decoder)
    assert told(lambda: actor.generate(PROMPTS, PARAMS)) == []
    assert actor.generate(PROMPTS, PARAMS) == outs
    assert all(map(torch.equal, actor.score(batch), scored))


@pytest.mark.parametrize("later", [False, True])
def test_a_model_that_accelerate_computes_in_bfloat16_is_told_once(later, bfloat16_accelerator):
    m, actors = model(), []
    if later:
        actors.append(share(m))
    bfloat16_accelerator.prepare(m)
    found = told(lambda: actors[0].generate(PROMPTS, PARAMS) if later else actors.append(share(m)))
    assert len(found) == 1
    assert "load the model in bfloat16" in found[0]
    assert "bf16=False" in found[0]
    assert told(lambda: actors[0].generate(PROMPTS, PARAMS)) == []


# ---- ordinary use --------------------------------------------------------------------------------
def trained(m):
    ids = torch.tensor([PROMPTS[0]])
    m.train()
    m(input_ids=ids, labels=ids).loss.backward()
    m.eval()


ORDINARY = {
    "gradient hooks": lambda m: [p.register_hook(lambda grad: grad) for p in m.parameters()],
    "backward hooks": lambda m: m.model.layers[0].register_full_backward_hook(
        lambda module, before, after: None
    ),
    "compiled in place": lambda m: m.compile(backend="eager"),
    "forward compiled": lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager")),
    "inputs' gradients": lambda m: m.enable_input_require_grads(),
    "checkpointing": lambda m: m.gradient_checkpointing_enable(),
    "hidden states": lambda m: m(
        torch.tensor([PROMPTS[0]]), output_hidden_states=True, output_attentions=True
    ),
    "a step": trained,
    "no cache": lambda m: setattr(m.config, "use_cache", False),
    "eager attention": lambda m: m.set_attn_implementation("eager"),
    "a padding token": lambda m: setattr(m.config, "pad_token_id", 3),
    "frozen": lambda m: m.requires_grad_(False),
    "generated": lambda m: m.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=3, do_sample=False
    ),
    "state loaded": lambda m: m.load_state_dict(m.state_dict()),
    "another attribute": lambda m: setattr(attention(m), "mine", 3.0),
    "a buffer of one's own": lambda m: m.register_buffer("seen", torch.zeros(3)),
}


@pytest.mark.parametrize("later", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_use_is_neither_refused_nor_told(name, later):
    m, actors = model(), []
    if later:
        actors.append(share(m))
        actors[0].generate(PROMPTS, PARAMS)
    ORDINARY[name](m)
    found = told(lambda: None if later else actors.append(share(m)))
    found += told(lambda: actors[0].generate(PROMPTS, PARAMS))
    assert found == []
    assert off(m, actors[0].generate(PROMPTS, PARAMS)) < 1e-4


ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_scaled_frequencies_are_the_models(rope):
    m = model(rope_parameters={"rope_theta": 1e4} | rope)
    actors = []
    assert told(lambda: actors.append(share(m))) == []
    assert off(m, actors[0].generate(PROMPTS, PARAMS)) < 1e-4
    with torch.no_grad():
        # longer than any here: dynamic frequencies are others meanwhile
        m(torch.randint(0, 48, (1, 300)))
    assert off(m, actors[0].generate(PROMPTS, PARAMS)) < 1e-4


# ---- followed ------------------------------------------------------------------------------------
@pytest.mark.parametrize("book", ["config", "generation_config"])
def test_ids_that_end_a_completion_are_followed(book, tmp_path):
    m = model()
    actor = share(m)
    (completion,), _ = actor.generate(PROMPTS, PARAMS)
    last = completion.token_ids[2]
    getattr(m, book).eos_token_id = last
    (now,), _ = actor.generate(PROMPTS, PARAMS)
    first = completion.token_ids.index(last)
    assert now.token_ids == completion.token_ids[: first + 1]
    assert now.finish_reason == "stop"
    assert actor.weights_version == 0
    actor.save_pretrained(tmp_path / "saved")
    again = HybridActor.from_pretrained(tmp_path / "saved")
    assert last in again.decoder.config.eos_token_ids


def test_frequencies_that_a_cast_has_rounded_are_followed():
    """At position 1,000 rounded frequencies turn the fastest pairs otherwise by whole radians."""
    config = AutoConfig.for_model(
        **TIED
        | {
            "max_position_embeddings": 1100,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        }
    )
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(config).eval()
    exact = m.model.rotary_emb.inv_freq.clone()
    m.to(torch.bfloat16)
    assert not torch.equal(m.model.rotary_emb.inv_freq.float(), exact)
    actors = []
    (found,) = told(lambda: actors.append(share(m)))
    assert "rounded the model's rotary frequencies" in found
    ids = torch.randint(0, 48, (1, 1000), generator=torch.Generator().manual_seed(1))
    batch = PackedBatch.from_completions([ids[0, :900].tolist()], [[completion(ids)]])
    ours = actors[0].score(batch).logp[batch.action_mask].double()

    def theirs(module):
        with torch.no_grad():
            logp = (
                module(ids)
                .logits.double()
                .log_softmax(-1)[0, :-1]
                .gather(-1, ids[0, 1:, None])[:, 0]
            )
        return logp[-len(ours) :]

    # the same weights and rounded frequencies, computed in float32
    wide = AutoModelForCausalLM.from_config(config).eval()
    wide.load_state_dict({name: value.float() for name, value in m.state_dict().items()})
    far = float((ours - theirs(wide)).abs().mean())
    wide.model.rotary_emb.inv_freq.copy_(m.model.rotary_emb.inv_freq)
    near = float((ours - theirs(wide)).abs().mean())
    assert near < 0.02 < far, (near, far)


def completion(ids):
    from fusedrl.engine.base.completion import Completion

    found = ids[0, 900:].tolist()
    return Completion(
        ids[0, :900].tolist(), found, [0.0] * len(found), "", "length", [0] * len(found)
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.half(),
        lambda h: h.bfloat16(),
        lambda h: h.double(),
        lambda h: h.to("meta"),
        lambda h: setattr(h, "weight", nn.Parameter(torch.zeros(1, 7))),
        lambda h: setattr(h, "unit", h.unit.double()),
        lambda h: setattr(h, "bias", nn.Parameter(torch.zeros(2))),
    ],
)
def test_a_value_head_that_was_cast_or_reshaped_alone_is_refused_and_put_right(change, strict):
    actor = HybridActor.from_module(model(), value_head=True, strict=strict)
    outs = actor.generate(PROMPTS, PARAMS)
    batch = PackedBatch.from_completions(PROMPTS, outs)
    head = actor.value_head
    change(head)
    for read in (lambda: actor.score(batch), lambda: actor.generate(PROMPTS, PARAMS)):
        with pytest.raises(
            ValueError,
            match=r"ValueHead: expected weight \[1, 32\] and bias \[1\] in torch.float32 on cpu.*, "
            r"got .*use value_head.to",
        ):
            read()
    actor.value_head = ValueHead(32)
    assert actor.generate(PROMPTS, PARAMS) == outs
