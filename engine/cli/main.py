"""The command line: fusedrl train sft|reward|dpo|ppo|grpo|..., fusedrl plan
sft|reward|dpo|ppo|grpo|..., fusedrl generate, fusedrl demo, fusedrl doctor.

Options of `train` and `plan` are the fields of the configuration dataclasses (config/), nested
ones with a dot. An option on the command line overrides --config. Exit codes: 0 done, 1 a bug (with
its traceback) or a failed check of `fusedrl verify`, 2 configuration or data, 3 environment, 4
stopped by the reward-hacking alarm, 128 + n stopped by signal n with its state saved (129 SIGHUP,
130 SIGINT, 138 SIGUSR1, 143 SIGTERM). Commands that do not need torch do not import it. `samples`,
`report` and `watch` are in report.py, `runs`, `resume` and `export` in runs.py; `init`, `data`,
`bench`, `generate`, `chat`, `judge`, `eval` and `verify` have their own files.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_origin

from fusedrl.engine.base.errors import SAID, ConfigError, Elsewhere, SetupError, Stopped, UserError
from fusedrl.engine.cli import data, evaluate
from fusedrl.engine.cli.bench import bench_options, run_bench
from fusedrl.engine.cli.chat import chat_options
from fusedrl.engine.cli.common import (
    CONFIGURATION,
    ENVIRONMENT,
    FAILED,
    INTERRUPTED,
    Parser,
    check_device,
    nearest,
    plain_warnings,
    refuse_unknown,
    report_file,
    report_json,
    spelled,
)
from fusedrl.engine.cli.devices import devices_of, start
from fusedrl.engine.cli.early import check_models
from fusedrl.engine.cli.fields import fixed_of
from fusedrl.engine.cli.generate import generate_options, run_generate
from fusedrl.engine.cli.help import example, short_help, stages_help
from fusedrl.engine.cli.init import add_commands as add_init
from fusedrl.engine.cli.judge import judge_options
from fusedrl.engine.cli.names import (
    OF_OTHER_STAGES,
    STAGES_ELSEWHERE,
    known_elsewhere,
    nearest_names,
)
from fusedrl.engine.cli.report import add_commands
from fusedrl.engine.cli.runs import add_commands as add_run_commands
from fusedrl.engine.cli.runs import run_resume
from fusedrl.engine.cli.values import keys_of, meant, parts_of, read_yaml
from fusedrl.engine.cli.verify import verify_options
from fusedrl.engine.cli.words import LACKING, in_plain_words
from fusedrl.engine.config import (
    DPOConfig,
    KTOConfig,
    PolicyConfig,
    RejectionConfig,
    RewardModelConfig,
    SFTConfig,
)
from fusedrl.engine.config.algorithms import ALGORITHMS

STAGES: dict[str, tuple[type, str, str, str]] = {
    "sft": (
        SFTConfig,
        "fusedrl.engine.stages.sft",
        "train_sft",
        "supervised fine-tuning on demonstrations",
    ),
    "reward": (
        RewardModelConfig,
        "fusedrl.engine.stages.reward_model",
        "train_reward_model",
        "a reward model on preferences: pairs or ranked lists",
    ),
    "dpo": (
        DPOConfig,
        "fusedrl.engine.stages.dpo",
        "train_dpo",
        "direct preference optimisation: preferences, no reward model",
    ),
    "kto": (
        KTOConfig,
        "fusedrl.engine.stages.kto",
        "train_kto",
        "Kahneman-Tversky optimisation: answers labelled as wanted or not",
    ),
    "rejection": (
        RejectionConfig,
        "fusedrl.engine.stages.rejection",
        "train_rejection",
        "rejection sampling: imitate the best of many samples",
    ),
} | {
    name: (PolicyConfig, "fusedrl.engine.stages.policy", "train_policy", row.title)
    for name, row in ALGORITHMS.items()
}
_DASHES = "-\u2013\u2014"  # the longer ones come with text that was copied
OPTIONAL = ("lora", "critic", "replay", "ptx", "evaluation")  # groups of options that may be null


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. An error that the user can fix is one message on
    standard error; any other error keeps its traceback."""
    try:
        with plain_warnings():
            _run(list(sys.argv[1:] if argv is None else argv))
    except Stopped as stop:
        return int(stop.code or 0)
    except SystemExit as stop:
        if not _is_ours(stop):
            return _fail(
                SetupError(
                    "something that this command called ended the process with "
                    f"sys.exit({stop.code!r}), and nothing here does; a function "
                    "given to it raises an exception where it cannot go on"
                ),
                FAILED,
            )
        # --help, --version, argparse's own errors, and what is missing
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("fusedrl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        return _fail(error, CONFIGURATION)
    except (OSError, SetupError) as error:
        return _fail(error, ENVIRONMENT)
    except ValueError as error:
        if not _is_ours(error):
            raise
        return _fail(error, CONFIGURATION)
    except Warning as error:
        return _fail(
            SetupError(
                f"a warning, and Python was told to stop at those: {' '.join(str(error).split())}"
            ),
            FAILED,
        )
    except Elsewhere:  # a fault of another rank, which shows its own traceback
        return FAILED
    return 0


def _fail(error: BaseException, code: int) -> int:
    # only the rank that failed prints the message; if several failed, the first
    if isinstance(error, Elsewhere) or SAID in getattr(error, "__notes__", ()):
        return code
    message = (
        f"{error.filename}: {error.strerror}"
        if isinstance(error, OSError) and error.filename is not None
        else str(error)
    )
    print(f"fusedrl: error: {message}", file=sys.stderr)
    return code


def _is_ours(error: BaseException) -> bool:
    """Whether the engine or an option parser raised the error, so that its message says what to do.
    An error raised in a library is a bug and needs its traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    return (
        isinstance(error, UserError)
        or module.startswith("fusedrl.engine.")
        or (
            isinstance(error, SystemExit)
            and module in ("argparse", "__main__", "jsonargparse._core")
        )
    )


def _parser() -> Parser:
    parser = Parser(
        prog="fusedrl",
        allow_abbrev=False,
        description="RLHF on one machine: train and generate from one copy of the weights.",
    )
    parser.add_argument("--version", action="version", version=f"fusedrl {version('fusedrl')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train a model: sft, reward, dpo, ppo, grpo, ...", add_help=False
    )
    train.add_argument("rest", nargs=argparse.REMAINDER)
    memory = commands.add_parser(
        "plan",
        help="what a run will take of memory, and the largest micro-batch that fits",
        add_help=False,
    )
    memory.add_argument("rest", nargs=argparse.REMAINDER)
    generate_options(
        commands.add_parser("generate", help="print completions of prompts", allow_abbrev=False)
    )
    bench_options(
        commands.add_parser(
            "bench", help="measure generation or a step of training", allow_abbrev=False
        )
    )
    judge_options(commands)
    add_commands(commands)
    data.add_commands(commands)
    evaluate.add_commands(commands)
    chat_options(commands)
    add_run_commands(commands)
    add_init(commands, {name: (row[0], row[3]) for name, row in STAGES.items()})
    verify_options(commands)
    demo = commands.add_parser(
        "demo", help="all three stages on an embedded task, in minutes on a CPU", allow_abbrev=False
    )
    demo.add_argument(
        "--dir",
        default="runs/demo",
        help="where models, metrics and the report go (default: %(default)s)",
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="of everything that draws (default: %(default)s)"
    )
    doctor = commands.add_parser(
        "doctor",
        help="what this machine has and lacks; exit code 3 where something required is missing",
        allow_abbrev=False,
    )
    doctor.add_argument("--device", help="a device that is required, such as cuda (default: none)")
    doctor.add_argument(
        "--output-json",
        type=report_file,
        metavar="FILE",
        help='what was found; "-" is standard output, without the tables',
    )
    return parser


def _run(argv: list[str]) -> None:
    if argv[:1] == ["train"]:  # argparse's REMAINDER does not take options first
        _train(argv[1:])
        return
    if argv[:1] == ["plan"]:
        _plan(argv[1:])
        return
    if argv[:1] == ["resume"]:
        run_resume(argv[1:], parse_config, _function)
        return
    parser = _parser()
    options, unknown = parser.parse_known_args(spelled(parser, argv))
    options.argv = argv
    if unknown:
        refuse_unknown(parser, options, unknown)
    if options.command == "bench":
        run_bench(options)
    elif "call" in options:
        options.call(options)
    elif options.command == "generate":
        run_generate(options)
    elif options.command == "doctor":
        _doctor(options)
    else:
        from fusedrl.engine.tools.demo import run_demo

        run_demo(options.dir, options.seed)


# ---- train ---------------------------------------------------------------------------------------
def _train(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        told = stages_help({name: row[3] for name, row in STAGES.items()})
        print(told, file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else CONFIGURATION)
    if argv[0].startswith("-"):
        raise ConfigError(
            f"train: expected a stage before the options, got {argv[0]!r}; such as fusedrl train "
            "sft; fusedrl train --help lists them"
        )
    if argv[0] not in STAGES:
        raise ConfigError(
            f"train: unknown stage {argv[0]!r}{_nearest_stage(argv[0])}; expected one of "
            f"{', '.join(STAGES)}"
        )
    if {"-h", "--help"} & set(argv):
        print(short_help(argv[0], STAGES[argv[0]][0], STAGES[argv[0]][3]))
        raise SystemExit(0)
    argv = ["--help" if word == "--help-all" else word for word in argv]
    argv, devices, place = devices_of(argv)
    config = parse_config(argv[0], argv[1:])
    start(_function(argv[0]), config, ["train", *argv], config.run.dir, devices, place)


def _function(stage: str) -> Callable[[], Callable[[Any], Any]]:
    """Return a function that imports a stage and returns what trains it."""
    _, module, name, _ = STAGES[stage]
    return lambda: getattr(importlib.import_module(module), name)


def _nearest_stage(name: str) -> str:
    meant = STAGES_ELSEWHERE.get(name.lower().replace("-", "_"))
    return f", which is {meant} here" if meant is not None else nearest(name, STAGES)


def parse_config(
    stage: str,
    argv: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
    tree: Mapping[str, Any] | None = None,
) -> Any:
    """Read the configuration of a stage ("sft", "reward", or an algorithm) from command-line
    options and, with --config FILE, from YAML.

    An option on the command line overrides the file. Several --reward options make one list.
    `defaults` gives values for required keys that are left out; `tree` holds options as nested
    dictionaries, which files and options override.

    Raises:
        ConfigError: an unknown key (the message names the nearest), a wrong type, a missing value,
            or values that contradict each other.
        FileNotFoundError: the configuration file does not exist.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    cls = STAGES[stage][0]
    known = dict(keys_of(cls))
    files, options = _sort_options(list(argv), stage, known)
    parser = ArgumentParser(prog=f"fusedrl train {stage}", exit_on_error=False, default_env=False)
    parser.add_argument(
        "--config", action="config", help="YAML file with these options; the command line beats it"
    )
    parser.add_class_arguments(cls)
    trees: list[Any] = [] if tree is None else [tree]
    hint = partial(_hint, stage=stage, known=known, dashes="")
    trees += [read_yaml(file, known, hint) for file in files]
    played = any(isinstance(one, Mapping) and one.get("environment") for one in trees) or any(
        option.startswith("--environment=") for option in options
    )  # an environment rewards
    usual: dict[str, Any] = {"reward": []} if played and "environment" in known else {}
    parser.set_defaults(usual | dict(defaults or {}) | fixed_of(stage))
    try:
        configs = [f"--config={json.dumps(one, default=str)}" for one in trees]
        parsed = parser.parse_args(configs + options)
        parsed.pop("config", None)
        values = parser.instantiate(parsed)
        if values.get("algorithm", stage) != stage and stage in ALGORITHMS:
            raise ConfigError(
                f"config: algorithm is {values['algorithm']!r}, and the command says train "
                f"{stage}; leave the option out"
            )
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
    except (ArgumentError, TypeError) as error:
        message = f"config: {in_plain_words(str(error), cls)}"
        if message.endswith(LACKING) and not defaults:
            lacking = re.findall(r"--(\w+)", message)
            given = example(stage, cls, argv, lacking)
            message += f"; such as: {given} (fusedrl init {stage} writes all options into a file)"
        raise ConfigError(message) from error
    # for an optional group, jsonargparse puts our own message among others
    except ValueError as error:
        ours = re.search(r"config: expected .*", str(error))
        if isinstance(error, UserError) or ours is None:
            raise
        raise ConfigError(ours[0]) from error


def _sort_options(
    argv: list[str], stage: str, known: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Split arguments into (configuration files, options), so that the files can be read first; all
    --reward options become one list, all --tools another."""
    files: list[str] = []
    rewards: dict[str, list[str]] = {name: [] for name in ("reward", "monitor_reward", "tools")}
    options: list[str] = []
    index, name = 0, ""
    while index < len(argv):
        key, equals, value = argv[index].partition("=")
        before, name = name, key.removeprefix("--").replace("-", "_")
        if (
            key in ("-h", "--help")
            or name == "print_config"
            or name in [f"{group}.help" for group in OPTIONAL]
        ):
            options.append(argv[index] if key == "-h" else f"--{name}{equals}{value}")
        elif (
            not equals
            and key[:1] not in _DASHES
            and (
                before.rpartition(".")[2] == "data"
                or any(get_origin(part) is tuple for part in parts_of(known.get(before)))
            )
        ):
            several = "several are written with commas and without spaces, such as "
            several += "a.jsonl,b.jsonl" if before.endswith("data") else "1,0.5"
            if before in rewards:
                several = f"write --{before} before each"
            raise ConfigError(
                f"config: expected one value after --{before}, and got {argv[index]!r} behind it; "
                f"{several}"
            )
        elif not key.startswith("--") or (name not in known and name != "config"):
            expected = "" if key.startswith("--") else "; options are written --key value"
            hint = _hint(name.lstrip("_" + _DASHES), stage=stage, known=known, dashes="--")
            raise ConfigError(f"config: unknown option {key!r}{hint}{expected}")
        else:
            if not equals:
                follows = index + 1 < len(argv) and not (
                    argv[index + 1].startswith("--") and argv[index + 1][2:3].isalpha()
                )
                if not follows and known.get(name) is not bool:
                    raise ConfigError(f"config: expected a value after {key}")
                value = argv[index + 1] if follows else "true"
                index += follows
            if name == "config":
                files.append(value)
            elif name in rewards and name in known:
                rewards[name] += (
                    json.loads(value) if value.startswith("[") and _is_list(value) else [value]
                )
            else:
                given = meant(value, known[name])
                if isinstance(given, str) and given[:1] in ("[", "{") and ".data" in name:
                    group, _, own = name.rpartition(".")  # a text, which would be taken apart
                    options.append(f"--config={json.dumps({group: {own: given}})}")
                else:
                    text = given if isinstance(given, str) else json.dumps(given)
                    options.append(f"--{name}={text}")
        index += 1
    return files, options + [
        f"--{name}={json.dumps(listed)}" for name, listed in rewards.items() if listed
    ]


def _hint(name: str, *, stage: str, known: Mapping[str, Any], dashes: str) -> str:
    """Return a hint for an unknown name: its name here, the stages that have it, or one like it."""
    if name in known:
        return f", did you mean {dashes}{name}?"
    if name.startswith("data."):
        return f", which has no options of its own: {dashes}data FILE:prompt=COLUMN"
    affirmed = name.removeprefix("no_")
    if (
        affirmed != name
        and (option := next(iter(nearest_names(affirmed, known)), None)) is not None
        and known[option] is bool
    ):
        return f", which is {dashes}{option} false here"
    if known_elsewhere(name, known) is not None:
        return nearest(name, known, dashes)
    owners = [other for other, (cls, *_) in STAGES.items() if name in dict(keys_of(cls))]
    if not owners:
        return nearest(name, known, dashes)
    shown = [other for other in owners if other not in ALGORITHMS] + [
        "ppo, grpo and the other policy methods"
    ] * ("ppo" in owners)
    ours = next((one for one in OF_OTHER_STAGES.get(name, ()) if one in known), None)
    return f", which is one of {', '.join(shown)}, not of {stage}" + (
        f"; the nearest here is {dashes}{ours}" if ours else ""
    )


def _is_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


# ---- plan ----------------------------------------------------------------------------------------
_PLAN_HELP = """usage: fusedrl plan STAGE --model DIR [--memory 8GiB] [--devices N]
                    [--output-json FILE] [--config run.yaml] [--option value ...]

What `fusedrl train STAGE` with the same options will take of memory, by what it is for, and the
largest tokens_per_microbatch that fits, with and without checkpoint_activations. Of the model only
config.json is read. --data and --reward may be left out; with prompts the KV cache is counted for
the longest of them, without for max_prompt_length or the model's full length.

  --model DIR          model directory, its config.json, or a Hugging Face id
  --memory AMOUNT      what may be used, such as 8GiB or 16GB (default: all of the device's);
                       with it, --device may be one of another machine
  --devices N          what the run takes on each of N devices
  --output-json FILE   the numbers, in bytes; "-" is standard output, without the table

stages: sft, reward, dpo, kto, ppo, ...: those of fusedrl train; fusedrl train STAGE --help lists
the other options."""


def _plan(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(_PLAN_HELP, file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else CONFIGURATION)
    if argv[0].startswith("-"):
        raise ConfigError(
            f"plan: expected a stage before the options, got {argv[0]!r}; such as fusedrl plan "
            "sft; fusedrl plan --help says more"
        )
    if argv[0] not in STAGES:
        raise ConfigError(
            f"plan: unknown stage {argv[0]!r}{_nearest_stage(argv[0])}; expected one of "
            f"{', '.join(STAGES)}"
        )
    parser = Parser(prog=f"fusedrl plan {argv[0]}", add_help=False, allow_abbrev=False)
    parser.add_argument("--memory")
    parser.add_argument("--output-json", type=report_file)
    argv, devices, _ = devices_of(argv)
    own, rest = parser.parse_known_args(spelled(parser, argv[1:]))
    keys = dict(keys_of(STAGES[argv[0]][0]))
    for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
        name = option.removeprefix("--").replace("-", "_")
        if name not in keys and (close := nearest_names(name, {"memory": 0, "output_json": 0})):
            raise ConfigError(
                f"plan: unknown option {option!r}, did you mean --{close[0].replace('_', '-')}?"
            )
    config = parse_config(
        argv[0],
        rest,
        {"data": "unread"} | ({"reward": ["unread"]} if "reward" in keys else {}),
    )
    from fusedrl.engine.base.memory import parse_memory

    memory = None if own.memory is None else parse_memory(own.memory)
    try:
        check_device(config.device)
    except SetupError:
        if memory is None:  # else the plan is for a machine elsewhere
            raise
    if not Path(config.model).is_file():
        check_models([config.model])
    from fusedrl.engine.watch.plan import no_fit, plan, print_plan

    found = plan(config, memory=memory, devices=devices)
    report_json(found.to_json(), own.output_json, lambda: print_plan(found))
    if not found.fits:
        raise SetupError(no_fit(found, keys))


# ---- doctor --------------------------------------------------------------------------------------
def _doctor(options: argparse.Namespace) -> None:
    with contextlib.suppress(SetupError):  # a device that is not there belongs into the report
        check_device(options.device)
    from fusedrl.engine.tools.doctor import diagnose, print_diagnosis

    found = diagnose(options.device)
    report_json(found.to_json(), options.output_json, lambda: print_diagnosis(found))
    if found.missing:
        raise SystemExit(ENVIRONMENT)
