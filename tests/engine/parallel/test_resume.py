"""A rank that resumes reads the moments and masters that it owns, and leaves the others on the
disk."""

import json
import subprocess
import sys

import pytest
import torch
from tests.support.launched import ranks_env
from torch import nn

from fusedrl.engine.optim.adamw import make_optimizer
from fusedrl.engine.runs.checkpoint import read_checkpoint, save_checkpoint

pytestmark = pytest.mark.cpu_only("resident memory of a process")
COUNT, NUMEL = 8, 1 << 20
READS = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from fusedrl.engine.optim.adamw import make_optimizer
from fusedrl.engine.parallel.ranks import Ranks
from fusedrl.engine.runs.checkpoint import read_checkpoint

def memory(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name))
    return int(line.split()[1]) * 1024

directory, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
params = {f"p{i}": nn.Parameter(torch.zeros(int(sys.argv[4]), dtype=torch.bfloat16))
          for i in range(int(sys.argv[5]))}
optimizer = make_optimizer(params, lr=0.1, ranks=Ranks(rank, size))
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
before = memory("VmRSS")
checkpoint = read_checkpoint(directory, 1, [path.name for path in directory.iterdir()])
optimizer.load_state_dict(checkpoint.tensors["optimizer"])
held = sum(x.nbytes for name, x in optimizer.state_dict().items() if "exp_avg" in name)
print(json.dumps([memory("VmHWM") - before, held]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a checkpoint with the state of `COUNT` parameters of `NUMEL` numbers."""
    params = {f"p{i}": nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16)) for i in range(COUNT)}
    optimizer = make_optimizer(params, lr=0.1)
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return save_checkpoint(
        tmp_path_factory.mktemp("run"), 1, {"optimizer": optimizer.state_dict()}, {}
    )


def grown(directory, rank, size):
    """(bytes by which a process that loads the state grew at its peak, bytes of its moments)."""
    words = [sys.executable, "-c", READS, *map(str, (directory, rank, size, NUMEL, COUNT))]
    found = subprocess.run(words, env=ranks_env(), capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_a_rank_reads_what_it_owns(checkpoint):
    (whole, all_moments), (part, moments) = grown(checkpoint, 0, 1), grown(checkpoint, 3, 8)
    assert (all_moments, moments) == (8 * COUNT * NUMEL, 8 * NUMEL)
    read = 12 * NUMEL  # moments and a master from the file, and a copy of the moments
    assert whole > 0.9 * COUNT * (read + 8 * NUMEL), "the measure sees what is read"
    assert part < 1.5 * (read + 8 * NUMEL)


def test_what_was_read_is_what_was_saved(checkpoint):
    found = read_checkpoint(checkpoint, 1, [path.name for path in checkpoint.iterdir()])
    assert found.tensors["optimizer"]["p3.exp_avg"].unique().tolist() == [
        pytest.approx(0.1, rel=1e-6)
    ]
