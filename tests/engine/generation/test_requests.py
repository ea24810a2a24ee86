"""What a request may ask for beyond plain sampling: stop strings, banned tokens, biases,
completions that go on, more samples than are needed."""

import pytest
import torch

from fusedrl.engine import HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.generation import state as state_module
from fusedrl.engine.generation.cache import CacheConfig
from fusedrl.kernels.sampling import sample

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21"]
SMALL = CacheConfig(block_size=4, max_sequences=3, max_tokens_per_step=9, num_blocks=30)


@pytest.fixture
def actor(tiny_model, device):
    return HybridActor.from_pretrained(
        tiny_model, cache=CacheConfig(block_size=4), dtype="float32", device=device
    )


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


def all_of(outs):
    return [completion for group in outs for completion in group]


def full_logits(device, actor, ids):
    """[n, V] float64 of the training forward: row t says what follows token t."""
    with torch.no_grad():
        n = len(ids)
        hidden = actor.decoder(
            torch.tensor(ids, device=device),
            torch.arange(n, device=device),
            torch.tensor([0, n], dtype=torch.int32, device=device),
            n,
        )
    return hidden.double() @ actor.decoder.head_weight.detach().double().T


# ---- stop strings --------------------------------------------------------------------------------
def test_a_stop_string_ends_the_completion(actor):
    free = all_of(actor.generate(PROMPTS, SamplingParams(max_new_tokens=30, n=4, seed=2)))
    stopped = all_of(
        actor.generate(PROMPTS, SamplingParams(max_new_tokens=30, n=4, seed=2, stop=["w20", "w7 "]))
    )
    ended = 0
    for one, other in zip(free, stopped, strict=True):
        assert other.token_ids == one.token_ids[: len(other.token_ids)]
        assert "w20" not in other.text
        assert "w7 " not in other.text
        assert one.text.startswith(other.text)
        texts = [
            actor.tokenizer.decode(one.token_ids[: i + 1], skip_special_tokens=True)
            for i in range(len(one.token_ids))
        ]
        places = [i for i, text in enumerate(texts) if "w20" in text or "w7 " in text]
        if places:
            assert len(other.token_ids) == places[0] + 1, "at the first token that completes it"
            assert other.finish_reason == "stop"
            ended += 1
        else:
            assert (other.token_ids, other.text, other.finish_reason) == (
                one.token_ids,
                one.text,
                one.finish_reason,
            )
    assert 3 <= ended < 12


def test_a_stop_string_over_several_tokens_and_only_in_what_is_new(actor):
    words_only = {"seed": 1, "banned_token_ids": (0, 1, 2, 3)}
    ((free,),) = actor.generate(["w3 w4"], SamplingParams(max_new_tokens=20, **words_only))
    words = free.text.split()
    middle = f"{words[5]} {words[6]} {words[7]}"
    ((ended,),) = actor.generate(
        ["w3 w4"], SamplingParams(max_new_tokens=20, **words_only, stop=(middle,))
    )
    assert ended.token_ids == free.token_ids[:8]
    assert ended.text.split() == words[:5]
    # a prompt that holds it already ends nothing
    assert (
        actor.generate(["w3 w4"], SamplingParams(max_new_tokens=6, **words_only, stop=("w3 w4",)))[
            0
        ][0].finish_reason
        == "length"
    )
    # and continued behind it, it ends no second time
    ((more,),) = actor.generate(
        [ended], SamplingParams(max_new_tokens=3, **words_only, stop=(middle,))
    )
    assert more.token_ids[:11] == free.token_ids[:11]


def test_stop_strings_of_a_byte_level_tokenizer(shared, device):
    """A character of several tokens, a stop string that begins inside one."""
    actor = HybridActor.from_pretrained(
        shared / "models" / "stories260k", dtype="float32", device=device
    )
    for seed in range(3):
        ((free,),) = actor.generate(
            ["Once upon a time"], SamplingParams(max_new_tokens=60, seed=seed)
        )
        stop = free.text[25:33]
        ((ended,),) = actor.generate(
            ["Once upon a time"], SamplingParams(max_new_tokens=60, seed=seed, stop=stop)
        )
        assert ended.finish_reason == "stop"
        assert ended.text == free.text[: free.text.index(stop)]
        assert ended.token_ids == free.token_ids[: len(ended.token_ids)]


# ---- what may be drawn ---------------------------------------------------------------------------
@pytest.mark.parametrize("cache", [CacheConfig(block_size=4), SMALL], ids=["roomy", "tight"])
def test_bans_and_biases_are_of_the_draw_and_the_logprobs_of_the_model(tiny_model, cache, device):
    actor = HybridActor.from_pretrained(tiny_model, cache=cache, dtype="float32", device=device)
    banned, bias = (5, 9, 20), {7: 2.5, 8: -3.0, 30: 1.0}
    params = [
        SamplingParams(
            max_new_tokens=12,
            seed=4,
            n=2,
            temperature=0.8,
            banned_token_ids=banned,
            logit_bias=bias,
        ),
        SamplingParams(max_new_tokens=12, seed=4, n=2, temperature=0.8),
        SamplingParams(
            max_new_tokens=12,
            seed=4,
            n=2,
            temperature=0.0,
            min_new_tokens=2,
            logit_bias=bias,
            top_k=3,
        ),
    ]
    outs = actor.generate(PROMPTS, params)
    plain = actor.generate(PROMPTS, SamplingParams(max_new_tokens=12, seed=4, n=2, temperature=0.8))
    assert outs[1] == plain[1], "a companion's bias is its own"
    assert outs[0] != plain[0]
    for index, (p, group) in enumerate(zip(params, outs, strict=True)):
        for completion in group:
            ids = completion.prompt_ids + completion.token_ids
            logits, first = full_logits(device, actor, ids), len(completion.prompt_ids)
            log_p = (logits / (p.temperature or 1.0)).log_softmax(-1)
            for t in range(first, len(ids)):
                row = logits[t - 1].float().clone()
                for token, value in dict(p.logit_bias).items():
                    row[token] += value
                suppress = torch.zeros(1, len(row), dtype=torch.bool, device=device)
                suppress[0, list(p.banned_token_ids)] = True
                suppress[0, 2] |= t - first < p.min_new_tokens
                drawn = sample(
                    row[None],
                    temperature=p.temperature,
                    top_k=p.top_k,
                    keys=torch.tensor([[4, index, completion.sample, t]], device=device),
                    suppress=suppress,
                )
                assert int(drawn.token_ids) == ids[t]
                assert abs(completion.logprobs[t - first] - float(log_p[t - 1, ids[t]])) < 1e-4
            assert not set(completion.token_ids) & set(p.banned_token_ids)


def test_what_truncates():
    assert not SamplingParams(stop=("a",)).truncates
    assert SamplingParams(banned_token_ids=[3]).truncates
    assert SamplingParams(logit_bias={3: 1.0}).truncates
    assert not SamplingParams(temperature=0.0, logit_bias={3: 1.0}).truncates
    assert hash(SamplingParams(logit_bias={3: 1.0}, stop="x")) == hash(
        SamplingParams(logit_bias=((3, 1),), stop=("x",))
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stop": ("",)}, "expected stop to be strings that are not empty"),
        ({"stop": (3,)}, "expected stop to be strings"),
        ({"banned_token_ids": (-1,)}, "expected banned_token_ids to be token ids >= 0"),
        ({"banned_token_ids": "ab"}, "banned_token_ids"),
        ({"logit_bias": {-1: 2.0}}, "expected logit_bias to map token ids >= 0 to numbers"),
        ({"logit_bias": {1: float("-inf")}}, "banned_token_ids bans a token"),
        ({"logit_bias": {1: "x"}}, "logit_bias"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(TypeError, match=message):
        SamplingParams(**fields)


def test_requests_are_checked(tiny_model, device):
    actor = HybridActor.from_pretrained(tiny_model, dtype="float32", device=device)
    for fields in ({"banned_token_ids": (32,)}, {"logit_bias": {32: 1.0}}):
        with pytest.raises(
            ValueError,
            match=r"token id 32 of prompt 0 or its SamplingParams is outside the model's "
            r"vocabulary \[0, 32\)",
        ):
            actor.generate([[1]], SamplingParams(max_new_tokens=4, **fields))
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        HybridActor(actor.decoder).generate([[1]], SamplingParams(max_new_tokens=4, stop=("a",)))
    with pytest.raises(ValueError, match="leave no token of 32 to draw; shorten banned_token_ids"):
        actor.generate([[1]], SamplingParams(max_new_tokens=4, banned_token_ids=tuple(range(32))))
    assert actor.generate([[1]], SamplingParams(max_new_tokens=2))[0][0].token_ids, (
        "and nothing leaked"
    )


# ---- completions that go on ----------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_aborted_completion_goes_on_as_if_it_had_never_stopped(actor, temperature, device):
    def draw(count):
        return SamplingParams(max_new_tokens=count, temperature=temperature, seed=3, n=3)

    whole = actor.generate(PROMPTS, draw(24), request_ids=[7, 8, 9])
    running = actor.stream(PROMPTS, draw(24), request_ids=[7, 8, 9])
    partial = [next(running)]
    actor.abort()
    partial += list(running)
    assert {f.completion.finish_reason for f in partial} == {
        "aborted",
        *(f.completion.finish_reason for f in partial[:1]),
    }
    for f in partial:
        assert f.completion.sample == f.sample
        if f.completion.finish_reason != "aborted":
            continue
        ((done,),) = actor.generate(
            [f.completion],
            SamplingParams(
                max_new_tokens=24 - len(f.completion.token_ids), temperature=temperature, seed=3
            ),
            request_ids=[7 + f.prompt],
        )
        expected = whole[f.prompt][f.sample]
        assert (done.token_ids, done.finish_reason, done.text, done.prompt_ids) == (
            expected.token_ids,
            expected.finish_reason,
            expected.text,
            expected.prompt_ids,
        )
        torch.testing.assert_close(
            torch.tensor(done.logprobs, device=device),
            torch.tensor(expected.logprobs, device=device),
            atol=1e-5,
            rtol=0,
        )


def test_a_partial_rollout_across_an_update_tells_the_version_of_every_token(actor, device):
    params = SamplingParams(max_new_tokens=20, seed=1, banned_token_ids=(2,))
    short = SamplingParams(max_new_tokens=1, seed=1)
    running = actor.stream(["w1 w2", "w3"], [params, short])
    next(running)
    actor.abort()
    partial = next(running).completion
    n = len(partial.token_ids)
    assert partial.finish_reason == "aborted"
    assert 0 < n < 20
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.1)
    actor.mark_updated()
    ((done,),) = actor.generate(
        [partial], SamplingParams(max_new_tokens=4, seed=1, banned_token_ids=(2,))
    )
    assert done.token_ids[:n] == partial.token_ids
    assert done.logprobs[:n] == partial.logprobs, (
        "what was drawn under the older weights keeps its log-probability"
    )
    assert done.weights_versions == [0] * n + [1] * 4
    batch = PackedBatch.from_completions(["w1 w2"], [[done]], device=device)
    assert batch.weights_versions.tolist() == [0] * (len(done.prompt_ids) + n) + [1] * 4


def test_extend_keeps_the_keys_and_values_and_observations_are_no_actions(
    actor, count_tokens, device
):
    params = SamplingParams(max_new_tokens=21, seed=5, banned_token_ids=(2,))
    ((first,),) = actor.generate(["w1 w2 w3 w4 w5 w6 w7"], params, request_ids=[3])
    observation = [10, 11, 12, 13, 14]
    extended = actor.extend(first, observation)
    assert first.action_mask is None
    assert extended.token_ids == first.token_ids + observation
    del count_tokens[:]
    ((second,),) = actor.generate([extended], params, request_ids=[3])
    # of 8 + 21 + 5 tokens the first 28 lie in full blocks of 4 that the first turn computed
    assert count_tokens[0] == 34 - 28
    assert second.action_mask == [True] * 21 + [False] * 5 + [True] * 21
    assert second.token_ids[:26] == extended.token_ids
    assert second.logprobs[:21] == first.logprobs
    fresh = HybridActor(actor.decoder, actor.tokenizer)
    ((alone,),) = fresh.generate([first.prompt_ids + extended.token_ids], params, request_ids=[3])
    assert alone.token_ids == second.token_ids[26:], "as without a cache"
    batch = PackedBatch.from_completions(["..."], [[second]], device=device)
    assert int(batch.action_mask.sum()) == 42
    assert not batch.action_mask[8 + 21 : 8 + 26].any()
    scored = actor.score(batch)
    assert float((scored.logp - batch.rollout_logp).abs().max()) < 1e-5
    assert not scored.logp[8 + 21 : 8 + 26].any()


def test_an_update_between_turns_is_never_mixed_with_older_keys(actor):
    ((first,),) = actor.generate(
        ["w1 w2 w3 w4 w5 w6 w7"], SamplingParams(max_new_tokens=9, temperature=0.0)
    )
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(-1.3)
    actor.mark_updated()
    params = SamplingParams(max_new_tokens=9, temperature=0.0)
    second, alone = (
        a.generate([actor.extend(first, [4])], params)[0][0]
        for a in (actor, HybridActor(actor.decoder, actor.tokenizer))
    )
    assert second.token_ids == alone.token_ids


# ---- more than is needed -------------------------------------------------------------------------
@pytest.mark.cpu_only("a GPU is asked every few steps, in which several completions end")
def test_over_sampling_with_an_early_stop(actor):
    """Eight samples are asked for, the first four to finish are taken, and the stragglers leave
    nothing behind."""
    params = SamplingParams(max_new_tokens=40, n=8, seed=6)
    whole = actor.generate(["w1"], params)[0]
    running, taken = actor.stream(["w1"], params), []
    for finished in running:
        taken.append(finished)
        if len(taken) == 4:
            break
    running.close()
    lengths = sorted(len(c.token_ids) for c in whole)
    assert sorted(len(f.completion.token_ids) for f in taken) == lengths[:4], (
        "the shortest finish first"
    )
    assert all(f.completion == whole[f.sample] for f in taken)
    scheduler = actor._generation().scheduler
    assert not scheduler.busy
    assert scheduler.blocks.available == scheduler.blocks.total
