"""Measurements of `fusedrl bench throughput|latency|step`. The least possible times (floors) come
from workloads.py, with the machine's ceilings measured in the same run.

Rounds are interleaved: every contestant runs once in each. Medians are reported. No sequence stops
at an EOS, so the work is the same for all contestants and in every round. Our prefix cache is
emptied before each round. Weights may be random, in the shapes of published models: the cost of a
step does not depend on their values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError, SetupError
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.directories import resolve_directory
from fusedrl.engine.model.weights import load_decoder, resolve_device, resolve_dtype, without_code
from fusedrl.engine.tools.machine import (
    copy_bandwidth,
    describe_machine,
    gemm_rate,
    seconds_of,
)
from fusedrl.engine.tools.workloads import (
    SHAPES,
    WORKLOADS,
    Workload,
    count_weights,
    floor_of,
    kv_bytes_per_token,
    random_workload,
)

# sequences of one padded batch of an opponent, as many as our engine runs at once by default
_AT_ONCE = 256
PHASES = ("generate", "reward", "score", "advantage", "train", "other")  # of a step
# generates the whole workload; the new ids of every sequence
Contestant = Callable[[], list[list[int]]]


@dataclass(frozen=True)
class Subject:
    """Model to measure: either a directory or id, or a name in `SHAPES` with random weights; the
    other is None."""

    model: str | None = None
    shape: str | None = None
    dtype: str = "auto"
    device: str | None = None

    @property
    def name(self) -> str:
        """Name of the model in reports."""
        return self.model if self.model is not None else f"{self.shape}, random weights"

    def decoder(self) -> Decoder:
        """Load the decoder, without an EOS, so that no sequence stops early."""
        device = resolve_device(self.device)
        if self.model is not None:
            return _endless(load_decoder(self.model, dtype=self.dtype, device=device))
        return _endless(
            Decoder.random(
                model_config(SHAPES[self.shape or ""]),
                seed=0,
                dtype=resolve_dtype(self.dtype, device),
                device=device,
            )
        )

    def peer(self) -> Any:
        """Load the model in transformers, also without an EOS."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device)
        if self.model is not None:
            with without_code(resolve_directory(self.model)) as directory:
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    directory,
                    dtype=dtype,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                )
            model, report = loaded
            if report["missing_keys"]:
                raise ValueError(
                    f"{self.model}: the weights lack {', '.join(sorted(report['missing_keys']))}; "
                    "copy all of the model's files there"
                )
        else:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**SHAPES[self.shape or ""]),
                dtype=dtype,
                trust_remote_code=False,
            )
        model.generation_config.eos_token_id = None
        return model.eval().to(device)


def _endless(decoder: Decoder) -> Decoder:
    decoder.config = replace(decoder.config, eos_token_ids=())
    return decoder


# ---- throughput ----------------------------------------------------------------------------------
def throughput(
    subject: Subject,
    name: str,
    *,
    opponents: Sequence[str] = (),
    iterations: int = 3,
    warmup: int = 1,
    **sizes: int,
) -> dict[str, Any]:
    """Measure how fast a whole workload is generated. The result's top-level keys are those of
    vLLM's `bench throughput --output-json`, with fusedrl's numbers; `contestants` has the numbers
    of every contestant.

    Args:
        name: name of the workload in WORKLOADS.
        opponents: names in OPPONENTS. They share one copy of the weights with fusedrl's actor.
        sizes: arguments of the workload.
    Raises:
        ConfigError: an opponent is unknown, or a sequence is longer than the model's positions.
    """
    if unknown := [o for o in opponents if o not in OPPONENTS]:
        raise ConfigError(
            f"bench: unknown opponent {unknown[0]!r}; expected a list of {', '.join(OPPONENTS)}, "
            "separated by commas"
        )
    peer: Any = subject.peer() if opponents else None
    actor = HybridActor.from_module(peer) if opponents else HybridActor(subject.decoder())
    _endless(actor.decoder)
    workload = WORKLOADS[name](actor.decoder.config.vocab_size, **sizes)
    workload.check(actor.decoder.config)
    makers: dict[str, Callable[[Workload, float], Contestant]] = {
        "fusedrl": lambda w, t: ours(actor, w, t)
    }
    makers |= {o: lambda w, t, o=o: OPPONENTS[o](peer, w, t) for o in opponents}  # type: ignore[misc]

    trial = Workload(
        "trial", workload.prompts[:8], tuple(min(16, n) for n in workload.new_tokens[:8])
    )
    greedy = {who: make(trial, 0.0)() for who, make in makers.items()}
    times = interleaved(
        {who: make(workload, 1.0) for who, make in makers.items()},
        iterations,
        warmup,
        actor.decoder.device,
    )
    found = about(subject, actor.decoder, workload)
    floor, requests, tokens = (
        found["floor"],
        workload.num_sequences,
        workload.input_tokens + workload.output_tokens,
    )
    medians = {who: statistics.median(seconds) for who, seconds in times.items()}
    contestants = {
        who: {
            "elapsed_time": medians[who],
            "elapsed_times": seconds,
            "requests_per_second": requests / medians[who],
            "tokens_per_second": tokens / medians[who],
            "output_tokens_per_second": workload.output_tokens / medians[who],
            "percent_of_roofline": 100 * floor["seconds"] / medians[who],
            "times_ours": medians[who] / medians["fusedrl"],
            "same_greedy_tokens": sum(
                a == b for a, b in zip(greedy[who], greedy["fusedrl"], strict=True)
            )
            / len(greedy[who]),
        }
        for who, seconds in times.items()
    }
    mine = contestants["fusedrl"]
    return {
        "elapsed_time": mine["elapsed_time"],
        "num_requests": requests,
        "total_num_tokens": tokens,
        "requests_per_second": mine["requests_per_second"],
        "tokens_per_second": mine["tokens_per_second"],
        "output_tokens_per_second": mine["output_tokens_per_second"],
        **found,
        "contestants": contestants,
    }


def ours(actor: HybridActor, workload: Workload, temperature: float) -> Contestant:
    """Make fusedrl's contestant; it reuses no prefix of an earlier call."""
    prompts = [list(prompt) for prompt in workload.prompts]
    params = [
        SamplingParams(max_new_tokens=n, temperature=temperature, n=workload.samples)
        for n in workload.new_tokens
    ]

    def generate() -> list[list[int]]:
        actor.mark_updated()
        return [
            completion.token_ids
            for completions in actor.generate(prompts, params)
            for completion in completions
        ]

    return generate


def padded_generate(model: Any, workload: Workload, temperature: float) -> Contestant:
    """Make a contestant of transformers' `generate`. Batches are padded on the left; a batch runs
    to its longest completion, and each completion is then cut to the length asked for."""
    device, rows = model.device, max(1, _AT_ONCE // workload.samples)
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "num_return_sequences": workload.samples,
        }
    batches = []
    for start in range(0, len(workload.prompts), rows):
        prompts, new = (
            workload.prompts[start : start + rows],
            workload.new_tokens[start : start + rows],
        )
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        if not temperature:  # greedily it returns one sequence of each
            ids, mask = (
                ids.repeat_interleave(workload.samples, 0),
                mask.repeat_interleave(workload.samples, 0),
            )
        batches.append((ids, mask, [n for n in new for _ in range(workload.samples)]))

    @torch.no_grad()
    def generate() -> list[list[int]]:
        out: list[list[int]] = []
        for ids, mask, new in batches:
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=max(new), pad_token_id=0, **how
            )
            out += [row[:n] for row, n in zip(made[:, ids.shape[1] :].tolist(), new, strict=True)]
        return out

    return generate


def generate_batch(model: Any, workload: Workload, temperature: float) -> Contestant:
    """Make a contestant of transformers' continuous batching, each request with its own length.

    Its manager and cache are made once and kept, as fusedrl's are. On a CPU the default cache would
    take most of the memory and far more time, so it is reduced to the workload's size. A model has
    one manager: making another contestant ends the previous one.

    Raises:
        SetupError: the installed transformers has no continuous batching.
    """
    try:
        from transformers import ContinuousBatchingConfig, GenerationConfig
    except ImportError as error:
        raise SetupError(
            "bench: this transformers has no continuous batching (generate_batch); upgrade it, or "
            "leave that opponent out"
        ) from error
    # a manager left from before would be used again, with its sizes and sampling settings
    model.destroy_cached_continuous_batching_manager()
    draw: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    how = GenerationConfig(
        max_new_tokens=max(workload.new_tokens), eos_token_id=-1, pad_token_id=0, **draw
    )
    page, requests = (
        32,
        [
            (list(p), n)
            for p, n in zip(workload.prompts, workload.new_tokens, strict=True)
            for _ in range(workload.samples)
        ],
    )
    fits: dict[str, Any] = {
        "page_size": page,
        "num_blocks": sum(-(-(len(p) + n) // page) + 1 for p, n in requests),
        "max_batch_tokens": max(256, 8 * len(requests)),
    }
    sizes = ContinuousBatchingConfig(**(fits if model.device.type == "cpu" else {}))

    def generate() -> list[list[int]]:
        with (
            torch.no_grad(),
            model.continuous_batching_context_manager(
                generation_config=how,
                continuous_batching_config=sizes,
                block=True,
                timeout=5,
                persistent_manager=True,
            ) as manager,
        ):
            asked = [manager.add_request(prompt, max_new_tokens=n) for prompt, n in requests]
            done: dict[str, list[int]] = {}
            while len(done) < len(asked):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    done[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError(
                        f"bench: transformers' continuous batching stopped with {len(done)} of "
                        f"{len(asked)} requests done"
                    )
        return [done[key] for key in asked]

    return generate


OPPONENTS: Mapping[str, Callable[[Any, Workload, float], Contestant]] = {
    "generate": padded_generate,
    "generate_batch": generate_batch,
}


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], iterations: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Time every contestant in each of `iterations` rounds, after `warmup` rounds that do not
    count. Return the seconds of each contestant's rounds."""
    rounds = [
        {who: seconds_of(run, device) for who, run in contestants.items()}
        for _ in range(warmup + iterations)
    ]
    return {who: [each[who] for each in rounds[warmup:]] for who in contestants}


def about(subject: Subject, decoder: Decoder, workload: Workload) -> dict[str, Any]:
    """Describe the model, the workload, its floor and the machine, for every report."""
    config, device, size = decoder.config, decoder.device, decoder.dtype.itemsize
    copied, multiplied = copy_bandwidth(device), gemm_rate(device)
    floor = floor_of(config, workload, size, copied, multiplied)
    return {
        "model": {
            "name": subject.name,
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "device": str(device),
            "parameters": count_weights(config).parameters,
            "kv_bytes_per_token": kv_bytes_per_token(config, decoder.cache_dtype.itemsize),
        },
        "workload": {
            "name": workload.name,
            "num_prompts": len(workload.prompts),
            "n": workload.samples,
            "input_tokens": workload.input_tokens,
            "output_tokens": workload.output_tokens,
        },
        "floor": floor._asdict()
        | {"output_tokens_per_second": workload.output_tokens / floor.seconds},
        "machine": describe_machine(device)
        | {"copy_gb_per_s": copied / 1e9, "gemm_gflop_per_s": multiplied / 1e9},
    }


# ---- latency -------------------------------------------------------------------------------------
def latency(
    subject: Subject,
    *,
    batch_size: int,
    input_len: int,
    output_len: int,
    samples: int = 1,
    iterations: int = 30,
    warmup: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the latency of one batch, and of the same batch with one new token each. The result's
    top-level keys are those of vLLM's `bench latency --output-json`. It also has, for each round,
    the time to the first token (ttft) and the time per later token, (latency - ttft) / (output_len
    - 1).

    Raises:
        ConfigError: a sequence is longer than the model's positions.
    """
    actor = HybridActor(subject.decoder())
    workload = random_workload(
        actor.decoder.config.vocab_size, batch_size, input_len, output_len, samples, seed
    )
    workload.check(actor.decoder.config)
    first = replace(workload, new_tokens=(1,) * batch_size)
    times = interleaved(
        {"first": ours(actor, first, 1.0), "all": ours(actor, workload, 1.0)},
        iterations,
        warmup,
        actor.decoder.device,
    )
    per_token = (
        [
            (whole - start) / (output_len - 1)
            for start, whole in zip(times["first"], times["all"], strict=True)
        ]
        if output_len > 1
        else []
    )
    found = about(subject, actor.decoder, workload)
    ranks = (10, 25, 50, 75, 90, 99)
    return {
        "avg_latency": statistics.fmean(times["all"]),
        "latencies": times["all"],
        "percentiles": _percentiles(times["all"], ranks),
        "time_to_first_token": _percentiles(times["first"], ranks),
        "time_per_output_token": _percentiles(per_token, ranks) if per_token else None,
        **found,
    }


def _percentiles(values: Sequence[float], ranks: Sequence[int]) -> dict[str, float]:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([rank / 100 for rank in ranks], dtype=torch.float64)
    )
    return {str(rank): x for rank, x in zip(ranks, quantiles.tolist(), strict=True)}


# ---- what is printed -----------------------------------------------------------------------------
def print_report(found: Mapping[str, Any]) -> None:
    """Print a result as a table on standard output."""
    from rich.table import Table

    from fusedrl.engine.base.tables import console, show

    model, work, machine, floor = (found[key] for key in ("model", "workload", "machine", "floor"))
    size = (
        f"{model['parameters'] / 1e6:,.1f}M parameters, {model['dtype']} on {model['device']}, "
        f"{model['kv_bytes_per_token']:,} bytes of cache a token"
    )
    asked = (
        f"{work['num_prompts']} prompts x {work['n']} samples ({work['name']}): "
        f"{work['input_tokens']:,} tokens in, {work['output_tokens']:,} out"
    )
    table = Table()
    for column in _columns(found):
        table.add_column(column, justify="right" if table.columns else "left")
    for row in _rows(found):
        table.add_row(*row)
    to = console()
    to.print(f"{model['name']}: {size}\n{asked}")
    show(table, to)
    to.print(
        f"roofline of generation: {floor['seconds']:.4g} s, "
        f"{_number(floor['output_tokens_per_second'])} tokens/s "
        f"({floor['bytes_moved'] / 1e9:,.4g} GB at {machine['copy_gb_per_s']:,.4g} GB/s, "
        f"{floor['flops'] / 1e9:,.4g} GFLOP at {machine['gemm_gflop_per_s']:,.4g} GFLOP/s, step by "
        "step)",
    )
    where = (
        machine["gpu"] or f"{machine['cpu']}, {machine['capability']}, {machine['threads']} threads"
    )
    to.print(
        f"{where}; torch {machine['torch']}; {machine['commit']}; {machine['date']}",
    )


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _columns(found: Mapping[str, Any]) -> tuple[str, ...]:
    if "contestants" in found:
        return (
            "",
            "seconds",
            "requests/s",
            "tokens/s",
            "out tokens/s",
            "of the roofline",
            "times ours",
            "same greedy tokens",
        )
    if "latencies" in found:
        return "milliseconds", "p50", "p99", "of the roofline"
    return (
        "phase",
        "seconds",
        "of the step",
        *(("strict, seconds", "strict / not") if found["strict"] else ()),
    )


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    floor, work = found["floor"], found["workload"]
    if "contestants" in found:
        for who, c in found["contestants"].items():
            yield (
                who,
                f"{c['elapsed_time']:.4g}",
                _number(c["requests_per_second"]),
                _number(c["tokens_per_second"]),
                _number(c["output_tokens_per_second"]),
                f"{c['percent_of_roofline']:.3g}%",
                f"{c['times_ours']:.3g}",
                f"{c['same_greedy_tokens']:.0%}",
            )
    elif "latencies" in found:
        later = work["output_tokens"] / (work["num_prompts"] * work["n"]) - 1
        least = {
            "time_to_first_token": floor["prefill_seconds"],
            "time_per_output_token": floor["decode_seconds"] / later if later else math.nan,
            "percentiles": floor["seconds"],
        }
        for key, label in (
            ("time_to_first_token", "to the first token"),
            ("time_per_output_token", "per token after it"),
            ("percentiles", "the whole batch"),
        ):
            if (p := found[key]) is not None:
                yield (
                    label,
                    f"{1e3 * p['50']:.4g}",
                    f"{1e3 * p['99']:.4g}",
                    f"{100 * least[key] / p['50']:.3g}%",
                )
    else:
        taken, strict = found["seconds"], found["strict"]
        for phase in (*PHASES, "step"):
            beside = (
                (
                    f"{strict['seconds'][phase]:.4g}",
                    f"{strict['seconds'][phase] / taken[phase]:.3g}" if taken[phase] else "",
                )
                if strict
                else ()
            )
            yield phase, f"{taken[phase]:.4g}", f"{taken[phase] / taken['step']:.1%}", *beside
        yield "MFU", f"{found['mfu']:.1%}", "", *(("", "") if strict else ())
        yield "MFU of train", f"{found['train_mfu']:.1%}", "", *(("", "") if strict else ())
        yield "tokens/s", _number(found["tokens_per_second"]), "", *(("", "") if strict else ())
        yield (
            "peak memory, GiB",
            f"{found['peak_memory_gib']:.3g}",
            "",
            *(("", "") if strict else ()),
        )
