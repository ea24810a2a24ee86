"""Rewards: TRL's contract, what misbehaves, weighted sums, and reward models with the policy's
tokenizer and with another."""

import asyncio
import math
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.model.heads import RewardModel, load_reward_model, save_reward_model
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.rewards.functions import load_ahead
from fusedrl.engine.rewards.rewards import RewardSet, load_reward, moved_rewards
from fusedrl.kernels.gae import shaped_gae


def _score(functions, completions=("aa", "b", "cccc"), weights=None, columns=None, prompts=None):
    rewards = (
        functions
        if isinstance(functions, RewardSet)
        else RewardSet([load_reward(f) for f in functions], weights)
    )
    count = len(completions)
    return rewards.score(
        prompts or ["p"] * count, list(completions), [[1]] * count, [[5, 6]] * count, columns
    )


def length(completions, **_):
    return [len(text) for text in completions]


async def later(completions, **_):
    await asyncio.sleep(0)
    return [1.0 for _ in completions]


# ---- the contract --------------------------------------------------------------------------------
def test_arguments_are_those_of_trl():
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(
            prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns
        )
        return [0.0, 1.0]

    chat = [{"role": "user", "content": "q"}]
    scores = _score([reward], ["x", "y"], columns={"answer": [3, None]}, prompts=["p", chat])
    assert seen == {
        "prompts": ["p", chat],
        "completions": ["x", [{"role": "assistant", "content": "y"}]],
        "completion_ids": [[5, 6], [5, 6]],
        "columns": {"answer": [3, None]},
    }
    assert scores.total == [0.0, 1.0]
    assert scores.per_reward == {"reward": [0.0, 1.0]}
    assert scores.invalid == []


def test_a_function_may_name_only_what_it_needs():
    assert _score(
        [lambda completions: [len(c) for c in completions]], columns={"answer": [1, 2, 3]}
    ).total == [2, 1, 4]

    def reward(answer, *, completion_ids):
        return [a * len(ids) for a, ids in zip(answer, completion_ids, strict=True)]

    assert _score([reward], columns={"answer": [1, 2, 3]}).total == [2, 4, 6]


def test_async_rewards_run_together_also_inside_an_event_loop():
    started = []

    async def waits(completions, **_):
        started.append(None)
        while len(started) < 2:
            await asyncio.sleep(0.001)
        return [0.5] * len(completions)

    assert _score([length, waits, waits, later]).total == [4, 3, 6]

    async def notebook():
        return _score([later]).total

    assert asyncio.run(notebook()) == [1, 1, 1]


def test_weights_none_and_names():
    def some(completions, **_):
        return [None, 2.0, None]

    scores = _score([length, some, length], weights=[1.0, 0.5, -2.0])
    assert scores.total == [-2.0, 0.0, -4.0]
    assert scores.per_reward == {
        "length": [2, 1, 4],
        "some": [None, 2, None],
        "length#2": [2, 1, 4],
    }
    alone = _score([some])
    assert math.isnan(alone.total[0])
    assert alone.total[1] == 2
    assert [(i, name) for i, name, _ in alone.invalid] == [(0, "some"), (2, "some")]
    assert "no reward applies" in alone.invalid[0][2]


@pytest.mark.parametrize(
    "returned",
    [
        np.array([1.0, 2, 3]),
        torch.tensor([1, 2, 3]),
        (1, 2.0, np.float32(3)),
        [True, 2, torch.tensor([3.0])],
    ],
)
def test_numbers_of_many_kinds(returned):
    assert _score([lambda completions: returned]).total == [1, 2, 3]


def test_no_completions():
    scores = _score([length], [])
    assert scores.total == []
    assert scores.per_reward == {"length": []}


# ---- rewards of tokens and of steps --------------------------------------------------------------
def test_rewards_of_tokens_sum_to_the_score_and_say_where_they_accrued(device):
    scores = _score(
        [length, lambda completions: [[1.0, -3.0], 0.5, torch.tensor([2.0, 4.0], device=device)]],
        weights=[1.0, 0.5],
    )
    assert scores.per_reward == {"length": [2, 1, 4], "<lambda>": [-2.0, 0.5, 6.0]}
    assert scores.total == [1.0, 1.25, 7.0]
    assert scores.tokens == [[0.5, -1.5], None, [1.0, 2.0]]
    assert _score([length]).tokens == [None] * 3
    both = _score([lambda completions: [[1.0, 2.0]] * 3, lambda completions: np.ones((3, 2))])
    assert both.tokens == [[2.0, 3.0]] * 3


@pytest.mark.parametrize(
    "bad, reason",
    [
        ([1.0, None], "got None in a list"),
        ([1.0, math.nan], "a finite number"),
        ([1.0] * 3, "one for each, 2 here"),
        ([(0, 1.0)], "within the 1 characters of the completion, got 0"),
        ([(2, 1.0)], "got 2"),
        ([("a", 1.0)], "got 'a'"),
        ([(1, "x")], "got 'x'"),
    ],
)
def test_a_bad_list_makes_the_sample_invalid(bad, reason):
    scores = _score([lambda completions: [1.0, bad, [1.0, 1.0]]])
    assert [index for index, _, _ in scores.invalid] == [1]
    assert reason in scores.invalid[0][2]
    assert scores.tokens == [None, None, [1.0, 1.0]]


def test_rewards_of_steps_stand_at_the_tokens_that_end_them(shared):
    tokenizer = AutoTokenizer.from_pretrained(str(shared / "models/stories260k"))
    prompt = tokenizer("Once upon a time")["input_ids"]
    text = ", there was a cat.\nIt was 😀 happy.\n"
    ids = tokenizer(f"Once upon a time{text}")["input_ids"][len(prompt) :]
    assert tokenizer.decode(prompt + ids, skip_special_tokens=True).endswith(text)

    def steps(completions):
        return [
            [
                (end + 1, float(number))
                for number, end in enumerate([i for i, c in enumerate(text) if c == "\n"], 1)
            ]
        ]

    rewards = RewardSet([load_reward(steps, tokenizer=tokenizer)])
    (spread,) = rewards.score(["Once upon a time"], [text], [prompt], [[*ids, 2]]).tokens
    assert [i for i, value in enumerate(spread) if value] == [
        i for i, token in enumerate(ids) if tokenizer.decode([token]) == "\n"
    ]
    assert sorted(spread)[-2:] == [1.0, 2.0]
    with pytest.raises(
        RewardError,
        match=r"'steps' returned rewards of steps, .* give load_reward the policy's tokenizer",
    ):
        RewardSet([load_reward(steps)]).score(["p"], [text], [prompt], [ids])


def test_moved_rewards_change_when_and_not_how_much(device):
    batch = PackedBatch.from_sequences(
        [([1, 1], [5, 6, 7]), ([1], [5]), ([1, 1], [5, 6])], device=device
    )
    moved, sums = moved_rewards(batch, [[1.0, 2.0, 4.0], [3.0], None])
    assert moved.tolist() == [0, 0, 1, 2, -3, 0, 0, 0, 0, 0, 0]
    assert sums.tolist() == [7, 3, 0]
    totals, values = (
        torch.tensor([7.0, 3.0, 0.5], device=device),
        torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(0)).to(device),
    )
    logp = torch.zeros(batch.num_tokens, device=device)
    options = dict(
        mask=batch.action_mask,
        cu_seqlens=batch.cu_seqlens,
        kl_coef=0.1,
        gamma=1.0,
        lam=1.0,
        whiten=False,
    )
    shaped = shaped_gae(logp, logp, values, totals, token_rewards=moved, **options)
    assert shaped.returns.tolist() == pytest.approx([0, 0, 7, 6, 4, 0, 3, 0, 0, 0.5, 0.5])
    late = shaped_gae(logp, logp, values, totals, **options)
    assert late.returns.tolist() == pytest.approx([0, 0, 7, 7, 7, 0, 3, 0, 0, 0.5, 0.5])


# ---- what misbehaves -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, "1.0", [1.0], {}, object(), torch.zeros(3), 10**400, 1j]
)
def test_a_value_that_is_no_finite_number_makes_the_sample_invalid(bad):
    scores = _score([length, lambda completions: [1.0, bad, 1.0]])
    assert scores.total[0] == 3
    assert scores.total[2] == 5
    assert math.isnan(scores.total[1])
    assert [(i, name) for i, name, _ in scores.invalid] == [(1, "<lambda>")]
    assert "number or None, got" in scores.invalid[0][2]


def test_a_value_whose_square_would_overflow_makes_the_sample_invalid():
    scores = _score([lambda completions: [1.0, -1e30, 1e15]])
    assert [(i, reason) for i, _, reason in scores.invalid] == [
        (1, "expected a number of at most 1e+15 (squares are summed in float32), got -1e+30")
    ]


@pytest.mark.parametrize(
    "returned, message",
    [
        ([1.0], "expected 3 values, one per completion, got 1"),
        ([1.0] * 4, "got 4"),
        (None, "got NoneType"),
        (1.0, "got float"),
        ("abc", "got str"),
        ({"a": 1, "b": 2, "c": 3}, "got dict"),
        (np.float32(1), "got float"),
        (torch.tensor(3.0), "got float"),
    ],
)
def test_a_wrong_return_stops_the_run(returned, message):
    def culprit(completions, **_):
        return returned

    async def culprit_async(completions, **_):
        return returned

    for function in (culprit, culprit_async):
        with pytest.raises(RewardError, match=f"'{function.__name__}'.*{message}"):
            _score([length, function])


def test_a_reward_that_raises_is_named_with_the_cause():
    def culprit(completions, **_):
        return [1 / 0]

    async def culprit_async(completions, **_):
        raise KeyError("answer")

    with pytest.raises(
        RewardError,
        match=r"'culprit' raised ZeroDivisionError: division by zero \(.*test_rewards.py:\d+\)",
    ) as caught:
        _score([culprit])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RewardError, match="'culprit_async' raised KeyError: 'answer'"):
        _score([length, culprit_async])
    with pytest.raises(RewardError, match="needs the column 'missing' of the data"):
        _score([lambda completions, missing: [0]])


class Unspeakable(Exception):
    def __str__(self):
        return self.missing

    __repr__ = __str__

    def __float__(self):
        raise self

    def __bool__(self):
        raise SystemExit(0)


def test_what_cannot_be_shown_is_told_all_the_same():
    """A user's exception, or value, whose own text raises."""

    def culprit(completions, **_):
        raise Unspeakable

    async def culprit_async(completions, **_):
        raise Unspeakable

    for function in (culprit, culprit_async):
        with pytest.raises(
            RewardError,
            match=rf"reward '{function.__name__}' raised Unspeakable: <its text cannot be shown> "
            r"\(.*test_rewards.py:\d+\)",
        ):
            _score([function])

    class Text:
        def __repr__(self):
            raise SystemExit(0)

    for value, said in (
        (Unspeakable(), "got a Unspeakable that cannot be shown"),
        (Text(), "got a Text that cannot be shown"),
        ([Text(), 1.0], "got a Text that cannot be shown"),
        ([(Text(), 1.0)], "got a Text that cannot be shown"),
        ("x" * 200, "got 'xxx"),
    ):
        scores = _score([lambda completions, value=value, **_: [value, 1.0, 2.0]])
        assert said in scores.invalid[0][2]
        assert len(scores.invalid[0][2]) < 200
        assert scores.total[1:] == [1.0, 2.0]


def test_sizes_are_checked():
    with pytest.raises(
        RewardError, match="expected 3 entries in answer, one per completion, got 2"
    ):
        _score([length], columns={"answer": [1, 2]})
    for rewards, weights in (([], None), ([load_reward(length)], [1.0, 2.0])):
        with pytest.raises(RewardError, match="one weight for each"):
            RewardSet(rewards, weights)


# ---- files ---------------------------------------------------------------------------------------
def test_a_function_of_a_file(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Config:\n    bonus: int = 3\n"
        "def reward(completions, **kwargs):\n    return [len(c) + Config().bonus for c in "
        "completions]\n"
    )
    reward = load_reward(f"{path}:reward")
    assert reward.name == "reward"
    assert _score(RewardSet([reward])).total == [5, 4, 7]


@pytest.mark.parametrize(
    "code, function, message",
    [
        (None, "f", "there is no such file"),
        ("def f(: pass", "f", r"SyntaxError.*line 1"),
        ("\nimport nonsense_package", "f", r"ModuleNotFoundError.*\(line 2\)"),
        (
            "def good(completions): pass\ndef _hidden(): pass",
            "f",
            "has no 'f'; its functions: good",
        ),
        ("f = 3", "f", "expected a function, got int"),
        ("", "", "has no ''; its functions: none"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, code, function, message):
    path = tmp_path / "broken.py"
    if code is not None:
        path.write_text(code)
    with pytest.raises(RewardError, match=message):
        load_reward(f"{path}:{function}")


def test_specifications_that_are_neither(tmp_path):
    with pytest.raises(RewardError, match="name the function"):
        load_reward(str(tmp_path / "reward.py"))
    with pytest.raises(RewardError, match="there is no such directory"):
        load_reward(str(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_reward(str(tmp_path))


# ---- reward models -------------------------------------------------------------------------------
@pytest.fixture
def reward_directory(tiny_model, tmp_path):
    model = RewardModel.from_decoder(load_decoder(tiny_model, device="cpu"), seed=3)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    save_reward_model(
        model, tmp_path / "judge", tokenizer=AutoTokenizer.from_pretrained(tiny_model)
    )
    return tmp_path / "judge"


def _expected(device, directory, sequences):
    batch = PackedBatch.from_sequences([(ids[:1], ids[1:]) for ids in sequences], device=device)
    return load_reward_model(directory)(batch).tolist()


def test_with_the_policys_tokenizer_its_ids_are_scored_as_they_are(
    tiny_model, reward_directory, device
):
    policy = AutoTokenizer.from_pretrained(tiny_model)
    policy(["w1", "w1 w2"], padding=True)  # leaves padding switched on in the backend
    rewards = RewardSet([load_reward(str(reward_directory), tokenizer=policy)])
    # ids that their text would not give back
    prompts, completions = [[1, 5], [1], [1, 9, 9]], [[7, 2], [3] * 5, [12]]
    scores = rewards.score(["ignored"] * 3, ["ignored"] * 3, prompts, completions)
    assert scores.per_reward.keys() == {"judge"}
    assert scores.total == pytest.approx(
        _expected(
            device, reward_directory, [p + c for p, c in zip(prompts, completions, strict=True)]
        ),
        abs=1e-6,
    )
    again = rewards.score(["ignored"], ["ignored"], prompts[:1], completions[:1])
    assert again.total[0] == pytest.approx(scores.total[0], abs=1e-6)  # companions do not matter


def test_with_another_tokenizer_the_text_is_scored(reward_directory, device):
    backend = Tokenizer(models.WordLevel({"<x>": 0, "</s>": 1, "w1": 2, "w2": 3}, unk_token="<x>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    policy = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<x>", eos_token="</s>")
    reward = load_reward(str(reward_directory), tokenizer=policy)
    scores = RewardSet([reward]).score(["w1", "w1"], ["w2", "w2"], [[2], [2]], [[3, 1], [3]])
    w1, w2 = 5, 6  # after the four special tokens and w0
    assert scores.total == pytest.approx(
        _expected(device, reward_directory, [[1, w1, w2, 2], [1, w1, w2]]), abs=1e-6
    )  # EOS only where the policy ended
    assert load_reward(str(reward_directory))(_rollout("w1", "w2")) == pytest.approx(
        _expected(device, reward_directory, [[1, w1, w2, 2]]), abs=1e-6
    )


def _rollout(prompt, completion):
    from fusedrl.engine.rewards.rewards import Rollout

    return Rollout([prompt], [completion], [[0]], [[0]], {})


def test_what_is_too_long_for_a_reward_model_is_invalid(tiny_model, reward_directory):
    rewards = RewardSet(
        [
            load_reward(str(reward_directory), tokenizer=AutoTokenizer.from_pretrained(tiny_model)),
            load_reward(length),
        ]
    )
    scores = rewards.score(["p"] * 3, ["aa"] * 3, [[1]] * 3, [[5] * 63, [5] * 64, [5]])
    assert scores.invalid == [
        (1, "judge", "65 tokens, and the reward model 'judge' reads at most 64")
    ]
    assert math.isfinite(scores.total[0])
    assert math.isnan(scores.total[1])
    assert math.isfinite(scores.total[2])
    nothing = rewards.score(["p"], ["aa"], [[1]], [[5] * 64])
    assert math.isnan(nothing.total[0])


# ---- a reward that ends the process --------------------------------------------------------------
ENDINGS = {
    "sys.exit(0)": "SystemExit",
    "sys.exit()": "SystemExit",
    "sys.exit('done')": "SystemExit",
    "raise GeneratorExit": "GeneratorExit",
    "raise asyncio.CancelledError": "CancelledError",
    "raise type('Odd', (BaseException,), {})('x')": "Odd",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_reward_that_ends_the_process_is_a_failed_reward(tmp_path, ending, kind):
    (tmp_path / "r.py").write_text(
        f"import asyncio, sys\n{kind} f(completions, **_):\n    {ending}\n"
    )
    with pytest.raises(RewardError, match=rf"reward 'f' raised {ENDINGS[ending]}.*r\.py:3"):
        RewardSet([load_reward(f"{tmp_path / 'r.py'}:f")]).score(["p"], ["c"], [[1]], [[2]])


@pytest.mark.parametrize("ending", ENDINGS)
def test_so_is_a_file_that_does_and_a_judge(tmp_path, ending):
    from fusedrl.engine.watch.judge import Answers, Pairs, judge_pairs, load_judge

    (tmp_path / "r.py").write_text(f"import asyncio, sys\ndef f(**_): ...\n{ending}\n")
    with pytest.raises(RewardError, match=f"importing the file raised {ENDINGS[ending]}.*line 3"):
        load_reward(f"{tmp_path / 'r.py'}:f")
    with pytest.raises(RewardError, match=f"judge .*importing the file raised {ENDINGS[ending]}"):
        load_judge(f"{tmp_path / 'r.py'}:f")
    (tmp_path / "j.py").write_text(f"import asyncio, sys\ndef f(prompts, a, b):\n    {ending}\n")
    with pytest.raises(RewardError, match=f"judge 'f' raised {ENDINGS[ending]}"):
        judge_pairs(
            load_judge(f"{tmp_path / 'j.py'}:f"),
            Pairs(["p"], [[1]], Answers(["x"], [[1]]), Answers(["y"], [[2]]), {}),
        )


def test_an_interrupt_stays_one(tmp_path):
    (tmp_path / "r.py").write_text("def f(completions, **_):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        RewardSet([load_reward(f"{tmp_path / 'r.py'}:f")]).score(["p"], ["c"], [[1]], [[2]])


def test_by_the_command_line_it_is_an_error_with_a_word(tiny_model, write_jsonl, tmp_path, capsys):
    from fusedrl.engine.cli.main import main

    (tmp_path / "r.py").write_text("import sys\ndef f(completions, **_):\n    sys.exit(0)\n")
    argv = [
        "train",
        "grpo",
        "--model",
        str(tiny_model),
        "--data",
        write_jsonl("p.jsonl", [{"prompt": "w1"}] * 4),
        "--reward",
        f"{tmp_path / 'r.py'}:f",
        "--prompts_per_step",
        "2",
        "--generation.max_new_tokens",
        "2",
        "--run.dir",
        str(tmp_path / "run"),
    ]
    assert main(argv) == 2
    assert "reward 'f' raised SystemExit: 0" in capsys.readouterr().err
    (tmp_path / "r.py").write_text(
        "class ApiError(Exception):\n    def __str__(self):\n        return self.code\n"
        "def f(completions, **_):\n    raise ApiError\n"
    )
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "reward 'f' raised ApiError: <its text cannot be shown>" in said
    assert "r.py:5)" in said
    (tmp_path / "ending.py").write_text("import sys\nsys.exit(0)\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert main([*argv, "--loss.advantage", "ending.f"]) == 2
    finally:
        sys.path.remove(str(tmp_path))
    assert "'ending.f' cannot be imported: SystemExit: 0" in capsys.readouterr().err


@pytest.mark.parametrize("asynchronous", ["", "async "])
def test_a_function_that_takes_messages_for_a_text_is_told_what_they_are(tmp_path, asynchronous):
    (tmp_path / "r.py").write_text(
        f"{asynchronous}def short(completions, **_):\n"
        "    return [-len(c.split()) for c in completions]\n"
    )
    rewards = RewardSet([load_reward(f"{tmp_path / 'r.py'}:short")])
    assert rewards.score(["p"], ["a b"], [[1]], [[2]]).total == [-2.0]
    talk = [{"role": "user", "content": "p"}]
    with pytest.raises(RewardError, match=r'no attribute \'split\'.*text is c\[-1\]\["content"\]'):
        rewards.score([talk], ["a b"], [[1]], [[2]])


def test_functions_that_were_loaded_ahead_are_handed_out_once(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("def f(completions, **_):\n    return [1.0] * len(completions)\n")
    load_ahead([f"{path}:f", "exact_match", str(tmp_path)])
    path.write_text("def f(completions, **_):\n    return [2.0] * len(completions)\n")
    values = [
        RewardSet([load_reward(f"{path}:f")]).score(["p"], ["a"], [[1]], [[2]]).total
        for _ in range(2)
    ]
    assert values == [[1.0], [2.0]]
    load_ahead([f"{path}:f"])
    load_ahead(())
    path.write_text("")
    with pytest.raises(RewardError, match="has no 'f'"):
        load_reward(f"{path}:f")
