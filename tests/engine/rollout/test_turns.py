"""Trajectories: what the sampler read is what is trained on, token by token; observations are no
actions; limits end what an environment does not; a trajectory that fails costs itself alone."""

import json
from dataclasses import replace

import pytest
import torch
from tests.support.tiny import write_model
from transformers import AutoModelForCausalLM

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.blame import Invalid
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import TurnsConfig
from fusedrl.engine.data.tokenize import encode_prompt, encode_turn
from fusedrl.engine.generation.cache import CacheConfig
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.rewards.environments import Environments
from fusedrl.engine.rewards.pool import Workers
from fusedrl.engine.rollout.sampled import Prompt, sample_prompts
from fusedrl.engine.rollout.turns import describe, play

pytestmark = pytest.mark.cpu_only("environments are Python")
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'developer' %}{{ raise_exception('no') }}{% endif %}"
    "{{ {'user': 'w20', 'assistant': 'w21', 'tool': 'w22'}[m.role] }} {{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w21 {% endif %}"
)
GAMES = """
import asyncio

class Chat:
    long = 3
    def reset(self, row):
        self.row, self.count = row, 0
        return [{"role": "user", "content": row["prompt"]}]

    def step(self, completion):
        self.count += 1
        words = " ".join(f"w{(self.count + i) % 20}" for i in range(self.long))
        return {"role": "tool", "content": words}, 10 + self.count, self.count == self.row["turns"]

class Text(Chat):
    def reset(self, row):
        super().reset(row)
        return None
    def step(self, completion):
        (message, *rest) = super().step(completion)
        return message["content"], *rest

class Long(Text):
    long = 400

class Never(Text):
    def step(self, completion):
        return "w1", 1.0, False, {"asked": 1}

class Slow(Chat):
    async def step(self, completion):
        await asyncio.sleep(0.002 * (len(completion) % 7))
        return super().step(completion)

class Breaks(Text):
    def reset(self, row):
        if row["prompt"].startswith("w2 "):
            raise KeyError("no")
        return super().reset(row)
    def step(self, completion):
        if self.row["prompt"].startswith("w4 ") and self.count == 1:
            return "w1", float("nan"), False
        return super().step(completion)

class Refused(Text):
    def step(self, completion):
        messages = [{"role": "user", "content": "w1"}]
        return {"prompt 0": "", "prompt 1": messages}[self.row["kind"]], 0, False

class TooLong(Text):
    def reset(self, row):
        return " ".join(["w1"] * 64)

class System(Chat):
    def step(self, completion):
        return [{"role": "developer", "content": "w1"}], 0, False
"""


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    path = tmp_path_factory.mktemp("games") / "games.py"
    path.write_text(GAMES, encoding="utf-8")
    return lambda name, **options: Environments(f"{path}:{name}", **options)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "long"
    return write_model(directory, max_position_embeddings=1536)


def actor_of(directory, **options):
    actor = HybridActor.from_pretrained(directory, device="cpu", **options)
    actor.tokenizer.chat_template = TEMPLATE
    return actor


ROWS = [{"prompt": f"w{i} w{i + 1}", "turns": 1 + i % 3} for i in range(6)]
PARAMS = SamplingParams(max_new_tokens=6, n=2, seed=3)


def flat(played):
    return [one for group in played.groups for one in group]


def batch_of(episodes):
    return PackedBatch.from_completions(
        [one.completion.prompt_ids for one in episodes], [[one.completion] for one in episodes]
    )


def tokens(played):
    return [(e.completion.token_ids, e.completion.logprobs) for e in flat(played)]


# ---- the tokens ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Chat", "Text"])
def test_a_trajectory_is_one_sequence_whose_turns_are_actions(name, tiny_model, games):
    actor = actor_of(tiny_model)
    played = play(actor, ROWS, games(name), TurnsConfig(), PARAMS, range(6))
    assert [len(group) for group in played.groups] == [2] * 6
    for row, group in zip(ROWS, played.groups, strict=True):
        for one in group:
            c = one.completion
            assert len(one.ends) == row["turns"]
            assert not one.invalid
            assert one.rewards == [11.0 + turn for turn in range(row["turns"])]
            assert c.finish_reason == "stop"  # the environment ended it
            assert c.action_mask[0]
            assert c.action_mask[-1]
            assert one.ends[-1] == len(c.token_ids) - 1
            # what stands between turns was not drawn
            gaps = [
                i for i in range(1, len(c.token_ids)) if c.action_mask[i] > c.action_mask[i - 1]
            ]
            assert len(gaps) == row["turns"] - 1
            assert all(x == 0 for x, m in zip(c.logprobs, c.action_mask, strict=True) if not m)
            assert one.observed == len(c.token_ids) - len(c.actions) >= 3 * (row["turns"] - 1)
            assert sum(one.earned) == sum(one.rewards)
            assert all(one.earned[end] == r for end, r in zip(one.ends, one.rewards, strict=True))


def test_a_conversation_has_the_tokens_that_the_template_gives_it(tiny_model, games):
    """Turns that the model ended itself are as the template would have written them; of those that
    were cut off, the end is an observation."""
    actor = actor_of(tiny_model)
    params = replace(PARAMS, max_new_tokens=12, stop_token_ids=(2,))
    episodes = flat(play(actor, ROWS * 3, games("Chat"), TurnsConfig(), params, range(18)))
    several = [one for one in episodes if len(one.ends) > 1]
    assert several
    for one in several:
        ids = [*one.completion.prompt_ids, *one.completion.token_ids]
        closed = ids if ids[-1] == 2 else [*ids, 2]
        # words of the vocabulary, and no special token in the middle of a turn
        special = any(t in (0, 1, 3) for t in one.completion.actions)
        if not special:
            assert closed == encode_prompt(actor.tokenizer, [*one.prompt, *one.messages])[:-1]
        assert one.messages[0]["role"] == "assistant"
        assert one.messages[1]["role"] == "tool"


def test_what_the_model_drew_is_never_tokenised_anew(tiny_model, games):
    """A turn with tokens that its text does not have (<unk>, <pad>) keeps them."""
    actor = actor_of(tiny_model)
    only = SamplingParams(max_new_tokens=4, banned_token_ids=tuple(range(4, 32)), n=1, seed=0)
    (one,) = flat(play(actor, ROWS[2:3], games("Chat"), TurnsConfig(), only, [0]))
    assert one.completion.actions
    assert set(one.completion.actions) <= {0, 1, 2, 3}
    assert len(one.ends) == 3


def test_between_turns_stands_what_the_template_writes(tiny_model):
    tokenizer = actor_of(tiny_model).tokenizer
    user, tool = {"role": "user", "content": "w1 w2"}, {"role": "tool", "content": "w5"}
    assert encode_turn(tokenizer, [user], [tool], 2) == [26, 9, 2, 25]
    assert encode_turn(tokenizer, [user], [tool], None) == [2, 26, 9, 2, 25]  # cut off: its end
    assert encode_turn(tokenizer, [user], [tool], 7) == [2, 26, 9, 2, 25]  # ended by another token
    assert encode_turn(tokenizer, [], "w5 w6", 2) == [9, 10]


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "w1"])
def test_a_template_that_does_not_show_the_turn_is_told_of(template, tiny_model, games):
    actor = actor_of(tiny_model)
    actor.tokenizer.chat_template = template
    (one,) = flat(play(actor, ROWS[2:3], games("Chat"), TurnsConfig(), replace(PARAMS, n=1), [0]))
    assert "expected the chat template to print" in one.invalid


# ---- one log-probability -------------------------------------------------------------------------
def test_the_samplers_log_probabilities_are_those_of_transformers(long_model, games):
    """An independent definition, at positions over 130 and over 1,000."""
    actor = actor_of(long_model)
    rows = [{"prompt": "w1 w2", "turns": 4}, {"prompt": "w3", "turns": 2}]
    params = SamplingParams(max_new_tokens=40, n=2, seed=1)
    episodes = flat(play(actor, rows, games("Long"), TurnsConfig(), params, [0, 1]))
    assert max(len(one.completion.token_ids) for one in episodes) > 1200
    model = AutoModelForCausalLM.from_pretrained(long_model, dtype=torch.float64)
    batch = batch_of(episodes)
    scored = actor.score(batch)
    assert (scored.logp - batch.rollout_logp)[batch.action_mask].abs().max() < 1e-4
    assert (scored.logp[~batch.action_mask] == 0).all()
    for one in episodes:
        c = one.completion
        ids = torch.tensor([[*c.prompt_ids, *c.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0]
        logp = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        ours = torch.tensor(c.logprobs, dtype=torch.float64)
        mask = torch.tensor(c.action_mask)
        assert (logp[-len(c.token_ids) :] - ours)[mask].abs().max() < 1e-4


def test_in_bfloat16_they_differ_by_rounding(long_model, games):
    actor = actor_of(long_model, dtype="bfloat16")
    rows = [{"prompt": "w1 w2", "turns": 3}]
    params = SamplingParams(max_new_tokens=30, n=4, seed=1)
    episodes = flat(play(actor, rows, games("Long"), TurnsConfig(), params, [0]))
    batch = batch_of(episodes)
    difference = (actor.score(batch).logp - batch.rollout_logp)[batch.action_mask].abs()
    assert difference.mean() < 1e-3
    assert difference.max() < 2e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_they_are_equal_to_the_bit_whatever_the_order_of_answers(dtype, long_model, games):
    rows = [row | {"prompt": row["prompt"]} for row in ROWS]
    found = []
    for name, processes in (("Chat", 0), ("Slow", 2), ("Slow", 0)):
        actor = actor_of(long_model, dtype=dtype, strict=True)
        with Workers(processes, 60.0) as workers:
            environments = games(name, workers=workers)
            played = play(actor, rows, environments, TurnsConfig(), PARAMS, range(6))
        batch = batch_of(flat(played))
        mask = batch.action_mask
        assert actor.score(batch).logp[mask].equal(batch.rollout_logp[mask])
        found.append(tokens(played))
    assert found[0] == found[1] == found[2]


def test_without_strict_answers_in_any_order_give_the_same_bits(tiny_model, games):
    found = []
    for name, processes in (("Chat", 0), ("Slow", 2), ("Slow", 0)):
        with Workers(processes, 60.0) as workers:
            environments = games(name, workers=workers)
            actor = actor_of(tiny_model)
            found.append(tokens(play(actor, ROWS, environments, TurnsConfig(), PARAMS, range(6))))
    assert found[0] == found[1] == found[2]


def test_few_slots_and_a_small_cache_change_no_trajectory(tiny_model, games):
    """Sequences wait, are preempted, and find nothing of themselves in the cache."""
    usual = play(
        actor_of(tiny_model, strict=True), ROWS, games("Chat"), TurnsConfig(), PARAMS, range(6)
    )
    cache = CacheConfig(max_sequences=3, num_blocks=6, block_size=16)
    actor = actor_of(tiny_model, strict=True, cache=cache)
    limits = TurnsConfig(max_length=64)
    assert tokens(play(actor, ROWS, games("Chat"), limits, PARAMS, range(6))) == tokens(usual)


def test_truncated_sampling_keeps_what_tokens_were_drawn_from(tiny_model, games):
    actor = actor_of(tiny_model)
    params = replace(PARAMS, top_k=3, return_kept=True)
    episodes = flat(play(actor, ROWS, games("Chat"), TurnsConfig(), params, range(6)))
    for one in episodes:
        c = one.completion
        for ids, token, chosen in zip(c.kept, c.token_ids, c.action_mask, strict=True):
            assert (len(ids) == 3 and token in ids) if chosen else len(ids) == 0
    batch = batch_of(episodes)
    scored = actor.score(batch)
    assert (scored.logp - batch.rollout_logp)[batch.action_mask].abs().max() < 1e-4


def test_values_of_a_value_head_are_of_actions(tiny_model, games):
    actor = actor_of(tiny_model, value_head=True)
    episodes = flat(play(actor, ROWS, games("Text"), TurnsConfig(), PARAMS, range(6)))
    batch = batch_of(episodes)
    assert batch.rollout_values is not None
    scored = actor.score(batch)
    assert (scored.values - batch.rollout_values)[batch.action_mask].abs().max() < 1e-4


# ---- limits --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("limits", "turns", "most"),
    [
        (TurnsConfig(max_turns=3), 3, 18),
        (TurnsConfig(max_turns=1), 1, 6),
        (TurnsConfig(max_turns=50, max_total_tokens=8), None, 8),
        (TurnsConfig(max_turns=50, max_length=20), None, 17),
        (TurnsConfig(max_turns=50), None, 60),  # the model's 64 positions
    ],
)
def test_a_trajectory_that_never_ends_is_ended_by_a_limit(limits, turns, most, tiny_model, games):
    actor = actor_of(tiny_model)
    played = play(actor, ROWS, games("Never"), limits, PARAMS, range(6))
    for one in flat(played):
        c = one.completion
        assert c.finish_reason == "length"
        assert not one.invalid
        assert c.action_mask[-1]  # it ends with a turn
        assert len(c.actions) <= most
        assert len(c.prompt_ids) + len(c.token_ids) <= (limits.max_length or 64)
        assert turns is None or len(one.ends) == turns
        assert one.rewards == [1.0] * len(one.ends)
        assert one.info == {"asked": float(len(one.ends))}
    found = describe(played.groups, 0.0)
    assert found["environment/asked"] == found["turns/mean"]


# ---- failures ------------------------------------------------------------------------------------
def test_a_trajectory_that_fails_costs_itself_alone(tiny_model, games):
    actor = actor_of(tiny_model)
    usual = play(
        actor_of(tiny_model, strict=True), ROWS, games("Text"), TurnsConfig(), PARAMS, range(6)
    )
    actor = actor_of(tiny_model, strict=True)
    rows = [row | {"turns": 3} if row["prompt"] == "w4 w5" else row for row in ROWS]
    played = play(actor, rows, games("Breaks"), TurnsConfig(), PARAMS, range(6))
    for index, (group, before) in enumerate(zip(played.groups, usual.groups, strict=True)):
        for one, same in zip(group, before, strict=True):
            if index == 2:
                assert "raised KeyError: 'no'" in one.invalid
                assert not one.completion.token_ids
            elif index == 4:
                assert "finite number" in one.invalid
                assert len(one.ends) == 2
            else:
                assert one.completion == same.completion
                assert not one.invalid
            assert isinstance(one.earned, Invalid) is (index in (2, 4))
    found = describe(played.groups, 0.0)
    assert found["turns/failures"] == 4.0
    assert describe([[flat(played)[4]]], 1.0) == {
        "turns/failures": 1.0,
        "timing/environment_wait": 1.0,
    }


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("Refused", "prompt 0", "expected an observation with a token, got an empty text"),
        ("Refused", "prompt 1", "expected a text as observation, since the prompt is one"),
        ("TooLong", "", "its prompt has 65 tokens, and the most of a trajectory are 64"),
        ("System", "", "the model's chat template refuses these messages"),
    ],
)
def test_what_cannot_be_continued_is_told_of(name, kind, reason, tiny_model, games):
    rows = [{"prompt": "w1", "turns": 3, "kind": kind}]
    actor = actor_of(tiny_model)
    (one,) = flat(play(actor, rows, games(name), TurnsConfig(), replace(PARAMS, n=1), [0]))
    assert reason in one.invalid


# ---- beside rewards ------------------------------------------------------------------------------
def test_rewards_are_told_of_a_trajectory_once_it_has_ended(tiny_model, games):
    actor, heard = actor_of(tiny_model), []
    prompts = [Prompt(row["prompt"], [1, 2], {"turns": row["turns"]}) for row in ROWS]
    found = sample_prompts(
        actor,
        prompts,
        PARAMS,
        range(6),
        games("Chat"),
        TurnsConfig(),
        lambda *one: heard.append(one),
    )
    assert sorted((index, number) for index, number, *_ in heard) == [
        (i, n) for i in range(6) for n in range(2)
    ]
    for index, number, prompt, completion, episode in heard:
        place = index * 2 + number
        assert found.completions[place] == completion
        assert found.prompts[place] == prompt
        assert found.episodes[place] == episode
        assert prompt.ids == completion.prompt_ids != [1, 2]
        assert json.dumps(episode.shown)


def test_states_are_equal_where_observations_are(tiny_model, games):
    actor = actor_of(tiny_model)
    played = play(actor, ROWS[2:3], games("Text"), TurnsConfig(), PARAMS, [0])
    one, other = played.groups[0]
    assert one.states == other.states
    assert len(set(one.states)) == 3
    mask = [*([False] * len(one.completion.prompt_ids)), *one.completion.action_mask]
    expected, turn = [], -1
    for index, chosen in enumerate(mask):
        turn += chosen and not mask[index - 1]
        expected.append(one.states[turn] if chosen else 0)
    assert one.turn_states == expected
