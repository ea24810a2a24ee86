"""What the policy is held near: the model that a run starts from, in one of three places.

frozen       a second copy beside the policy: the weights once more
adapter_off  the policy itself with its LoRA adapter switched off: nothing
host         a second copy in the host's memory, on the GPU while it scores: the weights once more,
             but not while gradients and activations are there
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor, Scored
from fusedrl.engine.base.packing import PackedBatch


class Reference(Protocol):
    """Whatever scores a batch as `HybridActor.score` does, and has hidden states for an exact
    KL."""

    def score(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        tokens_per_microbatch: int | None = None,
        partition: Sequence[Sequence[int]] | None = None,
    ) -> Scored: ...

    def hidden(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """[N, H] of the batch and the head [V, H] that reads it, without gradient."""


class Frozen:
    """A second copy beside the policy."""

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

    def _present(self) -> AbstractContextManager[None]:
        """Within the block the actor is the reference."""
        return nullcontext()


class AdapterOff(Frozen):
    """The policy without its adapter: the base model's bits, from the weights that are there
    anyway."""

    def _present(self) -> AbstractContextManager[None]:
        return self._actor.disable_adapter()


class OnHost(Frozen):
    """A model whose weights wait in the host's memory, page-locked where there is a GPU, and are on
    `device` while it scores."""

    def __init__(self, actor: HybridActor, device: torch.device) -> None:
        super().__init__(actor)
        self._device = device
        pin = device.type == "cuda"
        self._waiting = {
            name: p.detach().pin_memory() if pin else p.detach()
            for name, p in actor.decoder.named_parameters()
        }
        self._back()  # to the page-locked copy; the other goes

    @contextmanager
    def _present(self) -> Iterator[None]:
        try:
            # once a call, however the batch is cut
            self._actor.decoder.to(self._device, non_blocking=True)
            yield
        finally:
            self._back()

    def _back(self) -> None:
        for name, parameter in self._actor.decoder.named_parameters():
            parameter.data = self._waiting[name]  # scoring wrote nothing
        self._actor.decoder.to("cpu")  # copies no parameter; the RoPE tables follow


class NamesReference(Protocol):
    """A configuration that names a reference."""

    @property
    def model(self) -> str: ...
    @property
    def device(self) -> str | None: ...
    @property
    def reference_kind(self) -> str: ...


def load_reference(config: NamesReference, actor: HybridActor) -> Reference:
    """The reference that the configuration names (on a CPU the host's copy is a frozen one);
    `actor`: the policy, with its adapter on it."""
    if config.reference_kind == "adapter_off":
        return AdapterOff(actor)
    device = actor.decoder.device
    host = config.reference_kind == "host" and device.type != "cpu"
    copy = HybridActor.from_pretrained(
        config.model, dtype=actor.decoder.dtype, device="cpu" if host else config.device
    )
    copy.decoder.requires_grad_(False)
    copy.ranks = actor.ranks
    copy.strict = actor.strict  # before the first step its bits are the policy's, and the KL is 0
    return OnHost(copy, device) if host else Frozen(copy)
