"""Heads on a decoder's hidden states: a value per token, a score per sequence.

Both kinds compute in float32, whatever the trunk's dtype, so that values and scores are always
float32.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.model.configuration import ModelConfig
from fusedrl.engine.model.decoder import Decoder, own_precision
from fusedrl.engine.model.directories import resolve_directory
from fusedrl.engine.model.lora import merging
from fusedrl.engine.model.strict import strict_linear
from fusedrl.engine.model.weights import (
    HEADS,
    classifier,
    disk_faults,
    harmless,
    hf_views,
    load_config,
    load_tensors,
    opened,
    replacing,
    resolve_device,
    resolve_dtype,
    write_model,
)
from fusedrl.kernels.linear_logprob import linear_logprob

VALUE_HEAD_FILE = "value_head.safetensors"
_SHIFT_KEY = "fusedrl_score_shift"


class ValueHead(nn.Module):
    """One linear layer on the trunk, with output 0 at first: hidden [N, H] -> values [N] float32.

        V = level + unit (w . h + b)

    The trained part, w . h + b, predicts (return - level) / unit, so that a learning rate has the
    same effect whatever the scale of the rewards. `level` and `unit` [1] (offset and scale of the
    values) are not trained: they are 0 and 1 at first. `raise_by` changes `level`; `count_in`
    changes `unit` and keeps every value (van Hasselt et al., 2016, Learning values across many
    orders of magnitude, "preserving outputs precisely").
    """

    level: Tensor
    unit: Tensor

    def __init__(self, hidden_size: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))
        self.register_buffer("level", torch.zeros(1, device=device))
        self.register_buffer("unit", torch.ones(1, device=device))

    @torch.no_grad()
    def raise_by(self, short: float) -> None:
        """Add `short` to every value."""
        self.level.add_(short)

    @torch.no_grad()
    def count_in(self, unit: float) -> None:
        """Change the scale `unit` and keep the values, up to rounding. Raise ValueError if `unit`
        is not finite and above 0."""
        if not 0 < unit < math.inf:
            raise ValueError(f"ValueHead.count_in: expected a finite unit above 0, got {unit!r}")
        ratio = self.unit / unit
        for p in (self.weight, self.bias):
            p.mul_(ratio)
        self.unit.fill_(unit)

    def restore(self, level: float, unit: float) -> None:
        """Restore the offset and scale that the weights were trained with."""
        self.level.fill_(level)
        self.unit.fill_(unit)

    def forward(self, hidden_NH: Tensor, *, strict: bool = False) -> Tensor:
        """Return the values of hidden states. With `strict`, the bits of a value depend only on its
        row of hidden states and the head; the gradient is the same.

        Raises:
            ValueError: the head was cast, moved or given another shape.
        """
        H, found = (
            hidden_NH.shape[-1],
            [
                (tuple(p.shape), p.dtype, p.device)
                for p in (self.weight, self.bias, self.level, self.unit)
            ],
        )
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        if found != [((1, H), wide, hidden_NH.device), *[((1,), wide, hidden_NH.device)] * 3]:
            names = ("weight", "bias", "level", "unit")
            got = ", ".join(
                f"{name} {list(shape)} in {dtype} on {device}"
                for name, (shape, dtype, device) in zip(names, found, strict=True)
            )
            raise ValueError(
                f"ValueHead: expected weight [1, {H}] and bias [1] in torch.float32 on "
                f"{hidden_NH.device}, as values are whatever the trunk's "
                f"dtype, got {got}; use value_head.to({str(hidden_NH.device)!r}, torch.float32), "
                f"or a new ValueHead({H}), and make its optimizer "
                "afterwards"
            )
        with own_precision(hidden_NH.device):
            return self.level + self.unit * (strict_linear if strict else F.linear)(
                hidden_NH.to(wide), self.weight, self.bias
            ).squeeze(-1)


def last_values(
    head: ValueHead, batch: PackedBatch, hidden_NH: Tensor, *, strict: bool = False
) -> Tensor:
    """Return [B] float32: of sequences that were cut off (column cut_off), the value of the state
    after the last token, read at that token's hidden state, whether it is an action or not; 0 of
    other sequences."""
    cut_B = batch.column("cut_off")
    ends_B = (batch.cu_seqlens[1:].long() - 1).clamp(min=0)
    if not batch.num_tokens:
        return torch.zeros_like(cut_B, dtype=torch.float32)
    return torch.where(cut_B, head(hidden_NH.index_select(0, ends_B), strict=strict), 0.0)


def save_value_head(head: ValueHead, directory: str | Path) -> None:
    """Write the head into the directory of a saved actor, atomically. It is stored as one linear
    layer that gives the values in the rewards' scale."""
    path = Path(directory) / VALUE_HEAD_FILE
    temporary = path.with_name(f".{path.name}.tmp")
    with torch.no_grad(), disk_faults(path):
        try:
            save_file(
                {"weight": head.unit * head.weight, "bias": head.level + head.unit * head.bias},
                temporary,
            )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load_value_head(
    directory: str | Path, hidden_size: int, *, device: torch.device | str | None = None
) -> ValueHead:
    """Read a head that `save_value_head` wrote. Raise FileNotFoundError if there is none, and
    ValueError if its shapes do not fit."""
    path = Path(directory) / VALUE_HEAD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"expected a value head at {path}")
    head = ValueHead(hidden_size, device=device)
    with opened(path) as file, torch.no_grad():
        for name, p in head.named_parameters():
            tensor = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (a safetensors handle is no dict)
            if tensor is None or tensor.shape != p.shape:
                raise ValueError(
                    f"{path}: expected {name} {list(p.shape)}, got "
                    f"{'none' if tensor is None else list(tensor.shape)}"
                )
            p.copy_(tensor)
    return head


class RewardHead(nn.Module):
    """Linear layer without bias, hidden [B, H] -> scores [B] float32; normal(0, 1 / sqrt(H + 1)) at
    first (Stiennon et al., 2020)."""

    def __init__(
        self, hidden_size: int, *, seed: int = 0, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        weight = torch.empty(1, hidden_size).normal_(
            0.0, (hidden_size + 1) ** -0.5, generator=torch.Generator().manual_seed(seed)
        )
        self.weight = nn.Parameter(weight.to(device))

    def forward(self, hidden_BH: Tensor) -> Tensor:
        """Return the scores [B] of hidden states [B, H]."""
        return F.linear(hidden_BH.to(self.weight.dtype), self.weight).squeeze(-1)


class RewardModel(nn.Module):
    """A decoder with a reward head, read at the last token of each sequence.

    `shift` is subtracted from every score, for example so that a reference set scores 0 on average.
    It is saved with the model; transformers reads the same directory, but ignores `shift`.

    With `imitation` the model has a second head, over the vocabulary, which learns to write the
    preferred answers. It starts as the language model's head: that head itself if it is separate,
    or a copy of the embedding if the two are tied, so that training the head does not change the
    embedding. It is trained and checkpointed with the rest, but is not part of a saved reward
    model.
    """

    lm_head: Tensor | None

    def __init__(
        self, decoder: Decoder, head: RewardHead, *, shift: float = 0.0, imitation: bool = False
    ) -> None:
        super().__init__()
        self.decoder, self.head, self.shift = decoder, head, shift
        if imitation and decoder.head is not None:
            decoder.head.requires_grad_()  # an adapter froze it with the rest
        self.register_parameter(
            "lm_head",
            nn.Parameter(decoder.embedding.detach().clone())
            if imitation and decoder.head is None
            else None,
        )
        self.imitates = imitation

    @classmethod
    def from_decoder(
        cls, decoder: Decoder, *, seed: int = 0, imitation: bool = False
    ) -> RewardModel:
        """Create a reward model with a new head on this decoder, which is shared, not copied."""
        return cls(
            decoder,
            RewardHead(decoder.config.hidden_size, seed=seed, device=decoder.device),
            imitation=imitation,
        )

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the scores [B], in float32. Differentiable. Raise ValueError if a sequence is
        empty, since it has no last token."""
        return self.scores(batch, self.hidden(batch))

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Return the hidden states [N, H]. Raise the errors of `forward`."""
        if not all(batch.lengths):
            raise ValueError(
                f"RewardModel: sequence {batch.lengths.index(0)} is empty; a score is read at the "
                "last token, so give it one"
            )
        return self.decoder(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length)

    def scores(self, batch: PackedBatch, hidden_NH: Tensor) -> Tensor:
        """Return the scores [B], in float32, from the batch's hidden states."""
        return self.head(hidden_NH.index_select(0, batch.cu_seqlens[1:].long() - 1)) - self.shift

    def imitation_logp(self, batch: PackedBatch, hidden_NH: Tensor) -> Tensor:
        """Return the sum of the log-probabilities of the batch's actions under the second head, in
        nats. The logits are never stored in full. Raise ValueError if there is no second head."""
        if not self.imitates:
            raise ValueError(
                "RewardModel: expected a second head to imitate with; build the model with "
                "imitation=True"
            )
        weight_VH = self.lm_head if self.lm_head is not None else self.decoder.head_weight
        return cast(
            Tensor,
            linear_logprob(
                hidden_NH, weight_VH, batch.labels(), softcap=self.decoder.config.logit_softcap
            ),
        ).sum()


def check_reward_model(path: str | Path) -> ModelConfig:
    """Return the configuration of a reward model's directory or id. Raise ValueError if it is that
    of a language model. Other errors are those of `load_config`."""
    directory = resolve_directory(path)
    config = load_config(directory)
    if not classifier(config) and any(
        "ForCausalLM" in str(name) for name in config.raw.get("architectures") or ()
    ):
        raise ValueError(
            f"{directory} is a language model ({', '.join(config.raw['architectures'])}), and a "
            "reward model is expected here; train one from "
            "it with fusedrl train reward, or give a function, file.py:function"
        )
    return config


def load_reward_model(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: torch.device | str | None = None
) -> RewardModel:
    """Load a reward model from a `*ForSequenceClassification` directory or id with one label,
    written by this engine or another program. Arguments and errors are those of `load_decoder`."""
    directory = resolve_directory(path)
    config = check_reward_model(directory)
    # A classifier has no language model head: the trunk is built as if it were tied, and `raw`
    # keeps what the file said.
    decoder = Decoder(
        replace(config, tie_embeddings=True),
        dtype=resolve_dtype(dtype, device),
        device=resolve_device(device),
    )
    model = RewardModel.from_decoder(decoder)
    shift = config.raw.get(_SHIFT_KEY, 0.0)
    if not isinstance(shift, (int, float)) or isinstance(shift, bool):
        raise ValueError(
            f"{directory / 'config.json'}: expected a number for {_SHIFT_KEY}, got {shift!r}"
        )
    model.shift = float(shift)
    load_tensors(
        directory,
        hf_views(decoder) | {"score.weight": model.head.weight.detach()},
        ignored=harmless(decoder.config),
    )
    return model


def save_reward_model(
    model: RewardModel,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that `AutoModelForSequenceClassification.from_pretrained` loads; otherwise
    like `save_pretrained`. To score batches, transformers needs a pad_token_id in the
    configuration; if there is none, the tokenizer's is written."""
    config = model.decoder.config
    changes: dict[str, Any] = {
        "architectures": [config.family.classifier.format(config.family.name)],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        _SHIFT_KEY: model.shift,
    }
    if config.pad_token_id is None and getattr(tokenizer, "pad_token_id", None) is not None:
        changes["pad_token_id"] = tokenizer.pad_token_id
    tensors = {name: view for name, view in hf_views(model.decoder).items() if name not in HEADS}
    with replacing(directory) as temporary:
        write_model(
            temporary,
            config,
            tensors | {"score.weight": model.head.weight.detach()},
            changes,
            tokenizer,
            max_shard_bytes,
            merging(model.decoder),
        )
