"""What may happen while completions are under way: updates, a switched adapter, other threads. The
judge is the training forward of each token's own weights, or what one call alone gives."""

import copy
import gc
import threading
import time
from dataclasses import replace

import pytest
import torch

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.generation import state as state_module
from fusedrl.engine.generation.turns import Turns
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": 1,
    "tie_word_embeddings": True,
}
LONG = [3 + i % 40 for i in range(24)]


def make(device, lora: bool = False, **cache) -> HybridActor:
    actor = HybridActor(
        Decoder.random(model_config(CONFIG), 0, device=device),
        cache=CacheConfig(**{"block_size": 4, "max_sequences": 4, "num_blocks": 200} | cache),
    )
    if lora:
        actor.add_adapter(LoRAConfig(rank=4, alpha=8.0), seed=1)
        with torch.no_grad():
            for layer in actor.decoder.layers:
                for b in layer.lora.tensors()[1::2]:
                    b.copy_(0.3 * torch.randn(b.shape, generator=torch.Generator().manual_seed(2)))
    return actor


def worst(device, actor: HybridActor, prompt, completion, first: int = 0) -> float:
    """How far the sampler was from the training forward, from completion token `first` on."""
    batch = PackedBatch.from_completions([prompt], [[completion]], device=device)
    return float((actor.score(batch).logp - batch.rollout_logp)[len(prompt) + first :].abs().max())


def fixed(count: int, **more) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, min_new_tokens=count, seed=4, **more)


# ---- updates -------------------------------------------------------------------------------------
def by_optimizer(actor):
    for p in actor.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).to(p)
    torch.optim.AdamW(actor.parameters(), lr=0.1, fused=True).step()


def in_place(actor):
    with torch.no_grad():
        for p in actor.parameters():
            p.mul_(1.3)


def by_data(actor):
    for p in actor.parameters():
        p.data.mul_(1.3)


def replaced(actor):
    layer = actor.decoder.layers[0]
    layer.down_proj = torch.nn.Parameter(layer.down_proj.detach() * -1.5)


@pytest.mark.parametrize("update", [by_optimizer, in_place, by_data, replaced])
def test_what_starts_after_an_update_is_of_the_new_weights_alone(update, device):
    """Two slots: the third request is admitted after the update, and its prompt's blocks are in the
    cache, of the older weights."""
    actor = make(device, max_sequences=2)
    prompts, older = [LONG, [5, 6], LONG], copy.deepcopy(actor.decoder)
    stream = actor.stream(prompts, [fixed(60), fixed(40), fixed(9)])
    first = next(stream)
    assert first.prompt == 1
    update(actor)
    done = {f.prompt: f.completion for f in stream}
    late, running = done[2], done[0]
    assert set(late.weights_versions) == {1} == {actor.weights_version}
    assert worst(device, actor, LONG, late) < 1e-4
    n = running.weights_versions.index(1)
    assert running.weights_versions == [0] * n + [1] * (60 - n)
    assert 0 < n < 60
    assert worst(device, HybridActor(older), LONG, cut(running, n)) < 1e-4
    assert set(actor.generate([LONG], fixed(3))[0][0].weights_versions) == {1}


def cut(completion, n):
    return replace(
        completion,
        token_ids=completion.token_ids[:n],
        logprobs=completion.logprobs[:n],
        weights_versions=completion.weights_versions[:n],
    )


def test_a_step_by_itself_notices(device):
    actor = make(device)
    generator = actor._generation()
    ticket, sequences = generator.prepare([LONG], fixed(40))
    generator.enqueue(ticket, sequences)
    generator.step()
    in_place(actor)
    while ticket.live:
        generator.step()
    versions = ticket.finished[0].completion.weights_versions
    assert versions == [0] * versions.index(1) + [1] * (40 - versions.index(1))


def test_a_cast_while_completions_are_under_way_is_refused_and_the_actor_goes_on(device):
    actor = make(device)
    stream = actor.stream([LONG, [4]], [fixed(40), fixed(2)])
    next(stream)
    kept = actor._generator.cache.k
    # as if the model had been float32 on another device
    actor._generator.cache.k = kept.to(torch.bfloat16)
    in_place(actor)
    with pytest.raises(
        RuntimeError,
        match=r"the model was moved or cast, to torch\.float32 on cpu, while completions were on "
        r"the way",
    ):
        next(stream)
    assert worst(device, actor, LONG, actor.generate([LONG], fixed(9))[0][0]) < 1e-4


def test_a_stream_that_begins_within_a_loan_is_refused(device):
    actor = make(device)
    actor.generate([[1]], fixed(2))
    stream = actor.stream([LONG], fixed(4))
    with actor.lend_cache(), pytest.raises(RuntimeError, match="lent to training"):
        next(stream)
    assert actor.generate([LONG], fixed(4))


# ---- the adapter ---------------------------------------------------------------------------------
def test_a_request_keeps_the_adapter_it_was_asked_under(device):
    actor = make(device, lora=True)
    alone = make(device, lora=True)
    want_on = [c for (c,) in alone.generate([LONG, [5, 6], LONG, [7]] * 2, fixed(30))]
    with alone.disable_adapter():
        want_off = alone.generate([LONG, [9]], fixed(12))
        assert (
            alone.score(PackedBatch.from_completions([LONG], want_off[:1], device=device))
            .logp.sub(0)
            .any()
        )
    found, inner = [], None
    for finished in actor.stream([LONG, [5, 6], LONG, [7]] * 2, fixed(30)):
        found.append(finished)
        if inner is None:
            with actor.disable_adapter():
                inner = actor.generate([LONG, [9]], fixed(12))
                unbegun = actor.stream([LONG], fixed(12))
    assert [[c.token_ids for c in group] for group in inner] == [
        [c.token_ids for c in group] for group in want_off
    ]
    assert [f.completion.token_ids for f in sorted(found, key=lambda f: f[:2])] == [
        c.token_ids for c in want_on
    ]
    for finished in found:
        prompt = ([LONG, [5, 6], LONG, [7]] * 2)[finished.prompt]
        assert worst(device, actor, prompt, finished.completion) < 1e-4
    (late,) = unbegun  # asked within the block, computed outside
    assert late.completion.token_ids == want_off[0][0].token_ids
    with actor.disable_adapter():
        assert worst(device, actor, LONG, inner[0][0]) < 1e-4
        begun = actor.stream([LONG], fixed(12))
    with actor.disable_adapter():
        assert next(begun).completion.token_ids == late.completion.token_ids
    assert not actor._generator.scheduler.busy


@pytest.mark.parametrize(
    "cache", [{}, {"num_blocks": 20, "max_sequences": 3}], ids=["roomy", "preempting"]
)
def test_calls_of_both_states_take_turns_and_none_waits_for_ever(cache, device):
    actor, alone = make(device, lora=True, **cache), make(device, lora=True)
    prompts = [LONG[:n] for n in (3, 9, 5, 12, 7, 4)]
    want = alone.generate(prompts, fixed(20))
    with alone.disable_adapter():
        base = alone.generate(prompts, fixed(20))
    on = actor.stream(prompts, fixed(20))
    with actor.disable_adapter():
        away = actor.stream(prompts, fixed(20))
    done = {True: [], False: []}
    streams = {True: on, False: away}
    while streams:
        for adapted in list(streams):
            found = next(streams[adapted], None)
            if found is None:
                del streams[adapted]
            else:
                done[adapted].append(found)
    for adapted, expected in ((True, want), (False, base)):
        assert [f.completion.token_ids for f in sorted(done[adapted], key=lambda f: f[:2])] == [
            group[0].token_ids for group in expected
        ]
    scheduler = actor._generator.scheduler
    assert not scheduler.busy
    assert scheduler.blocks.available == scheduler.blocks.total


def test_the_adapter_is_of_the_thread_that_switches_it(device):
    actor = make(device, lora=True)
    batch = PackedBatch.from_sequences([(LONG, [7, 8, 9])], device=device)
    on = actor.score(batch).logp
    with actor.disable_adapter():
        off = actor.score(batch).logp
        seen = {}
        thread = threading.Thread(
            target=lambda: seen.update(
                logp=actor.score(batch).logp, enabled=actor.decoder.adapter_enabled
            )
        )
        thread.start()
        thread.join()
        assert not actor.decoder.adapter_enabled
    assert seen["enabled"]
    assert torch.equal(seen["logp"], on)
    assert not torch.equal(off, on)


# ---- threads -------------------------------------------------------------------------------------
def together(*works) -> list:
    """Run them at once; what each returned, or the exception."""
    outs: list = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(index, work):
        start.wait()
        try:
            outs[index] = work()
        except BaseException as error:
            outs[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return outs


def calls(index):
    """The prompts, parameters and request ids of one thread's calls."""
    for round_ in range(4):
        prompts = [
            [3 + (7 * index + 5 * round_ + i) % 50 for i in range(2 + 3 * j)] for j in range(3)
        ]
        yield (
            prompts,
            SamplingParams(max_new_tokens=25, n=2, seed=index),
            [100 * index + 10 * round_ + j for j in range(3)],
        )


@pytest.mark.parametrize(
    "cache",
    [{}, {"num_blocks": 24, "max_sequences": 5, "max_tokens_per_step": 7}],
    ids=["roomy", "preempting"],
)
def test_threads_get_what_they_would_have_got_alone(cache, device):
    alone, actor = make(device), make(device, **cache)
    want = [
        [[c.token_ids for group in alone.generate(*call) for c in group] for call in calls(index)]
        for index in range(4)
    ]

    def work(index):
        return lambda: [
            [c.token_ids for group in actor.generate(*call) for c in group] for call in calls(index)
        ]

    assert together(*map(work, range(4))) == want
    generator = actor._generator
    assert not generator.scheduler.busy
    assert not generator._tickets
    assert generator.scheduler.blocks.available == generator.scheduler.blocks.total


def test_an_exception_in_one_threads_consumer_is_its_own(device):
    actor, alone = make(device), make(device)
    want = alone.generate([LONG, [5]], fixed(50, n=2))

    def breaks():
        for _ in actor.stream([[7], [8]], [fixed(2), fixed(200)]):
            raise KeyError("a reward")

    error, outs = together(breaks, lambda: actor.generate([LONG, [5]], fixed(50, n=2)))
    assert isinstance(error, KeyError)
    assert [[c.token_ids for c in group] for group in outs] == [
        [c.token_ids for c in group] for group in want
    ]
    gc.collect()
    actor.generate([[1]], fixed(2))
    assert not actor._generator.scheduler.busy


def test_a_step_that_fails_is_an_error_in_every_thread_and_the_actor_works_on(monkeypatch, device):
    actor = make(device)
    want = actor.generate([LONG], fixed(60))
    step, calls_, both = state_module.decode_step, [], threading.Barrier(2)

    def fails(*args):
        calls_.append(1)
        if len(calls_) == 20:
            raise OSError("the card fell off")
        return step(*args)

    monkeypatch.setattr(state_module, "decode_step", fails)

    def work():
        stream = actor.stream([LONG, [4]], [fixed(150), fixed(1)])
        next(stream)
        both.wait()
        return list(stream)

    outs = together(work, work)
    assert sorted(type(out).__name__ for out in outs) == ["OSError", "RuntimeError"], outs
    told = next(out for out in outs if isinstance(out, RuntimeError))
    assert "a step failed in another call on this actor" in str(told)
    assert isinstance(told.__cause__, OSError)
    assert [c.token_ids for c in actor.generate([LONG], fixed(60))[0]] == [
        c.token_ids for c in want[0]
    ]


def test_training_in_one_thread_while_another_generates(device):
    actor, batch = (
        make(device),
        PackedBatch.from_sequences([(LONG, [7, 8, 9]), ([1, 2], [3])], device=device),
    )
    stop = threading.Event()

    def trains():
        found = []
        while not stop.is_set():
            hidden = actor.forward(batch)
            logp, _ = actor.logprobs(batch, hidden)
            logp.sum().backward()
            found.append(logp.detach())
        return found

    def generates():
        try:
            return [actor.generate([LONG, [5]], fixed(40)) for _ in range(4)]
        finally:
            stop.set()

    alone = make(device)
    want, logp = alone.generate([LONG, [5]], fixed(40)), alone.score(batch).logp
    found, outs = together(trains, generates)
    assert found
    assert all(torch.allclose(x, logp, atol=1e-5) for x in found)
    assert all(
        [c.token_ids for c in group] == [c.token_ids for c in expected]
        for out in outs
        for group, expected in zip(out, want, strict=True)
    )
    assert actor.weights_version == 0


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
def test_an_optimizers_step_waits_for_the_decoding_step_of_another_thread(options, device):
    """The weights are one of two sets at any time, and no token is of a mixture of both."""
    actor, sets = make(device), [make(device), make(device)]
    moves = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(device) * 0.1
        for i, p in enumerate(actor.parameters())
    ]
    optimizer = torch.optim.SGD(actor.parameters(), lr=1.0, **options)

    def move(sign: float) -> None:
        for p, by in zip(actor.parameters(), moves, strict=True):
            p.grad = sign * by
        optimizer.step()

    with torch.no_grad():
        for p, by in zip(sets[1].parameters(), moves, strict=True):
            p.sub_(by)
    stop = threading.Event()

    def trains():
        count = 0
        while not stop.is_set():
            move(1.0 if count % 2 == 0 else -1.0)
            count += 1
            if count % 8 == 0:
                stop.wait(0.02)  # for a completion that no step comes into
        return count

    def generates():
        try:
            return [
                actor.generate([LONG], replace(fixed(3), seed=seed))[0][0] for seed in range(40)
            ]
        finally:
            stop.set()

    steps, outs = together(trains, generates)
    assert steps > 10
    pure = [out for out in outs if len(set(out.weights_versions)) == 1]
    assert pure
    assert all(min(worst(device, one, LONG, out) for one in sets) < 1e-3 for out in pure)


def test_an_optimizer_that_raised_holds_nobody_up(device):
    actor = make(device)
    optimizer = torch.optim.SGD(actor.parameters(), lr=0.1)
    want = actor.generate([LONG], fixed(4))

    def closure():
        raise KeyError("half-way")

    def fails():
        with pytest.raises(KeyError):
            optimizer.step(closure)

    fails()
    # in the same thread
    assert actor.generate([LONG], fixed(4))[0][0].token_ids == want[0][0].token_ids
    thread = threading.Thread(target=fails)
    optimizer.step()
    thread.start()
    thread.join()
    # its thread has ended
    assert actor.generate([LONG], fixed(4))[0][0].token_ids == want[0][0].token_ids


@pytest.mark.parametrize("how", ["closure", "hook", "in the step", "after a step within"])
def test_after_an_optimizer_that_raised_other_threads_go_on(how, device):
    """Its thread lives on, so nothing but its stack tells that the step is over."""
    actor = make(device)
    inside = []

    class Raises(torch.optim.SGD):
        def step(self, closure=None):
            if how == "after a step within":
                super().step(closure)
                inside.append(actor._watch._still.locked())
            raise KeyError("half-way")

    optimizer = (Raises if how in ("in the step", "after a step within") else torch.optim.SGD)(
        actor.parameters(), lr=0.1
    )

    def raises(*_):
        raise KeyError("half-way")

    def steps_and_generates():
        torch.optim.SGD(actor.parameters(), lr=0.1).step()
        done.append(actor.generate([LONG], fixed(4)))

    def others():
        thread = threading.Thread(target=steps_and_generates, daemon=True)
        thread.start()
        thread.join(20)

    for _ in range(2):
        done: list = []
        handle = optimizer.register_step_pre_hook(raises) if how == "hook" else None
        with pytest.raises(KeyError):
            optimizer.step(raises if how == "closure" else None)
        if handle is not None:
            handle.remove()
        others()
        assert len(done) == 1
    assert actor.generate([LONG], fixed(4))
    assert inside == ([True, True] if how == "after a step within" else [])


def test_weights_loaded_in_another_thread_between_steps_are_noticed(device):
    actor = make(device, max_sequences=2)
    turn, loaded = threading.Event(), threading.Event()

    def loads():
        turn.wait(20)
        in_place(actor)
        loaded.set()

    def generates():
        out = []
        for finished in actor.stream([LONG, [5], LONG], [fixed(60), fixed(35), fixed(6)]):
            out.append(finished)
            turn.set()
            loaded.wait(20)
        return out

    _, outs = together(loads, generates)
    late = next(f.completion for f in outs if f.prompt == 2)
    assert set(late.weights_versions) == {1}
    assert worst(device, actor, LONG, late) < 1e-4


def test_abort_and_release_from_another_thread(device):
    actor = make(device)
    begun = threading.Event()

    def generates():
        stream = actor.stream([[5], [6]], [fixed(1), fixed(240)])
        out = [next(stream)]
        begun.set()
        time.sleep(0.02)
        return [*out, *stream]

    def releases():
        begun.wait(20)
        actor.release_cache()

    outs, _ = together(generates, releases)
    assert {f.completion.finish_reason for f in outs} == {"length", "aborted"}
    assert actor.generate([[5]], fixed(3))[0][0].finish_reason == "length"


def test_turns_are_in_order_and_an_interrupt_leaves_no_trace(monkeypatch):
    turns, order = Turns(), []
    assert turns.try_enter()
    with pytest.raises(RuntimeError, match="from within one of its own steps"), turns:
        pass
    threads = []
    for name in range(5):

        def work(name=name):
            with turns:
                order.append(name)

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        while len(turns._waiting) != name + 1:
            time.sleep(0.001)
    turns.leave()
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4]
    assert turns.try_enter()

    turns.leave()

    class Interrupted:
        """A gate at which the wait is interrupted."""

        def __init__(self):
            self.asked = 0

        def acquire(self):
            self.asked += 1
            if self.asked == 2:
                raise KeyboardInterrupt

    turns._holder = -1  # another thread
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Lock", Interrupted)
        with pytest.raises(KeyboardInterrupt), turns:
            pass
    assert not turns._waiting
    turns.leave()
    with turns:
        pass
