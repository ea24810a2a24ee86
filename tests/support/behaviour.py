"""A record of behaviour: what fixed-seed runs of every stage and of generation compute, to the bit.

    python -m tests.support.behaviour record before.json     # every case, some minutes on one core
    python -m tests.support.behaviour record after.json --only grpo
    python -m tests.support.behaviour compare before.json after.json

A change that says it changes no behaviour shows it by two records, one on each side, that are
equal. Both have to be of one machine and one install: other kernels round differently. Runs go
through the command line and generation through `HybridActor`, which stay where they are when the
files behind them move.

Of a run it holds each line of metrics.jsonl but for times, the samples, the alarms, state.json and,
by digest, each tensor of the last checkpoint and of the models that were written; of generation the
tokens, log-probabilities and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tests.support.tiny import write_model

RUN = ["--run.dir", "run", "--run.progress", "false", "--optim.lr", "3e-3", "--device", "cpu"]
PAIRS = ["--model", "m", "--data", "pairs.jsonl", "--pairs_per_step", "6", "--epochs", "2", *RUN]
TEXTS = [
    "--model",
    "m",
    "--data",
    "texts.jsonl",
    "--sequences_per_step",
    "6",
    "--epochs",
    "2",
    *RUN,
]
POLICY = [
    "--model",
    "m",
    "--data",
    "prompts.jsonl",
    "--reward",
    "rewards.py:likes_w3",
    "--steps",
    "3",
    "--prompts_per_step",
    "4",
    "--tokens_per_microbatch",
    "60",
    "--generation.max_new_tokens",
    "8",
    *RUN,
]
ROWS = (
    "ppo",
    "ppo_penalty",
    "trpo",
    "ppo_max",
    "a2c",
    "actor_critic",
    "reinforce",
    "reinforce_baseline",
    "reinforce_learned",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "rloo",
    "remax",
    "opo",
    "gpg",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "sapo",
    "gmpo",
    "pass_at_k",
    "gdpo",
    "online_dpo",
    "dro",
    "sequence_ratio",
)
# What is set on top of a stage: one name, its options. The policy's are those whose pairs have to
# go together.
SFT_OPTIONS = {
    "lora": ["--lora.rank", "2"],
    "bfloat16": ["--dtype", "bfloat16"],
    "checkpointed": ["--checkpoint_activations", "true"],
    "held_out": ["--eval_fraction", "0.25", "--eval_every", "2"],
}
POLICY_OPTIONS = {
    "strict": ["--strict", "true"],
    "bfloat16": ["--dtype", "bfloat16"],
    "lora": ["--lora.rank", "2"],
    "critic": ["--critic.model", "m"],
    "replay": ["--replay.capacity", "16", "--replay.fraction", "0.5"],
    "ptx": ["--ptx.data", "texts.jsonl"],
    "refill": ["--refill_tries", "2", "--samples_per_prompt", "2"],
    "top_p": ["--generation.top_p", "0.9"],
    "correction": ["--correction.kind", "truncated"],
    "evaluation": ["--evaluation.data", "held_out.jsonl", "--evaluation.every", "1"],
    "offset": ["--data", "prompts_from_7.jsonl"],
    "checkpointed": ["--checkpoint_activations", "true"],
    "kl_in_loss": ["--kl.placement", "loss", "--kl.coef", "0.1"],
    "kl_target": ["--kl.coef", "0.1", "--kl.target", "2"],
    "speculate": ["--generation.speculate", "true"],
    "normalized": ["--normalize_scores", "true"],
    "lambdas": [
        *("--loss.lam_critic", "1", "--loss.lam_alpha", "0.4"),
        *("--loss.bootstrap_truncated", "true"),
        *("--generation.stop_token_ids", "[9, 12, 15, 18, 21, 24]"),  # some completions end
    ],
    "held": ["--loss.kl_cov_ratio", "0.1", "--minibatches", "2"],
    "chosen": [
        *("--loss.top_entropy_quantile", "0.5"),
        *("--loss.clip_cov_ratio", "0.1", "--loss.clip_cov_low", "-5"),
    ],
    "environment": ["--environment", "games.py:Echo"],
}
OF_CRITICS = ("critic", "lambdas")  # what a row of groups refuses
CLOCKED = ("timing/", "mem/", "tokens_per_s")  # metrics of the machine rather than of the run
REWARDS = """
def likes_w3(prompts, completions, begins_at=None, **columns):
    scores = [text.split().count("w3") + len(text.split()) / 8 for text in completions]
    if begins_at is None:
        return scores
    return [start + score for start, score in zip(begins_at, scores)]
"""
GAMES = """
class Echo:
    def reset(self, row):
        self.begun = False

    def step(self, completion):
        done, self.begun = self.begun or "w5" in completion, True
        return "w9 " + " ".join(completion.split()[:2]), completion.count("w3"), done
"""


def cases() -> dict[str, list[str]]:
    """Name -> arguments of the command line, in a directory that `furnish` has filled."""
    found = {"sft": ["train", "sft", *TEXTS], "reward": ["train", "reward", *PAIRS]}
    found |= {
        f"sft {name}": ["train", "sft", *TEXTS, *options] for name, options in SFT_OPTIONS.items()
    }
    found |= {
        f"reward {name}": ["train", "reward", *PAIRS, *options]
        for name, options in SFT_OPTIONS.items()
        if name != "held_out"
    }
    for loss in ("sigmoid", "ipo", "hinge"):
        found[f"dpo {loss}"] = ["train", "dpo", *PAIRS, "--loss", loss]
    found |= {
        f"dpo {name}": ["train", "dpo", *PAIRS, *SFT_OPTIONS[name]] for name in ("lora", "bfloat16")
    }
    answers = ["train", "kto", *PAIRS]
    answers[answers.index("--pairs_per_step")] = "--answers_per_step"
    found["kto"] = answers
    found |= {f"kto {name}": [*answers, *SFT_OPTIONS[name]] for name in ("lora", "bfloat16")}
    sampled = [*POLICY, "--samples_per_prompt", "4"]
    found["rejection"] = ["train", "rejection", *sampled]
    found |= {row: ["train", row, *POLICY] for row in ROWS}
    for row in ("ppo", "grpo"):
        for name, options in POLICY_OPTIONS.items():
            if not (row == "grpo" and name in OF_CRITICS):
                found[f"{row} {name}"] = ["train", row, *POLICY, *options]
    return found


def furnish(directory: Path) -> None:
    """Write the models, the data and the rewards that the cases name."""
    write_model(directory / "m")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (directory / name).write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )

    def words(start: int, count: int) -> str:
        return " ".join(f"w{(start + 5 * j) % 28}" for j in range(count))

    prompts = [{"prompt": words(3 * i, 1 + i % 5)} for i in range(12)]
    write("prompts.jsonl", prompts)
    write("prompts_from_7.jsonl", [row | {"begins_at": 7.0} for row in prompts])
    write("held_out.jsonl", [{"prompt": words(3 * i + 1, 2)} for i in range(4)])
    write(
        "texts.jsonl",
        [
            {"prompt": words(i, 1 + i % 3), "completion": " " + words(2 * i, 2 + i % 5)}
            for i in range(24)
        ],
    )
    write(
        "pairs.jsonl",
        [
            {
                "prompt": words(i, 2),
                "chosen": " " + words(3, 1 + i % 3),
                "rejected": " " + words(i, 2 + i % 4),
            }
            for i in range(24)
        ],
    )
    (directory / "rewards.py").write_text(REWARDS, encoding="utf-8")
    (directory / "games.py").write_text(GAMES, encoding="utf-8")


def command(arguments: list[str]) -> tuple[int, str]:
    """Run a command line; its exit code and what it said."""
    from fusedrl.engine.cli.main import main as fusedrl

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = fusedrl(arguments)
    return code, said.getvalue()


def run_case(arguments: list[str]) -> dict[str, Any]:
    """What a run in the working directory left behind; {"refused": exit code} where it would not
    begin.

    Raises:
        RuntimeError: it ended with another code than 0 after it had begun, which no case should.
    """
    shutil.rmtree("run", ignore_errors=True)
    code, said = command(arguments)
    if code != 0:
        if not Path("run", "metrics.jsonl").exists():
            return {"refused": code}
        raise RuntimeError(f"{' '.join(arguments)} ended with {code}: {said[-800:]}")
    return read_run(Path("run"))


def read_run(run: Path) -> dict[str, Any]:
    """A run directory as values that can be compared."""

    def lines(name: str) -> list[dict[str, Any]]:
        path = run / name
        rows = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.exists()
            else []
        )
        return [
            {key: value for key, value in row.items() if not key.startswith(CLOCKED)}
            for row in rows
        ]

    found: dict[str, Any] = {
        name: lines(name) for name in ("metrics.jsonl", "samples.jsonl", "alarms.jsonl")
    }
    last = max(run.glob("checkpoints/step_*"), default=None)
    for part in ([] if last is None else [last]) + [
        run / name for name in ("model", "critic", "adapter")
    ]:
        for path in sorted(part.rglob("*.safetensors")):
            found[f"{part.name}/{path.name}"] = digests(path)
    if last is not None:
        found["state.json"] = json.loads((last / "state.json").read_text(encoding="utf-8"))
    return found


def digests(path: Path) -> dict[str, str]:
    """Name -> dtype, shape and SHA-256 of each tensor's bytes."""
    with safe_open(path, framework="pt") as tensors:
        return {name: _digest(tensors.get_tensor(name)) for name in sorted(tensors.keys())}


def _digest(tensor: torch.Tensor) -> str:
    bits = (
        tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(bits).hexdigest()[:16]}"


def generations() -> dict[str, Any]:
    """Completions of prompts of several lengths under each kind of sampling, with companions and a
    small cache."""
    from fusedrl.engine import HybridActor, SamplingParams

    prompts = [[1, *range(4, 4 + 1 + 3 * i)] for i in range(5)]
    kinds = {
        "greedy": SamplingParams(max_new_tokens=24, temperature=0.0),
        "sampled": SamplingParams(max_new_tokens=24, seed=3),
        "n": SamplingParams(max_new_tokens=12, n=3, temperature=0.7),
        "kept": SamplingParams(max_new_tokens=24, top_k=12, top_p=0.9, min_p=0.01),
        "stops": SamplingParams(
            max_new_tokens=24, stop=("w5",), stop_token_ids=(9,), min_new_tokens=2
        ),
    }
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for strict in (False, True):
            actor = HybridActor.from_pretrained("m", dtype=dtype, device="cpu", strict=strict)
            for name, params in kinds.items():
                found[f"{name}, {str(dtype)[6:]}{', strict' if strict else ''}"] = [
                    [
                        [list(c.token_ids), [float(x) for x in c.logprobs], c.finish_reason]
                        for c in group
                    ]
                    for group in actor.generate(prompts, params)
                ]
    return found


@contextlib.contextmanager
def _furnished() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        furnish(Path(directory))
        os.chdir(directory)
        try:
            yield
        finally:
            os.chdir(before)


def record(only: str = "") -> dict[str, Any]:
    """Every case whose name holds `only`."""
    found: dict[str, Any] = {}
    with _furnished():
        if only in "generate":
            found["generate"] = generations()
        for name, arguments in cases().items():
            if only in name:
                found[name] = run_case(arguments)
                print(name, *(["refused"] if "refused" in found[name] else []), file=sys.stderr)
    return found


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Each place at which two records differ, with what stands there."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            text
            for key in dict.fromkeys([*before, *after])
            for text in differences(
                before.get(key, "nothing"), after.get(key, "nothing"), f"{where} {key}".strip()
            )
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            text
            for i, pair in enumerate(zip(before, after, strict=True))
            for text in differences(*pair, f"{where}[{i}]")
        ]
    same = before == after or (before != before and after != after)
    return [] if same else [f"{where}: {_short(before)} -> {_short(after)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Record what fixed-seed runs compute, or compare two records."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name holds it (default: all)"
    )
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args(argv)
    if options.command == "record":
        torch.set_num_threads(1)
        options.out.write_text(json.dumps(record(options.only)), encoding="utf-8")
        return 0
    before, after = (
        json.loads(path.read_text(encoding="utf-8")) for path in (options.before, options.after)
    )
    found = differences(before, after)
    print(*found[:40], f"{len(before)} and {len(after)} cases, {len(found)} differences", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
