"""The formulas of scaling_model.py against runs of one and of two processes on this machine's CPU:
`python -m bench.scaling_model --check`, with nothing else running.

From the run of one process and from rates that are measured beforehand (a word, and the bandwidth
of an exchange over loopback), the time of the run of two is predicted:

    rollout   the share of the rank with most tokens     of the time of one process
    score     1/2 x its imbalance                        of the time of one process
    train     1/2 x its imbalance of the passes, + exchanged bytes / bandwidth, + words
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.scaling_model import exchanged_bytes

STEPS, UPDATES = 4, 2
PHASES = ("generate_and_reward", "score", "train")
REWARD = """
def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""
SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}


def _model(directory: Path) -> Path:
    """A model of 11M parameters with random weights, and prompts."""
    from fusedrl.engine.tools.demo import random_model
    from fusedrl.engine.tools.demo_task import write_demo_files

    files = write_demo_files(directory, stories=64, pairs=64, prompts=256, held_out=16)
    path = files / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | SIZES
    config |= {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64}
    path.write_text(json.dumps(config), encoding="utf-8")
    (directory / "rewards.py").write_text(REWARD, encoding="utf-8")
    return random_model(files / "model", directory / "start", 0)


def _run(directory: Path, devices: int) -> list[dict[str, float]]:
    """The metrics of a run but for its first step, which warms up."""
    words = [sys.executable, "-m", "fusedrl.engine.cli", "train", "grpo", "--model", "start"]
    words += ["--data", "prompts.jsonl", "--reward", "rewards.py:length", "--steps", str(STEPS)]
    words += ["--prompts_per_step", "16", "--samples_per_prompt", "8", "--device", "cpu"]
    words += ["--generation.max_new_tokens", "64", "--tokens_per_microbatch", "1024"]
    words += ["--minibatches", str(UPDATES), "--run.dir", f"run{devices}", "--run.progress"]
    words += ["false", "--devices", str(devices), "--parallel.lanes", "2", "--kl.coef", "0"]
    subprocess.run(
        words, cwd=directory, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900
    )
    text = (directory / f"run{devices}" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()][1:]


def _rates(rank: int, store: str, out: str) -> None:
    """Write seconds of a word and bytes a second of an exchange between two processes."""
    import torch
    import torch.distributed as dist

    from fusedrl.engine.parallel.ranks import Ranks

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    ranks, found = Ranks(rank, 2), []
    flat = torch.ones(1 << 23)
    for count, act in (
        (200, lambda: ranks.meet("a word")),
        (10, lambda: ranks.to_owners("gradients", flat, [1 << 22, 1 << 22])),
    ):
        act()
        began = time.perf_counter()
        for _ in range(count):
            act()
        found.append((time.perf_counter() - began) / count)
    if rank == 0:
        Path(out).write_text(json.dumps([found[0], (flat.nbytes / 2) / found[1]]))
    dist.barrier()
    dist.destroy_process_group()


def rates(directory: Path) -> tuple[float, float]:
    """Seconds of a word, and bytes a second that a process sends while it receives as many."""
    code = (
        "import sys; from bench.scaling_check import _rates; "
        "_rates(int(sys.argv[1]), *sys.argv[2:])"
    )
    words = [str(directory / "store"), str(directory / "rates.json")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), *words], env=env)
        for rank in (0, 1)
    ]
    if any(child.wait(300) for child in children):
        raise RuntimeError("the processes that measure an exchange failed")
    word, bandwidth = json.loads((directory / "rates.json").read_text())
    return word, bandwidth


def check() -> str:
    """Predict and measure; the table in Markdown."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = _model(directory)
        word, bandwidth = rates(directory)
        one, two = _run(directory, 1), _run(directory, 2)
        parameters = (model / "model.safetensors").stat().st_size / 4

    def mean(rows: list[dict[str, float]], key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    counted = mean(two, "parallel/gradients_bytes") + mean(two, "parallel/parameters_bytes")
    formula = UPDATES * exchanged_bytes(parameters, 2, 4, 4)
    shares = {
        "generate_and_reward": mean(two, "parallel/imbalance_tokens") / 2,
        "score": mean(two, "parallel/imbalance") / 2,
        "train": mean(two, "parallel/imbalance") / 2,
    }
    predicted = {phase: mean(one, f"timing/{phase}") * shares[phase] for phase in PHASES}
    predicted["train"] += counted / bandwidth + 12 * UPDATES * word
    lines = [
        f"A word takes {1e6 * word:.0f} us, an exchange runs at {bandwidth / 1e9:.2f} GB/s each "
        f"way. {parameters / 1e6:.1f}M parameters: {counted / 1e6:.1f} MB a step were counted, and "
        f"{formula / 1e6:.1f} MB are the formula's.\n",
        "| phase | one process, s | two, predicted | two, measured | off by |",
        "|---|---|---|---|---|",
    ]
    for phase in PHASES:
        alone, found = mean(one, f"timing/{phase}"), mean(two, f"timing/{phase}")
        off = 100 * (found / predicted[phase] - 1)
        lines.append(
            f"| {phase} | {alone:.3f} | {predicted[phase]:.3f} | {found:.3f} | {off:+.0f}% |"
        )
    return "\n".join(lines)
