"""Where steps are captured, decoding stays captured while prompts are read, and the host reads a
window while the device computes the next one. Counted, with a capture that returns the step."""

import random

import pytest

from fusedrl.engine.base.activity import Activity
from fusedrl.engine.generation.cache import CacheConfig
from fusedrl.engine.generation.generator import Generator
from fusedrl.engine.generation.graphs import StepGraphs
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.kernels.runtime import native

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "tie_word_embeddings": True,
}
SLOTS = 16
strict_only = pytest.mark.skipif(
    not native.capability, reason="strict mode needs the native extension"
)


class Counted(Generator):
    """Notes what is launched, and whether anything is under way while the host reads."""

    def __init__(self, *arguments, **options):
        self.prefills, self.windows, self.reads, self.idle_reads = [], [], 0, 0
        super().__init__(*arguments, **options)

    def _launch(self, plan):
        launched = super()._launch(plan)
        if launched:
            (self.prefills if plan.chunks else self.windows).append(plan)
        return launched

    def _read(self):
        self.reads += 1
        self.idle_reads += len(self._flights) == 1
        return super()._read()


@pytest.fixture(scope="module")
def decoder(device):
    return Decoder.random(model_config(CONFIG), 0, device=device)


def asked(count, seed=0, **more):
    draw = random.Random(seed)
    prompts = [
        [1] + [draw.randrange(3, 61) for _ in range(draw.randrange(4, 40))] for _ in range(count)
    ]
    params = [
        SamplingParams(max_new_tokens=draw.randrange(8, 80), seed=1, stop_token_ids=(5, 6), **more)
        for _ in prompts
    ]
    return prompts, params


def captured(decoder, cache=None, **options):
    return Counted(
        decoder,
        None,
        cache or CacheConfig(block_size=8, max_sequences=SLOTS),
        window=8,
        graphs=StepGraphs(lambda step, state: step),
        **options,
    )


def told(generator, prompts, params):
    found = sorted(generator.run(prompts, params), key=lambda finished: finished[:2])
    assert not generator.scheduler.busy
    assert generator.scheduler.blocks.available == generator.scheduler.blocks.total
    return [finished.completion for finished in found]


def test_decoding_stays_captured_and_sequences_are_admitted_in_batches(decoder):
    generator = captured(decoder)
    prompts, params = asked(128)
    told(generator, prompts, params)
    assert not any(len(plan.decode) for plan in generator.prefills), "a row decoded uncaptured"
    admitted = [
        sum(not chunk.start or chunk.final for chunk in plan.chunks) for plan in generator.prefills
    ]
    assert sum(admitted) >= 128
    # an eighth of 16 have left, at least, each time; at the end as many as wait
    assert sorted(admitted)[2] >= 2
    assert len(generator.prefills) <= (128 - SLOTS) // 2 + 1


def test_the_host_reads_while_the_device_works(decoder):
    generator = captured(decoder)
    prompts, params = asked(128)
    told(generator, prompts, params)
    assert generator.reads == len(generator.windows) + len(generator.prefills)
    assert generator.idle_reads <= 1, "nothing was under way while the host read"


def test_a_host_that_must_see_every_token_reads_each_before_the_next(decoder):
    class Tokenizer:
        eos_token_id, added_tokens_decoder, all_special_tokens, all_special_ids = 17, {}, (), ()

        @staticmethod
        def decode(ids, skip_special_tokens):
            return "".join(f" {token}" for token in ids)

    generator = captured(decoder)
    generator.tokenizer, generator._texts = Tokenizer(), type(generator._texts)(Tokenizer())
    told(generator, *asked(4, stop=(" 9 ",)))
    assert generator.reads == generator.idle_reads > 0
    assert all(plan.steps == 1 for plan in generator.windows)


@strict_only
@pytest.mark.cpu_only("strict mode is the C++ kernels'")
@pytest.mark.parametrize("blocks", [None, 40], ids=["roomy", "short of blocks"])
def test_the_window_after_an_end_changes_no_bit_and_counts_for_nothing(decoder, blocks):
    prompts, params = asked(48)
    cache = CacheConfig(block_size=8, num_blocks=blocks, max_sequences=SLOTS)
    want = told(Generator(decoder, None, cache, strict=True, window=1), prompts, params)
    activity = Activity()
    generator = captured(decoder, cache, strict=True, activity=activity)
    assert told(generator, prompts, params) == want
    tokens = sum(len(one.token_ids) for one in want)
    assert activity.tokens == tokens
    launched = sum(plan.steps * len(plan.sampled) for plan in generator.windows)
    assert launched > tokens, "some windows were launched for sequences that had ended"
    # prompts and completions that are cached hold what their tokens give
    longer = [one.prompt_ids + one.token_ids[:-1] for one in want]
    fresh = Generator(decoder, None, cache, strict=True, window=1)
    few = [SamplingParams(max_new_tokens=4)] * len(longer)
    assert told(generator, longer, few) == told(fresh, longer, few)


def test_what_tokens_were_drawn_from_stays_beside_them(decoder):
    prompts, params = asked(12, top_k=5)
    params[::2] = [
        SamplingParams(max_new_tokens=30, top_k=4, seed=2, return_kept=True) for _ in params[::2]
    ]
    want = told(Generator(decoder, None, CacheConfig(max_sequences=4), window=1), prompts, params)
    found = told(captured(decoder, CacheConfig(max_sequences=4)), prompts, params)
    for one, other in zip(found, want, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.kept is None) == (other.kept is None)
        for ids, others in zip(one.kept or (), other.kept or (), strict=True):
            assert sorted(map(int, ids)) == sorted(map(int, others))
