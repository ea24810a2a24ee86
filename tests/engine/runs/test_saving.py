"""Whatever ends a run, its last completed step is on the disk where it can be, and going on from
there is bitwise the undisturbed run.

One file: the run that every kind of end is tried on.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import (
    CheckpointError,
    ConfigError,
    RewardError,
    SetupError,
    Stopped,
)
from fusedrl.engine.cli.main import main, parse_config
from fusedrl.engine.config import (
    CriticConfig,
    DPOConfig,
    EvaluationConfig,
    GenerationConfig,
    KLConfig,
    LoRAConfig,
    OptimConfig,
    PolicyConfig,
    PtxConfig,
    RejectionConfig,
    ReplayConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)
from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS
from fusedrl.engine.optim.adamw import Optimizer
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.policy.control import Control
from fusedrl.engine.rewards.rewards import RewardSet
from fusedrl.engine.runs import saving
from fusedrl.engine.runs.checkpoint import latest_checkpoint
from fusedrl.engine.runs.run import Run
from fusedrl.engine.stages import policy, rejection
from fusedrl.engine.stages.dpo import train_dpo
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.rejection import train_rejection
from fusedrl.engine.stages.reward_model import train_reward_model
from fusedrl.engine.stages.sft import train_sft
from fusedrl.engine.watch.monitor import HeldOut

pytestmark = [pytest.mark.cpu_only("bitwise resumption is promised on a CPU")]

# A reward that draws from torch's generator: what is carried from step to step holds that as well.
REWARD = """
import torch
def likes_w3(completions, **columns):
    return [text.split().count("w3") + torch.rand(()).item() for text in completions]
"""
TRAIN = {
    SFTConfig: train_sft,
    RewardModelConfig: train_reward_model,
    DPOConfig: train_dpo,
    RejectionConfig: train_rejection,
    PolicyConfig: train_policy,
}
OPTIM = OptimConfig(lr=3e-3)
STEPS, AT = 4, 2  # steps of a run, and those complete when something happens to it


@pytest.fixture(autouse=True)
def _signals_as_on_a_terminal():
    """A suite in the background of a script has SIGINT ignored, one under nohup SIGHUP, and ignored
    signals stay so in a run."""
    before = {
        number: signal.signal(number, handler)
        for number, handler in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGHUP, signal.SIG_DFL),
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGUSR1, signal.SIG_DFL),
        )
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def policy_options(kind, texts, prompts):
    """The options of a kind of policy run beyond those that all have."""
    return {
        "everything": dict(
            algorithm="ppo",
            lora=LoRAConfig(rank=2),
            critic=CriticConfig(model="policy", warmup_steps=1, optim=OPTIM),
            scale_scores=True,
            ptx=PtxConfig(data=texts, sequences_per_step=2),
            replay=ReplayConfig(capacity=12, fraction=0.3, max_age=3),
            kl=KLConfig(coef=0.1, target=0.5, horizon=50),
            evaluation=EvaluationConfig(data=prompts, every=1, samples_per_prompt=1),
        ),
        "int8": dict(algorithm="grpo", optim=replace(OPTIM, state="int8")),
        "bfloat16": dict(algorithm="grpo", dtype="bfloat16"),
    }.get(kind, dict(algorithm=kind))


@pytest.fixture
def make(tiny_model, tiny_teacher, tmp_path, write_jsonl):
    """The configuration of a stage or an algorithm; the run directory is `name`."""
    (tmp_path / "rewards.py").write_text(REWARD)
    model, reward = str(tiny_model), (f"{tmp_path / 'rewards.py'}:likes_w3",)
    prompts = write_jsonl(
        "prompts.jsonl",
        [{"prompt": " ".join(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))} for i in range(12)],
    )
    texts = write_jsonl(
        "texts.jsonl",
        [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i % 5}"} for i in range(8)],
    )
    pairs = write_jsonl(
        "pairs.jsonl",
        [{"prompt": f"w{i}", "chosen": f"w{i + 1} w3", "rejected": f"w{i + 2}"} for i in range(8)],
    )
    sampled = dict(
        reward=reward,
        steps=STEPS,
        prompts_per_step=4,
        generation=GenerationConfig(max_new_tokens=5),
        tokens_per_microbatch=60,
    )

    def config(kind, name="run", run=None, **kwargs):
        common = (
            dict(
                model=model,
                optim=OPTIM,
                run=RunConfig(dir=str(tmp_path / name), **dict(progress=False) | (run or {})),
            )
            | kwargs
        )
        if kind == "sft":
            return SFTConfig(data=texts, sequences_per_step=2, **common)
        if kind == "reward":
            return RewardModelConfig(data=pairs, pairs_per_step=2, eval_fraction=0.0, **common)
        if kind == "dpo":
            return DPOConfig(data=pairs, pairs_per_step=2, eval_fraction=0.0, **common)
        if kind == "rejection":
            return RejectionConfig(
                data=prompts, **sampled | dict(samples_per_prompt=3, minibatches=2) | common
            )
        extra = policy_options(kind, texts, prompts)
        group = ADVANTAGES[ALGORITHMS[extra["algorithm"]].advantage] == "group"
        return PolicyConfig(
            data=prompts,
            **sampled
            | dict(
                samples_per_prompt=3 if group else 1,
                minibatches=2 if ALGORITHMS[extra["algorithm"]].objective != "trpo" else 1,
            )
            | common
            | extra
            | ({"reference_model": str(tiny_teacher)} if kind == "distill" else {}),
        )

    return config


def run_of(config):
    return TRAIN[type(config)](config)


@contextmanager
def disturbed(where, act, after=AT):
    """Within the block `act` is called, once, when `where` is reached with `after` steps
    complete."""
    logged, done = [0], []

    def reached(original, late=False):
        def call(*args, **kwargs):
            due = logged[0] == after and not done
            if due and not late:
                done.append(1)
                act()
            found = original(*args, **kwargs)
            if due and late:
                done.append(1)
                act()
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        log = Run.log
        patch.setattr(
            Run,
            "log",
            lambda self, step, metrics: (log(self, step, metrics), logged.__setitem__(0, step + 1))[
                0
            ],
        )
        owners = {
            "rollout": [(policy, "rollout"), (rejection, "rollout")],
            "reward": [(RewardSet, "_call")],
            "score": [(policy, "score")],
            "update": [(Optimizer, "step")],
            "half-way": [(Optimizer, "step")],
            "evaluate": [(HeldOut, "evaluate")],
            "save": [(saving, "save_checkpoint")],
            "log": [(Run, "log")],
        }[where]
        for owner, name in owners:
            patch.setattr(owner, name, reached(getattr(owner, name), late=where == "half-way"))
        yield
    assert done, f"{where} was never reached"


def fail(error):
    def act():
        raise error

    return act


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def last(config):
    found = latest_checkpoint(config.run.dir)
    return 0 if found is None else found.step


def outcome(config):
    """All that a run leaves: records without clocks, the last checkpoint, and the bytes of the
    model."""
    root, clocks = Path(config.run.dir), ("timing/", "tokens_per_s", "mem/")
    rows = [
        {k: v for k, v in json.loads(line).items() if not k.startswith(clocks)}
        for line in (root / "metrics.jsonl").read_text().splitlines()
    ]
    checkpoint = latest_checkpoint(root)
    files = {
        path.relative_to(root): path.read_bytes() for path in sorted(root.glob("*/*.safetensors"))
    }
    return (
        rows,
        (root / "samples.jsonl").read_text(),
        checkpoint.step,
        checkpoint.state,
        checkpoint.tensors,
        files,
    )


UNDISTURBED = {}


def undisturbed(make, kind):
    """The outcome of a run that nothing happened to; made once, since it is a function of the
    kind."""
    if kind not in UNDISTURBED:
        run_of(whole := make(kind, "whole"))
        UNDISTURBED[kind] = outcome(whole)
    return UNDISTURBED[kind]


def assert_same(ours, theirs):
    assert ours[:4] == theirs[:4]
    for group, tensors in theirs[4].items():
        assert ours[4][group].keys() == tensors.keys()
        differing = [
            name
            for name, tensor in tensors.items()
            if not torch.equal(ours[4][group][name], tensor)
        ]
        # which every process counts from 0, and no step reads
        assert not set(differing) - {"weights_versions"}, (group, differing)
    assert ours[5] == theirs[5]


def resumed(config):
    run_of(replace(config, run=replace(config.run, resume=True)))
    return outcome(config)


# ---- an exception leaves the loop ----------------------------------------------------------------
KINDS = [
    "sft",
    "reward",
    "dpo",
    "rejection",
    "everything",
    "grpo",
    *(pytest.param(name, marks=pytest.mark.full) for name in ("bfloat16", *ALGORITHMS)),
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_saves_the_last_completed_step(make, kind, capsys):
    parts = make(kind, "parts")
    where = "update" if kind in ("sft", "reward", "dpo") else "rollout"
    error = MemoryError("a fault of the test")
    with disturbed(where, fail(error)), pytest.raises(SetupError, match="out of memory") as caught:
        run_of(parts)
    assert caught.value.__cause__ is error
    assert last(parts) == AT
    told = capsys.readouterr().err
    assert f"step {AT} is in {parts.run.dir}/checkpoints/step_{AT:08d}; go on with" in told
    assert any(f"step {AT} is in" in note for note in caught.value.__notes__)
    assert_same(resumed(parts), undisturbed(make, kind))


@pytest.mark.parametrize(
    "where, error",
    [
        ("reward", ValueError("x")),
        ("reward", SystemExit(0)),
        ("score", RuntimeError("non-finite")),
        ("update", MemoryError()),
        ("rollout", KeyboardInterrupt()),
    ],
)
def test_wherever_it_comes_from(make, where, error):
    parts = make("everything", "parts")
    with (
        disturbed(where, fail(error)),
        pytest.raises((type(error), RuntimeError, RewardError, SetupError)),
    ):
        run_of(parts)
    assert last(parts) == AT
    assert_same(resumed(parts), undisturbed(make, "everything"))


def test_half_way_through_an_update_the_checkpoint_before_is_named(make, capsys):
    parts = make("everything", "parts")
    with disturbed("half-way", fail(MemoryError())), pytest.raises(SetupError):
        run_of(parts)
    told = capsys.readouterr().err
    assert (
        f"the last completed step, {AT}, is not saved: the weights have begun to change "
        "since" in told
    )
    # the first step is saved always
    assert f"step 1 is in {parts.run.dir}/checkpoints/step_00000001" in told
    assert last(parts) == 1
    assert_same(resumed(parts), undisturbed(make, "everything"))


def test_a_checkpoint_whose_state_lacks_something_is_named(make):
    run_of(config := make("grpo", "old"))
    checkpoint = latest_checkpoint(config.run.dir)
    parts = saving.Parts(
        Learner(HybridActor.from_pretrained(config.model, device="cpu"), config.optim),
        control=Control(config),
    )
    parts.load(checkpoint)
    older = replace(
        checkpoint, state={key: value for key, value in checkpoint.state.items() if key != "unit"}
    )
    with pytest.raises(
        CheckpointError,
        match=r"state\.json lacks 'unit', so another version of fusedrl wrote it; resume with that "
        r"version, or begin",
    ):
        parts.load(older)


def test_updates_that_are_all_skipped_leave_the_step_whole(make, monkeypatch):
    parts = make("sft", "parts")
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor,
        "backward",
        lambda self, *a: backward(
            self * (float("nan") if Path(parts.run.dir).exists() and last(parts) else 1.0), *a
        ),
    )
    monkeypatch.setattr("fusedrl.engine.optim.learner.MOST_SKIPPED", 1)
    with pytest.raises(RuntimeError, match="non-finite gradient norm"):
        run_of(parts)
    monkeypatch.undo()
    assert last(parts) == 1
    assert_same(resumed(parts), undisturbed(make, "sft"))


def test_a_save_that_fails_keeps_the_first_error(make, capsys, monkeypatch):
    config = make("grpo")

    def full(*args, **kwargs):
        if args[1] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return saving_of(*args, **kwargs)

    saving_of = saving.save_checkpoint
    monkeypatch.setattr(saving, "save_checkpoint", full)
    with (
        disturbed("rollout", fail(ZeroDivisionError("mine"))),
        pytest.raises(ZeroDivisionError, match="mine"),
    ):
        run_of(config)
    told = capsys.readouterr().err
    assert (
        f"saving the last completed step, {AT}, failed (OSError: [Errno 28] No space left on "
        "device)" in told
    )
    assert "step 1 is in" in told


def test_an_error_before_the_first_step_is_complete_leaves_nothing_and_may_begin_anew(make, capsys):
    config = make("everything")
    with (
        disturbed("rollout", fail(ValueError("at once")), after=0),
        pytest.raises(ValueError, match="at once"),
    ):
        run_of(config)
    assert "nothing is saved: no step was completed" in capsys.readouterr().err
    assert last(config) == 0
    run_of(config)


# ---- signals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, where, numbers, step",
    [
        ("everything", "rollout", ["SIGTERM"], AT + 1),
        ("everything", "half-way", ["SIGHUP"], AT + 1),
        ("everything", "evaluate", ["SIGUSR1"], AT + 1),
        ("everything", "save", ["SIGTERM", "SIGTERM"], 1),
        ("everything", "reward", ["SIGINT", "SIGINT"], AT),
        ("grpo", "score", ["SIGTERM", "SIGINT"], AT),
        ("everything", "half-way", ["SIGINT", "SIGINT"], AT + 1),
        ("sft", "update", ["SIGINT", "SIGINT"], AT),
        ("dpo", "log", ["SIGTERM"], AT + 1),
        ("rejection", "reward", ["SIGTERM"] * 3, AT),
        ("reward", "half-way", ["SIGTERM"] * 3, 1),
    ],
)
def test_signals_at_any_moment(make, kind, where, numbers, step):
    """Once: the step is completed and saved. Twice: no completed step is lost. Three times: at
    once."""
    parts = make(kind, "parts", dict(signals="SIGUSR1"))
    numbers = [signal.Signals[name] for name in numbers]
    with (
        disturbed(where, send(*numbers), after=1 if where == "save" else AT),
        pytest.raises(Stopped) as stopped,
    ):
        run_of(parts)
    assert stopped.value.code == 128 + numbers[0]
    assert last(parts) == step
    assert_same(resumed(parts), undisturbed(make, kind))


def test_the_first_signal_saves_what_is_complete_before_the_step_ends(make):
    """A scheduler's grace may be shorter than a step."""
    config, seen = make("everything"), []

    def act():
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(last(config))

    with disturbed("reward", act), pytest.raises(Stopped):
        run_of(config)
    assert seen == [AT]
    assert last(config) == AT + 1


def test_ignored_signals_stay_ignored_and_handlers_come_back(make):
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    }
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with disturbed("rollout", send(signal.SIGHUP)):
            run_of(make("grpo"))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_terminal_that_has_gone_ends_nothing(make, monkeypatch):
    class Gone:
        isatty = staticmethod(lambda: False)

        def write(self, *text):
            raise OSError(errno.EIO, "Input/output error")

        flush = write

    config = make("grpo", run=dict(progress=True))
    monkeypatch.setattr(sys, "stderr", Gone())
    with disturbed("rollout", send(signal.SIGHUP)), pytest.raises(Stopped):
        run_of(config)
    monkeypatch.undo()
    assert last(config) == AT + 1


@pytest.mark.parametrize("names", ["SIGKILL", "USR1", "SIGUSR1,nonsense"])
def test_signals_that_cannot_be_caught(names):
    with pytest.raises(
        ConfigError, match=r"run\.signals names of signals that a process can catch"
    ):
        RunConfig(signals=names)


def start(options, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "fusedrl.engine.cli", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def options_of(tmp_path, tiny_model, write_jsonl, name):
    (tmp_path / "rewards.py").write_text(REWARD)
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i} w{i + 3}"} for i in range(12)])
    return [
        "train",
        "ppo",
        "--model",
        str(tiny_model),
        "--data",
        data,
        "--reward",
        f"{tmp_path / 'rewards.py'}:likes_w3",
        "--steps",
        "40",
        "--prompts_per_step",
        "4",
        "--generation.max_new_tokens",
        "5",
        "--optim.lr",
        "3e-3",
        "--evaluation.data",
        data,
        "--evaluation.every",
        "3",
        "--run.dir",
        str(tmp_path / name),
    ]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 12))]
)
def test_processes_that_are_stopped_at_random_moments(tmp_path, tiny_model, write_jsonl, seed):
    """The defaults as shipped, by the command line: signals after random waits, SIGKILL among them,
    until the run is done."""
    rng = random.Random(seed)
    config = parse_config("ppo", options_of(tmp_path, tiny_model, write_jsonl, "whole")[2:])
    assert main(options_of(tmp_path, tiny_model, write_jsonl, "whole")) == 0
    options = options_of(tmp_path, tiny_model, write_jsonl, "parts")
    parts = replace(config, run=replace(config.run, dir=str(tmp_path / "parts")))
    for _ in range(1 if seed == 0 else 12):
        before = last(parts) if Path(parts.run.dir).exists() else 0
        with start([*options, "--run.resume", "true"] if before else options) as process:
            lines = Path(parts.run.dir) / "metrics.jsonl"
            size = lines.stat().st_size if before else 0
            wait = time.monotonic() + 600
            while (
                process.poll() is None
                and time.monotonic() < wait
                and not (lines.exists() and lines.stat().st_size > size)
            ):  # a step more
                time.sleep(0.01)
            time.sleep(rng.random() * 0.3)
            number = rng.choice(
                [signal.SIGTERM, signal.SIGINT, signal.SIGHUP] + [signal.SIGKILL] * (seed > 0)
            )
            process.send_signal(number)
            told = process.stderr.read()
        if process.returncode == 0:  # at its end
            break
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), told
        if number != signal.SIGKILL:
            assert last(parts) > before
            assert f"go on with: fusedrl resume {parts.run.dir}\n" in told
            assert last(parts) == json.loads(lines.read_text().splitlines()[-1])["step"]
    assert main([*options, "--run.resume", "true"]) == 0
    assert_same(outcome(parts), outcome(config))


# ---- when, where, and how to go on ---------------------------------------------------------------
def test_by_default_the_clock_says_when(make, monkeypatch):
    clock, steps = [0.0], []
    monkeypatch.setattr(saving.time, "perf_counter", lambda: clock[0])
    seconds = {"step": 200.0, "save": 1.0}
    log, save = Run.log, saving.save_checkpoint

    def slow(directory, step, *args, **kwargs):
        steps.append(step)
        clock[0] += seconds["save"]
        return save(directory, step, *args, **kwargs)

    monkeypatch.setattr(
        Run,
        "log",
        lambda self, *args: (clock.__setitem__(0, clock[0] + seconds["step"]), log(self, *args))[1],
    )
    monkeypatch.setattr(saving, "save_checkpoint", slow)

    def saved(name, **options):
        steps.clear()
        run_of(make("grpo", name, options.pop("run", None), steps=12, **options))
        return list(steps)

    assert saved("usual") == [1, 4, 7, 10, 12]  # the first, every ten minutes, the end
    assert saved("often", run=dict(save_minutes=3)) == list(range(1, 13))
    assert saved("never", run=dict(save_minutes=0)) == [12]
    assert saved("steps", run=dict(save_every=5)) == [5, 10, 12]
    seconds["save"] = 60.0  # 5% of the time at the most: 1,200 s between two
    assert saved("costly") == [1, 7, 12]
    assert {
        path.name for path in (Path(make("grpo", "usual").run.dir) / "checkpoints").iterdir()
    } == {"step_00000010", "step_00000012"}


STAGE_OPTIONS = {
    "sft": ["--sequences_per_step", "2"],
    "reward": ["--pairs_per_step", "2"],
    "dpo": ["--pairs_per_step", "2"],
    "kto": ["--answers_per_step", "4"],
    "rejection": ["--prompts_per_step", "2", "--samples_per_prompt", "2", "--steps", "4"],
    "ppo": ["--prompts_per_step", "4", "--steps", "4", "--optim.lr", "1e-4"],
    "grpo": ["--prompts_per_step", "2", "--samples_per_prompt", "2", "--steps", "4"],
}


@pytest.mark.parametrize("stage", STAGE_OPTIONS)
def test_what_is_printed_can_be_run(stage, tmp_path, tiny_model, write_jsonl, capsys, monkeypatch):
    """Of every stage, with a configuration file and names with blanks, from another directory too:
    one short command goes on with the run."""
    monkeypatch.chdir(tmp_path)
    run = {"dir": "the run", "resume": False, "progress": False, "save_every": 1}
    (tmp_path / "run.yaml").write_text(json.dumps({"run": run}))
    rows = {"prompt": "w1 w2", "completion": "w3 w4"}
    if stage in ("reward", "dpo", "kto"):
        rows = {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}
    write_jsonl("data with blanks.jsonl", [rows] * 8)
    (tmp_path / "it's.py").write_text(REWARD)
    argv = ["train", stage, "--config", "run.yaml", "--model", str(tiny_model)]
    argv += ["--data", "data with blanks.jsonl", *STAGE_OPTIONS[stage]]
    if stage in ("rejection", "ppo", "grpo"):
        argv += ["--reward", "it's.py:likes_w3", "--generation.max_new_tokens", "4"]
    with disturbed("update", send(signal.SIGTERM, signal.SIGTERM)):
        assert main(argv) == 143
    told = capsys.readouterr().err.split("go on with: ")[1:]
    commands = {one.splitlines()[0] for one in told}
    assert commands == {"fusedrl resume 'the run'"}
    assert main(["resume", "the run", "--run.save_every", "0", "--run.keep", "9"]) == 0
    assert json.loads(Path("the run/status.json").read_text())["state"] == "finished"
    lines = Path("the run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [1, 2, 3, 4]
    assert main(["train", *argv[1:]]) == 2
    assert "continue it with fusedrl resume 'the run', or choose" in capsys.readouterr().err


# ---- a directory that holds records --------------------------------------------------------------
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", ["records alone", "a broken checkpoint", "a torn line", "a model"])
def test_records_without_a_checkpoint_are_never_written_over(make, resume, left):
    config = make("sft")
    run_of(config)
    root = Path(config.run.dir)
    for path in (root / "checkpoints").iterdir():
        if left == "a broken checkpoint":
            (path / "MANIFEST.json").unlink()
        else:
            shutil.rmtree(path)
    if left == "a torn line":
        (root / "metrics.jsonl").write_bytes(b'{"step": 1, "lo')
    if left == "a model":
        (root / "metrics.jsonl").unlink()
    before = {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    with pytest.raises(
        ConfigError,
        match=r"holds records of a run .* and no checkpoint to continue it from.*Choose another "
        r"--run\.dir, or move",
    ):
        run_of(replace(config, run=replace(config.run, resume=resume)))
    assert before == {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock"
    }
