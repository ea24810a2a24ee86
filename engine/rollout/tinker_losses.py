"""Tinker's losses, and its data checked and as tensors.

The losses are sums over the tokens of each datum, of q = logprobs, A = advantages and the model's
p at temperature 1, with r = p / q:

    cross_entropy         -w log p
    importance_sampling   -r A
    ppo                   -min(r A, clip(r, low, high) A)
    cispo                 -sg(clip(r, low, high)) A log p
    dro                   -A log p + beta / 2 (log r)^2
    gspo                  ppo's, with r = sg(s) p / sg(p), log s the mean of log r over the tokens
                          that sequence_ratio_mask marks; sg() has no gradient

A token whose weight or advantage is 0 adds 0, whatever its q (dro's penalty excepted).

Source    the pages on losses of Tinker's documentation (tinker 0.38), whose formulas the tests
          repeat in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.model.decoder import Decoder

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def _cross_entropy(logp_N: Tensor, x: Inputs, config: Config) -> Tensor:
    return -torch.where(x["weights"] != 0, logp_N * x["weights"], 0.0).sum()


def _ratio(logp_N: Tensor, x: Inputs) -> Tensor:
    """Return p / q; 1 where the advantage is 0, whose product is then 0 for any q."""
    return torch.where(x["advantages"] != 0, logp_N - x["logprobs"], 0.0).exp()


def _importance_sampling(logp_N: Tensor, x: Inputs, config: Config) -> Tensor:
    return -(_ratio(logp_N, x) * x["advantages"]).sum()


def _clipped(ratio_N: Tensor, x: Inputs, config: Config) -> Tensor:
    within = ratio_N.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio_N * x["advantages"], within * x["advantages"]).sum()


def _ppo(logp_N: Tensor, x: Inputs, config: Config) -> Tensor:
    return _clipped(_ratio(logp_N, x), x, config)


def _cispo(logp_N: Tensor, x: Inputs, config: Config) -> Tensor:
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    weight_N = _ratio(logp_N.detach(), x).clamp(low, high) * x["advantages"]
    return -torch.where(weight_N != 0, weight_N * logp_N, 0.0).sum()


def _dro(logp_N: Tensor, x: Inputs, config: Config) -> Tensor:
    penalty_N = 0.5 * config["beta"] * (logp_N - x["logprobs"]) ** 2
    return -(logp_N * x["advantages"] - penalty_N).sum()


def _gspo(logp_N: Tensor, x: Inputs, config: Config) -> Tensor:
    marked = x["sequence_ratio_mask"] != 0
    mean = (logp_N.detach() - x["logprobs"])[marked].mean()
    return _clipped(torch.exp(mean + logp_N - logp_N.detach()), x, config)


class Loss(NamedTuple):
    """A loss by name: its function of (log-probabilities [N], inputs, configuration), the inputs
    that a datum must have beside target_tokens, and the configuration's keys with their defaults.
    A default of None has to be given."""

    of: Callable[[Tensor, Inputs, Config], Tensor]
    inputs: tuple[str, ...]
    config: Mapping[str, float | None]


_POLICY = ("logprobs", "advantages")
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy, ("weights",), {}),
    "importance_sampling": Loss(_importance_sampling, _POLICY, {}),
    "ppo": Loss(_ppo, _POLICY, _CLIP),
    "cispo": Loss(_cispo, _POLICY, _CLIP),
    "dro": Loss(_dro, _POLICY, {"beta": None}),
    "gspo": Loss(_gspo, (*_POLICY, "sequence_ratio_mask"), dict.fromkeys(_CLIP)),
}


class Example(NamedTuple):
    """A datum, checked: N tokens, the N tokens to predict after each, and inputs [N] float32."""

    tokens: list[int]
    targets: list[int]
    inputs: dict[str, Tensor]


def loss_of(name: str, config: Config | None) -> Callable[[Example, Tensor], Tensor]:
    """Return a loss by its name, as a function of an example and its targets' log-probabilities
    [N].

    Raises:
        ValueError: an unknown name, or a configuration with keys that are unknown or missing.
    """
    if name not in LOSSES:
        raise ValueError(
            f"tinker: expected loss_fn to be one of {', '.join(LOSSES)}, got {name!r}; "
            "forward_backward_custom takes a loss of your own"
        )
    loss = LOSSES[name]
    numbers = {**loss.config, **(config or {})}
    if unknown := sorted(numbers.keys() - loss.config.keys()):
        raise ValueError(
            f"tinker: expected loss_fn_config of {name} to have "
            f"{', '.join(loss.config) or 'nothing'}, got {', '.join(unknown)}"
        )
    if missing := [key for key, value in numbers.items() if value is None]:
        raise ValueError(f"tinker: {name} needs {', '.join(missing)} in loss_fn_config")
    settled = {key: float(value) for key, value in numbers.items() if value is not None}
    return lambda example, logp_N: loss.of(logp_N, example.inputs, settled)


def examples_of(
    data: Sequence[Any], names: Sequence[str] | None, decoder: Decoder
) -> list[Example]:
    """Return data (tinker.Datum's) with these inputs, on the decoder's device; None: with the
    targets alone, whatever else there is.

    Raises:
        ValueError: no datum, one without tokens or with more than the model has positions, other
            inputs than these, or inputs of another shape, with ids that the model does not have or
            with numbers that are not finite.
    """
    if not len(data):
        raise ValueError("tinker: expected at least one datum, got none")
    found = []
    for index, datum in enumerate(data):
        where = f"datum {index}"
        tokens = ids_of(datum.model_input, where, decoder, room=1)
        wanted = ("target_tokens", *(names or ()))
        if names is not None and datum.loss_fn_inputs.keys() != set(wanted):
            raise ValueError(
                f"tinker: {where}: expected the inputs {', '.join(wanted)}, got "
                f"{', '.join(datum.loss_fn_inputs) or 'none'}"
            )
        columns = {
            name: _column(datum.loss_fn_inputs.get(name), len(tokens), f"{where}: {name}")
            for name in wanted
        }
        targets = columns.pop("target_tokens").tolist()
        _check(targets, f"{where}: target_tokens", decoder)
        mask_N = columns.get("sequence_ratio_mask")
        if mask_N is not None and not bool((mask_N != 0).any()):
            raise ValueError(f"tinker: {where}: sequence_ratio_mask marks no token")
        inputs = {name: column.float().to(decoder.device) for name, column in columns.items()}
        found.append(Example(tokens, targets, inputs))
    return found


def _column(given: Any, count: int, where: str) -> Tensor:
    """Return an input [N] as a tensor."""
    column = None if given is None else torch.as_tensor(np.asarray(given.to_numpy()))
    if column is None or column.shape != (count,):
        raise ValueError(
            f"tinker: {where}: expected [{count}], a number for each token of model_input, got "
            f"{'none' if column is None else list(column.shape)}"
        )
    if column.is_floating_point() and not bool(torch.isfinite(column).all()):
        raise ValueError(f"tinker: {where}: expected finite numbers, got NaN or infinity")
    return column


def ids_of(prompt: Any, where: str, decoder: Decoder, room: int = 0) -> list[int]:
    """Return the tokens of a tinker.ModelInput. Raise ValueError if there are none, if they and
    `room` more tokens exceed the model's positions, or for ids that the model does not have."""
    ids: list[int] = prompt.to_ints()
    most = decoder.config.max_positions - room
    if not 1 <= len(ids) <= most:
        raise ValueError(f"tinker: {where}: expected 1 to {most} tokens, got {len(ids)}")
    _check(ids, where, decoder)
    return ids


def _check(ids: Sequence[int], where: str, decoder: Decoder) -> None:
    vocabulary = decoder.config.vocab_size
    if wrong := [token for token in ids if not 0 <= token < vocabulary]:
        raise ValueError(
            f"tinker: {where}: expected token ids in [0, {vocabulary}), got {wrong[0]}"
        )
