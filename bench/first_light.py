"""The first minutes on a new machine, in three commands of at most eight minutes each: `make
first-light`, or

    python bench/first_light.py truth --device cuda --out runs/first-light   (then: engine, kernels)

truth     versions, doctor (with what became of each attention backend), `fusedrl verify` of gae
          and then of everything (with the machine's ceilings), ids and offsets beyond 2^31,
          compute-sanitizer's memcheck and racecheck on the CUDA C++ kernels
engine    the engine's promises (device = CPU, captured = uncaptured, sampler = trainer in both
          dtypes, more requests than slots, ...), a profile of a prefill and of a window of captured
          steps, throughput, latency of 1 and of 64, a GRPO step, and its suites
kernels   the head under two workspaces, contests of bench/ against eager, torch.compile and Liger,
          ncu on three kernels

It runs from a checkout and needs only torch, and for the suites and the contests pytest,
pytest-benchmark and liger-kernel: `make first-light-packages` puts them into build/first-light, for
a machine without a network. If a step fails, hangs or lacks something, this is reported in a line,
and the next step begins. Every step has seconds of its own, which no other step can take; what it
leaves, later ones may use. PART.txt has the output of every step, PART.json the findings, written
after each.
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
PACKAGES = ROOT / "build" / "first-light" / "packages"
SECONDS = 480.0  # of a part, unless --minutes says otherwise
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
PROFILED = {  # op -> its kernels, as a pattern
    "logprob": "logprob|forward",
    "paged_attention": "paged|attention|merge",
    "gae": "gae",
}
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
    most: seconds of the part's eight minutes that are kept for it."""

    name: str
    command: tuple[str, ...]
    most: float
    json: Path | None = None
    lacking: str | None = None
    tool: tuple[str, ...] = ()  # in front of Python


class Part:
    """Settings shared by the steps of a part: the device, the folder for results, and what is
    missing on this machine."""

    def __init__(self, device: str, scratch: Path) -> None:
        self.device, self.scratch, self.gpu = device, scratch, device != "cpu"
        self.no_pytest = None if installed("pytest") else "pytest is not installed"

    def suite(self, *what: str) -> tuple[str, ...]:
        return (*PYTEST, "-m", "not full", "--device", self.device, *what)

    def ran(self, name: str, *command: str, most: float, lacking: str | None = None) -> Step:
        """A command of the command line that leaves a JSON file."""
        file = self.scratch / f"{name.replace(' ', '_')}.json"
        where = ("--device", self.device, "--output-json", str(file))
        return Step(name, (*CLI, *command, *where), most, file, lacking)

    def truth(self) -> Iterator[Step]:
        yield Step("versions", ("-c", VERSIONS), 15)
        yield self.ran("doctor", "doctor", most=40)
        yield self.ran("verify gae", "verify", "--ops", "gae", most=45)
        cases = "8" if self.gpu else "1"
        yield self.ran("verify", "verify", "--cases", cases, "--timeout", "60", most=170)
        offsets = self.suite("tests/kernels/test_grid.py", "-k", "offsets")
        yield Step("offsets beyond 2^31", offsets, 40, lacking=self.no_pytest)
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
                50,
                lacking=lacking,
                tool=(found or "", "--tool", tool, *only),
            )
        some = "not gradcheck" if self.gpu else "written or exercised"
        contract = self.suite("tests/kernels/test_contract.py", "-k", some)
        yield Step("contract", contract, 60, lacking=self.no_pytest)

    def engine(self) -> Iterator[Step]:
        file = self.scratch / "promises.json"
        yield Step("promises", ("-c", PROMISES, self.device, str(file)), 70, file)
        yield self.probe("profile", 50)
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
        through = ("bench", "throughput", *model, "--dataset-name", "seed0", *small)
        yield self.ran("throughput", *through, "--num-iters", "2", most=90, lacking=lacking)
        few = ("--num-iters", "5", "--num-iters-warmup", "2")
        for count in ("1", "64"):
            alone = ("bench", "latency", *model, "--batch-size", count, *few)
            yield self.ran(f"latency of {count}", *alone, most=40, lacking=lacking)
        step = ("bench", "step", "--algorithm", "grpo")
        yield self.ran("grpo step", *step, *model, *groups, most=70, lacking=lacking)
        for name in (
            "model/test_windows",
            "generation/test_generator",
            "test_actor",
            "generation/test_arena",
        ):
            what = self.suite(f"tests/engine/{name}.py")
            yield Step(f"suite {name}", what, 30, lacking=self.no_pytest)

    def kernels(self) -> Iterator[Step]:
        missing = self.no_pytest
        if missing is None and not installed("pytest_benchmark"):
            missing = "pytest-benchmark is not installed"
        some = () if self.gpu else ("--rounds", "2", "--first", "1")  # a rehearsal
        yield self.probe("workspace", 45)
        for name in CONTESTS:
            results = self.scratch / name
            command = (*PYTEST, "-s", "--benchmark-enable", "--results", str(results), *some)
            yield Step(
                name,
                (*command, f"bench/bench_{name}.py"),
                20,
                results / f"{name}.json",
                missing,
            )
        found, lacking = shutil.which("ncu"), None
        if not (self.gpu and found):
            lacking = "ncu is not on the PATH" if self.gpu else "there is no GPU in this run"
        for name, ours in PROFILED.items():
            only = ("--kernel-name", f"regex:{ours}", "--launch-skip", "4", "--launch-count", "2")
            tool = (found or "", "--section", "SpeedOfLight", "--section", "LaunchStats")
            tool += ("--section", "Occupancy", "--section", "WarpStateStats", *only)
            yield self.probe("kernel", 30, name, name=f"ncu {name}", lacking=lacking, tool=tool)

    def probe(self, what: str, most: float, *more: str, name: str = "", **rest: Any) -> Step:
        """One of bench/probes.py."""
        name = name or what
        file = self.scratch / f"{name.replace(' ', '_')}.json"
        where = ("--device", self.device, "--output-json", str(file))
        return Step(name, ("-m", "bench.probes", what, *more, *where), most, file, **rest)


def installed(name: str) -> bool:
    """Whether a step can import this."""
    return importlib.util.find_spec(name) is not None or (PACKAGES / name).is_dir()


def steps(part: str, device: str, scratch: Path) -> Iterator[Step]:
    """Return the steps of one part, the most informative first."""
    of = Part(device, scratch)
    return {"truth": of.truth, "engine": of.engine, "kernels": of.kernels}[part]()


def environment() -> dict[str, str]:
    """Return environment variables under which `fusedrl` is this checkout and nothing uses the
    network."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(namespace()), str(ROOT), os.environ.get("PYTHONPATH", ""), str(PACKAGES)]
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


def run(step: Step, limit: float, log: Any) -> dict[str, Any]:
    """One step, within `limit` seconds: {"state", "seconds", "found"}; its output goes to the
    log."""
    log.write(f"\n==== {step.name}\n")
    if step.lacking is not None:
        return {"state": "skipped", "why": step.lacking}
    began = time.monotonic()
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
    parser.add_argument(
        "--minutes",
        type=float,
        default=SECONDS / 60,
        help="of the part; each step's share grows with it (default: %(default)g)",
    )
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"expected --minutes above 0, got {options.minutes:g}")
    options.out.mkdir(parents=True, exist_ok=True)
    began, report = time.monotonic(), dict[str, Any]()
    whole = 60 * options.minutes
    text, file = (options.out / f"{options.part}.{suffix}" for suffix in ("txt", "json"))
    with tempfile.TemporaryDirectory() as scratch, text.open("w", encoding="utf-8") as log:
        waiting = list(steps(options.part, options.device, Path(scratch)))
        while waiting:
            step = waiting.pop(0)
            kept = sum(later.most for later in waiting if later.lacking is None) * whole / SECONDS
            of = report[step.name] = run(step, whole - kept - (time.monotonic() - began), log)
            seconds, why = of.get("seconds", 0), of.get("why", "")
            line = f"{of['state']:16} {step.name:28} {seconds:7.1f} s  {why}".rstrip()
            print(line, flush=True)
            log.write(line + "\n")
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{options.part}: {time.monotonic() - began:.0f} s; {text}, {file}")
    return int(any(found["state"] not in ("ok", "skipped") for found in report.values()))


if __name__ == "__main__":
    sys.exit(main())
