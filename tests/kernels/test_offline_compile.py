"""Every Triton kernel compiles for sm_80, sm_90, sm_100 and gfx942 with no GPU at hand, and spills
on none of them. None scans backwards, and attention on sm_90 multiplies by wgmma."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.cpu_only("Triton's compiler alone")
SCRIPT = Path(__file__).resolve().parents[1] / "offline_compile.py"


def run(arguments, **environment):
    # A process of its own: here triton was imported for its interpreter, which has no compiler
    # behind @triton.jit.
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=kept | environment,
        capture_output=True,
        text=True,
    )


# The tile sizes are chosen for the compiler of Triton 3.9. An older one keeps some values of
# some of these kernels in memory, which costs a little time and changes nothing: bytes of a thread,
# or registers on gfx942.
SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 128


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_and_none_spills(tmp_path, target):
    done = run(["--json", tmp_path / "rows.json", "--target", target])
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    print(done.stdout)
    wrong = [row for row in rows if "error" in row or row["spills"] > SPILLS]
    assert not wrong, "\n".join(map(str, wrong))
    assert {row["target"] for row in rows} == {target}
    assert len(rows) > 180
    assert "logprob" in {row["kernel"].split(".")[0] for row in rows}
    # Released versions of Triton are said to get these wrong if the operands do not commute.
    assert not [row for row in rows if row["reverse_scans"]]
    if target == "sm_90":
        on_tensor_cores = {row["kernel"]: row["wgmma"] for row in rows}
        for D in (64, 80, 128):
            for kind in ("forward", "backward_q", "backward_kv"):
                assert on_tensor_cores[f"attention.{kind}_bf16_{D}_wgmma"] > 0


def test_refuses_the_interpreter():
    done = run([], TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "expected TRITON_INTERPRET unset" in done.stderr
