"""Generation from the paged cache, against transformers on a real model and against itself on a
random one.

One file: the two models and the requests that all cases share.
"""

import random

import numpy as np
import pytest
import torch

from fusedrl.engine.generation import state as state_module
from fusedrl.engine.generation.cache import CacheConfig, block_bytes, resolve_num_blocks
from fusedrl.engine.generation.generator import Generator
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.generation.scheduler import Scheduler
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import load_decoder, load_tokenizer

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


@pytest.fixture(scope="module")
def decoder(device):
    return Decoder.random(model_config(CONFIG), 0, device=device)


def ragged_prompts(count, longest, vocab=61, seed=0):
    draw = random.Random(seed)
    return [
        [1] + [draw.randrange(3, vocab) for _ in range(draw.randrange(longest))]
        for _ in range(count)
    ]


def generate(generator, prompts, params, request_ids=None):
    """[prompt][sample] -> Completion, and the generator is empty again."""
    found = sorted(generator.run(prompts, params, request_ids), key=lambda f: f[:2])
    is_empty(generator)
    outs = [[] for _ in prompts]
    for f in found:
        outs[f.prompt].append(f.completion)
    return outs


def is_empty(generator):
    scheduler = generator.scheduler
    assert not scheduler.busy
    assert not generator._tickets
    assert scheduler.blocks.available == scheduler.blocks.total
    assert len(scheduler._free_slots) == scheduler.slots.count


def logprobs_by_the_training_forward(decoder, completion, temperature=1.0):
    ids = torch.tensor(completion.prompt_ids + completion.token_ids, device=decoder.device)
    n, first = len(ids), len(completion.prompt_ids)
    with torch.no_grad():
        hidden = decoder(
            ids,
            torch.arange(n, device=ids.device),
            torch.tensor([0, n], dtype=torch.int32, device=ids.device),
            n,
        )
        logp = torch.log_softmax(hidden.double() @ decoder.head_weight.double().T / temperature, -1)
    return logp[first - 1 : n - 1].gather(1, ids[first:, None])[:, 0].cpu()


def check_logprobs(device, decoder, outs, temperature=1.0):
    for completion in (c for group in outs for c in group):
        want = logprobs_by_the_training_forward(decoder, completion, temperature)
        assert (torch.tensor(completion.logprobs, device=device) - want).abs().max() <= 1e-4


@pytest.fixture
def count_preemptions(monkeypatch):
    seen = []
    requeue = Scheduler._requeue
    monkeypatch.setattr(
        Scheduler,
        "_requeue",
        lambda self, sequence: (seen.append(sequence.id), requeue(self, sequence))[1],
    )
    return seen


@pytest.fixture
def count_tokens(monkeypatch):
    seen = []
    step = state_module.decode_step
    monkeypatch.setattr(
        state_module,
        "decode_step",
        lambda weights, ids, *rest: (seen.append(len(ids)), step(weights, ids, *rest))[1],
    )
    return seen


# ---- a real model --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def greedy_by_transformers(device):
    cached = {}

    def run(path, prompts, new):
        if not cached:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
            )
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0
            )
            for index, row in enumerate(out[:, width:].tolist()):
                cached[index] = row[: row.index(2) + 1] if 2 in row else row
            cached["model"] = model
        return cached

    return run


@pytest.mark.parametrize(
    "config,preempts",
    [
        (CacheConfig(), False),
        (CacheConfig(num_blocks=34), True),
        (CacheConfig(max_sequences=9, max_tokens_per_step=13), False),
    ],
    ids=["roomy", "preempting", "few slots, small chunks"],
)
def test_greedy_tokens_are_those_of_transformers(
    shared, config, preempts, count_preemptions, greedy_by_transformers, device
):
    path = shared / "models" / "stories260k"
    decoder = load_decoder(path, dtype="float32", device=device)
    prompts = [p[:60] for p in ragged_prompts(32, 59, vocab=512)]
    want = greedy_by_transformers(path, prompts, 200)
    generator = Generator(decoder, None, config)
    outs = generate(generator, prompts, SamplingParams(max_new_tokens=200, temperature=0.0))
    assert [group[0].token_ids for group in outs] == [want[i] for i in range(32)]
    assert bool(count_preemptions) == preempts
    check_logprobs(device, decoder, outs)
    for (completion,) in outs:
        with torch.no_grad():
            logp = (
                want["model"](
                    torch.tensor([completion.prompt_ids + completion.token_ids], device=device)
                )
                .logits[0]
                .log_softmax(-1)
            )
        theirs = logp[len(completion.prompt_ids) - 1 : -1].gather(
            1, torch.tensor(completion.token_ids, device=device)[:, None]
        )[:, 0]
        torch.testing.assert_close(
            torch.tensor(completion.logprobs, device=device), theirs, rtol=0, atol=1e-4
        )


# ---- draws do not depend on the schedule ---------------------------------------------------------
PARAMS = SamplingParams(max_new_tokens=30, temperature=0.8, n=3, seed=5)


@pytest.fixture(scope="module")
def plain(decoder):
    return generate(Generator(decoder), ragged_prompts(9, 40), PARAMS)


def same(outs, want):
    for group, expected in zip(outs, want, strict=True):
        assert [c.token_ids for c in group] == [c.token_ids for c in expected]
        for c, e in zip(group, expected, strict=True):
            assert (c.finish_reason, c.weights_versions) == (e.finish_reason, e.weights_versions)
            assert np.abs(np.array(c.logprobs) - np.array(e.logprobs)).max() <= 1e-4


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(num_blocks=6),
        CacheConfig(block_size=4, num_blocks=40),
        CacheConfig(max_sequences=2),
        CacheConfig(max_sequences=1, max_tokens_per_step=1),
        CacheConfig(max_sequences=4, max_tokens_per_step=5),
        CacheConfig(block_size=64),
        CacheConfig(block_size=1),
    ],
    ids=lambda c: f"{c.block_size}-{c.num_blocks}-{c.max_sequences}-{c.max_tokens_per_step}",
)
def test_schedule_changes_no_token(decoder, plain, config):
    same(generate(Generator(decoder, None, config), ragged_prompts(9, 40), PARAMS), plain)


def test_two_runs_are_bitwise_alike(decoder, plain):
    assert generate(Generator(decoder), ragged_prompts(9, 40), PARAMS) == plain


def test_companions_and_order_change_no_token(decoder, plain):
    prompts = ragged_prompts(9, 40)
    order = [4, 0, 8]
    same(
        generate(Generator(decoder), [prompts[i] for i in order], PARAMS, request_ids=order),
        [plain[i] for i in order],
    )


def test_draws_are_keyed_by_seed_request_and_sample(plain, decoder):
    assert len({tuple(c.token_ids) for c in plain[0]}) == 3
    twice = generate(Generator(decoder), [[1, 5]] * 2, SamplingParams(max_new_tokens=20))
    assert twice[0][0].token_ids != twice[1][0].token_ids
    other = generate(Generator(decoder), [[1, 5]], SamplingParams(max_new_tokens=20, seed=1))
    assert other[0][0].token_ids != twice[0][0].token_ids


def test_logprobs_are_of_the_full_scaled_distribution(decoder, plain, device):
    check_logprobs(device, decoder, plain, temperature=0.8)
    restrictions = ({"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.2}, {"min_new_tokens": 7})
    outs = generate(
        Generator(decoder),
        ragged_prompts(4, 10),
        [SamplingParams(max_new_tokens=20, temperature=0.8, **r) for r in restrictions],
    )
    check_logprobs(device, decoder, outs, temperature=0.8)
    mixed = generate(
        Generator(decoder),
        ragged_prompts(2, 10),
        [SamplingParams(max_new_tokens=9, temperature=t) for t in (0.0, 1.0)],
    )
    check_logprobs(device, decoder, mixed)


def test_bfloat16_is_as_near_to_float64_as_the_training_forward(decoder, device):
    config = model_config({**CONFIG, "initializer_range": 0.1})
    half, oracle = (
        Decoder.random(config, 0, dtype=dtype, device=decoder.device)
        for dtype in (torch.bfloat16, torch.float64)
    )
    oracle.load_state_dict(half.state_dict())
    outs = [
        group[0]
        for group in generate(
            Generator(half), ragged_prompts(16, 10), SamplingParams(max_new_tokens=20)
        )
    ]
    want, trained = (
        torch.cat([logprobs_by_the_training_forward(d, c) for c in outs]) for d in (oracle, half)
    )
    ours = torch.tensor([x for c in outs for x in c.logprobs], device=device)
    assert (ours - want).abs().mean() <= 1.5 * (trained - want).abs().mean()
    assert (ours - trained).abs().max() <= 2e-2


@pytest.mark.parametrize(
    "config", [CacheConfig(), CacheConfig(num_blocks=7)], ids=["roomy", "preempting"]
)
def test_nan_in_blocks_that_nobody_wrote_changes_nothing(decoder, plain, config):
    generator = Generator(decoder, None, config)
    generator.cache.k.fill_(torch.nan)
    generator.cache.v.fill_(torch.nan)
    same(generate(generator, ragged_prompts(9, 40), PARAMS), plain)


# ---- the prefix cache ----------------------------------------------------------------------------
def test_a_prompt_is_prefilled_once_for_its_samples(decoder, count_tokens):
    generate(Generator(decoder), [list(range(3, 50))], SamplingParams(max_new_tokens=1, n=8))
    assert count_tokens == [47]


def test_prefix_hits_skip_full_blocks_and_change_no_token(decoder, plain, count_tokens):
    generator, prompts = Generator(decoder), ragged_prompts(9, 40)
    same(generate(generator, prompts, PARAMS), plain)
    del count_tokens[:]
    same(generate(generator, prompts, PARAMS), plain)
    assert count_tokens[0] == sum((len(p) - 1) % 16 + 1 for p in prompts)


def test_a_bump_makes_cached_prefixes_unreachable(count_tokens, device):
    decoder = Decoder.random(model_config(CONFIG), 0, device=device)
    generator, prompts = Generator(decoder), ragged_prompts(5, 40)
    before = generate(generator, prompts, SamplingParams(max_new_tokens=20, temperature=0.0))
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(1.1)
    generator.bump(7)
    del count_tokens[:]
    outs = generate(generator, prompts, SamplingParams(max_new_tokens=20, temperature=0.0))
    assert count_tokens[0] == sum(map(len, prompts))
    assert {v for group in before for v in group[0].weights_versions} == {0}
    assert {v for group in outs for v in group[0].weights_versions} == {7}
    check_logprobs(device, decoder, outs)


def test_weights_that_change_under_way_are_told_token_by_token(decoder):
    generator = Generator(decoder)
    stream = generator.run(
        [[1, 4], [1, 4, 5]],
        [SamplingParams(max_new_tokens=n, temperature=0.0, min_new_tokens=n) for n in (3, 9)],
    )
    next(stream)
    generator.bump(1)
    assert next(stream).completion.weights_versions == [0] * 3 + [1] * 6
    assert list(stream) == []


# ---- how completions end -------------------------------------------------------------------------
def test_finish_reasons_and_stop_tokens(decoder):
    free = generate(
        Generator(decoder),
        [[1, 7, 9]],
        SamplingParams(max_new_tokens=40, temperature=0.0, min_new_tokens=40),
    )[0][0]
    assert (free.finish_reason, len(free.token_ids)) == ("length", 40)
    stop = free.token_ids[12]
    first = free.token_ids.index(stop)
    for limit, reason in ((40, "stop"), (first + 1, "stop"), (first, "length")):
        if limit:
            cut = generate(
                Generator(decoder),
                [[1, 7, 9]],
                SamplingParams(max_new_tokens=limit, temperature=0.0, stop_token_ids=(stop, 60)),
            )[0][0]
            assert cut.finish_reason == reason
            assert cut.token_ids == free.token_ids[: min(first + 1, limit)]
            assert len(cut.logprobs) == len(cut.weights_versions) == len(cut.token_ids)


def test_eos_of_the_model_and_of_the_tokenizer_both_end(decoder):
    class Tokenizer:
        eos_token_id = 17

        @staticmethod
        def decode(ids, skip_special_tokens):
            return " ".join(map(str, ids))

    outs = generate(
        Generator(decoder, Tokenizer()),
        [[1, 5]] * 60,
        SamplingParams(max_new_tokens=40, temperature=2.0),
    )
    last = {group[0].token_ids[-1] for group in outs if group[0].finish_reason == "stop"}
    assert last == {2, 17}
    assert not any({2, 17} & set(group[0].token_ids[:-1]) for group in outs)
    # what they add to the prompt's text
    assert outs[0][0].text == "".join(f" {token}" for token in outs[0][0].token_ids)


def test_min_new_tokens(decoder):
    stops = tuple(range(20, 60))
    outs = generate(
        Generator(decoder),
        [[1, 5]] * 20,
        SamplingParams(max_new_tokens=30, temperature=3.0, min_new_tokens=6, stop_token_ids=stops),
    )
    assert min(len(group[0].token_ids) for group in outs) == 7
    assert not {2, *stops} & {t for group in outs for t in group[0].token_ids[:6]}


# ---- streams and aborts --------------------------------------------------------------------------
LENGTHS = [
    SamplingParams(max_new_tokens=n, min_new_tokens=n, temperature=0.0) for n in (12, 3, 7, 1)
]


def test_stream_yields_each_once_as_it_finishes(decoder):
    generator = Generator(decoder)
    stream = generator.run([[1], [1, 4], [1, 5], [1, 6]], LENGTHS)
    first = next(stream)
    assert (first.prompt, len(first.completion.token_ids)) == (3, 1)
    assert generator.scheduler.busy
    assert [(f.prompt, f.sample) for f in stream] == [(1, 0), (2, 0), (0, 0)]
    is_empty(generator)


def test_closing_a_stream_leaks_nothing(decoder):
    generator = Generator(decoder, None, CacheConfig(max_sequences=3, num_blocks=8))
    for steps in range(4):
        stream = generator.run(ragged_prompts(6, 30), SamplingParams(max_new_tokens=20, n=2))
        for _ in range(steps):
            next(stream)
        stream.close()
        is_empty(generator)
    generator.run(ragged_prompts(6, 30), PARAMS)  # never started
    is_empty(generator)


def test_abort_delivers_what_there_is(decoder):
    generator = Generator(decoder, None, CacheConfig(max_sequences=3))
    stream = generator.run([[1], [1, 4], [1, 5], [1, 6]], LENGTHS)
    seen = [next(stream)]
    generator.abort()
    seen += stream
    is_empty(generator)
    assert sorted(f.prompt for f in seen) == [0, 1, 2, 3]
    assert [f.completion.finish_reason for f in seen[1:]] == ["aborted"] * 3
    whole = generate(generator, [[1], [1, 4], [1, 5], [1, 6]], LENGTHS)
    for f in seen:
        assert f.completion.token_ids == whole[f.prompt][0].token_ids[: len(f.completion.token_ids)]


def test_an_abort_storm_leaks_nothing(decoder):
    generator, draw = (
        Generator(
            decoder, None, CacheConfig(max_sequences=4, num_blocks=9, max_tokens_per_step=11)
        ),
        random.Random(0),
    )
    for seed in range(30):
        streams = [
            generator.run(
                ragged_prompts(3, 40, seed=seed),
                SamplingParams(max_new_tokens=draw.randrange(1, 25), n=draw.randrange(1, 4)),
            )
            for _ in range(3)
        ]
        for _ in range(draw.randrange(12)):
            next(draw.choice(streams), None)
        draw.shuffle(streams)
        streams[0].close()
        if seed % 2:
            generator.abort()
        for stream in streams[1:]:
            stream.close()
        is_empty(generator)


def test_generate_within_a_stream(decoder, plain):
    generator, outs = Generator(decoder), [[] for _ in range(9)]
    found = []
    for f in generator.run(ragged_prompts(9, 40), PARAMS):
        found.append(f)
        if len(found) in (1, 20):
            inner = list(
                generator.run([[1, 9, 9]], SamplingParams(max_new_tokens=60, min_new_tokens=60))
            )
            assert len(inner) == 1
    for f in sorted(found, key=lambda f: f[:2]):
        outs[f.prompt].append(f.completion)
    same(outs, plain)
    is_empty(generator)


def test_no_prompts(decoder):
    assert generate(Generator(decoder), [], SamplingParams()) == []


# ---- errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prompts,params,ids,error,message",
    [
        ("text", SamplingParams(), None, TypeError, "a list of prompts, got one str"),
        (["text"], SamplingParams(), None, ValueError, "need a tokenizer"),
        ([[]], SamplingParams(), None, ValueError, "prompt 0 has no token"),
        (
            [[1], [1, 61]],
            SamplingParams(max_new_tokens=4),
            None,
            ValueError,
            r"token id 61 of prompt 1 .* outside the model's vocabulary \[0, 61\)",
        ),
        ([[-1]], SamplingParams(max_new_tokens=4), None, ValueError, "token id -1"),
        (
            [[1]],
            SamplingParams(max_new_tokens=4, stop_token_ids=(99,)),
            None,
            ValueError,
            "token id 99",
        ),
        (
            [[1.5]],
            SamplingParams(),
            None,
            TypeError,
            "expected prompt 0 to be a string, a list of token ids, a list of messages or a "
            "Completion",
        ),
        (
            [[1] * 90],
            SamplingParams(max_new_tokens=7),
            None,
            ValueError,
            "prompt 0 has 90 tokens, and with max_new_tokens=7 that exceeds the model's 96 "
            "positions",
        ),
        (
            [[1] * 70],
            SamplingParams(max_new_tokens=20),
            None,
            ValueError,
            "prompt 0 can never run: 70 prompt tokens and max_new_tokens=20 need 6 KV blocks of 16 "
            "tokens, and the cache has 5",
        ),
        (
            [[1], [2]],
            [
                SamplingParams(max_new_tokens=4),
                SamplingParams(max_new_tokens=4, banned_token_ids=tuple(range(61))),
            ],
            None,
            ValueError,
            "SamplingParams of prompt 1 leave no token of 61 to draw; shorten banned_token_ids$",
        ),
        (
            [[1]],
            SamplingParams(
                max_new_tokens=4,
                min_new_tokens=2,
                stop_token_ids=(7,),
                banned_token_ids=tuple(i for i in range(61) if i != 7),
            ),
            None,
            ValueError,
            "shorten banned_token_ids, or lower min_new_tokens",
        ),
        ([[1]], [SamplingParams()] * 2, None, ValueError, "1 prompts and 2 SamplingParams"),
        (
            [[1]],
            SamplingParams(max_new_tokens=4),
            [1, 2],
            ValueError,
            "1 prompts and 2 request_ids",
        ),
        (
            [[1]],
            SamplingParams(max_new_tokens=4),
            ["a"],
            TypeError,
            "an integer of 64 bits as request id of prompt 0",
        ),
        ([[1]], [{"n": 2}], None, TypeError, "expected SamplingParams for prompt 0, got dict"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    decoder, count_tokens, prompts, params, ids, error, message
):
    generator = Generator(decoder, None, CacheConfig(num_blocks=5))
    with pytest.raises(error, match=message):
        generator.run(prompts, params, ids)
    assert not count_tokens
    is_empty(generator)


def test_a_failure_in_a_step_ends_all_and_the_next_call_works(device):
    decoder = Decoder.random(model_config(CONFIG), 0, device=device)
    generator = Generator(decoder, None, CacheConfig(max_tokens_per_step=256))
    prompts = ragged_prompts(6, 40)
    want = generate(Generator(decoder), prompts, SamplingParams(max_new_tokens=20, temperature=0.0))
    stream = generator.run(prompts, SamplingParams(max_new_tokens=20, temperature=0.0, n=2))
    norm = decoder.norm.detach().clone()
    with torch.no_grad():
        decoder.norm.fill_(torch.nan)
    with pytest.raises((ValueError, RuntimeError), match="NaN"):
        next(stream)
    is_empty(generator)
    with torch.no_grad():
        decoder.norm.copy_(norm)
    same(generate(generator, prompts, SamplingParams(max_new_tokens=20, temperature=0.0)), want)


# ---- prompts by a tokenizer ----------------------------------------------------------------------
def test_text_and_messages(shared, device):
    from transformers import AutoTokenizer

    path = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(path)
    generator = Generator(load_decoder(path, dtype="float32", device=device), tokenizer)
    messages = [{"role": "user", "content": "Tell me"}]
    with pytest.raises(ValueError, match="no chat template"):
        generator.prepare(["a", messages], SamplingParams())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    prompts = ["Once upon a time", messages, [1, 403], torch.tensor([1, 403], device=device), ""]
    outs = generate(generator, prompts, SamplingParams(max_new_tokens=8, temperature=0.0))
    assert outs[0][0].prompt_ids == tokenizer("Once upon a time")["input_ids"]
    assert outs[0][0].prompt_ids[0] == tokenizer.bos_token_id
    assert outs[1][0].prompt_ids == tokenizer("Tell me!", add_special_tokens=False)["input_ids"]
    assert outs[2][0].token_ids == outs[3][0].token_ids
    assert outs[4][0].prompt_ids == [1]  # nothing but the BOS
    assert outs[0][0].text == tokenizer.decode(outs[0][0].token_ids)


# ---- the size of the cache -----------------------------------------------------------------------
def test_cache_sizes(decoder):
    weights = decoder.weights()
    assert block_bytes(weights, 16) == 2 * 2 * 2 * 8 * 16 * 4
    assert resolve_num_blocks(CacheConfig(num_blocks=9), weights, 96) == 9
    assert (
        resolve_num_blocks(CacheConfig(memory_bytes=10 * block_bytes(weights, 16) + 5), weights, 96)
        == 9
    )
    assert resolve_num_blocks(CacheConfig(max_sequences=4), weights, 90) == 4 * 6
    assert resolve_num_blocks(CacheConfig(memory_fraction=0.01), weights, 96) > 1000
    generator = Generator(decoder, None, CacheConfig(num_blocks=9))
    assert generator.cache.nbytes == 10 * block_bytes(weights, 16)
    with pytest.raises(ValueError, match="hold no sequence"):
        resolve_num_blocks(CacheConfig(memory_bytes=100), weights, 96)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"block_size": 0}, "block_size >= 1"),
        ({"num_blocks": 3, "memory_bytes": 9}, "num_blocks and memory_bytes"),
        ({"memory_fraction": 1.5}, r"memory_fraction in \(0, 1\]"),
        ({"max_sequences": 9, "max_tokens_per_step": 8}, "max_tokens_per_step >= max_sequences"),
    ],
)
def test_cache_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**fields)


def test_text_goes_on_from_the_prompt(shared):
    # A sentencepiece tokenizer drops the first space of what it decodes: alone, " and" would become
    # "and".
    tokenizer = load_tokenizer(shared / "models/stories260k")
    prompts = ["Once upon a time", "The cat", "Lily was so", "One day,"]
    generator = Generator(load_decoder(shared / "models/stories260k", device="cpu"), tokenizer)
    outs = generate(generator, prompts, SamplingParams(max_new_tokens=24, temperature=0.0))
    for prompt, (completion,) in zip(prompts, outs, strict=True):
        assert (
            prompt + completion.text
            == tokenizer.decode(
                completion.prompt_ids + completion.token_ids, skip_special_tokens=True
            ).strip()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_behind_every_window_are_free_for_others(dtype, count_preemptions, device):
    """Completions far longer than the window, in a cache that holds the windows alone."""
    windowed = CONFIG | {"model_type": "mistral", "sliding_window": 6}
    decoder = Decoder.random(model_config(windowed), 0, dtype=dtype, device=device)
    prompts = ragged_prompts(4, 5)
    params = SamplingParams(max_new_tokens=80, min_new_tokens=80, n=1, seed=5)
    roomy = generate(Generator(decoder, config=CacheConfig(block_size=4)), prompts, params)
    if dtype == torch.float32:
        check_logprobs(device, decoder, roomy)
    assert not count_preemptions
    tight = CacheConfig(block_size=4, num_blocks=24, max_sequences=4, max_tokens_per_step=8)
    assert generate(Generator(decoder, config=tight), prompts, params) == roomy
    assert not count_preemptions, "the pool holds no more than one whole sequence and three windows"
