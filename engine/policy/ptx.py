"""PPO-ptx: pretraining and policy optimisation in the same optimizer step.

    L = policy loss + coef * mean over the learned tokens of a draw of -log p(token)

Every optimizer step draws `sequences_per_step` texts. The draw depends only on the seed and the
number of the optimizer step, so a resumed run goes on with the texts that come next. The two
gradients are added before the norm is taken and before the optimizer moves anything: it makes one
step on the sum. (Two optimizer steps, one for each part, are another method.) Log-probabilities
have temperature 1, whatever the temperature of the rollouts.

Source    Ouyang et al. (2022), Training language models to follow instructions with human feedback,
          eq. 2, with its coefficient 27.8.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import PolicyConfig, PtxConfig
from fusedrl.engine.data.mixture import Mixture, mix
from fusedrl.engine.data.readers import ReadOptions, Source, load_demonstrations
from fusedrl.engine.data.tokenize import count_tokens, encode_demonstrations, end_of_text
from fusedrl.engine.optim.learner import Update
from fusedrl.engine.parallel.lanes import costs_of
from fusedrl.engine.runs.run import Run
from fusedrl.kernels.runtime.faults import raise_faults

Tokens = tuple[list[int], list[bool]]  # token ids, and whether each of them is learned


class Ptx:
    """Pretraining part of a policy's loss.

    Args:
        texts: texts to draw from.
        seed: seed of the draws.
        tokens_per_microbatch: tokens of one forward and backward pass; changes no gradient.
    """

    def __init__(
        self, config: PtxConfig, texts: Mixture[Tokens], *, seed: int, tokens_per_microbatch: int
    ) -> None:
        self.config, self.texts = config, texts
        self._seed, self._tokens = seed, tokens_per_microbatch
        self._seen: list[Tensor] = []

    def backward(self, actor: HybridActor, index: int, update: Update | None = None) -> Tensor:
        """Add the gradient of the pretraining loss for the run's optimizer step `index` (counted
        from 0) to the existing gradients.
        Return the pretraining part of the loss, 0-d.

        Args:
            update: divides the work among the ranks; None: this rank does all of it.
        """
        batch, scale = self._drawn(actor, index)
        lanes = 1 if update is None else update.lanes
        groups = batch.split(self._tokens, lanes=lanes)
        if update is None:
            loss = torch.zeros((), device=batch.device)
            for group in groups:
                part = self._part(actor, batch.select(group), scale)
                part.backward()
                loss += part.detach()
        else:
            work = update.share(groups, costs_of(batch.lengths, groups))
            for group in work:
                work.backward(self._part(actor, batch.select(group), scale))
            total = work.loss()
            loss = torch.zeros((), device=batch.device) if total is None else total
        self._seen.append(loss / self.config.coef)
        return loss

    @torch.no_grad()
    def loss(self, actor: HybridActor, index: int) -> Tensor:
        """Return the pretraining part of the loss, 0-d, that `backward` differentiates, computed
        with the current weights."""
        batch, scale = self._drawn(actor, index)
        total = torch.zeros((), device=batch.device)
        for group in batch.split(self._tokens):
            total += self._part(actor, batch.select(group), scale)
        return total

    def metrics(self) -> dict[str, float]:
        """Return `loss/ptx`: the mean cross-entropy of all `backward` calls since the last call of
        this method. It is in nats per token, without the coefficient."""
        if not self._seen:
            return {}
        raise_faults(self._seen[0].device)
        mean, self._seen = torch.stack(self._seen).double().mean().item(), []
        return {"loss/ptx": mean}

    def _drawn(self, actor: HybridActor, index: int) -> tuple[PackedBatch, float]:
        """Return the texts of an optimizer step, and the weight of each of their learned tokens."""
        count = self.config.sequences_per_step
        batch = PackedBatch.from_masked(
            self.texts.draw(self._seed, index * count, (index + 1) * count),
            device=actor.decoder.device,
        )
        return batch, self.config.coef / max(1, int(batch.action_mask.sum()))

    @staticmethod
    def _part(actor: HybridActor, micro: PackedBatch, scale: float) -> Tensor:
        """Return the loss of a micro-batch. `scale` has the whole draw's number of tokens as
        denominator."""
        return actor.cross_entropy(micro, actor.forward(micro), scale)


def load_ptx(config: PolicyConfig, actor: HybridActor, run: Run) -> Ptx | None:
    """Build the pretraining part that a configuration asks for, with its texts read and tokenised.
    Return None if there is none, or if its coefficient is 0.

    Raises:
        DataError, OSError: the texts cannot be read; the message says why.
    """
    ptx, most = config.ptx, actor.decoder.config.max_positions
    if ptx is None or ptx.coef == 0:
        return None
    limit, learn_prompts = min(most, ptx.max_length or most), ptx.learn_prompts

    def read(source: Source) -> list[Tokens]:
        examples = load_demonstrations(
            source,
            skip_bad_lines=config.skip_bad_lines,
            rejects=run.rejects(),
            options=ReadOptions(count_tokens=partial(count_tokens, actor.tokenizer)),
        )
        pairs, dropped = encode_demonstrations(
            actor.tokenizer,
            examples,
            end_of_text(actor.tokenizer, actor.decoder.config.eos_token_ids),
            limit,
        )
        run.message(f"pretraining texts: {dropped}")
        return [
            (
                prompt + completion,
                [False] + [learn_prompts] * (len(prompt) - 1) + [True] * len(completion),
            )
            for prompt, completion in pairs
        ]

    return Ptx(
        ptx,
        mix(ptx.data, read),
        seed=config.run.seed,
        tokens_per_microbatch=config.tokens_per_microbatch,
    )
