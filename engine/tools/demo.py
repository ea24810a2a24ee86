"""Demo of all stages on an embedded task, in minutes on a CPU: SFT from random weights, a reward
model from noisy preferences, PPO with that reward model.

`run_demo` calls the three stages exactly as a user would. Then it measures the result on prompts
that no stage has seen: the gold reward, which no stage was trained on, and the reward model's
score, which PPO was trained on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base import tables
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.estimates import Estimate
from fusedrl.engine.config import (
    EvaluationConfig,
    GenerationConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)
from fusedrl.engine.data.readers import load_pairs, load_prompts
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import load_tokenizer, save_pretrained
from fusedrl.engine.rewards.rewards import RewardSet, load_reward
from fusedrl.engine.stages.policy import PolicyResult, train_policy
from fusedrl.engine.stages.reward_model import RewardModelResult, train_reward_model
from fusedrl.engine.stages.sft import SFTResult, train_sft
from fusedrl.engine.tools.demo_task import gold_reward, noise_ceiling, write_demo_files
from fusedrl.engine.watch.evaluate import Evaluation, comparison, evaluate, side_by_side
from fusedrl.engine.watch.page.page import write_page
from fusedrl.engine.watch.run_files import RunFiles

RATER_TEMPERATURE = 3.0
GENERATION = GenerationConfig(max_new_tokens=64)
KL_TARGET = 6.0


@dataclass(frozen=True)
class DemoSize:
    """Sizes of the demo; the defaults are what `fusedrl demo` runs."""

    stories: int = 8192
    sft_epochs: int = 5
    pairs: int = 8192
    ppo_steps: int = 80
    prompts_per_step: int = 64
    held_out: int = 512


@dataclass(frozen=True)
class DemoResult:
    """Results of the three stages, and the policy before and after PPO on held-out prompts."""

    directory: Path
    sft: SFTResult
    reward_model: RewardModelResult
    ppo: PolicyResult
    before: Evaluation
    after: Evaluation
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def gain(self) -> Estimate:
        """Rise of the gold reward by PPO."""
        return self.after.rewards["gold"].minus(self.before.rewards["gold"])


def run_demo(
    directory: str | Path = "runs/demo",
    seed: int = 0,
    *,
    size: DemoSize | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> DemoResult:
    """Write the task's files, train all three stages, measure, and print a table.

    Args:
        directory: directory for all files. If it is not empty, the first free one of directory-2,
            directory-3, ... is used.
        seed: seed of the task, the initial weights and the runs.
        size: sizes of the demo; if None, the full ones.
        device: device of the models, which are float32 on any device. The default is the CPU, so
            that the demo is the same everywhere.
        progress: whether to show live progress and the table on the terminal.

    Returns:
        The results of the three stages, and the evaluations before and after PPO.
    """
    threads = torch.get_num_threads()
    # A model this small gains nothing from a second thread; on a busy machine two threads took 3
    # to 10 times as long.
    torch.set_num_threads(1)
    try:
        return _run(_free(Path(directory)), seed, size or DemoSize(), device, progress)
    finally:
        torch.set_num_threads(threads)


def _run(root: Path, seed: int, size: DemoSize, device: str, progress: bool) -> DemoResult:
    console, seconds = tables.console(texts=True), dict[str, float]()
    console.quiet = not progress
    at = partial(RunConfig, seed=seed, progress=progress)

    def chapter(number: int, title: str) -> float:
        console.print(f"{number}. {title}", style="bold")
        return time.perf_counter()

    console.print(f"Everything goes to {root}/")
    files = write_demo_files(
        root / "task",
        seed,
        stories=size.stories,
        pairs=size.pairs,
        held_out=size.held_out,
        rater_temperature=RATER_TEMPERATURE,
    )
    start_model = random_model(files / "model", root / "random", seed)

    started = chapter(
        1,
        f"SFT: a language model from random weights, {size.sft_epochs} passes over {size.stories} "
        "stories",
    )
    sft = train_sft(_sft(start_model, files, size, device, at(str(root / "sft"))))
    seconds["sft"] = time.perf_counter() - started

    started = chapter(
        2, f"Reward model: {size.pairs} preference pairs from a rater who is often wrong"
    )
    reward_model = train_reward_model(_reward(sft.model, files, device, at(str(root / "reward"))))
    seconds["reward"] = time.perf_counter() - started

    started = chapter(3, f"PPO against the reward model, KL target {KL_TARGET:g} nats per story")
    ppo = train_policy(
        _ppo(sft.model, reward_model.model, files, size, device, at(str(root / "ppo")))
    )
    seconds["ppo"] = time.perf_counter() - started

    started = time.perf_counter()
    reference, policy = (
        HybridActor.from_pretrained(path, dtype="float32", device=device)
        for path in (sft.model, ppo.model)
    )
    proxy = load_reward(reward_model.model, device=device, tokenizer=policy.tokenizer)
    rewards = {"gold": RewardSet([load_reward(gold_reward)]), "proxy": RewardSet([proxy])}
    prompts = load_prompts(str(files / "held_out.jsonl"))
    before, after = (
        evaluate(actor, reference, prompts, rewards, GENERATION, seed=seed + 1)
        for actor in (reference, policy)
    )
    seconds["evaluation"] = time.perf_counter() - started
    write_page([RunFiles(root / "ppo").read()], root / "report.html")

    result = DemoResult(root, sft, reward_model, ppo, before, after, seconds)
    ceiling = noise_ceiling(
        [vars(pair) for pair in load_pairs(str(files / "pairs.jsonl"))[0]], RATER_TEMPERATURE
    )
    _report(console, result, [str(example.prompt) for example in prompts], ceiling)
    return result


def _sft(model: Path, files: Path, size: DemoSize, device: str, run: RunConfig) -> SFTConfig:
    return SFTConfig(
        model=str(model),
        data=str(files / "sft.jsonl"),
        eval_fraction=0.05,
        epochs=size.sft_epochs,
        sequences_per_step=32,
        dtype="float32",
        device=device,
        optim=OptimConfig(lr=2e-3, warmup_steps=20),
        run=run,
    )


def _reward(model: str, files: Path, device: str, run: RunConfig) -> RewardModelConfig:
    return RewardModelConfig(
        model=model,
        data=str(files / "pairs.jsonl"),
        eval_fraction=0.125,
        pairs_per_step=32,
        dtype="float32",
        device=device,
        optim=OptimConfig(lr=2e-3, warmup_steps=10),
        run=run,
    )


def _ppo(
    model: str, reward: str, files: Path, size: DemoSize, device: str, run: RunConfig
) -> PolicyConfig:
    # A story is some twenty tokens and is scored at its end. lam = 1 gives the first token its full
    # credit, even while the value head has hardly learnt anything. A small value_coef keeps the
    # value head from changing the trunk that it shares with the policy.
    return PolicyConfig(
        model=model,
        data=str(files / "prompts.jsonl"),
        reward=(reward,),
        steps=size.ppo_steps,
        prompts_per_step=size.prompts_per_step,
        epochs=4,
        missing_eos_penalty=1.0,
        evaluation=EvaluationConfig(
            str(files / "held_out.jsonl"), every=max(1, size.ppo_steps // 4), prompts=32
        ),
        generation=GENERATION,
        dtype="float32",
        device=device,
        kl=KLConfig(coef=0.05, target=KL_TARGET),
        loss=LossConfig(lam=1.0, value_coef=0.02),
        optim=OptimConfig(lr=5e-4),
        run=run,
    )


def _free(directory: Path) -> Path:
    """Return the directory if it is missing or empty, else the first of directory-2, directory-3,
    ... that is. Raise ConfigError if it is a file."""
    if directory.is_file():
        raise ConfigError(f"demo: expected --dir to be a directory, got the file {directory}")
    found, number = directory, 1
    while found.exists() and (not found.is_dir() or any(found.iterdir())):
        number += 1
        found = directory.with_name(f"{directory.name}-{number}")
    return found


def random_model(files: Path, directory: Path, seed: int) -> Path:
    """Make a model directory with random weights from the task's files, and return its path."""
    save_pretrained(
        Decoder.random(model_config(files), seed), directory, tokenizer=load_tokenizer(files)
    )
    return directory


# ---- the report ----------------------------------------------------------------------------------
def _report(console: Console, result: DemoResult, prompts: list[str], ceiling: float) -> None:
    before, after, gain, model = result.before, result.after, result.gain, result.reward_model
    console.print(
        "\nBefore PPO (the SFT model, which is also the reference) and after it, on prompts that "
        "no stage has seen:"
    )
    labels = {
        "gold": "gold reward (nothing was trained on it)",
        "proxy": "proxy reward (the reward model's score)",
    }
    tables.show(comparison(before, after, labels=labels, kl_target=KL_TARGET), console)
    tables.show(side_by_side(prompts, before, after, score="gold", count=5), console)
    console.print(
        f"The reward model agrees with {model.accuracy:.1%} of {model.held_out} held-out labels "
        f"(95% interval {model.interval[0]:.1%} to "
        f"{model.interval[1]:.1%}); the labels are so noisy that nobody can expect more than "
        f"{ceiling:.1%}."
    )
    console.print(
        f"The gold reward {'rose' if gain.mean > 0 else 'fell'} by {abs(gain.mean):.2f}, which is "
        f"{abs(gain.mean) / gain.error:.0f} "
        f"standard errors; the KL is {after.kl.mean / KL_TARGET:.2f} times its target."
    )
    console.print(
        "Seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items())
        + f". Models, metrics and samples are in {result.directory}/, and a page about the PPO run "
        f"in {result.directory}/report.html"
    )
