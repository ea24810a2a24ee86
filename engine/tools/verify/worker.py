"""A process that tries what it is told: one JSON line in, one JSON line out, until its input ends.
`python -m fusedrl.engine.tools.verify.worker`

It has a process of its own so that a kernel that crashes, hangs or spoils the GPU's context takes
nothing else with it. What anyone prints goes to standard error; the answers alone go to standard
output.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from typing import IO, Any

import torch

from fusedrl.engine.tools.machine import copy_bandwidth, describe_machine, gemm_rate
from fusedrl.engine.tools.verify.ops import lost, time_op, try_op


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Do a task and return what came of it. Its "do": "op", "time", "promise" or "machine"."""
    device = torch.device(task["device"])
    if task["do"] == "machine":
        return describe_machine(device) | {
            "copy_gb_per_s": copy_bandwidth(device) / 1e9,
            "gemm_gflop_per_s": gemm_rate(device) / 1e9,
        }
    if task["do"] == "promise":
        promises = importlib.import_module("fusedrl.engine.tools.verify.promises")
        return dict(promises.PROMISES[task["what"]](device))
    entry = importlib.import_module(task["catalogue"]).CATALOGUE[task["what"]]
    if task["do"] == "time":
        return time_op(entry, task["impl"], device, task["bandwidth"], task["rate"])
    return try_op(
        entry, task["impl"], device, cases=task["cases"], full=task["full"], seed=task["seed"]
    )


def main(tasks: IO[str], answers: IO[str]) -> None:
    """Say that it has begun, then answer every task in turn; after an error that spoils the GPU's
    context, end."""
    answers.write("{}\n")
    answers.flush()
    for line in tasks:
        task = json.loads(line)
        try:
            found = answer(task)
        except Exception as error:
            traceback.print_exc()
            found = {
                "state": "FAIL",
                "why": [f"{type(error).__name__}: {str(error).strip()[:500]}"],
                "fatal": lost(error),
            }
        answers.write(json.dumps(found) + "\n")
        answers.flush()
        if found.get("fatal"):
            return


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    ours = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(sys.stdin, ours)
