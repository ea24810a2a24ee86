"""fusedrl bench throughput|latency|step|kernels: their options, and the functions that run them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, TypeAlias

from fusedrl.engine.base.errors import ConfigError, SetupError
from fusedrl.engine.cli.common import (
    check_device,
    count,
    count_or_none,
    nearest,
    report_file,
    report_json,
)
from fusedrl.engine.cli.early import check_models

Kinds: TypeAlias = "argparse._SubParsersAction[Any]"


def bench_options(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `fusedrl bench` and their options to the parser. Options that `vllm
    bench` also has have the same names and meanings."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    _throughput(kinds)
    _latency(kinds)
    _step(kinds)
    ops = kinds.add_parser(
        "kernels",
        help="the contests of bench/ (a source tree), by pytest-benchmark",
        allow_abbrev=False,
    )
    ops.add_argument("op", nargs="*", help="such as gae; all of them where none is named")
    ops.add_argument(
        "--output-json", type=report_file, metavar="FILE", help="pytest-benchmark's report"
    )


def _kind(kinds: Kinds, name: str, text: str, **defaults: Any) -> argparse.ArgumentParser:
    """Add a subcommand with the options that all measurements of a model share."""
    one = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="directory or id of the model")
    what.add_argument(
        "--shape",
        choices=("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-0.6b"),
        help="random weights in the shape of this model",
    )
    for option, (default, text) in {
        "--input-len": (defaults["input_len"], "tokens of a prompt"),
        "--output-len": (defaults["output_len"], "tokens drawn"),
        "--n": (defaults["n"], "samples of a prompt"),
        "--num-iters": (defaults["iters"], "rounds that count"),
        "--num-iters-warmup": (defaults["warmup"], "rounds before them"),
    }.items():
        shown = "(default: %(default)s)" if default is not None else "(default: by workload)"
        one.add_argument(
            option,
            type=count_or_none if option == "--num-iters-warmup" else count,
            default=default,
            help=f"{text} {shown}",
        )
    one.add_argument(
        "--seed", type=int, default=0, help="of prompts and draws (default: %(default)s)"
    )
    one.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="auto: float32 on CPU, bfloat16 on CUDA",
    )
    one.add_argument("--device", help="cpu or cuda (default: the best there is)")
    one.add_argument(
        "--output-json",
        type=report_file,
        metavar="FILE",
        help='the figures; "-" is standard output, without the table',
    )
    return one


def _throughput(kinds: Kinds) -> None:
    one = _kind(
        kinds,
        "throughput",
        "tokens per second of a whole workload",
        input_len=None,
        output_len=None,
        n=None,
        iters=3,
        warmup=1,
    )
    one.add_argument(
        "--dataset-name",
        default="random",
        choices=("random", "seed0", "group"),
        help="random: one length (default, 64 x 128 + 128); seed0: "
        "nano-vllm's 256 requests of 100 to 1024 tokens in and out, shorter by --input-len and "
        "--output-len; group: 64 prompts of 16 samples",
    )
    one.add_argument("--num-prompts", type=count, help="(default: by workload)")
    one.add_argument(
        "--opponents",
        default="",
        metavar="NAMES",
        help="generate, generate_batch (transformers), or both with a comma, in the same process",
    )


def _latency(kinds: Kinds) -> None:
    one = _kind(
        kinds,
        "latency",
        "of one batch: to the first token, per token after it, to the end",
        input_len=32,
        output_len=128,
        n=1,
        iters=30,
        warmup=10,
    )
    one.add_argument("--batch-size", type=count, default=8, help="prompts (default: %(default)s)")


def _step(kinds: Kinds) -> None:
    one = _kind(
        kinds,
        "step",
        "a whole PPO or GRPO step by phases",
        input_len=128,
        output_len=128,
        n=None,
        iters=3,
        warmup=1,
    )
    one.add_argument(
        "--algorithm", default="ppo", choices=("ppo", "grpo"), help="(default: %(default)s)"
    )
    one.add_argument("--num-prompts", type=count, help="(default: 64 for ppo, 8 for grpo)")
    one.add_argument(
        "--epochs", type=count, help="passes over a rollout (default: 4 for ppo, 1 for grpo)"
    )
    one.add_argument(
        "--tokens-per-microbatch", type=count, default=8192, help="(default: %(default)s)"
    )
    one.add_argument(
        "--strict",
        action="store_true",
        help="in turn with steps of strict numerics: what they cost",
    )


def run_bench(options: argparse.Namespace) -> None:
    """Run `fusedrl bench`."""
    if options.kind == "kernels":
        _bench_kernels(options)
        return
    check_device(options.device)
    check_models([options.model])
    from fusedrl.engine.tools import bench
    from fusedrl.engine.tools.bench_step import step

    subject = bench.Subject(options.model, options.shape, options.dtype, options.device)
    rounds = {"iterations": options.num_iters, "warmup": options.num_iters_warmup}
    if options.kind == "throughput":
        sizes = {
            "num_prompts": options.num_prompts,
            "input_len": options.input_len,
            "output_len": options.output_len,
            "samples": options.n,
        }
        found = bench.throughput(
            subject,
            options.dataset_name,
            opponents=[name for name in options.opponents.split(",") if name],
            **rounds,
            seed=options.seed,
            **{name: size for name, size in sizes.items() if size is not None},
        )
    elif options.kind == "latency":
        found = bench.latency(
            subject,
            batch_size=options.batch_size,
            input_len=options.input_len,
            output_len=options.output_len,
            samples=options.n,
            seed=options.seed,
            **rounds,
        )
    else:
        ppo = options.algorithm == "ppo"
        found = step(
            subject,
            algorithm=options.algorithm,
            num_prompts=options.num_prompts or (64 if ppo else 8),
            samples=options.n or (1 if ppo else 8),
            input_len=options.input_len,
            output_len=options.output_len,
            epochs=options.epochs or (4 if ppo else 1),
            strict=options.strict,
            tokens_per_microbatch=options.tokens_per_microbatch,
            seed=options.seed,
            **rounds,
        )
    report_json(found, options.output_json, lambda: bench.print_report(found))


def _bench_kernels(options: argparse.Namespace) -> None:
    import subprocess

    root = Path(__file__).resolve().parents[2]
    contests = {
        path.stem.removeprefix("bench_"): str(path)
        for path in sorted((root / "bench").glob("bench_*.py"))
    }
    ops = {
        name: path
        for name, path in contests.items()
        if (root / "kernels" / f"{name}.py").is_file() or (root / "kernels" / name).is_dir()
    }
    if not ops:
        raise SetupError(
            "bench kernels: the contests of the ops are in bench/ of a source tree, and this "
            "installation has none; clone the repository"
        )
    if unknown := [name for name in options.op if name not in ops]:
        raise ConfigError(
            f"bench kernels: unknown op {unknown[0]!r}{nearest(unknown[0], ops)}; expected some of "
            f"{', '.join(ops)}"
        )
    report = (
        [f"--benchmark-json={Path(options.output_json).resolve()}"] if options.output_json else []
    )
    chosen = [path for name, path in ops.items() if not options.op or name in options.op]
    raise SystemExit(
        subprocess.run(
            [sys.executable, "-m", "pytest", "-s", "--benchmark-enable", *report, *chosen], cwd=root
        ).returncode
    )
