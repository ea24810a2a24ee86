"""The first minutes on a new machine, in three commands of at most eight minutes each: `make
first-light`, or

    python bench/first_light.py truth --device cuda --out runs/first-light   (then: engine, kernels)

truth     versions, doctor, `fusedrl verify` of gae and then of everything, ids and offsets beyond
          2^31, compute-sanitizer on the CUDA C++ kernels
engine    the engine's promises (device = CPU, captured = uncaptured, sampler = trainer, more
          requests than slots, ...), throughput, latency, a GRPO step, and its suites
kernels   contests of bench/ against eager and torch.compile

It runs from a checkout and needs only torch (and pytest, for the suites and the contests). If a
step fails, hangs or lacks something, this is reported in a line, and the next step begins. Steps
that do not fit into the eight minutes are named. PART.txt has the output of every step, PART.json
the findings.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480.0  # of a part
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
CLI = ("-c", "import sys; from fusedrl.engine.cli.main import main; sys.exit(main())")
CONTESTS = (
    "gae",
    "logprob",
    "policy_loss",
    "linear_logprob",
    "linear_policy_loss",
    "sampling",
    "kv_cache",
    "paged_attention",
    "attention",
    "rms_norm",
    "rope",
    "swiglu",
    "normalize",
    "kl",
    "full_kl",
    "advance_rows",
)  # what decides first
VERSIONS = """
import importlib.metadata, json, platform, sys, torch
names = ("torch", "triton", "transformers", "safetensors", "numpy", "jsonargparse", "pytest",
         "cuda-bindings", "nvidia-cuda-nvrtc", "flash-attn",
         "liger-kernel")
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
found = {"python": platform.python_version(), "cuda": torch.version.cuda, "gpus": gpus}
print(json.dumps(found | {name: version(name) for name in names}, indent=1))
"""
PROMISES = """
import json, sys, torch
from fusedrl.engine.tools.verify.report import print_report, verify_machine
found = verify_machine(torch.device(sys.argv[1]), ops=())
print_report(found)
open(sys.argv[2], "w").write(json.dumps(found))
sys.exit(not found["ok"])
"""
SANITIZED = """
import sys, torch
from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.ops import try_op
for name, entry in CATALOGUE.items():
    if "cuda" in entry.implementations(sys.argv[1]):
        row = try_op(entry, "cuda", torch.device(sys.argv[1]), cases=1)
        print(name, row["state"], row["cases"], row["error_over_bound"], flush=True)
"""


@dataclass
class Step:
    """A command of this Python. json: the file that it writes. lacking: why it cannot run here.
    most: seconds."""

    name: str
    command: tuple[str, ...]
    most: float = 240.0
    json: Path | None = None
    lacking: str | None = None
    tool: tuple[str, ...] = ()  # in front of Python


class Part:
    """Settings shared by the steps of a part: the device, the folder for results, and what is
    missing on this machine."""

    def __init__(self, device: str, scratch: Path) -> None:
        self.device, self.scratch, self.gpu = device, scratch, device != "cpu"
        self.no_pytest = None if importlib.util.find_spec("pytest") else "pytest is not installed"

    def suite(self, *what: str) -> tuple[str, ...]:
        return (*PYTEST, "-m", "not full", "--device", self.device, *what)

    def ran(
        self, name: str, *command: str, most: float = 240.0, lacking: str | None = None
    ) -> Step:
        """A command of the command line that leaves a JSON file."""
        file = self.scratch / f"{name.replace(' ', '_')}.json"
        where = ("--device", self.device, "--output-json", str(file))
        return Step(name, (*CLI, *command, *where), most, file, lacking)

    def truth(self) -> Iterator[Step]:
        yield Step("versions", ("-c", VERSIONS), 60)
        yield self.ran("doctor", "doctor", most=120)
        yield self.ran("verify gae", "verify", "--ops", "gae", most=120)
        cases = "8" if self.gpu else "3"
        yield self.ran("verify", "verify", "--cases", cases, "--timeout", "120", most=300)
        offsets = self.suite("tests/kernels/test_grid.py", "-k", "offsets")
        yield Step("offsets beyond 2^31", offsets, 120, lacking=self.no_pytest)
        found = shutil.which("compute-sanitizer")
        if not self.gpu:
            lacking = "there is no GPU in this run"
        else:
            lacking = None if found else "compute-sanitizer is not on the PATH"
        only = ("--error-exitcode", "9", "--target-processes", "application-only")
        for tool in ("memcheck", "racecheck"):
            yield Step(
                f"compute-sanitizer {tool}",
                ("-c", SANITIZED, self.device),
                120,
                lacking=lacking,
                tool=(found or "", "--tool", tool, *only),
            )
        some = "not gradcheck" if self.gpu else "written or exercised"
        contract = self.suite("tests/kernels/test_contract.py", "-k", some)
        yield Step("contract", contract, 240, lacking=self.no_pytest)

    def engine(self) -> Iterator[Step]:
        file = self.scratch / "promises.json"
        yield Step("promises", ("-c", PROMISES, self.device, str(file)), 180, file)
        shared, lacking = ROOT.parent / "shared/models/stories260k", None
        if self.gpu:
            model = ("--shape", "qwen2.5-0.5b")
            small, groups = (), ("--num-prompts", "8", "--n", "8")
        else:
            model = ("--model", str(shared))
            short = ("--input-len", "16", "--output-len", "32")
            small = ("--num-prompts", "8", *short)
            groups = ("--num-prompts", "4", "--n", "4", *short)
            if not shared.is_dir():
                lacking = (
                    f"there is no {shared.name} beside the checkout, and a published shape is too "
                    "large for a CPU"
                )
        yield self.ran("throughput", "bench", "throughput", *model, *small, lacking=lacking)
        few = ("--num-iters", "10", "--num-iters-warmup", "3")
        yield self.ran("latency", "bench", "latency", *model, *few, most=120, lacking=lacking)
        step = ("bench", "step", "--algorithm", "grpo")
        yield self.ran("grpo step", *step, *model, *groups, most=180, lacking=lacking)
        for name in (
            "model/test_windows",
            "generation/test_generator",
            "test_actor",
            "generation/test_arena",
        ):
            what = self.suite(f"tests/engine/{name}.py")
            yield Step(f"suite {name}", what, 120, lacking=self.no_pytest)

    def kernels(self) -> Iterator[Step]:
        missing = self.no_pytest
        if missing is None and not importlib.util.find_spec("pytest_benchmark"):
            missing = "pytest-benchmark is not installed"
        some = () if self.gpu else ("--rounds", "2", "--first", "1")  # a rehearsal
        for name in CONTESTS:
            results = self.scratch / name
            command = (*PYTEST, "-s", "--benchmark-enable", "--results", str(results), *some)
            yield Step(
                name,
                (*command, f"bench/bench_{name}.py"),
                120 if self.gpu else 180,
                results / f"{name}.json",
                missing,
            )


def steps(part: str, device: str, scratch: Path) -> Iterator[Step]:
    """Return the steps of one part, the most informative first."""
    of = Part(device, scratch)
    return {"truth": of.truth, "engine": of.engine, "kernels": of.kernels}[part]()


def environment() -> dict[str, str]:
    """Return environment variables under which `fusedrl` is this checkout and nothing uses the
    network."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(namespace()), str(ROOT), os.environ.get("PYTHONPATH", "")]
        ),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def namespace() -> Path:
    """A folder in which `fusedrl` has engine/ and kernels/ of this checkout, as in src/, whose
    links a copy may have lost."""
    folder = ROOT / "build" / "first-light"
    (folder / "fusedrl").mkdir(parents=True, exist_ok=True)
    for room in ("engine", "kernels"):
        link = folder / "fusedrl" / room
        if not link.is_symlink() or link.resolve() != ROOT / room:
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT / room)
    return folder


def run(step: Step, left: float, log: Any) -> dict[str, Any]:
    """One step: {"state", "seconds", "found"}; its output goes to the log."""
    log.write(f"\n==== {step.name}\n")
    if step.lacking is not None:
        return {"state": "skipped", "why": step.lacking}
    if left < 5:
        return {"state": "skipped", "why": f"the {SECONDS / 60:g} minutes are over"}
    began, limit = time.monotonic(), min(step.most, left)
    log.flush()
    process = subprocess.Popen(
        [*step.tool, sys.executable, *step.command],
        cwd=ROOT,
        env=environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = process.wait(limit)
        state = "ok" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # with the processes that it started
        process.wait()
        state = f"stopped after {limit:.0f} s"
    found: Any = None
    if step.json is not None and step.json.is_file():
        try:
            found = json.loads(step.json.read_text(encoding="utf-8"))
        except ValueError:
            state = f"{state}, half a file"
    return {"state": state, "seconds": round(time.monotonic() - began, 1), "found": found}


def main() -> int:
    """Run one part; return 1 if a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("truth", "engine", "kernels"))
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu for a rehearsal (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/first-light"),
        help="where PART.txt and PART.json go (default: %(default)s)",
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began, report = time.monotonic(), dict[str, Any]()
    text, file = (options.out / f"{options.part}.{suffix}" for suffix in ("txt", "json"))
    with tempfile.TemporaryDirectory() as scratch, text.open("w", encoding="utf-8") as log:
        for step in steps(options.part, options.device, Path(scratch)):
            report[step.name] = run(step, SECONDS - (time.monotonic() - began), log)
            of = report[step.name]
            seconds, why = of.get("seconds", 0), of.get("why", "")
            line = f"{of['state']:16} {step.name:28} {seconds:7.1f} s  {why}".rstrip()
            print(line, flush=True)
            log.write(line + "\n")
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{options.part}: {time.monotonic() - began:.0f} s; {text}, {file}")
    return int(any(found["state"] not in ("ok", "skipped") for found in report.values()))


if __name__ == "__main__":
    sys.exit(main())
