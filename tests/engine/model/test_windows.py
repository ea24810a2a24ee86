"""Steps in a row between two looks of the host: whatever their number, captured or not, the
completions are the same to the bit."""

import random

import pytest
import torch

from fusedrl.engine.generation import state as state_module
from fusedrl.engine.generation.cache import CacheConfig
from fusedrl.engine.generation.generator import Generator
from fusedrl.engine.generation.graphs import StepGraphs, addresses, padded_blocks, padded_rows
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.generation.scheduler import Scheduler
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.kernels.runtime import native

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "tie_word_embeddings": True,
}
ROOMY, TIGHT = (
    CacheConfig(block_size=4),
    CacheConfig(block_size=4, num_blocks=26, max_sequences=6, max_tokens_per_step=9),
)  # chunks, preemption
strict_only = pytest.mark.skipif(
    not native.capability, reason="strict mode needs the native extension"
)

ASKED = [
    SamplingParams(max_new_tokens=24, n=2, seed=1),
    SamplingParams(max_new_tokens=17, temperature=1.5, stop_token_ids=tuple(range(20, 30)), seed=2),
    SamplingParams(
        max_new_tokens=30,
        temperature=1.5,
        min_new_tokens=11,
        stop_token_ids=tuple(range(3, 40)),
        seed=3,
    ),
    SamplingParams(max_new_tokens=1),
    SamplingParams(max_new_tokens=19, temperature=0.0, min_new_tokens=19),
    SamplingParams(
        max_new_tokens=22, top_k=5, banned_token_ids=(2, 7, 9), logit_bias={4: 2.0, 5: -1.0}, n=3
    ),
    SamplingParams(max_new_tokens=9, top_p=0.8, min_p=0.05, min_new_tokens=2, seed=4),
]


@pytest.fixture(scope="module")
def decoder(device):
    return Decoder.random(model_config(CONFIG), 0, device=device)


def prompts(count, longest=30, seed=0):
    draw = random.Random(seed)
    return [
        [1] + [draw.randrange(3, 61) for _ in range(draw.randrange(longest))] for _ in range(count)
    ]


class Captured(StepGraphs):
    """The control flow of a GPU: padded rows that live at one address, steps that are prepared
    once, a host that looks only when a window is over."""

    def __init__(self):
        self.captures = []
        super().__init__(
            lambda step, state: (self.captures.append(len(state.columns["rows"])), step)[1]
        )


class Tokenizer:
    eos_token_id = 17
    added_tokens_decoder, all_special_tokens, all_special_ids = {}, (), ()

    @staticmethod
    def decode(ids, skip_special_tokens):
        return "".join(f" {token}" for token in ids)


def is_empty(generator):
    scheduler = generator.scheduler
    assert not scheduler.busy
    assert scheduler.blocks.available == scheduler.blocks.total
    assert len(scheduler._free_slots) == scheduler.slots.count


def run(generator, asked=None, params=None):
    asked = prompts(len(ASKED)) if asked is None else asked
    found = sorted(generator.run(asked, params or ASKED), key=lambda f: f[:2])
    is_empty(generator)
    return [f.completion for f in found]


@pytest.fixture
def count_tokens(monkeypatch):
    seen = []

    def counted(step):
        return lambda weights, ids, *rest: (seen.append(len(ids)), step(weights, ids, *rest))[1]

    for name in ("decode_step", "strict_step"):
        monkeypatch.setattr(state_module, name, counted(getattr(state_module, name)))
    return seen


# ---- the same completions ------------------------------------------------------------------------
def test_a_host_that_looks_after_every_step_computes_the_same_steps(decoder, count_tokens):
    want = run(Generator(decoder, window=1))
    steps = list(count_tokens)
    assert {c.finish_reason for c in want} == {"stop", "length"}
    for window in (2, 8, 32):
        del count_tokens[:]
        assert run(Generator(decoder, window=window)) == want
        assert count_tokens == steps


@strict_only
@pytest.mark.cpu_only("strict mode is the C++ kernels'")
@pytest.mark.parametrize("cache", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_windows_and_captured_steps_change_no_bit(decoder, cache, count_tokens, monkeypatch):
    preempted = []
    requeue = Scheduler._requeue
    monkeypatch.setattr(
        Scheduler,
        "_requeue",
        lambda self, sequence: (preempted.append(sequence.id), requeue(self, sequence))[1],
    )
    want = run(Generator(decoder, None, ROOMY, strict=True, window=1))
    ends = {len(c.token_ids) for c in want if c.finish_reason == "stop"}
    assert any(length % 8 not in (0, 1) for length in ends)
    for window in (1, 2, 8):
        for graphs in (None, Captured()):
            del count_tokens[:]
            generator = Generator(decoder, None, cache, strict=True, window=window, graphs=graphs)
            assert run(generator) == want
            assert run(generator) == want, "prefix hits, and states that are used again"
            if graphs:
                assert graphs.captures
                assert len(graphs.captures) < len(count_tokens)
    assert bool(preempted) == (cache is TIGHT)


def test_without_strict_a_window_costs_rounding_only(decoder):
    want, outs = (
        run(Generator(decoder, window=1)),
        run(Generator(decoder, window=8, graphs=Captured())),
    )
    for one, other in zip(want, outs, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) < 1e-5


def test_stop_strings_end_at_the_first_token_that_completes_them(decoder, count_tokens):
    free = run(Generator(decoder, Tokenizer(), window=1))
    stop = tuple(f" {c.token_ids[3]} " for c in free if len(c.token_ids) > 5)
    params = SamplingParams(max_new_tokens=24, seed=1, stop=stop)
    want = run(Generator(decoder, Tokenizer(), window=1), params=params)
    assert {c.finish_reason for c in want} >= {"stop"}
    for graphs in (None, Captured()):
        outs = run(Generator(decoder, Tokenizer(), window=8, graphs=graphs), params=params)
        assert [(c.token_ids, c.text, c.finish_reason) for c in outs] == [
            (c.token_ids, c.text, c.finish_reason) for c in want
        ]


# ---- in flight -----------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_streams_closed_and_aborted_leak_nothing(decoder, cache):
    draw = random.Random(0)
    generators = [
        Generator(decoder, None, cache, window=8, graphs=graphs) for graphs in (None, Captured())
    ]
    for seed in range(12):
        for generator in generators:
            streams = [
                generator.run(
                    prompts(5, seed=seed + i),
                    SamplingParams(max_new_tokens=draw.randrange(1, 25), n=draw.randrange(1, 4)),
                )
                for i in range(2)
            ]
            for _ in range(draw.randrange(9)):
                next(draw.choice(streams), None)
            if seed % 2:
                generator.abort()
            for stream in draw.sample(streams, 2):
                stream.close()
            is_empty(generator)


@strict_only
@pytest.mark.cpu_only("strict mode is the C++ kernels'")
def test_what_is_aborted_is_the_beginning_of_what_would_have_come(decoder):
    whole = run(Generator(decoder, strict=True, window=1))
    for graphs in (None, Captured()):
        generator = Generator(decoder, strict=True, window=8, graphs=graphs)
        stream = generator.run(prompts(len(ASKED)), ASKED)
        seen = [next(stream) for _ in range(2)]
        generator.abort()
        seen = sorted([*seen, *stream], key=lambda f: f[:2])
        for finished, want in zip(seen, whole, strict=True):
            n = len(finished.completion.token_ids)
            assert (finished.completion.token_ids, finished.completion.logprobs) == (
                want.token_ids[:n],
                want.logprobs[:n],
            )
        is_empty(generator)


def test_an_update_under_way_is_told_token_by_token(device):
    decoder = Decoder.random(model_config(CONFIG), 0, device=device)
    params = [SamplingParams(max_new_tokens=n, temperature=0.0, min_new_tokens=n) for n in (3, 21)]
    for graphs in (None, Captured()):
        generator = Generator(decoder, window=8, graphs=graphs)
        stream = generator.run([[1, 4], [1, 4, 5]], params)
        next(stream)
        generator.bump(1)
        versions = next(stream).completion.weights_versions
        assert versions == [0] * versions.index(1) + [1] * (21 - versions.index(1))
        # one with the prefill, a window, and the window that was under way meanwhile
        assert versions.index(1) == (3 if graphs is None else 17)
        is_empty(generator)


@pytest.mark.parametrize("graphs", [None, Captured], ids=["plain", "captured"])
def test_nan_in_the_middle_of_a_window_ends_everything_and_the_next_call_works(
    decoder, graphs, monkeypatch
):
    generator = Generator(decoder, window=8, graphs=graphs and graphs())
    want, calls, draw = run(generator), [], state_module.sample

    def poisoned(logits, **arguments):
        """What `sample` does on a GPU, where it does not look."""
        calls.append(1)
        drawn = draw(logits, **arguments)
        bad = torch.arange(len(logits), device=logits.device) == 1
        return (
            drawn
            if len(calls) != 6
            else drawn._replace(
                token_ids=torch.where(bad, -1, drawn.token_ids),
                logp=torch.where(bad, torch.nan, drawn.logp),
            )
        )

    monkeypatch.setattr(state_module, "sample", poisoned)
    stream = generator.run(prompts(3), SamplingParams(max_new_tokens=30, min_new_tokens=30))
    with pytest.raises(RuntimeError, match="the logits of a sequence hold NaN or infinity"):
        next(stream)
    # nobody looked before the next window was under way, and no row fed -1 to the embedding
    assert len(calls) == (17 if graphs else 6)
    is_empty(generator)
    outs = run(generator)
    assert [c.token_ids for c in outs] == [c.token_ids for c in want]


# ---- captured steps ------------------------------------------------------------------------------
def test_padded_sizes():
    assert [padded_rows(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 500, 512, 513)] == [
        1,
        2,
        4,
        4,
        8,
        8,
        16,
        16,
        32,
        48,
        512,
        512,
        None,
    ]
    assert [padded_blocks(n, 100) for n in (0, 1, 16, 17, 33, 65, 99)] == [
        16,
        16,
        16,
        32,
        64,
        100,
        100,
    ]
    assert padded_blocks(3, 8) == 8


def test_a_step_is_captured_once_for_its_size(decoder):
    def ask(count, prompt=8, **more):
        run(
            generator,
            prompts(count, prompt),
            SamplingParams(max_new_tokens=20, min_new_tokens=20, **more),
        )
        return list(graphs.captures)

    graphs = Captured()
    generator = Generator(decoder, None, CacheConfig(block_size=4), window=8, graphs=graphs)
    assert ask(5, top_k=3) == ask(5, top_k=3) == ask(7, top_k=9, temperature=0.0, seed=3) == [8], (
        "other numbers are other values, not another step"
    )
    assert ask(2, top_k=3) == [8, 2]
    assert ask(7) == [8, 2, 8], "nothing to cut off"
    assert ask(9) == [8, 2, 8, 16]
    assert ask(5, prompt=75) == [8, 2, 8, 16, 8], "a wider block table"
    assert ask(5, prompt=75) == [8, 2, 8, 16, 8]


def test_an_optimizer_step_keeps_captures_and_moved_weights_do_not(device):
    decoder, graphs = Decoder.random(model_config(CONFIG), 0, device=device), Captured()
    generator = Generator(decoder, window=8, graphs=graphs)
    params = SamplingParams(max_new_tokens=12, temperature=0.0, banned_token_ids=(2,))
    run(generator, prompts(2), params)
    captured = len(graphs.captures)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.1)
    generator.bump(1)
    want = run(Generator(decoder, window=1), prompts(2), params)
    assert [c.token_ids for c in run(generator, prompts(2), params)] == [c.token_ids for c in want]
    assert len(graphs.captures) == captured
    decoder.norm.data = decoder.norm.data.clone()
    generator.bump(2)
    assert [c.token_ids for c in run(generator, prompts(2), params)] == [c.token_ids for c in want]
    assert len(graphs.captures) == 2 * captured


def test_addresses_name_what_a_step_has_in_itself(decoder):
    weights = decoder.weights()
    first = addresses(weights)
    assert len(first) > 20
    assert addresses(weights) == addresses(decoder.weights()) == first
    assert addresses(weights._replace(norm_eps=2.0)) != first
    weights.rope_table.upto(2 * weights.rope_table.tensors[0].shape[1] + 1)
    assert addresses(weights) != first, "a table that grew lies elsewhere"
    first = addresses(weights)
    assert addresses(weights._replace(norm=weights.norm.clone())) != first
    hash(first)
