"""TRL trainers with completions from a HybridActor that shares the trained model's weights: nothing
is copied, synchronised or re-tokenised.

    trainer = GRPOTrainer(model=model, processing_class=tokenizer, rollout_func=rollout_func(), ...)

The actor is made at the first rollout. By then the trainer has moved and wrapped the model: to a
GPU, and under torchrun or `accelerate launch`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import nn

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.peft_adapters import inner_model, shared_views

# bits of a request id: groups of a step and process, and processes; the step has the 30 above
_GROUPS, _RANKS = 20, 12


def rollout_func(
    actor: HybridActor | Callable[[nn.Module, Any], HybridActor] = HybridActor.from_module,
    params: SamplingParams | None = None,
) -> Rollouts:
    """Make the function that TRL's `GRPOTrainer(rollout_func=...)` calls: f(prompts, trainer) ->
    {"prompt_ids", "completion_ids", "logprobs"}, one completion a prompt.

    TRL repeats a prompt once for each of its completions; equal neighbours are prefilled only once.
    `logprobs` are those of the temperature-scaled distribution. No random draw is used twice: a
    draw is numbered by the trainer's step, by the process, and by whether the trainer evaluates. So
    a resumed run draws what the uninterrupted run would have drawn.

    Args:
        actor: function that makes an actor from the trainer's unwrapped model and its tokenizer,
            such as functools.partial(HybridActor.from_module, cache=...). It is called at the first
            rollout, and again if the trainer has moved the weights since. It may also be an actor
            that was made from the trainer's model, if the trainer has not moved, cast or wrapped
            that model since.
        params: sampling options (n is ignored); None: as the trainer's arguments say
            (max_completion_length, temperature, top_p, top_k, min_p, seed).
    Raises:
        TypeError, ValueError: at the first rollout, a model that is sharded (FSDP, ZeRO-3) or that
            `HybridActor.from_module` does not accept, or trainer arguments that this function does
            not support.
        RuntimeError: at a rollout, an actor whose weights are not those that the trainer trains.
    """
    return Rollouts(actor, params)


class Rollouts:
    """Function that `rollout_func` returns. `actor` is the actor that generates; it is None until
    the first rollout makes it."""

    def __init__(
        self,
        actor: HybridActor | Callable[[nn.Module, Any], HybridActor],
        params: SamplingParams | None,
    ) -> None:
        self.actor: HybridActor | None = actor if isinstance(actor, HybridActor) else None
        self._make = None if isinstance(actor, HybridActor) else actor
        self._params = params
        self._step = -1
        self._groups = [0, 0]  # numbered so far at this step, in training and in evaluation

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        draw = self._params if self._params is not None else _as_the_trainer(trainer.args)
        actor = self.actor = self._actor(trainer)
        groups = [(prompt, len(list(equal))) for prompt, equal in groupby(prompts)]
        outs = actor.generate(
            _encoded([prompt for prompt, _ in groups], trainer),
            [replace(draw, n=n) for _, n in groups],
            request_ids=self._request_ids(len(groups), trainer),
        )
        completions = [completion for samples in outs for completion in samples]
        return {
            "prompt_ids": [c.prompt_ids for c in completions],
            "completion_ids": [c.token_ids for c in completions],
            "logprobs": [c.logprobs for c in completions],
        }

    def _actor(self, trainer: Any) -> HybridActor:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        _refuse_shards(model)
        if self.actor is not None and _lies_in(model, self.actor.decoder):
            return self.actor
        if self._make is None:
            raise RuntimeError(
                "rollout_func: the actor does not generate from the weights that the trainer "
                "trains: the model was moved, cast or "
                "wrapped after the actor was made, or is another one. Leave the actor out: "
                "rollout_func() makes one at the first "
                "rollout, from the model as it then lies"
            )
        self.actor = None  # its cache goes before the next one comes
        return self._make(model, trainer.processing_class)

    def _request_ids(self, count: int, trainer: Any) -> list[int]:
        """Return numbers that no other process, step or evaluation uses."""
        step, evaluating, rank = (
            trainer.state.global_step,
            not trainer.model.training,
            trainer.accelerator.process_index,
        )
        if step != self._step:
            self._step, self._groups = step, [0, 0]
        start = self._groups[evaluating]
        self._groups[evaluating] += count
        if start + count > 1 << _GROUPS or rank >= 1 << _RANKS:
            raise ValueError(
                f"rollout_func: expected at most {1 << _GROUPS} groups of equal prompts a step on "
                f"each of at most {1 << _RANKS} processes, got "
                f"{start + count} on process {rank}"
            )
        return [
            (((2 * step + evaluating) << _GROUPS) + group << _RANKS) + rank
            for group in range(start, start + count)
        ]


def _refuse_shards(model: nn.Module) -> None:
    """Raise ValueError if each process holds a part of the model alone: FSDP2 makes its parameters
    DTensors, FSDP1 flat ones, and DeepSpeed's ZeRO-3 empty ones."""
    for name, p in model.named_parameters():
        by = (
            "FSDP2"
            if hasattr(p, "placements")
            else "FSDP1"
            if "_flat_param" in name
            else "DeepSpeed's ZeRO-3"
            if hasattr(p, "ds_id")
            else None
        )
        if by is not None:
            raise ValueError(
                f"rollout_func: {by} has sharded the model, and completions are drawn from whole "
                "weights in each process. Train it whole on each device: an accelerate config "
                "without fsdp (DDP), or DeepSpeed's ZeRO-2. Where the optimizer's state does not "
                "fit then, `fusedrl train grpo --devices N` divides it"
            )


def _lies_in(model: nn.Module, decoder: Decoder) -> bool:
    found = dict(inner_model(model).named_parameters())
    return all(
        name in found
        and (found[name].data_ptr(), found[name].device, found[name].dtype)
        == (view.data_ptr(), view.device, view.dtype)
        for name, view in shared_views(decoder).items()
    )


def _encoded(prompts: list[Any], trainer: Any) -> list[Any]:
    """Encode messages as token ids with the trainer's chat template, its keywords and tools. Return
    texts unchanged."""
    if not prompts or isinstance(prompts[0], str):
        return prompts
    encoded = trainer.processing_class.apply_chat_template(
        prompts,
        tools=trainer.tools or None,
        chat_template=trainer.chat_template,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )
    return list(encoded["input_ids"])


def _as_the_trainer(arguments: Any) -> SamplingParams:
    if arguments.repetition_penalty != 1.0 or arguments.generation_kwargs:
        raise ValueError(
            "rollout_func: expected repetition_penalty 1.0 and no generation_kwargs, which "
            "completions drawn here do not follow, got "
            f"{arguments.repetition_penalty} and {arguments.generation_kwargs}; give rollout_func "
            "the params to draw with"
        )
    return SamplingParams(
        max_new_tokens=arguments.max_completion_length,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k or 0,
        min_p=arguments.min_p or 0.0,
        seed=arguments.seed,
    )
