"""Monitoring of a policy run: evaluation on held-out prompts, sample tables over time, the
reward-hacking alarm, and a message if all rewards are equal. Monitoring does not change training by
a single bit.

    <run>/metrics.jsonl        eval_... in the lines of the steps that were evaluated; the line of
                               step 0 is the policy before training
    <run>/samples_eval.jsonl   completions of the same few prompts at every evaluation: step,
                               prompt, completion, scores by name
    <run>/alarms.jsonl         a line per alarm: step, and the evidence
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.draws import generators_kept
from fusedrl.engine.base.estimates import Estimate
from fusedrl.engine.base.ordering import shuffled
from fusedrl.engine.config import EvaluationConfig, PolicyConfig
from fusedrl.engine.data.readers import ReadOptions, load_prompts
from fusedrl.engine.data.tokenize import count_tokens, encode_prompts
from fusedrl.engine.generation.drafts import drafts_of
from fusedrl.engine.policy.advantages import find_advantage
from fusedrl.engine.rewards.environments import Environments
from fusedrl.engine.rewards.rewards import RewardSet
from fusedrl.engine.runs.metrics import read_rows
from fusedrl.engine.runs.run import Run
from fusedrl.engine.watch.alarm import Detector, as_row, message
from fusedrl.engine.watch.evaluate import Evaluation, Scorer, evaluate

ALARM_EXIT = 4  # of a process that the alarm stopped
FLAT_STEPS = 5  # the message about equal rewards is repeated after so many such rollouts in a row


class Monitor:
    """Monitor of a policy run. Make it when the run directory is open, before a checkpoint is
    restored. Then call `begin` once, and `after` at the end of every step.

    Args:
        rewards: the rewards that the policy is trained on.
        gold: the rewards that are only measured.
        environments: what answers the policy's turns, in runs with an environment.
    Raises:
        DataError, ConfigError, FileNotFoundError: the held-out prompts cannot be used.
    """

    def __init__(
        self,
        config: PolicyConfig,
        actor: HybridActor,
        reference: Scorer | None,
        rewards: RewardSet,
        gold: RewardSet | None,
        run: Run,
        environments: Environments | None = None,
    ) -> None:
        self._config, self._run = config, run
        self._held_out = (
            None
            if config.evaluation is None
            else HeldOut(
                config, config.evaluation, actor, reference, rewards, gold, run, environments
            )
        )
        self._detector: Detector | None = None
        if config.alarm.action != "off":
            self._alarms = run.lines("alarms.jsonl")
            self._detector = Detector(config.alarm, config.kl.target)
        self._flat = FlatRewards(
            find_advantage(config.advantage).needs,
            1
            if config.advantage == "none"
            else config.prompts_per_step * config.samples_per_prompt,
            config.generation.max_new_tokens,
            config.score_clip,
        )
        # in a resumed run, repeat the earlier steps, so that detectors are in the same state
        for row in read_rows(run.directory / "metrics.jsonl"):
            self._flat.update(row)
            if self._detector is not None:
                self._detector.update(row)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest held-out prompt; 0 without held-out prompts."""
        return 0 if self._held_out is None else self._held_out.longest

    def begin(self) -> None:
        """Evaluate the policy before its first step. A resumed run skips this."""
        if self._held_out is not None and self._run.start == 0:
            self._run.record(0, self._held_out.evaluate(0))

    def after(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics to add to those of step `step` (counted from 0): eval_... if an
        evaluation is due, and whether the alarm fires."""
        done, found = step + 1, dict[str, float]()
        if self._held_out is not None and self._held_out.due(done):
            found |= self._held_out.evaluate(done)
        if said := self._flat.update(metrics):
            self._run.message(f"step {done}: {said}")
        if self._detector is not None:
            before, evidence = self._detector.firing, self._detector.update(metrics)
            found["alarm/reward_hacking"] = float(self._detector.firing)
            if evidence and not before:
                self._alarms.append(as_row(done, evidence))
                self._run.message(message(done, evidence))
                if self._config.alarm.action == "stop":
                    self._run.stop(ALARM_EXIT)
        return found


class FlatRewards:
    """Detector of flat rollouts, from which nothing can be learnt: all rewards are equal, or all
    scores are beyond score_clip. If a method compares the completions of one prompt, equal rewards
    within every prompt count, too.

    Args:
        needs: what the advantage compares: "group" the completions of a prompt, "greedy" each
            completion with the greedy one, anything else all completions.
        completions: number of completions in a rollout. A single reward does not count as equal.
        max_new_tokens, score_clip: values of the run's configuration.
    """

    def __init__(
        self, needs: str, completions: int, max_new_tokens: int, score_clip: float | None = None
    ) -> None:
        self._needs, self._alone, self._max_new_tokens, self._score_clip = (
            needs,
            completions == 1,
            max_new_tokens,
            score_clip,
        )
        self._stretch, self._said = 0, False

    def update(self, metrics: Mapping[str, float]) -> str | None:
        """Add a step's metrics; a line without a reward is ignored. Return a message at the run's
        first flat rollout, and at the FLAT_STEPS-th of every series of them; else None."""
        if "reward_std" not in metrics:
            return None
        beyond = metrics.get("score_clip_fraction") == 1.0
        # differences below this bound are rounding of the mean
        equal = metrics["reward_std"] <= 1e-6 * abs(metrics["reward"])
        flat = (equal and self._needs != "greedy" and not self._alone) or (
            self._needs in ("group", "greedy") and metrics.get("frac_reward_zero_std") == 1.0
        )
        self._stretch = self._stretch + 1 if flat or beyond else 0
        first, self._said = not self._said and self._stretch > 0, self._said or self._stretch > 0
        if not first and self._stretch != FLAT_STEPS:
            return None
        when, there = (
            (f"in the last {FLAT_STEPS} rollouts", "them")
            if self._stretch == FLAT_STEPS
            else ("in this rollout", "it")
        )
        each = (
            f"were all equal (now {metrics['reward']:.4g})"
            if equal and self._needs != "greedy"
            else "of each prompt were equal"
        )
        each += ", that of the greedy completion among them" * (self._needs == "greedy")
        what = (
            f"all scores were beyond score_clip = {self._score_clip or 0:.4g}"
            if beyond and not flat
            else f"the rewards {each}"
        )
        causes = "; ".join(self._causes(metrics, beyond))
        again = f". Where it lasts, this is said again after {FLAT_STEPS} rollouts"
        return (
            f"{when} {what}, so that there is nothing to learn from {there}. Likely causes: "
            f"{causes}. Completions with their scores are in "
            f"samples.jsonl{'' if self._stretch == FLAT_STEPS else again}"
        )

    def _causes(self, metrics: Mapping[str, float], beyond: bool) -> list[str]:
        """List likely causes: first those that the metrics point to, then those that are always
        possible."""
        causes = (
            ["scores far from 0: raise score_clip, or centre them with normalize_scores"]
            if beyond
            else []
        )
        if metrics.get("completions/clipped_ratio") == 1.0 and "turns/mean" in metrics:
            causes.append(
                "every trajectory is ended by a limit, perhaps before it earns anything: raise "
                "turns.max_turns"
            )
        elif metrics.get("completions/clipped_ratio") == 1.0:
            causes.append(
                "every completion is cut off, perhaps before its answer: raise "
                f"generation.max_new_tokens ({self._max_new_tokens})"
            )
        if metrics.get("completions/mean_length", math.inf) <= 2.0:
            causes.append("completions are empty or nearly so: look at the prompts' template")
        if metrics.get("completions/distinct_trigrams", 1.0) < 0.1:
            causes.append(
                "all completions say the same: raise generation.temperature, or the policy has "
                "collapsed"
            )
        if beyond:
            return causes
        causes.append(
            "the reward never finds what it looks for (the format of an answer, a column of the "
            "data), or returns one value for everything: fusedrl reward-check tries it"
        )
        causes.append(
            "the prompts are all too hard for the policy, or all too easy: take others, or more "
            "samples_per_prompt"
        )
        return causes


class HeldOut:
    """Evaluation of the policy on held-out prompts, with the same random draws every time.
    Arguments and errors are those of `Monitor`."""

    def __init__(
        self,
        config: PolicyConfig,
        evaluation: EvaluationConfig,
        actor: HybridActor,
        reference: Scorer | None,
        rewards: RewardSet,
        gold: RewardSet | None,
        run: Run,
        environments: Environments | None = None,
    ) -> None:
        self._environments = environments
        self._config, self._evaluation, self._actor, self._reference, self._run = (
            config,
            evaluation,
            actor,
            reference,
            run,
        )
        parts = zip(gold.names, gold.rewards, strict=True) if gold is not None else ()
        self._rewards = {"reward": rewards} | {
            f"gold/{name}": RewardSet([reward], ranks=rewards.ranks) for name, reward in parts
        }
        room = actor.decoder.config.max_positions - config.generation.max_new_tokens
        examples = load_prompts(
            evaluation.data,
            skip_bad_lines=config.skip_bad_lines,
            rejects=run.rejects("rejects_eval.jsonl"),
            options=ReadOptions(count_tokens=partial(count_tokens, actor.tokenizer)),
        )
        fitting, dropped = encode_prompts(
            actor.tokenizer, examples, min(room, config.max_prompt_length or room)
        )
        run.message(f"held-out prompts: {dropped}")
        order = shuffled(len(fitting), config.run.seed, "held-out prompts")[
            : evaluation.prompts or None
        ]
        self._prompts = [fitting[index][0] for index in order]
        self.longest = max((len(fitting[index][1]) for index in order), default=0)
        self._samples = run.lines("samples_eval.jsonl")
        # its draws are the same every time, so that the last evaluation's texts guess well
        self._drafts = drafts_of(
            config.generation, actor.decoder.device, self._environments is not None
        )

    def due(self, done: int) -> bool:
        """Whether the policy is evaluated after step number `done`."""
        return done % self._evaluation.every == 0 or done == self._config.steps

    def evaluate(self, done: int) -> dict[str, float]:
        """Return metrics of the policy's current weights; write samples to the run directory."""
        config, count, samples = (
            self._config,
            len(self._prompts),
            self._evaluation.samples_per_prompt,
        )
        # random draws of a reward function must not change the training run
        with self._run.apart("evaluate"), generators_kept():
            found = evaluate(
                self._actor,
                self._reference,
                self._prompts,
                self._rewards,
                config.generation,
                seed=config.run.seed,
                samples=samples,
                request_ids=range(-1, -1 - count, -1),
                tokens_per_forward=config.tokens_per_microbatch,
                environments=self._environments,
                turns=config.turns,
                drafts=self._drafts,
            )  # a rollout's ids are 0 and above
        shown = []
        for index, example in enumerate(self._prompts[: self._evaluation.show]):
            scores = {
                name: value if math.isfinite(value := values[index * samples]) else None
                for name, values in found.scores.items()
            }
            completion = found.completions[index * samples]
            shown.append({"prompt": example.prompt, "completion": completion, "scores": scores})
            self._samples.append({"step": done} | shown[-1])
        self._run.table(done, "samples_eval", shown)
        return _metrics(found, self._reference is not None)


def _metrics(found: Evaluation, referred: bool) -> dict[str, float]:
    """Return an evaluation as metrics: eval_ and the name that the same quantity has in a training
    step, as TRL names them."""
    estimates = {_as_in_training(name): value for name, value in found.rewards.items()} | {
        "completions/mean_length": found.length,
        "completions/clipped_ratio": Estimate(1 - found.ended.mean, found.ended.error),
        "completions/repeated_trigrams": found.repetition,
        "completions/loop_fraction": found.loops,
    }
    estimates |= {f"pass@{k}": value for k, value in found.pass_at.items()} | (
        {"kl": found.kl} if referred else {}
    )
    metrics = {f"eval_{name}": value.mean for name, value in estimates.items()} | {
        f"eval_{name}_stderr": value.error for name, value in estimates.items()
    }
    return (
        metrics
        | {"eval_perplexity": found.own_perplexity}
        | ({"eval_perplexity_ref": found.perplexity} if referred else {})
    )


def _as_in_training(name: str) -> str:
    """Return a training step's name for the mean of a reward: reward, reward/NAME or gold/NAME."""
    kind, slash, rest = name.partition("/")
    return f"{'rewards' if kind == 'reward' else kind}/{rest}/mean" if slash else name
