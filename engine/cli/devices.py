"""--devices N of train, judge and eval: run the same command in N processes on this machine, each
with one device.

The processes find one another through a file, and communicate only over the loopback interface.
`torchrun --nproc-per-node N -m fusedrl train ...` does the same with torch's launcher,
over the interface that torch chooses.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusedrl.engine.base.errors import ConfigError, SetupError, Stopped, resume_command
from fusedrl.engine.cli.common import check_device
from fusedrl.engine.cli.early import check_run
from fusedrl.engine.cli.processes import LOOPBACK, Processes, tell_killed
from fusedrl.engine.config.base import StageConfig
from fusedrl.engine.rewards.functions import load_ahead
from fusedrl.engine.runs.files import check_unlocked
from fusedrl.engine.runs.loggers import check_loggers

if TYPE_CHECKING:
    from fusedrl.engine.parallel.ranks import Ranks

# a rank that is not there after so long is taken for stuck: rewards and rollouts may take a while
PATIENCE = timedelta(hours=1)


class Place(NamedTuple):
    """Place of a process among the processes of a run: its rank, their number, the process that
    started it, and the file through which they find one another."""

    rank: int
    size: int
    parent: int
    store: str


def devices_of(argv: Sequence[str]) -> tuple[list[str], int, Place | None]:
    """Return the arguments without --devices and --place, the number of devices, and this process's
    place (None unless `launch` started it).

    Raises:
        ConfigError: --devices is not a whole number above 0.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--devices", "--place"):
            rest.append(word)
            continue
        found[name] = value if equals else next(words, "")
    count, place = found.get("--devices", "1"), None
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"expected --devices to be a whole number >= 1, got {count!r}")
    if "--place" in found:
        place = _place(found["--place"])
    return rest, int(count), place


def _place(text: str) -> Place:
    rank, size, parent, store = (*text.split(",", 3), "", "", "")[:4]
    if not (rank.isdecimal() and size.isdecimal() and parent.isdecimal() and store):
        raise ConfigError("--place is for processes that --devices starts; leave it out")
    return Place(int(rank), int(size), int(parent), store)


def on_devices(options: argparse.Namespace, work: Callable[[Ranks], None]) -> None:
    """Call `work` with the ranks of a command that has the options --devices and --place: here, or
    in as many processes as `options.devices` says, which run `options.argv`."""
    place = None if options.place is None else _place(options.place)
    if options.devices > 1 and place is None:
        if code := launch(options.argv, options.devices, options.device, Processes()):
            raise Stopped(code)
        return
    with joined_by(place, options.device):
        from fusedrl.engine.parallel.ranks import joined

        with joined() as ranks:
            work(ranks)


def start(
    function: Callable[[], Callable[[Any], Any]],
    config: StageConfig,
    command: Sequence[str],
    directory: str,
    devices: int,
    place: Place | None,
) -> None:
    """Train by a configuration: in this process, or, if there are several devices and this process
    was not started for one of them, in as many processes as devices.

    Args:
        function: imports what trains, and returns it.
        command: the words after `fusedrl` by which each of the processes does the same.
        directory: the run directory as the person who called it names it; `fusedrl resume` goes
            on with the run there.
    """
    check_device(config.device)
    if place is None:  # else the process that started this one has checked
        check_run(config, functions=devices == 1)
    if devices > 1 and place is None:
        processes = Processes(config.run.signal_names)
        code = launch([*command, f"--devices={devices}"], devices, config.device, processes)
        if processes.killed:
            tell_killed(processes, config.run.dir, directory)
        if code:
            raise Stopped(code)
        return
    if place is not None and place.rank == 0:  # which has the loggers
        check_loggers(config.run.loggers)
    if place is None and not launched():
        check_unlocked(config.run.dir)
    train = function()
    from fusedrl.engine.runs.run import RESUME_COMMAND

    told = RESUME_COMMAND.set(resume_command(directory))
    try:
        with joined_by(place, config.device):
            train(config)
    finally:
        RESUME_COMMAND.reset(told)
        load_ahead(())  # nothing of this run is left for another


def launched() -> bool:
    """Whether torchrun started this process, and the others of the run beside it."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_torchelastic_launched()


def launch(argv: Sequence[str], count: int, device: str | None, processes: Processes) -> int:
    """Run `fusedrl argv` in `count` processes, and forward signals to all of them. Return the exit
    code of the first process that failed, or 0.

    Raises:
        ConfigError: `device` names one card, which all processes would share.
        SetupError: there are fewer GPUs than processes.
    """
    _check_cards(argv[0], count, device)
    with tempfile.TemporaryDirectory(prefix="fusedrl-") as directory, processes.forwarding():
        store = str(Path(directory) / "store")
        started = (sys.executable, "-P", "-m", "fusedrl", *argv, "--place")
        processes.start(
            [[*started, f"{rank},{count},{os.getpid()},{store}"] for rank in range(count)],
            os.environ | {"GLOO_SOCKET_IFNAME": LOOPBACK},
        )
        return processes.wait()


def _check_cards(command: str, count: int, device: str | None) -> None:
    import torch

    if device is not None and torch.device(device).index is not None:
        raise ConfigError(
            f"{command}: expected --device {torch.device(device).type} with --devices {count}, got "
            f"{device}, which is one device; each process takes the next"
        )
    there = 0 if device == "cpu" else torch.cuda.device_count()
    if there and count > there:
        raise SetupError(
            f"{command}: expected --devices {count} to be at most the {there} GPUs that torch "
            "sees; each process has one of its own"
        )


def _end_with_parent(parent: int) -> None:
    """Ask the system to send this process SIGTERM when its parent process ends (Linux only). Raise
    SetupError if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise SetupError("the process that started this one for --devices is gone")


def _cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _take_card(rank: int, there: int) -> None:
    """Compute on the GPU with this process's number on its machine; on the only one that it sees,
    if whatever started it shows each process another."""
    import torch

    if rank >= there > 1:
        raise SetupError(
            f"train: expected a GPU for each process, and process {rank} (from 0) of this machine "
            f"sees {there}; start as many processes as there are GPUs"
        )
    torch.cuda.set_device(rank if there > 1 else 0)


@contextlib.contextmanager
def joined_by(place: Place | None, device: str | None = None) -> Iterator[None]:
    """Join the process group of a run started by --devices or by torchrun, for the duration of the
    block. Do nothing if there is only this process, or if it has joined a group already.

    Args:
        device: the device of the configuration. Unless it is "cpu", each process takes a GPU of
            its own, if there are any.
    Raises:
        SetupError: the process has no GPU of its own, or the one that started it is gone.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_available() or dist.is_initialized():
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if place is not None:
        _end_with_parent(place.parent)
        fair = max(1, _cores() // place.size)
        torch.set_num_threads(min(torch.get_num_threads(), fair))
        if cuda:
            torch.cuda.set_device(place.rank)
        store = dist.FileStore(place.store, place.size)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=PATIENCE
        )
    elif dist.is_torchelastic_launched():
        if cuda:
            _take_card(dist.get_node_local_rank(), torch.cuda.device_count())
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
