"""Episodes of SkyRL-Gym's environments in SkyRL's GeneratorOutput. It needs an environment with
skyrl-gym and skyrl (docs/inside-others.md)."""

import asyncio
import sys
import typing

import pytest
import torch
import typing_extensions
from transformers import AutoModelForCausalLM

from fusedrl.engine import HybridActor, PackedBatch
from fusedrl.engine.rollout.skyrl import SkyRLGenerator

skyrl_gym = pytest.importorskip("skyrl_gym", reason="skyrl-gym is not installed")

TEMPLATE = (
    "<s>{% for m in messages %} {% if m['role'] == 'assistant' %}w1 {{ m['content'] }} </s> w27"
    "{% else %}w0 {{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} w1"
    "{% endif %}"
)
W = 4  # the id of the word w0


@pytest.fixture
def make(tiny_model, device):
    def build(**options):
        actor = HybridActor.from_pretrained(tiny_model, dtype="float32", device=device)
        actor.tokenizer.chat_template = TEMPLATE
        return SkyRLGenerator(actor, **options)

    return build


@pytest.fixture(scope="module")
def types():
    """SkyRL's own classes. Its annotations need a TypedDict that pydantic takes, which Python has
    from 3.12 on."""
    if sys.version_info < (3, 12):
        typing.TypedDict = typing_extensions.TypedDict
    return pytest.importorskip(
        "skyrl.train.generators.base", reason="skyrl is not installed", exc_type=ImportError
    )


registration = pytest.importorskip("skyrl_gym.envs.registration")


class Game(pytest.importorskip("skyrl_gym.envs.base_text_env").BaseTextEnv):
    """Each turn counts w5 and answers with the number of the turn, for three turns."""

    closed = 0

    def __init__(self, env_config=None, extras=None):
        super().__init__()
        self.goal, self.config, self.extras = extras.get("goal", "w5"), env_config, extras
        self.heard = []

    def step(self, action):
        self.heard.append(action)
        self.turns += 1
        return {
            "observations": [{"role": "user", "content": f"w{20 + self.turns}"}],
            "reward": float(action.split().count(self.goal)),
            "done": self.turns >= 3,
            "metadata": {},
        }

    def get_metrics(self):
        return {"heard": self.heard, "config": self.config}

    def close(self):
        Game.closed += 1


if "fusedrl-game" not in registration.registry:
    skyrl_gym.register(id="fusedrl-game", entry_point=lambda **kw: Game(**kw))


def batch(rows=6, **options):
    return {
        "prompts": [[{"role": "user", "content": f"w{2 + i // 2}"}] for i in range(rows)],
        "env_classes": ["fusedrl-game"] * rows,
        "env_extras": [{"goal": "w5"} for _ in range(rows)],
        "sampling_params": {"max_tokens": 6, "temperature": 1.0, "logprobs": 1},
        "trajectory_ids": None,
        "batch_metadata": None,
        **options,
    }


def test_episodes_of_several_turns_are_tokens_as_they_were_drawn(make, tiny_model):
    generator = make(max_turns=3, environments={"fusedrl-game": {"level": 3}})
    closed = Game.closed
    out = asyncio.run(generator.generate(batch(24)))
    assert Game.closed == closed + 24
    assert generator.copied == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    turns = []
    for row in range(24):
        prompt, said = out["prompt_token_ids"][row], out["response_ids"][row]
        mask, logp = out["loss_masks"][row], out["rollout_logprobs"][row]
        assert prompt == [1, W, W + 2 + row // 2, W + 1]
        assert len(said) == len(mask) == len(logp) == len(out["rewards"][row])
        # what the model said is what the environment heard, turn by turn
        heard = out["env_metrics"][row]["heard"]
        assert out["env_metrics"][row]["config"] == {"level": 3}
        turns.append(len(heard))
        own, observed = [[]], []
        for token, mine in zip(said, mask, strict=True):
            if mine:
                own[-1].append(token)
            elif own[-1]:
                own.append([])
                observed.append([token])
            else:
                observed[-1].append(token)
        assert len(own) == len(heard)
        for tokens, text in zip(own, heard, strict=True):
            assert generator.actor.tokenizer.decode(tokens, skip_special_tokens=True) == text
        for number, tokens in enumerate(observed, 1):
            # the template's line after an answer, the observation, the next turn's beginning
            assert tokens == [W + 27, W, W + 20 + number, W + 1]
        ends = [i for i, mine in enumerate(mask) if mine and (mask + [0])[i + 1] == 0]
        rewards = [0.0] * len(said)
        for end, text in zip(ends, heard, strict=True):
            rewards[end] = float(text.split().count("w5"))
        assert out["rewards"][row] == rewards
        with torch.no_grad():
            logits = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        for i, (token, mine) in enumerate(zip(said, mask, strict=True)):
            expected = float(logits[len(prompt) - 1 + i, token]) if mine else 0.0
            assert logp[i] == pytest.approx(expected, abs=1e-4)
        if len(heard) < 3:
            assert out["stop_reasons"][row] == "length"
    assert {1, 2, 3} & set(turns) != {1}, "some episodes have several turns"


def test_draws_are_of_step_phase_and_trajectory(make, types):
    ids = [types.TrajectoryID(f"q{i // 2}", i % 2) for i in range(6)]

    def drawn(generator, step, phase="train", **options):
        metadata = types.BatchMetadata(global_step=step, training_phase=phase)
        asked = batch(trajectory_ids=ids, batch_metadata=metadata, **options)
        return asyncio.run(generator.generate(asked))["response_ids"]

    first, second = make(), make()
    one = drawn(first, 1)
    assert drawn(second, 1) == one
    assert drawn(second, 2) != one != drawn(second, 1, "eval")
    assert len({tuple(row) for row in one}) > 3
    # without a word about the step, calls are numbered
    assert (
        asyncio.run(first.generate(batch()))["response_ids"]
        != asyncio.run(first.generate(batch()))["response_ids"]
    )


def test_skyrls_own_checks_take_the_output(make, types):
    utils = pytest.importorskip(
        "skyrl.train.utils.trainer_utils", reason="skyrl's trainer is not whole", exc_type=Exception
    )
    out = asyncio.run(make(max_turns=3).generate(batch()))
    utils.validate_generator_output(6, out)


def test_it_is_skyrls_interface(make, types, tiny_model):
    class Real(SkyRLGenerator, types.GeneratorInterface):
        pass

    actor = make().actor
    out = asyncio.run(Real(actor).generate(batch()))
    assert isinstance(Real(actor), types.GeneratorInterface)
    assert set(out) <= set(types.GeneratorOutput.__annotations__) | {
        "trajectory_time_splits",  # SkyRL 0.4
        "rollout_sample_support",
    }


def test_weights_are_shared_or_copied_and_counted(make, tiny_model, tmp_path, device):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).to(device)
    tokenizer = make().actor.tokenizer
    shared = SkyRLGenerator(HybridActor.from_module(model, tokenizer))
    apart, loaded = make(), make()
    rows = [asyncio.run(g.generate(batch()))["response_ids"] for g in (shared, apart)]
    assert rows[0] == rows[1]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.4)
    after = asyncio.run(shared.generate(batch()))["response_ids"]
    stale = asyncio.run(apart.generate(batch()))["response_ids"]
    apart._calls, loaded._calls = 1, 1
    apart.update_weights(model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded.load(tmp_path)
    assert asyncio.run(apart.generate(batch()))["response_ids"] == after != stale
    assert asyncio.run(loaded.generate(batch()))["response_ids"] == after
    size = sum(p.nbytes for p in model.parameters())
    assert (shared.copied, apart.copied, loaded.copied) == (0, size, size)
    with pytest.raises(ValueError, match="tensors are missing"):
        apart.update_weights(list(model.state_dict().items())[:3])
    with pytest.raises(RuntimeError, match="send them again"):
        asyncio.run(apart.generate(batch()))


def test_what_cannot_be_done_is_refused(make):
    for options, message in (
        ({"sampling_params": {"repetition_penalty": 1.3}}, "cannot be followed"),
        ({"prompts": [[{"role": "user", "content": "w1 " * 70}]] * 6}, "shorten the prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            asyncio.run(make().generate(batch(**options)))
    generator = make()
    generator.actor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="whose tokenizer has a chat template"):
        SkyRLGenerator(generator.actor)
    nan = make()
    step = Game.step
    try:
        Game.step = lambda self, action: {**step(self, action), "reward": float("nan")}
        with pytest.raises(ValueError, match="gave the reward nan"):
            asyncio.run(nan.generate(batch()))
        Game.step = lambda self, action: {**step(self, action), "postprocessed_action": "x"}
        with pytest.raises(ValueError, match="rewrites what the model said"):
            asyncio.run(nan.generate(batch()))
    finally:
        Game.step = step


def test_a_stop_string_ends_a_turn_without_an_eos(make):
    generator = make(max_turns=2)
    asked = batch(24, sampling_params={"max_tokens": 20, "stop": ["w9"]})
    out = asyncio.run(generator.generate(asked))
    seen = 0
    for said, mask in zip(out["response_ids"], out["loss_masks"], strict=True):
        if 0 in mask and said[mask.index(0) - 1] == W + 9:
            first = mask.index(0)
            assert said[first : first + 5] == [2, W + 27, W, W + 21, W + 1]
            seen += 1
    assert seen


@pytest.mark.real
def test_episodes_are_the_conversation_that_a_real_template_writes(smollm2):
    """An episode's tokens, read as text, are what the model's template makes of the messages."""
    actor = HybridActor.from_pretrained(smollm2, dtype="float32")
    generator = SkyRLGenerator(actor, max_turns=3)
    question = [
        {"role": "user", "content": "Say hi \U0001f642 in one word: \u05e9\u05dc\u05d5\u05dd"}
    ]
    asked = batch(2, prompts=[question] * 2)
    asked["sampling_params"] = {"max_tokens": 200, "temperature": 0.7}
    out = asyncio.run(generator.generate(asked))
    several = 0
    for row in range(2):
        heard = out["env_metrics"][row]["heard"]
        messages = [*question]
        for turn, text in enumerate(heard):
            messages.append({"role": "assistant", "content": text})
            if turn < len(heard) - 1:
                messages.append({"role": "user", "content": f"w{21 + turn}"})
        written = actor.tokenizer.apply_chat_template(messages, tokenize=False)
        said = actor.tokenizer.decode(out["prompt_token_ids"][row] + out["response_ids"][row])
        assert written.startswith(said)
        several += len(heard) > 1
        batched = PackedBatch.from_sequences(
            [(out["prompt_token_ids"][row], out["response_ids"][row])]
        )
        logp = actor.score(batched, temperature=0.7).logp[len(out["prompt_token_ids"][row]) :]
        for mine, drawn, scored in zip(
            out["loss_masks"][row], out["rollout_logprobs"][row], logp.tolist(), strict=True
        ):
            assert not mine or drawn == pytest.approx(scored, abs=2e-3)
    assert several
