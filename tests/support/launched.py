"""Runs of `fusedrl train --devices N` as processes of their own, with rewards that fail on one of
them."""

import os
import signal
import subprocess
import sys
import time

LANES = ["--parallel.lanes", "8"]
REWARDS = """
import json, os, signal, time
import torch
import torch.distributed as dist

RANK = dist.get_rank() if dist.is_initialized() else 0
CALLS = [0]

def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def slow(prompts, completions, **columns):
    time.sleep(0.2)
    return length(prompts, completions)

def fails_on_one(prompts, completions, **columns):
    CALLS[0] += 1
    if CALLS[0] == 2 and RANK == 1:
        raise ValueError("only here")
    return length(prompts, completions)

def dies_on_one(prompts, completions, **columns):
    CALLS[0] += 1
    if CALLS[0] == 2 and RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return length(prompts, completions)

def too_much(*arguments, **options):
    torch.empty(1 << 60)

def short_before(prompts, completions, **columns):
    from fusedrl.engine.parallel.lanes import Tree
    CALLS[0] += 1
    if CALLS[0] == 2 and RANK == 1:
        Tree._cut = too_much
    return length(prompts, completions)

def short_inside(prompts, completions, **columns):
    CALLS[0] += 1
    if CALLS[0] == 2 and RANK == 1:
        dist.all_to_all_single = too_much
    return length(prompts, completions)

def broken(*arguments):
    raise KeyError("a bug on rank 1")

def broken_on_one(prompts, completions, **columns):
    from fusedrl.engine.optim.adamw import Optimizer
    CALLS[0] += 1
    if CALLS[0] == 2 and RANK == 1:
        Optimizer.take = broken
    return length(prompts, completions)

def signalled_late(prompts, completions, **columns):
    from fusedrl.engine.parallel.ranks import Ranks
    CALLS[0] += 1
    if CALLS[0] == 1 and RANK == 1:
        gather = Ranks.gather
        def told_then_signalled(self, what, value):
            found = gather(self, what, value)
            if what == "the end of a step" and CALLS[0] == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return found
        Ranks.gather = told_then_signalled
    return length(prompts, completions)

def noted(prompts, completions, **columns):
    with open(f"notes-{RANK}", "a") as file:
        note = {"completions": len(completions), "threads": torch.get_num_threads()}
        file.write(json.dumps(note) + chr(10))
    return length(prompts, completions)
"""
RUN = [
    *("--model", "m", "--data", "prompts.jsonl", "--prompts_per_step", "4"),
    *("--tokens_per_microbatch", "60", "--generation.max_new_tokens", "8", "--device", "cpu"),
    *("--run.progress", "false", "--optim.lr", "3e-3", "--optim.schedule", "constant", *LANES),
]


def command(directory, reward, steps, run, devices, *options, stage="ppo"):
    """The words of a run in a directory that `furnish` has filled."""
    rewards = directory / "on_ranks.py"
    rewards.write_text(REWARDS, encoding="utf-8")
    return [
        *(sys.executable, "-m", "fusedrl", "train", stage, *RUN),
        *("--reward", f"on_ranks.py:{reward}", "--steps", str(steps), "--run.dir", run),
        *("--devices", str(devices), *options),
    ]


def heeds_ctrl_c():
    """A shell's background job ignores it, and what it starts does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(directory, *arguments, variables=None, **options):
    """The process of `command`, started; `variables` are added to its environment."""
    return subprocess.Popen(
        command(directory, *arguments, **options),
        cwd=directory,
        preexec_fn=heeds_ctrl_c,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        | (variables or {}),
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """Its exit code and what it said on standard error."""
    said = process.communicate(timeout=240)[1]
    return process.returncode, said


def ranks_env():
    """The environment of a process that is started with --place."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def wait_for_a_step(metrics):
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes()):
        time.sleep(0.05)


def steps_of(directory, run):
    """The steps of a run's checkpoints."""
    return sorted(int(p.name[5:]) for p in (directory / run / "checkpoints").glob("step_*"))
