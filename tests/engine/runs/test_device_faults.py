"""A device that runs out of memory or fails for good in the middle of generation or of a run, at a
chosen call of torch: nothing is leaked, nothing bad is saved, the first error is the one that is
told, and what goes on ends bitwise as if nothing had been."""

import gc
import random
import resource
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support import torture
from tests.support.behaviour import furnish
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrl.engine import HybridActor, SamplingParams
from fusedrl.engine.base.errors import SetupError
from fusedrl.engine.generation.cache import CacheConfig

pytestmark = pytest.mark.cpu_only("calls fail beneath torch's operations, which the CPU computes")
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21"]
# what safetensors' reader raises where torch.asarray has hidden the error beneath it
HIDDEN = "could not determine the shape of object type 'torch.storage.UntypedStorage'"
PARAMS = SamplingParams(max_new_tokens=8, n=2, seed=3)


class Failing(TorchDispatchMode):
    """Raises at the k-th call of an operation, and, if it is `sticky`, at each one after it."""

    def __init__(self, k=0, make=None, sticky=False):
        super().__init__()
        self.k, self.make, self.sticky, self.calls = k, make, sticky, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if self.k and (self.calls == self.k or (self.sticky and self.calls > self.k)):
            first = self.calls == self.k
            raise self.make("the first" if first else "a later one")
        return func(*args, **(kwargs or {}))


def short(which):
    return torch.OutOfMemoryError(f"CUDA out of memory: {which}")


def broken(which):
    return torch.AcceleratorError(f"CUDA error: unspecified launch failure, {which}")


def sampled(calls, count, seed):
    """The first call and some of the others. docs/reliability.md says how many were tried once."""
    others = random.Random(seed).sample(range(2, calls + 1), min(count, calls) - 1)
    return [1, *sorted(others)]


# ---- generation ----------------------------------------------------------------------------------
def drawn(outs):
    return [(c.token_ids, c.logprobs) for group in outs for c in group]


@pytest.mark.parametrize("make", [short, broken])
@pytest.mark.parametrize("strict", [False, True])
def test_generation_goes_on_after_any_call_that_failed(tiny_model, make, strict):
    """Small blocks and few of them, so that sequences are preempted."""
    cache = CacheConfig(block_size=4, max_sequences=3, max_tokens_per_step=9, num_blocks=14)
    actor = HybridActor.from_pretrained(tiny_model, cache=cache, dtype="float32", strict=strict)
    expected = drawn(actor.generate(PROMPTS, PARAMS))
    blocks = actor._generation().scheduler.blocks
    with Failing() as counted:
        actor.generate(PROMPTS, PARAMS)
    for k in sampled(counted.calls, 20, f"{make.__name__} {strict}"):
        mode = Failing(k, make)
        with mode, pytest.raises(RuntimeError, match="the first") as told:
            actor.generate(PROMPTS, PARAMS)
        assert type(told.value) is type(make("")), k
        assert blocks.available == blocks.total, k
        assert drawn(actor.generate(PROMPTS, PARAMS)) == expected, k


def test_a_cache_that_memory_does_not_hold(tiny_model, tmp_path):
    """Really refused by the system, in a process with little left."""

    def work():
        cache = CacheConfig(block_size=4, num_blocks=300_000)
        actor = HybridActor.from_pretrained(tiny_model, cache=cache, dtype="float32")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        try:
            actor.generate(PROMPTS, PARAMS)
            return "it fit"
        except SetupError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        fresh = HybridActor.from_pretrained(tiny_model, cache=cache, dtype="float32")
        same = drawn(actor.generate(PROMPTS, PARAMS)) == drawn(fresh.generate(PROMPTS, PARAMS))
        return f"{said} {same}"

    status, said = torture.in_child(work, tmp_path / "said")
    assert status == 0, said
    assert "no room for a KV cache of 0.29 GiB" in said
    assert "num_blocks" in said
    assert said.endswith("True")


def test_an_actor_may_be_collected_while_an_optimizer_steps(tiny_model):
    """As the one of a run that failed is: its error holds it in a circle."""
    actor = HybridActor.from_pretrained(tiny_model, dtype="float32")
    circle, gone = [actor], weakref.ref(actor)
    circle.append(circle)
    del actor, circle
    hooks = [
        register_optimizer_step_post_hook(lambda *_: gc.collect() and None),
        register_optimizer_step_post_hook(lambda *_: None),  # which torch goes on to
    ]
    gc.disable()
    try:
        torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()
    assert gone() is None


# ---- whole runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("make", [short, broken])
def test_a_run_ends_with_what_to_do_and_goes_on_bitwise(tmp_path, stage, make):
    furnish(tmp_path)

    def config(name):
        return torture.config_of(stage, tmp_path, tmp_path / name)

    torture.train(config("warm"))
    with Failing() as counted:
        torture.train(config("whole"))
    whole = torture.left_by(tmp_path / "whole")
    for k in sampled(counted.calls, 6, f"{stage} {make.__name__}"):
        one = config(f"run{k}")
        mode = Failing(k, make, sticky=make is broken)
        try:
            with mode:
                torture.train(one)
        except (RuntimeError, MemoryError, ValueError) as error:
            told = error
        else:
            raise AssertionError(f"call {k} failed, and the run said that it had succeeded")
        notes = " ".join(getattr(told, "__notes__", ()))
        if str(told) != HIDDEN:
            assert isinstance(told, SetupError), (k, told)
            assert "the first" in str(told), (k, told)
            assert ("new process" if make is broken else "fusedrl plan") in str(told), k
        saved = sorted(Path(one.run.dir).glob("checkpoints/step_*"))
        if notes and "is in" in notes:
            assert str(saved[-1]) in notes, k
        again = {"resume": True} if saved else {"restart": True}
        torture.train(replace(one, run=replace(one.run, **again)))
        found = torture.left_by(Path(one.run.dir))
        names = [n for n in found | whole if found.get(n) != whole.get(n)]
        assert names == [], (k, names)
