"""Every way to change or replace weights is followed or refused: no actor goes on with others than
its trainer's.

The judge is transformers, on the weights as they now are. A prompt with full blocks in the prefix
cache is completed before and after, so that keys and values of older weights would show.

One file: the list of ways is one table, tried with every reader.
"""

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoConfig, AutoModelForCausalLM

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.watch import Watch
from fusedrl.engine.model.weights import hf_views
from fusedrl.engine.optim.adamw import make_optimizer

SIZES = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [3, 4]]
PARAMS = SamplingParams(max_new_tokens=8, seed=1)
BUILT = ["from_module", "from_pretrained"]


@dataclass
class Case:
    """An actor, and what its trainer holds: a transformers model, or the actor's own decoder."""

    actor: HybridActor
    root: nn.Module
    tied: bool

    @property
    def ours(self) -> bool:
        return isinstance(self.root, Decoder)

    @property
    def slot(self) -> tuple[nn.Module, str]:
        """A square matrix, and where it lies."""
        layer = (self.root if self.ours else self.root.model).layers[1]
        return (layer, "o_proj") if self.ours else (layer.self_attn.o_proj, "weight")

    @property
    def weight(self) -> nn.Parameter:
        return getattr(*self.slot)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.root.parameters())

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def fresh(self) -> nn.Module:
        """transformers' model of the weights as they now are, on memory of its own."""
        other = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**SIZES | {"tie_word_embeddings": self.tied})
        )
        values = (
            hf_views(self.root)
            if self.ours
            else {name: p.detach() for name, p in self.root.named_parameters()}
        )
        other.load_state_dict({name: value.float() for name, value in values.items()}, strict=False)
        return other.eval().to(self.device)


def case(built: str, device, tied: bool = False) -> Case:
    torch.manual_seed(0)
    module = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**SIZES | {"tie_word_embeddings": tied})
        )
        .eval()
        .to(device)
    )
    cache = CacheConfig(block_size=4, num_blocks=64)
    if built == "from_module":
        return Case(HybridActor.from_module(module, cache=cache), module, tied)
    decoder = Decoder(model_config(SIZES | {"tie_word_embeddings": tied}), device=device)
    with torch.no_grad():
        for name, view in hf_views(decoder).items():
            view.copy_(module.get_parameter(name))
    actor = HybridActor(decoder, cache=cache)
    return Case(actor, decoder, tied)


@torch.no_grad()
def off(model: nn.Module, outs) -> float:
    """How far the sampler's log-probabilities are from transformers', at the most."""
    worst, device = 0.0, next(model.parameters()).device
    for prompt, (completion,) in zip(PROMPTS, outs, strict=True):
        ids = torch.tensor([prompt + completion.token_ids], device=device)
        logp = (
            model(ids)
            .logits.double()
            .log_softmax(-1)[0, :-1]
            .gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        )
        worst = max(
            worst,
            float((logp - torch.tensor(completion.logprobs, device=device).double()).abs().max()),
        )
    return worst


def gradients(c: Case) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in c.params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def step(kind: str, **options) -> Callable[[Case], None]:
    def change(c: Case) -> None:
        gradients(c)
        getattr(torch.optim, kind)(c.params, lr=options.pop("lr", 0.1), **options).step()

    return change


def own_step(c: Case) -> None:
    gradients(c)
    make_optimizer(c.root.named_parameters(), lr=0.1).step()


def muon(c: Case) -> None:
    gradients(c)
    torch.optim.Muon([p for p in c.params if p.ndim == 2], lr=0.3).step()


def lbfgs(c: Case) -> None:
    optimizer = torch.optim.LBFGS(c.params, lr=0.3, max_iter=2)

    def closure() -> torch.Tensor:
        gradients(c)
        return torch.zeros((), device=c.device)

    optimizer.step(closure)


def aliases(c: Case) -> None:
    """An optimizer on other tensors of the same memory, whose fused kernel counts nothing."""
    others = [nn.Parameter(p.data) for p in c.params]
    for p in others:
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(others, lr=0.1, fused=True).step()


def kernel(c: Case) -> None:
    p = c.weight
    one = torch.ones_like(p)
    torch._fused_sgd_(
        [p],
        [one],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.3,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    )


def quiet(write: Callable[[torch.Tensor], object]) -> Callable[[Case], None]:
    def change(c: Case) -> None:
        write(c.weight.data)

    return change


def loud(write: Callable[[torch.Tensor], object]) -> Callable[[Case], None]:
    def change(c: Case) -> None:
        with torch.no_grad():
            write(c.weight)

    return change


def element(x: torch.Tensor) -> None:
    x[17, 5] += 8.0


def swap_words(x: torch.Tensor) -> None:
    x.copy_(x.roll(2, 1))


def ema_swap(c: Case) -> None:
    for p in c.params:
        shadow = p.detach() * 1.5
        p.data.copy_(shadow)


def ema_pointers(c: Case) -> None:
    for p in c.params:
        p.data = p.detach() * 1.5


def swap_tensors(c: Case) -> None:
    torch.utils.swap_tensors(c.weight, nn.Parameter(c.weight.detach() * -1.5))


def replaced(c: Case) -> None:
    setattr(*c.slot, nn.Parameter(c.weight.detach() * -1.5))


def registered(c: Case) -> None:
    owner, name = c.slot
    new = nn.Parameter(c.weight.detach() * -1.5)
    delattr(owner, name)
    owner.register_parameter(name, new)


def layer_replaced(c: Case) -> None:
    layers = (c.root if c.ours else c.root.model).layers
    new = copy.deepcopy(layers[1])
    with torch.no_grad():
        for p in new.parameters():
            p.mul_(1.5)
    layers[1] = new


def layers_exchanged(c: Case) -> None:
    layers = (c.root if c.ours else c.root.model).layers
    layers[0], layers[1] = layers[1], layers[0]


def layer_removed(c: Case) -> None:
    del (c.root if c.ours else c.root.model).layers[1]


def head_replaced(c: Case) -> None:
    if c.ours:
        c.root.head = nn.Parameter(c.root.head.detach() * -1.5)
    else:
        c.root.lm_head = nn.Linear(SIZES["hidden_size"], SIZES["vocab_size"], bias=False)


def trunk_replaced(c: Case) -> None:
    if c.ours:
        c.actor.decoder = copy.deepcopy(c.root)
    else:
        c.root.model = copy.deepcopy(c.root.model)


def untied(c: Case) -> None:
    if c.ours:
        c.root.head = nn.Parameter(c.root.embedding.detach() * -1.5)
    else:
        c.root.lm_head.weight = nn.Parameter(c.root.lm_head.weight.detach() * -1.5)


def tied(c: Case) -> None:
    if c.ours:
        c.root.head = c.root.embedding
    else:
        c.root.lm_head.weight = c.root.model.embed_tokens.weight


def loaded(assign: bool) -> Callable[[Case], None]:
    def change(c: Case) -> None:
        c.root.load_state_dict(
            {name: value * 1.5 for name, value in c.root.state_dict().items()}, assign=assign
        )

    return change


def resized(c: Case) -> None:
    if c.ours:
        c.root.embedding = nn.Parameter(
            torch.cat(
                [c.root.embedding.detach(), torch.ones(4, SIZES["hidden_size"], device=c.device)]
            )
        )
    else:
        c.root.resize_token_embeddings(SIZES["vocab_size"] + 4)


def swapped_future(c: Case) -> None:
    """`.to` that makes new parameters."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        c.root.bfloat16()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def accelerated(c: Case) -> None:
    from accelerate import Accelerator

    optimizer = torch.optim.AdamW(c.params, lr=0.1)
    _, optimizer = Accelerator(cpu=c.device.type == "cpu").prepare(c.root, optimizer)
    gradients(c)
    optimizer.step()


def train_through(model: nn.Module, c: Case) -> None:
    """A forward and backward pass through what wraps the model, and a step."""
    ids = torch.tensor(PROMPTS[0], device=c.device)
    if c.ours:
        model(
            ids,
            torch.arange(len(ids), device=c.device),
            torch.tensor([0, len(ids)], dtype=torch.int32, device=c.device),
            len(ids),
        ).square().sum().backward()
    else:
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
    torch.optim.AdamW(c.params, lr=0.1).step()


def compiled(c: Case) -> None:
    train_through(torch.compile(c.root, backend="eager"), c)


def checkpointed(c: Case) -> None:
    if c.ours:
        c.root.checkpoint_activations = True
    else:
        c.root.train().gradient_checkpointing_enable()
    train_through(c.root, c)


def distributed(c: Case) -> None:
    train_through(nn.parallel.DistributedDataParallel(c.root, find_unused_parameters=True), c)


def in_numpy(c: Case) -> None:
    """What numpy writes into a parameter's memory, on the host."""
    if c.device.type != "cpu":
        pytest.skip("numpy sees no memory but the host's")
    quiet(lambda x: x.numpy().__imul__(-1.5))(c)


def sharded(c: Case) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    fully_shard(c.root)
    for p in c.params:
        assert isinstance(p, DTensor)
        p.data.mul_(1.5)


def peft_wrapped(c: Case) -> None:
    if c.ours:
        # what PEFT cannot: our layers have no nn.Linear
        c.root.layers[1].o_proj_adapter = nn.Linear(2, 2)
    else:
        from peft import LoraConfig, get_peft_model

        get_peft_model(c.root, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def peft_merged(c: Case) -> None:
    if c.ours:
        c.actor.add_adapter(LoRAConfig(rank=2, alpha=4.0))
        with torch.no_grad():
            for layer in c.root.layers:
                layer.lora.o_b.fill_(0.3)
                layer.o_proj += c.root.lora.scale * layer.lora.o_b @ layer.lora.o_a
                layer.lora = None
        c.root.lora = None
    else:
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(
            c.root, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        )
        wrapped.merge_and_unload()


def adapter_half_removed(c: Case) -> None:
    if c.ours:
        c.actor.add_adapter(LoRAConfig(rank=2, alpha=4.0))
        c.root.layers[0].lora = None
    else:
        c.root.model.layers[0].self_attn.q_proj.register_parameter(
            "bias", nn.Parameter(torch.ones(SIZES["hidden_size"], device=c.device))
        )


def pruned(c: Case) -> None:
    prune.l1_unstructured(*c.slot, amount=0.5)


def pruned_norm(c: Case) -> None:
    """Where the parameter is the only one of its module, it changes its name alone."""
    if c.ours:
        prune.l1_unstructured(c.root, "norm", amount=0.5)
    else:
        prune.l1_unstructured(c.root.model.norm, "weight", amount=0.5)


def pruned_for_good(c: Case) -> None:
    pruned(c)
    prune.remove(*c.slot)


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def parametrised(c: Case) -> None:
    owner, name = c.slot
    parametrize.register_parametrization(owner, name, Half())


def weight_normed(c: Case) -> None:
    owner, name = c.slot
    nn.utils.weight_norm(owner, name)


def weight_normed_anew(c: Case) -> None:
    owner, name = c.slot
    nn.utils.parametrizations.weight_norm(owner, name)


def second_actor(c: Case) -> None:
    if c.ours:
        HybridActor(c.root).generate(PROMPTS, PARAMS)
    else:
        HybridActor.from_module(c.root)
    loud(lambda x: x.mul_(-1.5))(c)


def hooked(c: Case) -> None:
    """A step inside the backward pass, by hooks on the gradients."""
    optimizers = {p: torch.optim.AdamW([p], lr=0.1, fused=True) for p in c.params}
    for p in c.params:
        p.register_hook(lambda grad: grad * 2)
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    ids = torch.tensor(PROMPTS[0], device=c.device)
    if c.ours:
        c.root(
            ids,
            torch.arange(len(ids), device=c.device),
            torch.tensor([0, len(ids)], dtype=torch.int32, device=c.device),
            len(ids),
        ).square().sum().backward()
    else:
        c.root(input_ids=ids[None], labels=ids[None]).loss.backward()


F, R = "followed", "refused"
CHANGES: dict[
    str, tuple[Callable[[Case], object], str, str]
] = {  # what becomes of an actor from_module, and from_pretrained
    **{
        f"{kind}, {name}": (step(kind, **options), F, F)
        for kind in ("SGD", "Adam", "AdamW", "Adagrad")
        for name, options in (
            ("plain", {"foreach": False}),
            ("foreach", {"foreach": True}),
            ("fused", {"fused": True}),
        )
    },
    **{
        kind: (step(kind), F, F)
        for kind in ("RMSprop", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")
    },
    "Adadelta": (step("Adadelta", lr=100.0), F, F),
    "Muon": (muon, F, F),
    "LBFGS": (lbfgs, F, F),
    "our optimizer": (own_step, F, F),
    "fused on aliases": (aliases, F, F),
    "a kernel": (kernel, F, F),
    "no_grad mul_": (loud(lambda x: x.mul_(-1.5)), F, F),
    "no_grad copy_": (loud(lambda x: x.copy_(x.flip(0))), F, F),
    "no_grad element": (loud(element), F, F),
    "no_grad foreach": (loud(lambda x: torch._foreach_mul_([x], -1.5)), F, F),
    "data mul_": (quiet(lambda x: x.mul_(-1.5)), F, F),
    "data neg_": (quiet(lambda x: x.neg_()), F, F),
    "data copy_": (quiet(lambda x: x.copy_(x.flip(0))), F, F),
    "data element": (quiet(element), F, F),
    "data row": (quiet(lambda x: x[9].mul_(-9.0)), F, F),
    "data rows exchanged": (quiet(lambda x: x.copy_(x.roll(1, 0))), F, F),
    "data columns exchanged": (quiet(swap_words), F, F),
    "numpy": (in_numpy, F, F),
    "dlpack": (quiet(lambda x: torch.from_dlpack(x).mul_(-1.5)), F, F),
    "data set": (lambda c: setattr(c.weight, "data", c.weight.detach() * -1.5), R, F),
    "data transposed": (lambda c: setattr(c.weight, "data", c.weight.data.t()), R, R),
    "set_": (loud(lambda x: x.set_(x.detach() * -1.5)), R, F),
    "EMA swap": (ema_swap, F, F),
    "EMA swap of pointers": (ema_pointers, R, F),
    "swap_tensors": (swap_tensors, R, F),
    "parameter replaced": (replaced, R, F),
    "parameter registered": (registered, R, F),
    "layer replaced": (layer_replaced, R, F),
    "layers exchanged": (layers_exchanged, R, F),
    "layer removed": (layer_removed, R, R),
    "head replaced": (head_replaced, R, F),
    "trunk replaced": (trunk_replaced, R, R),
    "load_state_dict": (loaded(False), F, F),
    "load_state_dict assign": (loaded(True), R, F),
    "to the same": (lambda c: c.root.to(c.device, torch.float32), F, F),
    "to memory_format": (lambda c: c.root.to(memory_format=torch.channels_last), F, F),
    "bfloat16": (lambda c: c.root.bfloat16(), R, F),
    "double": (lambda c: c.root.double(), R, R),
    "half": (lambda c: c.root.half(), R, R),
    "bfloat16 of a layer": (
        lambda c: (c.root if c.ours else c.root.model).layers[1].bfloat16(),
        R,
        R,
    ),
    "bfloat16, new parameters": (swapped_future, R, F),
    "to meta": (lambda c: c.root.to("meta"), R, R),
    "share_memory": (lambda c: c.root.share_memory(), None, F),
    "untied": (untied, R, R),
    "tied": (tied, R, None),
    "resized": (resized, R, R),
    "accelerate": (accelerated, F, F),
    "torch.compile": (compiled, F, F),
    "checkpointing": (checkpointed, F, F),
    "DDP": (distributed, F, F),
    "FSDP2": (sharded, R, R),
    "PEFT wrapped": (peft_wrapped, R, R),
    "PEFT merged": (peft_merged, None, F),
    "half an adapter": (adapter_half_removed, R, R),
    "pruned": (pruned, R, R),
    "norm pruned": (pruned_norm, R, R),
    "pruned for good": (pruned_for_good, None, F),
    "parametrize": (parametrised, R, R),
    "weight_norm": (weight_normed, R, R),
    "weight_norm, new": (weight_normed_anew, R, R),
    "second actor": (second_actor, R, F),
    "gradient hooks": (hooked, F, F),
}
TIED = {"untied"}
# hidden states are rounded before the head
WIDE = {"bfloat16": 2e-2, "bfloat16, new parameters": 2e-2}
REMEDIES = (
    "build a new actor",
    "into a new actor",
    "load the weights",
    "load that",
    "by actor.decoder.to",
    "assign a",
    "shard another copy",
    "actor.add_adapter",
)
UNCHANGED = {"to the same", "to memory_format", "share_memory", "tied"}


@pytest.fixture
def one_process(tmp_path):
    """A process group of one, over gloo."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("name", CHANGES)
def test_followed_or_refused(name, built, request, device):
    if name in ("DDP", "FSDP2"):
        request.getfixturevalue("one_process")
    change, *expected = CHANGES[name]
    wanted = expected[BUILT.index(built)]
    c = case(built, device, tied=name in TIED)
    before = c.fresh()
    first = c.actor.generate(PROMPTS, PARAMS)
    assert off(before, first) < 1e-4
    error = outs = None
    try:
        change(c)
        outs = c.actor.generate(PROMPTS, PARAMS)
    except (RuntimeError, AttributeError, TypeError) as caught:
        error = caught
    if error is not None:
        assert wanted != F, f"it should have been followed, and was refused: {error}"
        if isinstance(error, RuntimeError):
            assert "HybridActor" in str(error)
            assert any(remedy in str(error) for remedy in REMEDIES)
            batch = PackedBatch.from_completions(PROMPTS, first, device=device)
            for read in (
                lambda: c.actor.score(batch),
                lambda: c.actor.forward(batch),
                lambda: next(c.actor.stream(PROMPTS, PARAMS)),
            ):
                with pytest.raises(RuntimeError, match="HybridActor"):
                    read()
        else:  # a new decoder for an actor that has one; a dtype that the sampler does not have
            assert re.search(
                "'decoder'.* has no setter|expected weights in float32 or bfloat16, got "
                "(float16|float64)",
                str(error),
            )
        return
    assert wanted != R, "it should have been refused"
    now = c.fresh()
    assert off(now, outs) < WIDE.get(name, 1e-4)
    if name not in UNCHANGED:
        assert off(before, outs) > 0.01, "the change must have changed something"
        assert {v for group in outs for v in group[0].weights_versions} == {c.actor.weights_version}
        assert c.actor.weights_version > 0
    version = c.actor.weights_version
    assert c.actor.generate(PROMPTS, PARAMS) == outs
    assert c.actor.weights_version == version, "nothing has changed since"


@pytest.mark.parametrize("built", BUILT)
def test_refused_copies(built, device):
    c = case(built, device)
    for attempt in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled.*save_pretrained"):
            attempt(c.actor)


ODD = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 6,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "head_dim": 2,
    "num_key_value_heads": 3,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fingerprint_misses_no_element_and_no_order(dtype, device):
    """Rows that are no whole number of words, and elements, rows and columns of all of them."""
    decoder = Decoder.random(model_config(ODD), 0, dtype=dtype, device=device)
    watch = Watch(decoder)
    version = watch.look("all")
    assert watch.look("all") == watch.look("first rows") == watch.look("counts") == version
    for name, p in decoder.named_parameters():
        flat = p.data.view(-1)
        for place in range(len(flat)):
            flat[place] = torch.nextafter(flat[place], flat[place] + 1)
            version += 1
            assert watch.look("all") == version, (name, place)
        for dim in range(p.ndim if p.ndim > 1 else 0):
            p.data.copy_(p.data.roll(1, dim))
            version += 1
            assert watch.look("all") == version, (name, dim)
        p.data[-1] = torch.nan
        version += 1
        assert watch.look("all") == watch.look("all") == version, "NaN is itself"
    assert watch.look("first rows") == version
    for p in decoder.parameters():
        p.data[0] *= 3
        version += 1
        assert watch.look("counts") == version - 1
        assert watch.look("first rows") == version


def test_a_watch_keeps_no_memory_that_the_weights_have_left(device):
    """A model that is moved away, such as a reference that waits on the host, is not held by who
    watches it."""
    decoder = Decoder.random(model_config(ODD), 0, device=device)
    watch = Watch(decoder)
    watch.look("all")
    freed = []
    weakref.finalize(decoder.embedding.data.untyped_storage(), freed.append, 1)
    storages = [weakref.ref(p.untyped_storage()) for p in decoder.parameters()]
    decoder.to(torch.float64)
    gc.collect()
    assert freed
    assert all(reference() is None for reference in storages)
    assert watch.look("all") == 1


@pytest.mark.parametrize("built", BUILT)
def test_what_is_undone_is_no_longer_refused(built, device):
    c = case(built, device)
    outs = c.actor.generate(PROMPTS, PARAMS)
    parametrised(c)
    with pytest.raises(RuntimeError, match="HybridActor"):
        c.actor.generate(PROMPTS, PARAMS)
    weight = c.weight.detach().clone() * 2
    if c.ours:
        parametrize.remove_parametrizations(*c.slot, leave_parametrized=False)
        assert off(c.fresh(), c.actor.generate(PROMPTS, PARAMS)) < 1e-4
        assert torch.equal(c.weight, weight)
        assert [c.token_ids for (c,) in c.actor.generate(PROMPTS, PARAMS)] == [
            c.token_ids for (c,) in outs
        ]


def test_an_adapters_scale_is_in_one_place(device):
    actor = case("from_pretrained", device).actor
    actor.add_adapter(LoRAConfig(rank=2, alpha=4.0))
    with pytest.raises(AttributeError, match="scale"):
        actor.decoder.layers[0].lora.scale = 3.0


def test_saving_a_model_that_no_longer_shares_is_refused(tmp_path, device):
    c = case("from_module", device)
    replaced(c)
    with pytest.raises(RuntimeError, match="build a new actor"):
        c.actor.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_optimizer_of_other_parameters_is_no_update(device):
    c = case("from_pretrained", device)
    c.actor.generate(PROMPTS, PARAMS)
    other = nn.Linear(3, 3, device=device)
    other.weight.grad = torch.ones(3, 3, device=device)
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    c.actor.generate(PROMPTS, PARAMS)
    assert c.actor.weights_version == 0


def layer_twice(d):
    d.layers[0] = d.layers[1]


def matrix_twice(d):
    d.layers[0].qkv_proj = d.layers[1].qkv_proj


def rows_of_another(d):
    d.layers[0].o_proj = nn.Parameter(d.layers[1].gate_up_proj.detach()[3:35])


def tie(d):
    d.head = d.embedding


@pytest.mark.parametrize("share", [layer_twice, matrix_twice, rows_of_another, tie])
def test_parameters_with_two_names_are_generated_trained_and_saved_as_they_are(
    share, tmp_path, device
):
    c = case("from_pretrained", device)
    c.actor.generate(PROMPTS, PARAMS)
    share(c.root)
    outs = c.actor.generate(PROMPTS, PARAMS)
    assert off(c.fresh(), outs) < 1e-4
    batch = PackedBatch.from_completions(PROMPTS, outs, device=device)
    assert (c.actor.score(batch).logp - batch.rollout_logp)[batch.action_mask].abs().max() < 1e-5
    c.actor.save_pretrained(tmp_path / "saved")
    again = HybridActor.from_pretrained(
        tmp_path / "saved",
        cache=CacheConfig(block_size=4, num_blocks=64),
        dtype="float32",
        device=device,
    )
    assert [[o.token_ids for o in group] for group in again.generate(PROMPTS, PARAMS)] == [
        [o.token_ids for o in group] for group in outs
    ]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval().to(device)
    assert off(theirs, outs) < 1e-4
    step("AdamW", lr=0.01)(c)
    assert off(c.fresh(), c.actor.generate(PROMPTS, PARAMS)) < 1e-4
