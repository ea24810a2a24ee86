"""The reference model that a KL holds the policy near: the model that a run starts from, or another
one, such as a teacher. It is kept in one of three places, each with its cost in GPU memory.

frozen       a second copy next to the policy: costs the weights once more
adapter_off  the policy itself with its LoRA adapter switched off: costs nothing
host         a second copy in the host's memory, on the GPU while it scores: costs the weights once
             more, but not while gradients and activations are there
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor, Scored
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch


class Reference(Protocol):
    """Object that scores a batch as `HybridActor.score` does, and gives hidden states for an exact
    KL."""

    def score(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        tokens_per_microbatch: int | None = None,
        partition: Sequence[Sequence[int]] | None = None,
    ) -> Scored: ...

    def hidden(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the hidden states [N, H] of the batch and the head [V, H] that reads them, without
        gradient."""

    @property
    def capped(self) -> bool: ...


class Frozen:
    """Second copy of the initial model, next to the policy."""

    def __init__(self, actor: HybridActor) -> None:
        self._actor = actor

    def score(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        tokens_per_microbatch: int | None = None,
        partition: Sequence[Sequence[int]] | None = None,
    ) -> Scored:
        """Score a batch as `HybridActor.score` does."""
        with self._present():
            return self._actor.score(batch, temperature, tokens_per_microbatch, partition)

    @torch.no_grad()
    def hidden(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return hidden states as `Reference.hidden` does."""
        with self._present():
            return self._actor.forward(batch), self._actor.decoder.head_weight.detach()

    @property
    def capped(self) -> bool:
        """Whether the model caps its logits, which an exact KL does not follow."""
        return bool(self._actor.decoder.config.logit_softcap)

    def _present(self) -> AbstractContextManager[None]:
        """Return a context in which the actor has the reference's weights."""
        return nullcontext()


class AdapterOff(Frozen):
    """The policy without its adapter. It gives the base model's bits and needs no weights of its
    own."""

    def _present(self) -> AbstractContextManager[None]:
        return self._actor.disable_adapter()


class OnHost(Frozen):
    """Model whose weights wait in the host's memory and are on `device` only while it scores. Where
    there is a GPU, the host's memory is page-locked."""

    def __init__(self, actor: HybridActor, device: torch.device) -> None:
        super().__init__(actor)
        self._device = device
        pin = device.type == "cuda"
        self._waiting = {
            name: p.detach().pin_memory() if pin else p.detach()
            for name, p in actor.decoder.named_parameters()
        }
        self._back()  # use the page-locked copy, so that the original memory is freed

    @contextmanager
    def _present(self) -> Iterator[None]:
        try:
            # moved once per call, whatever the number of micro-batches
            self._actor.decoder.to(self._device, non_blocking=True)
            yield
        finally:
            self._back()

    def _back(self) -> None:
        for name, parameter in self._actor.decoder.named_parameters():
            parameter.data = self._waiting[name]  # still up to date, since scoring writes nothing
        self._actor.decoder.to("cpu")  # copies no parameter; the RoPE tables follow


class NamesReference(Protocol):
    """Configuration that names a reference."""

    @property
    def model(self) -> str: ...
    @property
    def reference_model(self) -> str | None: ...
    @property
    def device(self) -> str | None: ...
    @property
    def reference_kind(self) -> str: ...


def _check_vocabulary(name: str, reference: HybridActor, actor: HybridActor) -> None:
    ours, theirs = (
        {} if model.tokenizer is None else model.tokenizer.get_vocab()
        for model in (actor, reference)
    )
    sizes = [model.decoder.config.vocab_size for model in (actor, reference)]
    if not ours and not theirs and sizes[0] == sizes[1]:
        return
    if not ours or not theirs or ours != theirs:
        differing = [token for token in ours if ours[token] != theirs.get(token)]
        example = f", such as {differing[0]!r}" if differing else ""
        raise ConfigError(
            f"config: expected the tokenizer of reference_model {name} to have the policy's "
            f"vocabulary ({len(ours)} tokens), so that both speak of the same tokens; it has "
            f"{len(theirs)}, and {len(differing)} of the policy's are not the same there{example}. "
            "Take two models of one family"
        )


def load_reference(config: NamesReference, actor: HybridActor) -> Reference:
    """Load the reference that the configuration names. On a CPU, reference_kind "host" gives a
    frozen copy. `actor` is the policy, with its adapter. Raise ConfigError if the reference is
    another model, whose tokenizer has another vocabulary."""
    if config.reference_kind == "adapter_off":
        return AdapterOff(actor)
    device = actor.decoder.device
    host = config.reference_kind == "host" and device.type != "cpu"
    copy = HybridActor.from_pretrained(
        config.reference_model or config.model,
        dtype=actor.decoder.dtype,
        device="cpu" if host else config.device,
    )
    if config.reference_model is not None:
        _check_vocabulary(config.reference_model, copy, actor)
    copy.decoder.requires_grad_(False)
    copy.ranks, copy.activity = actor.ranks, actor.activity
    copy.strict = actor.strict  # before the first step its bits are the policy's, and the KL is 0
    return OnHost(copy, device) if host else Frozen(copy)
