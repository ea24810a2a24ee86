"""Worker process that runs checks: it reads one task per JSON line and writes one answer per JSON
line, until its input ends. `python -m fusedrl.engine.tools.verify.worker`

Checks run in separate processes, so that a kernel that crashes, hangs or spoils the GPU's context
does not stop the other checks. Anything that is printed goes to standard error; only answers go to
standard output.
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
    """Do a task and return the result. Its "do" is "op", "time", "promise" or "machine"."""
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
    """Write a first line to report the start, then answer every task in turn. End after an error
    that spoils the GPU's context."""
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
