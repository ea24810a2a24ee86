"""A policy step on 1 to 8 GPUs, computed from its parts. `python -m bench.scaling_model` writes the
tables between the markers of docs/scaling.md; --check compares the same formulas with runs of one
and two processes on this machine's CPU.

Nothing here was measured on a GPU. Peak rates are the data sheet's of the H100 SXM; the shares of
them that are reached are assumptions, and so are the latencies, but for what the page says was
measured. With P ranks, n parameters, t ranks to a tensor-parallel group (t = 1 is what is built),
S sequences and N tokens a step, u optimizer steps:

    rollout     sum over steps of (2n/t + active x context x kv/t) / HBM, or 2n active / (t FLOP/s)
                where that is more, + launches + 2L all-reduces; of S t / P sequences a group
    scoring     2n N / (P FLOP/s), training 6n N / (P FLOP/s), each times the busiest rank's share
    optimizer   u 30n' / HBM, where n' are the fullest owner's: reads gradient, master and moments,
                writes the latter two and the weights
    exchange    u (4 (P-1) n' + 2n)/t / NVLink: gradients in float32 out, parameters in bfloat16 in;
                + packing and adding, u 36n/t / HBM; + a word for each round
    apart       experience that every rank unpacks, HOST seconds a token; does not shrink with P

    memory      2n/t weights + 4n/t sums of gradients + 12n'/t masters and moments (6n'/t in int8)
                + 4n/t for each sum that waits when there are more lanes than ranks
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import NamedTuple

from bench.tables import replace_between

from fusedrl.engine.parallel.lanes import BUCKET, costs_of, deal

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- devices:begin -->", "<!-- devices:end -->"

MEMORY = 80e9
HBM = 0.70 * 3.35e12  # bytes/s: HBM3, and the share of it assumed to be reached
FLOPS = 0.50 * 989e12  # dense bfloat16, and the share of it in large products
NVLINK = 0.78 * 450e9  # bytes/s each way of NVLink 4's 900 GB/s both ways
LAUNCH = 0.2e-3  # seconds of a decoding step outside its products, assumed
REDUCE = 15e-6  # latency of one small all-reduce, assumed
WORD = 0.3e-3  # a word before an exchange, over loopback, assumed for 8 processes
HOST = 0.3e-6  # seconds to pack and unpack a new token with its columns: measured on a CPU core
POOL = 8e9  # bytes that have to be left for KV cache and activations


class Model(NamedTuple):
    """The sizes of a decoder."""

    layers: int
    hidden: int
    feed_forward: int
    key_values: int  # heads x width
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Weights of the products, embedding and head."""
        h, kv = self.hidden, self.key_values
        layer = h * (h + 2 * kv) + h * h + 3 * h * self.feed_forward
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * h

    def fullest(self, ranks: int) -> int:
        """Numbers of the parameters that one rank owns, at most: parameters stay whole."""
        h, kv = self.hidden, self.key_values
        layer = [h * (h + 2 * kv), h * h, 2 * h * self.feed_forward, h * self.feed_forward]
        sizes = layer * self.layers + [self.vocabulary * h] * (1 if self.tied else 2)
        return max(sum(sizes[i] for i in hand) for hand in deal(sizes, ranks))

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache a token, in bfloat16."""
        return 4 * self.layers * self.key_values


# the shapes of Qwen2.5
MODELS = {
    "0.5B": Model(24, 896, 4864, 128, 151936, True),
    "7B": Model(28, 3584, 18944, 512, 152064, False),
    "32B": Model(64, 5120, 27648, 1024, 152064, False),
}


class Work(NamedTuple):
    """A policy step: GRPO without a reference."""

    prompts: int
    samples: int
    prompt: int  # tokens
    completion: int  # mean tokens
    most: int
    updates: int
    micro: int  # tokens a micro-batch

    def lengths(self) -> list[int]:
        """New tokens of each completion: log-normal, the same at every call."""
        draw, spread = random.Random(1), 0.7
        centre = math.log(self.completion) - spread**2 / 2
        return [
            max(1, min(self.most, round(math.exp(draw.gauss(centre, spread)))))
            for _ in range(self.prompts * self.samples)
        ]


WORKS = {
    "large": Work(128, 8, 256, 1024, 4096, 4, 16384),
    "small": Work(16, 8, 256, 256, 1024, 1, 16384),
}


def step_seconds(model: Model, active: int, context: float, t: int = 1) -> float:
    """Time of a decoding step of so many sequences with so many tokens before them."""
    n = model.parameters
    read = (2 * n + active * context * model.kv_bytes) / t / HBM
    reduced = 2 * model.layers * (REDUCE + 2 * active * model.hidden / NVLINK) if t > 1 else 0.0
    return max(read, 2 * n * active / t / FLOPS) + LAUNCH + reduced


def memory(
    model: Model, devices: int, t: int = 1, lanes: int | None = None, moments: int = 8
) -> float:
    """Bytes that a device holds before KV cache and activations. `moments`: bytes a parameter."""
    n, mine = model.parameters, (lanes or devices // t) * t // devices
    waiting = int(math.log2(mine)) if mine > 1 else 0
    return (2 + 4 + 4 * waiting) * n / t + (4 + moments) * model.fullest(devices // t) / t


def fits(
    model: Model, devices: int, t: int = 1, lanes: int | None = None, moments: int = 8
) -> bool:
    """Whether POOL is left."""
    return memory(model, devices, t, lanes, moments) + POOL <= MEMORY


def rollout_seconds(model: Model, work: Work, devices: int, t: int = 1, moments: int = 8) -> float:
    """Time until the last group of ranks has generated its completions, prompts dealt as the engine
    deals them. Sequences wait where the cache has no room."""
    groups, lengths = devices // t, work.lengths()
    dealt = deal([1] * work.prompts, groups, -(-work.prompts // groups))
    room = max(POOL, MEMORY - memory(model, devices, t, None, moments) - 4e9) * t
    slots = max(1, int(room / (model.kv_bytes * (work.prompt + work.completion))))
    times = []
    for hand in dealt:
        mine = [length for i in hand for length in lengths[i * work.samples :][: work.samples]]
        seconds = 2 * model.parameters * len(hand) * work.prompt / t / FLOPS  # prompts, once each
        ends: list[int] = []
        at = 0
        while mine or ends:
            while mine and len(ends) < slots:
                ends.append(at + mine.pop(0))
            ends.sort()
            context = work.prompt + work.completion / 2
            seconds += (ends[0] - at) * step_seconds(model, len(ends), context, t)
            at = ends[0]
            ends = [end for end in ends if end > at]
        times.append(seconds)
    return max(times, default=0.0)


def imbalance(work: Work, lanes: int, ranks: int) -> float:
    """The busiest rank's share of an update's passes over the mean, by the engine's own deal."""
    whole = [length + work.prompt for length in work.lengths()][:: work.updates]
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(whole)), key=whole.__getitem__):
        if groups[-1] and sum(whole[j] for j in groups[-1]) + whole[i] > work.micro:
            groups.append([])
        groups[-1].append(i)
    costs = costs_of(whole, groups)
    dealt, each = deal(costs, lanes), lanes // ranks
    loads = [sum(costs[i] for lane in dealt[each * r :][:each] for i in lane) for r in range(ranks)]
    return max(loads) * ranks / sum(loads)


class Step(NamedTuple):
    """Seconds of a policy step, by part."""

    rollout: float
    scoring: float
    training: float
    optimizer: float
    exchange: float
    apart: float

    @property
    def whole(self) -> float:
        return math.fsum(self)


def exchanged_bytes(parameters: float, ranks: int, gradient: int = 4, weight: int = 2) -> float:
    """Bytes that a rank sends of gradients and receives of parameters in an optimizer step, in the
    mean over ranks."""
    return (ranks - 1) / ranks * (gradient + weight) * parameters


def exchange_seconds(model: Model, ranks: int, t: int = 1) -> float:
    """Time in which gradients reach their owners and parameters come back. The fullest owner
    receives most; owners send their parameters one after the other."""
    if ranks == 1:
        return 0.0
    n, most = model.parameters / t, model.fullest(ranks) / t
    gradients = 4 * max((ranks - 1) * most, n * (ranks - 1) / ranks)
    rounds = 2 + math.ceil(most / BUCKET) + ranks
    return (gradients + 2 * n) / NVLINK + 36 * n / HBM + rounds * WORD


def step(
    model: Model,
    work: Work,
    devices: int,
    t: int = 1,
    lanes: int | None = None,
    moments: int = 8,
) -> Step:
    """The time of a policy step."""
    ranks, n = devices // t, model.parameters / t
    lanes = lanes or ranks
    tokens = sum(work.lengths()) + work.prompts * work.samples * work.prompt
    busy = imbalance(work, lanes, ranks)
    passes = 2 * model.parameters * tokens / devices / FLOPS * busy
    per_layer = 8 * model.layers * model.hidden * tokens / ranks * (t - 1) / t / NVLINK
    sums = 12 * n * lanes / ranks / HBM if lanes > 1 else 0.0
    updated = 30 * model.fullest(ranks) / t / HBM
    return Step(
        rollout_seconds(model, work, devices, t, moments),
        passes + per_layer,
        3 * passes + 2 * per_layer,
        work.updates * (updated + sums),
        work.updates * exchange_seconds(model, ranks, t),
        HOST * sum(work.lengths()) if ranks > 1 else 0.0,
    )


# ---- the tables ----------------------------------------------------------------------------------
def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*names: str) -> list[str]:
    return [_row(list(names)), "|" + "---|" * len(names)]


def step_table() -> str:
    """Time of a step by number of devices."""
    rows = _head("model, step", "GPUs", *Step._fields, "whole, s", "against one GPU", "holds, GB")
    for name, model in MODELS.items():
        for size, work in WORKS.items():
            alone = step(model, work, 1).whole
            for devices in (1, 2, 4, 8):
                found, held = step(model, work, devices), memory(model, devices) / 1e9
                shown = [f"{seconds:.2f}" for seconds in (*found, found.whole)]
                gain = f"{alone / found.whole:.2f}x" if fits(model, 1) else ""
                if not fits(model, devices):
                    shown, gain = ["-"] * len(shown), "does not fit"
                rows.append(_row([f"{name}, {size}", str(devices), *shown, gain, f"{held:.1f}"]))
    return "\n".join(rows)


def tensor_table() -> str:
    """Time and memory on 8 devices by ranks in a tensor-parallel group."""
    rows = _head("model, step", "t", "rollout", "whole, s", "against t = 1", "holds, GB")
    ways = [(1, 8), (2, 8), (4, 8), (8, 8), (8, 2)]
    for name, model in MODELS.items():
        for size, work in WORKS.items():
            base = step(model, work, 8).whole if fits(model, 8) else math.nan
            for t, moments in ways if name == "32B" else ways[:4]:
                found, fit = (
                    step(model, work, 8, t, None, moments),
                    fits(model, 8, t, None, moments),
                )
                seconds = [found.rollout, found.whole]
                shown = [f"{x:.2f}" for x in seconds] if fit else ["-", "does not fit"]
                gain = f"{base / found.whole:.2f}x" if fit and base == base else ""
                held = f"{memory(model, 8, t, None, moments) / 1e9:.1f}"
                of = str(t) if moments == 8 else f"{t}, int8 moments"
                rows.append(_row([f"{name}, {size}", of, *shown, gain, held]))
    return "\n".join(rows)


def lanes_table() -> str:
    """What eight lanes cost where there are fewer ranks, and ZeRO-1 against whole optimizers."""
    rows = _head(
        "model",
        "GPUs",
        "lanes",
        "busiest over mean",
        "a large step, s",
        "holds, GB",
        "masters and moments whole, GB",
        "and its optimizer, s more",
    )
    for name, model in MODELS.items():
        for devices in (1, 2, 4, 8):
            for lanes in dict.fromkeys((devices, 8)):
                work, n = WORKS["large"], model.parameters
                found, held = step(model, work, devices, 1, lanes), memory(model, devices, 1, lanes)
                fit = fits(model, devices, 1, lanes)
                # every rank updates all parameters, and a ring sums float32 gradients for all
                whole = 30 * n / HBM + 8 * (devices - 1) / devices * n / NVLINK
                parts = 30 * model.fullest(devices) / HBM
                more = work.updates * (whole - parts - exchanged_bytes(n, devices) / NVLINK)
                rows.append(
                    _row(
                        [
                            name,
                            str(devices),
                            str(lanes),
                            f"{imbalance(work, lanes, devices):.3f}",
                            f"{found.whole:.1f}" if fit else "does not fit",
                            f"{held / 1e9:.1f}",
                            f"{(held + 12 * (n - model.fullest(devices))) / 1e9:.1f}",
                            f"{more:.2f}",
                        ]
                    )
                )
    return "\n".join(rows)


def page() -> str:
    """Everything between the page's markers."""
    work = " ".join(
        f"{name}: {w.prompts} prompts x {w.samples} completions of {w.completion} tokens in the "
        f"mean (at most {w.most}), prompts of {w.prompt}, {w.updates} optimizer steps."
        for name, w in WORKS.items()
    )
    return (
        f"All computed, none measured on a GPU. Steps: {work}\n\n**By number of GPUs**, replicated "
        f"weights with ZeRO-1, seconds:\n\n{step_table()}\n\n**Tensor parallel on 8 GPUs** "
        f"(computed; not built):\n\n{tensor_table()}\n\n**Lanes and ZeRO-1**:\n\n{lanes_table()}\n"
    )


def write(path: Path = PAGE) -> None:
    """Write the tables into the page."""
    text = path.read_text(encoding="utf-8")
    path.write_text(replace_between(text, BEGIN, END, page()), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="against runs on this CPU")
    if parser.parse_args().check:
        from bench.scaling_check import check

        print(check())
    else:
        write()
