"""Guessed tokens change no bit of a completion, whatever is guessed; and what guesses cost and
save."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

from fusedrl.engine import CacheConfig, HybridActor, SamplingParams
from fusedrl.engine.config import GenerationConfig, LoRAConfig
from fusedrl.engine.generation.drafts import Draft, Drafts, drafts_of, warn_of_drafts
from fusedrl.engine.generation.speculation import Guesses, allot, row_cost
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.dispatch import use_impl

pytestmark = [
    pytest.mark.cpu_only("guesses are computed by the C++ step alone"),
    pytest.mark.skipif(not native.capability, reason="needs the C++ kernels"),
]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "tie_word_embeddings": True,
}
ROOMY = CacheConfig(block_size=4)
TIGHT = CacheConfig(block_size=4, num_blocks=26, max_sequences=5, max_tokens_per_step=7)
PROMPTS = [[1, *range(3, 3 + n)] for n in (0, 7, 2, 21, 5)]
WAYS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5, "return_kept": True},
    "top_p": {"top_p": 0.7, "temperature": 0.7, "return_kept": True},
    "min_p": {"min_p": 0.1, "return_kept": True},
    "late end": {"min_new_tokens": 20, "temperature": 0.5},
    "banned": {"banned_token_ids": (4, 9), "temperature": 0.5},
    "biased": {"logit_bias": {5: 2.0, 2: -3.0}, "temperature": 0.5},
    "stop ids": {"stop_token_ids": (7, 8), "temperature": 0.5},
}


def make(cache=ROOMY, dtype=torch.float32, seed=0, **more):
    return HybridActor(Decoder.random(model_config(CONFIG), seed, dtype=dtype), cache=cache, **more)


def said(outs):
    """Everything of completions, to compare them to the bit."""
    return [
        dataclasses.replace(one, kept=None if one.kept is None else [list(row) for row in one.kept])
        for group in outs
        for one in group
    ]


class Adversary(Drafts):
    """Guesses what a test chooses: `book` has the completions that will be drawn, by prompt."""

    def __init__(self, kind, outs, seed=0):
        super().__init__()
        self.kind, self.random = kind, random.Random(seed)
        self.book = {}
        for group in outs:
            for one in group:
                self.book.setdefault(tuple(one.prompt_ids), []).append(one.token_ids)

    def guess(self, prompt_ids, sequence, text, most, least):
        found = next(one for one in self.book[tuple(prompt_ids)] if one[: len(text)] == list(text))
        right = found[len(text) : len(text) + most]
        right += [0] * (most - len(right))
        vocab = CONFIG["vocab_size"]
        ids = {
            "right": right,
            "wrong": [(token + 1) % vocab for token in right],
            "random": [self.random.randrange(vocab) for _ in right],
            "half": right[: self.random.randint(0, most)] + [3] * most,
            "foreign": [*right[:2], vocab + 7, -1, 2**31 - 1],
        }[self.kind][:most]
        # certain of itself, so that every guess is computed
        return Draft(ids, [1.0] * len(ids), [0] * len(ids))


def audited(actor):
    """After all calls: no block is lost, and each cached one holds what its tokens say."""
    blocks = actor._generator.scheduler.blocks
    assert blocks.available == blocks.total
    assert not blocks._tables


@pytest.mark.parametrize("cache", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("way", WAYS)
def test_guesses_change_no_bit(way, cache):
    params = SamplingParams(max_new_tokens=30, n=3, seed=3, **WAYS[way])
    plain = make(cache).generate(PROMPTS, params)
    for kind in ("right", "wrong", "random") if cache is ROOMY else ("half", "foreign"):
        drafts = Adversary(kind, plain)
        fresh = make(cache)
        assert said(fresh.generate(PROMPTS, params, drafts=drafts)) == said(plain), kind
        drafted, accepted, verifications = drafts.totals
        assert verifications > 20, kind
        assert accepted > verifications / 4 or kind in ("wrong", "random"), kind
        # two samples of a prompt may part where one's token is the other's wrong guess
        assert accepted < drafted / 20 or kind != "wrong", kind
        audited(fresh)
    drafts = Drafts()
    assert said(make(cache).generate(PROMPTS, params, drafts=drafts)) == said(plain)
    drafts.keep()
    assert said(make(cache).generate(PROMPTS, params, drafts=drafts)) == said(plain)
    # the second call has the first one's completions to guess from
    assert drafts.totals[1] > drafts.totals[0] / 2


@pytest.mark.parametrize(
    ("dtype", "strict", "valued", "adapted"),
    [
        (torch.float32, False, True, False),
        (torch.float32, True, True, True),
        (torch.bfloat16, False, True, True),
        (torch.bfloat16, True, False, False),
    ],
)
def test_in_every_dtype_with_values_and_an_adapter(dtype, strict, valued, adapted):
    def actor():
        found = make(TIGHT, dtype, strict=strict)
        if valued:
            head = ValueHead(CONFIG["hidden_size"])
            torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
            found = HybridActor(found.decoder, value_head=head, cache=TIGHT, strict=strict)
        if adapted:
            found.add_adapter(LoRAConfig(rank=2), seed=1)
            with torch.no_grad():
                for parameter in found.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1)
        return found

    params = SamplingParams(max_new_tokens=40, n=3, seed=5, temperature=0.8)
    plain = actor().generate(PROMPTS, params)
    for kind in ("right", "half"):
        drafts = Adversary(kind, plain)
        assert said(actor().generate(PROMPTS, params, drafts=drafts)) == said(plain)
        assert drafts.totals[1] > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_into_a_text(dtype):
    """Attention is cut into pieces at 128 positions and more: rows across a cut, and far behind."""
    params = SamplingParams(max_new_tokens=60, n=2, seed=1, min_new_tokens=60)
    prompts = [[1, *(3 + i % 50 for i in range(n))] for n in (100, 1000)]
    plain = make(dtype=dtype).generate(prompts, params)
    for kind in ("right", "half"):
        drafts = Adversary(kind, plain)
        assert said(make(dtype=dtype).generate(prompts, params, drafts=drafts)) == said(plain)
        assert drafts.totals[1] > 100


def test_stop_strings_end_at_the_first_token(tiny_model):
    params = SamplingParams(max_new_tokens=50, n=4, seed=2, temperature=0.7)
    prompts = ["w1 w2 w3", "w4"]

    def actor(cache=ROOMY):
        return HybridActor.from_pretrained(tiny_model, dtype="float32", cache=cache)

    free = actor().generate(prompts, params)
    words = free[0][0].text.split()
    params = dataclasses.replace(params, stop=(f"{words[4]} {words[5]}", "w7 "))
    plain = actor().generate(prompts, params)
    reasons = [one.finish_reason for group in plain for one in group]
    assert "stop" in reasons
    assert said(plain) != said(free)
    # the texts to guess from go on behind the stop string
    for kind in ("right", "half"):
        drafts = Adversary(kind, free)
        tight = actor(TIGHT)
        assert said(tight.generate(prompts, params, drafts=drafts)) == said(plain)
        assert drafts.totals[1] > 10
        audited(tight)


def test_continued_completions_and_several_calls_at_once():
    first = SamplingParams(max_new_tokens=9, n=2, seed=3, min_new_tokens=9)
    more = SamplingParams(max_new_tokens=20, seed=3)
    whole = []
    for drafts in (None, Drafts()):
        actor = make()
        outs = actor.generate(PROMPTS, first, drafts=drafts)
        flat = [one.extend([5, 6]) for group in outs for one in group]
        whole.append(said(actor.generate(flat, more, drafts=drafts)))
    assert whole[0] == whole[1]
    # a call without drafts beside one with: only the one is guessed for
    actor, drafts = make(), Drafts()
    params = SamplingParams(max_new_tokens=20, n=2, seed=3)
    alone = said(make().generate(PROMPTS, params))
    stream = actor.stream(PROMPTS, params)
    found = [next(stream)]
    assert said(actor.generate(PROMPTS, params, drafts=drafts)) == alone
    found += list(stream)
    found.sort(key=lambda one: one[:2])
    assert said([[one.completion for one in found]]) == alone


def test_after_an_update_the_old_texts_still_serve():
    params = SamplingParams(max_new_tokens=40, n=4, seed=3)
    actor, drafts = make(), Drafts()
    actor.generate(PROMPTS, params, drafts=drafts)
    drafts.keep()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.0001)
    fresh = make()
    fresh.decoder.load_state_dict(actor.decoder.state_dict())
    plain = fresh.generate(PROMPTS, params)
    moved = actor.generate(PROMPTS, params, drafts=drafts)
    for one, other in zip(said(plain), said(moved), strict=True):
        assert dataclasses.replace(one, weights_versions=other.weights_versions) == other
    drafted, accepted, _ = drafts.totals
    assert accepted > drafted / 2


def test_what_was_guessed_wrong_never_enters_the_prefix_cache():
    """A second call reuses the first one's blocks; with wrong guesses in them it would differ."""
    params = SamplingParams(max_new_tokens=40, seed=3, min_new_tokens=40)
    actor = make()
    plain = actor.generate(PROMPTS, params)
    longer = [[*one.prompt_ids, *one.token_ids] for (one,) in plain]
    after = said(make().generate(longer, params))

    def known(actor):
        blocks = actor._generator.scheduler.blocks
        return [len(blocks._match(ids, -1)[0]) for ids in longer]

    expected = known(actor)
    assert sum(expected) > 40
    for kind in ("wrong", "half", "right"):
        actor = make()
        actor.generate(PROMPTS, params, drafts=Adversary(kind, plain))
        assert known(actor) == expected, kind
        assert said(actor.generate(longer, params)) == after, kind


def test_right_guesses_save_steps(monkeypatch):
    from fusedrl.engine.generation import state as state_module

    steps = []
    step = state_module.decode_step
    monkeypatch.setattr(
        state_module,
        "decode_step",
        lambda weights, ids, *rest: (steps.append(len(ids)), step(weights, ids, *rest))[1],
    )
    params = SamplingParams(max_new_tokens=48, seed=3, min_new_tokens=48)
    plain = make().generate(PROMPTS[:1], params)
    one_by_one = len(steps)
    steps.clear()
    make().generate(PROMPTS[:1], params, drafts=Adversary("right", plain))
    assert one_by_one == 48
    assert len(steps) <= 6, "15 guesses and a token more per step"


def test_no_guesses_where_rows_depend_on_one_another():
    params = SamplingParams(max_new_tokens=20, seed=3)
    with use_impl("torch"):
        plain = make().generate(PROMPTS, params)
        drafts = Adversary("right", plain)
        make().generate(PROMPTS, params, drafts=drafts)
    assert drafts.totals == [0, 0, 0]


def test_a_run_says_where_the_option_has_no_effect():
    actor, generation = make(), GenerationConfig(speculate=True)
    assert isinstance(drafts_of(generation, actor.decoder.device), Drafts)
    assert drafts_of(GenerationConfig(), actor.decoder.device) is None
    with use_impl("torch"):
        assert drafts_of(generation, actor.decoder.device) is None
    assert "a CPU and the C++ kernels" in warn_of_drafts(generation, None)
    assert not warn_of_drafts(generation, Drafts())
    assert not warn_of_drafts(GenerationConfig(), None)


def test_no_guesses_for_many_sequences():
    params = SamplingParams(max_new_tokens=20, n=33, seed=3, min_new_tokens=20)
    plain = make().generate(PROMPTS[:1], params)
    drafts = Adversary("right", plain)
    make().generate(PROMPTS[:1], params, drafts=drafts)
    assert drafts.totals == [0, 0, 0]


# ---- the parts -----------------------------------------------------------------------------------
def test_how_many_guesses_pay():
    cost = row_cost(4)
    assert allot([[]], cost) == [0]
    assert allot([[0.06]], cost) == [1], "the second row is free"
    assert allot([[0.04]], cost) == [0], "but to guess is not"
    assert allot([[0.9, 0.8, 0.7, 0.1, 0.05]], cost) == [3]
    assert allot([[0.9**i for i in range(1, 16)]], cost)[0] > 7
    # the better guesses are taken, wherever they are
    assert allot([[0.5, 0.4, 0.3], [0.95, 0.9, 0.85], [0.01]], cost)[1] == 3
    # many sequences: only good guesses pay
    assert allot([[0.2, 0.1]] * 32, cost) == [0] * 32
    assert sum(allot([[0.95, 0.9]] * 16, cost)) >= 16


def test_allot_is_the_best_of_all_ways():
    """Against every way to take leading guesses of three sequences."""
    generator = random.Random(0)
    for _ in range(200):
        chances = [
            np.cumprod([generator.random() ** 0.5 for _ in range(generator.randint(0, 4))]).tolist()
            for _ in range(3)
        ]
        cost = generator.choice([0.02, 0.05, 0.1])

        def rate(lengths, chances=chances, cost=cost):
            rows = len(lengths) + sum(lengths)
            padded = next(size for size in (2, 4, 8, 16, 32) if size >= rows)
            tokens = len(lengths) + sum(
                sum(row[:n]) for row, n in zip(chances, lengths, strict=True)
            )
            return tokens / (1 + cost * padded)

        best = max(map(rate, itertools.product(*(range(len(row) + 1) for row in chances))))
        worth = best > 1.05 * rate([0, 0, 0])
        assert rate(allot(chances, cost)) == pytest.approx(best if worth else rate([0, 0, 0]))


def test_leading_right_guesses_are_counted():
    drafts = [Draft([5, 6, 7], [1.0] * 3, [0] * 3), None, Draft([8, 9], [1.0] * 2, [0] * 2)]
    guesses = Guesses.of(drafts, [3, 0, 2])
    assert guesses.first.tolist() == [0, 4, 5]
    none = np.zeros(8, dtype=bool)
    assert guesses.right(np.array([5, 6, 1, 7, 4, 8, 9, 3]), none).tolist() == [2, 0, 2]
    assert guesses.right(np.array([1, 6, 7, 8, 5, 3, 9, 3]), none).tolist() == [0, 0, 0]
    assert guesses.right(np.array([5, 6, 7, 8, 8, 8, 3, 3]), none).tolist() == [3, 0, 1]
    ended = np.array([False, True, False, False, True, True, False, False])
    assert guesses.right(np.array([5, 6, 7, 8, 8, 8, 9, 3]), ended).tolist() == [1, 0, 0]
