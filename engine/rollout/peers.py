"""What rollouts inside other engines share: weights that arrive from another process, sampling
options under vLLM's names, and numbers of requests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.weights import file_shape, harmless, hf_views

# of vLLM's options: those that mean the same here, and those that change nothing here
_SAME = {
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "stop_token_ids": "stop_token_ids",
    "min_tokens": "min_new_tokens",
}
_WITHOUT_EFFECT = {
    "logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "detokenize",
}
_LENGTHS = ("max_tokens", "max_new_tokens", "max_generate_length")


class ReceivedWeights:
    """Weights of an actor that another process trains: they arrive as Hugging Face's names and
    tensors, in any number of parts, and are copied over the actor's own.

    Attributes:
        bytes: bytes copied since this object was made.
        whole: whether the last update arrived completely. The actor must not generate before it
            has.
    """

    def __init__(self, actor: HybridActor) -> None:
        self._actor = actor
        self.bytes, self.whole = 0, True
        self._missing: set[str] | None = None

    def restart(self) -> None:
        """Forget the parts of an update that was never ended."""
        self._missing = None

    @torch.no_grad()
    def take(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy in a part of an update. Tensors may be of another dtype and on another device.

        Raises:
            ValueError: a name that the model does not have, or a shape that is not the model's.
        """
        decoder = self._actor.decoder
        views, ignored = hf_views(decoder), harmless(decoder.config)
        self.whole = False
        if self._missing is None:
            self._missing = set(views)
        for name, tensor in named:
            if name not in views and ignored(name):
                continue
            if name not in views or list(tensor.shape) != file_shape(views[name]):
                expected = file_shape(views[name]) if name in views else "no such tensor"
                raise ValueError(
                    f"weights from the trainer: {name} {list(tensor.shape)}, and this model has "
                    f"{expected}; both must be the same model, without an adapter beside it"
                )
            views[name].copy_(tensor.view(views[name].shape))
            self.bytes += tensor.nbytes
            self._missing.discard(name)

    def end(self) -> None:
        """End an update.

        Raises:
            ValueError: tensors are missing; the message names some.
        """
        missing, self._missing = self._missing or set(), None
        if missing:
            raise ValueError(
                f"weights from the trainer: {len(missing)} tensors are missing, such as "
                f"{', '.join(sorted(missing)[:3])}; an update must have the whole model"
            )
        self.whole = True
        self._actor.mark_updated()

    def require(self) -> None:
        """Raise RuntimeError if an update is not complete."""
        if not self.whole:
            raise RuntimeError(
                "weights from the trainer: the last update did not arrive completely, so the "
                "weights are of two versions; send them again"
            )


def sampling_of(options: Mapping[str, Any], most: int) -> SamplingParams:
    """Return sampling options that are given under vLLM's names. The log-probabilities are then
    those of what is drawn from, as with vLLM's processed_logprobs.

    Args:
        most: largest number of tokens; max_tokens may lower it.
    Raises:
        ValueError: an option that changes the draw in another way than SamplingParams can.
    """
    given = {key: value for key, value in options.items() if value is not None}
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1}
    lengths = [int(given.pop(key)) for key in _LENGTHS if key in given]
    stop, top_k = given.pop("stop", None) or (), max(0, int(given.pop("top_k", 0)))
    unknown = {
        key: value
        for key, value in given.items()
        if key not in _SAME and key not in _WITHOUT_EFFECT and neutral.get(key) != value
    }
    if unknown:
        raise ValueError(
            f"sampling options: {unknown} cannot be followed; expected temperature, top_p, top_k, "
            "min_p, seed, stop, stop_token_ids, min_tokens and max_tokens, and no penalties"
        )
    params = SamplingParams(
        max_new_tokens=min([most, *lengths]),
        top_k=top_k,
        stop=stop,
        **{ours: given[theirs] for theirs, ours in _SAME.items() if theirs in given},
    )
    if not params.truncates:
        return params
    return SamplingParams(**{**vars(params), "return_kept": True})


def request_number(*names: object) -> int:
    """Return a request id for these names: equal for equal names, else different in 2^-63 of all
    cases."""
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
