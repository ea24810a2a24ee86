"""A critic with a trunk of its own, of any size and family that reads the policy's tokens, and a
linear head.

    V(s_t) = w . h_{t-1} + b         read at the position before token t, as from a head on the
                                     policy's trunk; 0 at the first slot of a sequence

A reward model computes score(x) = w . h_last - shift. A critic that starts from it takes the same
w and b = -shift, so that V(s_t) is at first the score of the tokens before token t (Ouyang et al.,
2022, InstructGPT; Zheng et al., 2023, Secrets of RLHF in Large Language Models, part I).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.directories import resolve_directory
from fusedrl.engine.model.heads import (
    VALUE_HEAD_FILE,
    ValueHead,
    last_values,
    load_reward_model,
    load_value_head,
    save_value_head,
)
from fusedrl.engine.model.weights import (
    HEADS,
    classifier,
    harmless,
    hf_views,
    load_config,
    load_tensors,
    load_tokenizer,
    replacing,
    resolve_device,
    resolve_dtype,
    write_model,
)
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.parallel.lanes import costs_of, deal
from fusedrl.engine.parallel.ranks import ALONE
from fusedrl.engine.policy.control import Control
from fusedrl.engine.policy.metrics import value_metrics
from fusedrl.engine.policy.minibatches import Cuts, cuts_of, updates_of, weighted_by
from fusedrl.engine.policy.objectives import ValueScale
from fusedrl.kernels.policy_loss import ValueStats, value_loss


class SeparateCritic(nn.Module):
    """Decoder without a language model head, with a value head on top."""

    def __init__(self, decoder: Decoder, head: ValueHead) -> None:
        super().__init__()
        self.decoder, self.head = decoder, head
        self.ranks = ALONE  # the ranks that score together

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return [N] float32: the value of the state before each token; 0 at the first slot of a
        sequence. Differentiable."""
        return self._values(batch, self._hidden(batch))

    def _hidden(self, batch: PackedBatch) -> Tensor:
        found: Tensor = self.decoder(
            batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length
        )
        return found

    def _values(self, batch: PackedBatch, hidden_NH: Tensor) -> Tensor:
        return torch.where(batch.positions > 0, batch.to_next(self.head(hidden_NH)), 0.0)

    @torch.no_grad()
    def score(self, batch: PackedBatch, partition: Sequence[Sequence[int]]) -> PackedBatch:
        """Return the batch with the column values, `forward` without gradient, in the micro-batches
        given by `partition`; with the column cut_off also last_values. Training reproduces the same
        bits if it splits the batch the same way."""
        columns = {"values": torch.zeros(batch.num_tokens, device=batch.device)}
        if batch.cut_off is not None:
            columns["last_values"] = torch.zeros(batch.num_sequences, device=batch.device)
        mine = deal(costs_of(batch.lengths, partition), self.ranks.size)[self.ranks.rank]
        for part in (partition[index] for index in mine):
            micro = batch.select(part)
            hidden_NH = self._hidden(micro)
            columns["values"][batch.slots(part)] = self._values(micro, hidden_NH)
            if batch.cut_off is not None:
                columns["last_values"][list(part)] = last_values(self.head, micro, hidden_NH)
        self.ranks.sum("values", *columns.values())
        return batch.with_columns(**columns)

    def save_pretrained(self, directory: str | Path, *, tokenizer: Any = None) -> None:
        """Write config, weights, tokenizer and the value head to a directory. `load_critic` reads
        all of it; transformers reads it as a bare trunk."""
        config = self.decoder.config
        config = replace(
            config,
            raw={
                key: value
                for key, value in config.raw.items()
                if key not in ("id2label", "label2id", "fusedrl_score_shift")
            },
        )
        trunk = config.family.classifier.format(config.family.name).replace(
            "ForSequenceClassification", "Model"
        )
        tensors = {name: view for name, view in hf_views(self.decoder).items() if name not in HEADS}
        with replacing(directory) as temporary:
            write_model(
                temporary, config, tensors, {"architectures": [trunk]}, tokenizer, 5_000_000_000
            )
            save_value_head(self.head, temporary)


class TrunkCritic(nn.Module):
    """Value head on the policy's trunk, for the steps in which only the head is trained and the
    policy stays unchanged."""

    def __init__(self, actor: HybridActor, head: ValueHead) -> None:
        super().__init__()
        self.head = head
        self._actor = actor  # not a module, so its weights are not among this module's parameters

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return [N] float32 values, as `HybridActor.values` does. Differentiable in the head
        only."""
        with torch.no_grad():
            hidden_NH = self._actor.forward(batch)
        return self._actor.values(batch, hidden_NH)


class TrainedCritic(NamedTuple):
    """Critic and its learner. The critic is trained in the first `rollouts` rollouts of the run."""

    model: SeparateCritic | TrunkCritic
    learner: Learner
    rollouts: int


def load_critic(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: torch.device | str | None = None
) -> SeparateCritic:
    """Load a critic from a reward model (a *ForSequenceClassification), a saved critic, or a
    language model. The value head of a language model is the one saved with its weights, or else
    one that outputs 0. Arguments and errors are those of `load_decoder`."""
    directory = resolve_directory(path)
    config = load_config(directory)
    if classifier(config):
        model = load_reward_model(directory, dtype=dtype, device=device)
        head = ValueHead(config.hidden_size, device=model.decoder.device)
        with torch.no_grad():
            head.weight.copy_(model.head.weight)
            head.bias.fill_(-model.shift)
        return SeparateCritic(model.decoder, head)
    # A language model's head is not needed here: the trunk is built as if the embeddings were tied,
    # and `raw` keeps what the file said.
    decoder = Decoder(
        replace(config, tie_embeddings=True),
        dtype=resolve_dtype(dtype, device),
        device=resolve_device(device),
    )
    load_tensors(directory, hf_views(decoder), ignored=harmless(decoder.config))
    saved = (directory / VALUE_HEAD_FILE).is_file()
    head = (
        load_value_head(directory, config.hidden_size, device=decoder.device)
        if saved
        else ValueHead(config.hidden_size, device=decoder.device)
    )
    return SeparateCritic(decoder, head)


def critic_of(config: PolicyConfig, actor: HybridActor) -> TrainedCritic | None:
    """Return the critic that has an optimizer of its own, together with that optimizer; None if
    there is no such critic.

    If `critic.model` names a model, it is a critic with a trunk of its own, in the policy's dtype.
    If `critic.model` is "trunk", it is the value head on the policy's trunk, during the first
    `critic.warmup_steps` rollouts.

    Raises:
        ConfigError: the critic's vocabulary is not the policy's, or it has too few positions. Other
            errors are those of `load_critic`.
    """
    if config.critic is None:
        return None
    if config.own_critic is None:
        if actor.value_head is None or not config.critic.warmup_steps:
            return None
        head = TrunkCritic(actor, actor.value_head)
        return TrainedCritic(
            head,
            Learner(head, config.critic.optim, "critic", actor.ranks, actor.activity),
            config.critic.warmup_steps,
        )
    path = config.model if config.critic.model == "policy" else config.critic.model
    critic = load_critic(path, dtype=actor.decoder.dtype, device=actor.decoder.device)
    ours, theirs = actor.decoder.config, critic.decoder.config
    tokenizer = load_tokenizer(path) if actor.tokenizer is not None else None
    known = tokenizer is not None and tokenizer.get_vocab() == actor.tokenizer.get_vocab()
    if (
        (tokenizer is not None and not known)
        or theirs.vocab_size < ours.vocab_size
        or (theirs.vocab_size != ours.vocab_size and not known)
    ):
        found = f"a vocabulary of {theirs.vocab_size}" + (
            ", and a tokenizer that gives other ids" if tokenizer is not None and not known else ""
        )
        raise ConfigError(
            "config: expected critic.model to read the policy's token ids (a vocabulary of "
            f"{ours.vocab_size}), got {found} in {path}; "
            "start it from a model with the policy's tokenizer, or from critic.model = policy"
        )
    longest = min(
        ours.max_positions,
        (config.max_prompt_length or ours.max_positions) + config.generation.max_new_tokens,
    )
    if theirs.max_positions < longest:
        raise ConfigError(
            f"config: expected critic.model to have the {longest} positions that a prompt and its "
            "completion may take, got "
            f"{theirs.max_positions} in {path}; lower max_prompt_length to "
            f"{theirs.max_positions - config.generation.max_new_tokens} or less"
        )
    critic.decoder.checkpoint_activations = config.checkpoint_activations
    critic.ranks = actor.ranks
    learner = Learner(critic, config.critic.optim, "critic", actor.ranks, actor.activity)
    return TrainedCritic(critic, learner, config.steps)


def update_critic(
    critic: TrainedCritic,
    batch: PackedBatch,
    first_cuts: Cuts,
    config: PolicyConfig,
    control: Control,
    step: int,
) -> dict[str, float]:
    """Train the critic, apart from the policy, on the minibatches that `update` uses. The gradients
    of critic and policy are never in memory at the same time."""
    model, learner, rollouts = critic
    total_updates, done = updates_of(config, step, rollouts)
    stats: list[ValueStats] = []
    norms: list[float] = []
    scale, lanes = ValueScale.of(config, batch, control.unit or 1.0), learner.ranks.lanes
    for epoch in range(config.epochs):
        for minibatch in first_cuts if epoch == 0 else cuts_of(batch, config, step, epoch, lanes):
            weighted = weighted_by(batch, minibatch, config)
            with learner.update(done, total_updates) as one:
                work = one.share(minibatch, costs_of(batch.lengths, minibatch))
                for group in work:
                    micro = weighted.select(group)
                    old, returns, weights = (
                        micro.column(name) for name in ("values", "returns", "weights")
                    )
                    loss, value_stats = value_loss(
                        model(micro), old, returns, weights, clip=scale.clip
                    )
                    work.backward(config.loss.value_coef / scale.error**2 * loss)
                    work.tell(*value_stats)
                stats += [ValueStats(*numbers) for numbers in work.rows()]
            norms.append(one.grad_norm)
            done += 1
    learner.release()
    return (
        value_metrics(stats, len(norms))
        | {"critic/grad_norm": sum(norms) / len(norms)}
        | learner.metrics("critic/learning_rate", "critic/")
    )
