"""HybridActor: one copy of the weights, and everything that reads it: generation, scoring, the
training forward, the value head.

One file: generating and scoring read the same weights by the same rules.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.packing import IGNORE, PackedBatch
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.generation.arena import Arena
from fusedrl.engine.generation.cache import CacheConfig, resolve_num_blocks
from fusedrl.engine.generation.divided import divided
from fusedrl.engine.generation.generator import Finished, Generator
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.decoder import Decoder, own_precision
from fusedrl.engine.model.directories import resolve_directory
from fusedrl.engine.model.heads import VALUE_HEAD_FILE, ValueHead, load_value_head, save_value_head
from fusedrl.engine.model.lora import add_adapter
from fusedrl.engine.model.lora_files import load_adapter, save_adapter
from fusedrl.engine.model.sharing import share
from fusedrl.engine.model.strict import strict_fault, strict_hidden, strict_logprob
from fusedrl.engine.model.watch import Watch
from fusedrl.engine.model.weights import load_decoder, load_tokenizer, save_pretrained
from fusedrl.engine.parallel.lanes import costs_of, deal
from fusedrl.engine.parallel.ranks import ALONE
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from fusedrl.kernels.objective import PolicyObjective

_LIKELIHOOD = PolicyObjective(kind="reinforce")  # of advantages that are 1


class Scored(NamedTuple):
    """Result of scoring a batch by the training forward, per token slot; 0 where no action is
    (values: at the first slot of a sequence)."""

    logp: Tensor  # [N] float32
    entropy: Tensor  # [N] float32
    # [N] float32, read at the position before the token; None without a value head
    values: Tensor | None


class HybridActor:
    """A decoder that trains and generates from one copy of its weights.

    Whatever changes them changes them for both: an optimizer's step, in-place operations,
    `load_state_dict`, a cast, a parameter or a layer replaced. It is noticed by itself wherever
    weights are read, by a stream under way too, and `weights_version` goes up. What cannot be
    followed (a sharded, pruned or parametrised decoder, one without memory) raises a RuntimeError
    that says what to do. `model.watch` says what is found of writes that nobody counts.

    Threads may generate at once, and compute training forwards while others generate. A
    `torch.optim` optimizer's step waits for the sampler's, and the sampler's for it; let no other
    write to the weights run beside them.

    The KV cache is allocated by the first `generate`, and given back by `release_cache`. Setting
    `decoder.checkpoint_activations` trades time for the memory of the training forward.

    Attributes:
        ranks: that hold the same weights and call `generate` and `score` with the same arguments:
            the work is divided among them, and each has the whole result. By default this process
            alone.

    Args:
        decoder: the weights.
        tokenizer: a transformers tokenizer, or None where prompts are token ids.
        value_head: on the same trunk, or None.
        cache: size of the KV cache and of the steps over it.
        strict: what the training forward says of a token is bitwise what the sampler said, whatever
            the batch, at the cost of one more forward in training; in float32 and bfloat16, with
            the C++ kernels on a CPU and Triton on a GPU.
    Raises:
        ValueError: the tokenizer has ids that the model does not know, or `strict` where it cannot
            be kept.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any = None,
        *,
        value_head: ValueHead | None = None,
        cache: CacheConfig | None = None,
        strict: bool = False,
    ) -> None:
        if strict and (fault := strict_fault(decoder)) is not None:
            raise ValueError(
                "HybridActor: strict=True needs kernels whose sums have one order, in C++ on a CPU "
                "or Triton on a GPU, for a float32 or bfloat16 "
                f"model; for {decoder.dtype} on {decoder.device}: {fault}; use strict=False, and "
                "watch sampling/logp_diff_max"
            )
        if tokenizer is not None and len(tokenizer) > decoder.config.vocab_size:
            raise ValueError(
                f"HybridActor: the tokenizer has {len(tokenizer)} tokens and the model's "
                f"vocabulary {decoder.config.vocab_size}: ids from "
                f"{decoder.config.vocab_size} on have no embedding; use the tokenizer that belongs "
                "to the model"
            )
        self._decoder, self.tokenizer, self.value_head, self.strict = (
            decoder,
            tokenizer,
            value_head,
            strict,
        )
        self._watch = Watch(decoder)
        self._cache = cache or CacheConfig()
        self.ranks = ALONE
        self._generator: Generator | None = None
        self._making = threading.Lock()  # of a generator
        self._lent = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str | torch.dtype = "auto",
        device: torch.device | str | None = None,
        value_head: bool = False,
        cache: CacheConfig | None = None,
        strict: bool = False,
    ) -> HybridActor:
        """Load a directory or Hugging Face id: decoder, tokenizer, and with `value_head` the value
        head saved there, or one that says 0.

        Args:
            dtype: "auto" is float32 on CPU and bfloat16 on CUDA.
            device: None is the best there is (CUDA, else the CPU).
        Raises:
            As `load_decoder`; ValueError where tokenizer and model vocabulary differ.
        """
        directory = resolve_directory(path)
        decoder = load_decoder(directory, dtype=dtype, device=device)
        head = None
        if value_head:
            saved = (directory / VALUE_HEAD_FILE).is_file()
            head = (
                load_value_head(directory, decoder.config.hidden_size, device=decoder.device)
                if saved
                else ValueHead(decoder.config.hidden_size, device=decoder.device)
            )
        return cls(decoder, load_tokenizer(directory), value_head=head, cache=cache, strict=strict)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        tokenizer: Any = None,
        *,
        value_head: bool = False,
        cache: CacheConfig | None = None,
        strict: bool = False,
    ) -> HybridActor:
        """An actor on the storage of a transformers model that someone else trains.

        The weights are copied once, into fused storage, and the model's own parameters then lie in
        it: its optimizer's steps are the actor's, with nothing to synchronise, and are noticed as
        an actor's own.

        Args:
            module: of a family in `families.FAMILIES`, parameters of one dtype on one device. It is
                not wrapped and keeps working.
            tokenizer: a transformers tokenizer, or None where prompts are token ids.
            value_head: a fresh one, which says 0.
        Raises:
            TypeError, ValueError: a model that does not fit (`sharing.share`). Later, wherever the
                weights are read, RuntimeError: the model was cast, moved or otherwise re-allocated,
                and no longer shares them.
        """
        decoder = share(module)
        head = ValueHead(decoder.config.hidden_size, device=decoder.device) if value_head else None
        actor = cls(decoder, tokenizer, value_head=head, cache=cache, strict=strict)
        actor._watch = Watch(decoder, module)
        return actor

    @property
    def decoder(self) -> Decoder:
        """The weights. Their values may change in any way; another decoder needs an actor of its
        own."""
        return self._decoder

    @property
    def weights_version(self) -> int:
        """Number of changes of the weights, as far as they were noticed or told."""
        return self._watch.version

    @weights_version.setter
    def weights_version(self, version: int) -> None:
        """Set the version that the weights count as from now on: those of a checkpoint go on from
        its number."""
        self._watch.look()
        self._watch.version = version

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "HybridActor: an actor cannot be copied or pickled, since the copy's weights would be "
            "none that an "
            "optimizer trains; write it with save_pretrained and load that, or build "
            "HybridActor(copy.deepcopy(actor.decoder), actor.tokenizer) on weights of its own"
        )

    # ---- generating ------------------------------------------------------------------------------
    def generate(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        request_ids: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Complete prompts.

        Args:
            prompts: strings (tokenised with the tokenizer's special tokens), token-id lists,
                message lists (through the chat template), or completions to continue: aborted ones,
                or such as `extend` returns. Under the same request id and the same weights one goes
                on as if it had never stopped; max_new_tokens counts what this call adds.
            params: one for all prompts, or one per prompt; None: the defaults of `SamplingParams`.
            request_ids: one integer per prompt, by default its index. A draw depends on (seed,
                request id, sample index, position) and the logits alone.
        Returns:
            Per prompt the list of its n completions.
        Raises:
            TypeError, ValueError: before anything is generated: a prompt without tokens, ids
                outside the vocabulary, more tokens than the model has positions or than the cache
                can ever hold (with the two numbers), numbers of prompts and params that differ.
        """
        if self.ranks.size > 1:
            return divided(self.ranks, self._generate, prompts, params, request_ids)
        return self._generate(prompts, params, request_ids)

    def _generate(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        request_ids: Sequence[int] | None,
    ) -> list[list[Completion]]:
        found = sorted(
            self._run(prompts, params, request_ids, to_caller=False),
            key=lambda finished: finished[:2],
        )
        outs: list[list[Completion]] = [[] for _ in range(len(prompts))]
        for finished in found:
            outs[finished.prompt].append(finished.completion)
        return outs

    def stream(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        request_ids: Sequence[int] | None = None,
    ) -> Iterator[Finished]:
        """`generate`, one completion at a time as it finishes: Finished(prompt, sample,
        completion), the first two counting from 0.

        Closing the iterator takes what is unfinished out; `abort` has it delivered as it is.
        Weights may change meanwhile:
        what starts afterwards is computed with the new ones alone; what is under way goes on with
        them over its older keys and values, each token with its version. The adapter is on or off
        for the whole call, as it was when it was made.
        """
        return self._run(prompts, params, request_ids, to_caller=True)

    def _run(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        request_ids: Sequence[int] | None,
        to_caller: bool,
    ) -> Iterator[Finished]:
        return self._generation().run(
            prompts, params if params is not None else SamplingParams(), request_ids, to_caller
        )

    def extend(self, completion: Completion, token_ids: Sequence[int]) -> Completion:
        """Append observation tokens (a tool's answer, the user's next turn) to a completion; they
        are not actions. `generate` continues it as a prompt, and finds the keys and values of all
        its full blocks in the cache, as long as the weights have not changed and nothing else
        needed the memory."""
        return completion.extend(token_ids, self.weights_version)

    def abort(self) -> None:
        """End every completion in flight with the tokens it has and finish_reason "aborted"; the
        streams deliver them."""
        if self._generator is not None:
            self._generator.abort()

    def limit_cache(self, sequences: int, tokens: int) -> None:
        """Make the KV cache no larger than so many sequences of so many tokens each need, where
        that is all that will be generated. More sequences wait for one another; a longer one is
        refused. It holds for the next cache that is allocated: call it before the first
        `generate`."""
        c, weights = self._cache, self.decoder.weights()
        needed = min(sequences, c.max_sequences) * -(-tokens // c.block_size)
        granted = resolve_num_blocks(
            c, weights, self.decoder.config.max_positions, self.decoder.cache_dtype
        )
        self._cache = replace(
            c, num_blocks=min(needed, granted), memory_bytes=None, memory_fraction=None
        )

    def release_cache(self) -> None:
        """Give the KV cache's memory back; the next `generate` allocates it again. Completions in
        flight are aborted."""
        self.abort()
        self._generator = None

    @contextlib.contextmanager
    def lend_cache(self, *others: nn.Module) -> Iterator[Arena | None]:
        """Lend the KV cache's memory, within the block, to what training forwards keep for their
        backward passes, the actor's and those of `others` that are trained there; both belong
        inside. Yields the arena.

        The cache stays allocated where it is, its contents are forgotten, and nothing is generated
        meanwhile. Gradients are the same bits. What does not fit stays where it would have been.
        Without a cache there is nothing to lend: None.

        Raises:
            RuntimeError: completions are in flight; `generate` inside; or a graph made inside
                outlives the block, which then keeps the memory.
        """
        if (generator := self._generator) is None or self._lent:
            yield None
            return
        arena, self._lent = (
            Arena(
                generator.vacate(),
                keep=[*self.parameters(), *(p for other in others for p in other.parameters())],
            ),
            True,
        )
        try:
            with arena.holding():
                yield arena
        except BaseException:
            self._end_loan(generator, arena)  # the traceback may hold a graph
            raise
        if arena.used:
            gc.collect()
        if held := self._end_loan(generator, arena):
            raise RuntimeError(
                f"HybridActor.lend_cache: {held} bytes of the cache still belong to a graph that "
                "was made inside the block; call backward "
                "inside it, or drop what the graph ends in"
            )

    def _end_loan(self, generator: Generator, arena: Arena) -> int:
        """The cache is the sampler's again, unless so many bytes are still in use: then the next
        one allocates its own."""
        self._lent = False
        if held := arena.used:
            self._generator = None
        else:
            generator.take_back()
        return held

    def _generation(self) -> Generator:
        if self._lent:
            raise RuntimeError(
                "HybridActor.generate: the KV cache is lent to training; leave the lend_cache() "
                "block first"
            )
        self._watch.look()
        with self._making:
            generator = self._generator
            held = (
                None
                if generator is None
                else (generator.cache.k.device, generator.cache.k.dtype, generator.value_head)
            )
            if generator is None or held != (
                self.decoder.device,
                self.decoder.cache_dtype,
                self.value_head,
            ):
                generator = Generator(
                    self.decoder,
                    self.tokenizer,
                    self._cache,
                    watch=self._watch,
                    strict=self.strict,
                    value_head=self.value_head,
                )
            self._generator = generator
        return generator

    # ---- the training forward --------------------------------------------------------------------
    def forward(self, batch: PackedBatch) -> Tensor:
        """[N, H] hidden states of the training forward, with gradient; `logprobs` and `values` read
        them."""
        self._watch.look()
        arguments = (batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length)
        return (
            strict_hidden(self.decoder, *arguments, self._cache.block_size)
            if self.strict
            else self.decoder(*arguments)
        )

    def logprobs(
        self, batch: PackedBatch, hidden_NH: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(logp, entropy), both [N] float32, of the batch's actions given the tokens before them; 0
        elsewhere. Differentiable. Where the batch says what tokens were drawn from (`kept`), of the
        distribution over that.

        Training and `score` both come through here, so the same cut of a batch gives the same bits.
        At temperature 0: of T = 1, as `generate` reports it.
        """
        self._watch.look(lightly=True)
        head_VH, labels_N, T, softcap = (
            self.decoder.head_weight,
            batch.labels(),
            temperature or 1.0,
            self.decoder.config.logit_softcap,
        )
        kept = batch.kept_of_labels()
        with own_precision(head_VH.device):
            if self.strict:
                logp_N, entropy_N = strict_logprob(
                    hidden_NH, head_VH, labels_N, T, softcap, kept=kept
                )
            else:
                logp_N, entropy_N = linear_logprob(
                    hidden_NH,
                    head_VH,
                    labels_N,
                    temperature=T,
                    softcap=softcap,
                    entropy=True,
                    kept=kept,
                )
        mask_N = batch.action_mask
        return torch.where(mask_N, batch.to_next(logp_N), 0.0), torch.where(
            mask_N, batch.to_next(entropy_N), 0.0
        )

    def policy_loss(
        self,
        batch: PackedBatch,
        hidden_NH: Tensor,
        weights_N: Tensor,
        advantages_N: Tensor,
        *,
        old_logp: Tensor | None = None,
        ref_logp: Tensor | None = None,
        rollout_logp: Tensor | None = None,
        temperature: float = 1.0,
        **terms: Any,
    ) -> LinearPolicyLoss:
        """The loss of the batch's actions given the tokens before them in one pass over the head,
        whose gradient is formed while the logits are there.

        Args:
            weights_N, advantages_N, old_logp, ref_logp, rollout_logp: [N] float32, each action's at
                its own slot. `terms`: those of `linear_policy_loss`.
        Returns:
            (loss, stats, logp, entropy); the last two [N] float32, constants, of the actions with a
            weight and 0 elsewhere: the bits of `logprobs` where every action has one.
        Raises:
            ValueError: in strict mode, whose products are the sampler's, and of a batch with
                `kept`; use `logprobs` and the losses on it.
        """
        if batch.kept is not None:
            raise ValueError(
                "HybridActor.policy_loss: its head is over the whole vocabulary, and the batch was "
                "drawn from parts of it; use logprobs, and policy_loss on what it returns"
            )
        if self.strict:
            raise ValueError(
                "HybridActor.policy_loss: a strict actor computes the head as its sampler does; "
                "use logprobs, and policy_loss on what it returns"
            )
        self._watch.look(lightly=True)
        head_VH, labels_N, T, softcap = (
            self.decoder.head_weight,
            batch.labels(),
            temperature or 1.0,
            self.decoder.config.logit_softcap,
        )
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        old, ref, rolled = (
            None if x is None else batch.to_previous(x).to(wide)
            for x in (old_logp, ref_logp, rollout_logp)
        )
        advantages_N, weights_N = (batch.to_previous(x).to(wide) for x in (advantages_N, weights_N))
        with own_precision(head_VH.device):
            found = linear_policy_loss(
                hidden_NH,
                head_VH,
                labels_N,
                old,
                advantages_N,
                torch.where(labels_N == IGNORE, 0, weights_N),
                ref_logp=ref,
                rollout_logp=rolled,
                cu_seqlens=batch.cu_seqlens,
                temperature=T,
                softcap=softcap,
                **terms,
            )
        logp_N, entropy_N = (
            torch.where(batch.action_mask, batch.to_next(x), 0.0)
            for x in (found.logp, found.entropy)
        )
        return found._replace(logp=logp_N, entropy=entropy_N)

    def cross_entropy(self, batch: PackedBatch, hidden_NH: Tensor, scale: float) -> Tensor:
        """0-d: `scale` times the sum over the batch's actions of -log p, in nats.
        Differentiable."""
        if self.strict or batch.kept is not None:
            return -scale * self.logprobs(batch, hidden_NH)[0].sum()
        weights_N = (
            batch.action_mask.to(torch.promote_types(hidden_NH.dtype, torch.float32)) * scale
        )
        return self.policy_loss(
            batch, hidden_NH, weights_N, torch.ones_like(weights_N), objective=_LIKELIHOOD
        ).loss

    def values(self, batch: PackedBatch, hidden_NH: Tensor) -> Tensor:
        """[N] float32: the value of the state before each token; 0 at the first slot of a sequence.
        Differentiable.

        Raises:
            ValueError: the actor has no value head.
        """
        if self.value_head is None:
            raise ValueError(
                "HybridActor.values: this actor has no value head; load it with value_head=True"
            )
        self._watch.look(lightly=True)
        return torch.where(
            batch.positions > 0, batch.to_next(self.value_head(hidden_NH, strict=self.strict)), 0.0
        )

    @torch.no_grad()
    def score(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        tokens_per_microbatch: int | None = None,
        partition: Sequence[Sequence[int]] | None = None,
    ) -> Scored:
        """The training forward's log-probabilities, entropies and values of a batch, without
        gradient.

        Args:
            temperature: divides the logits, as in sampling.
            tokens_per_microbatch: cut the batch by `batch.split`; None: one micro-batch.
            partition: the sequence indices of each micro-batch instead. The same cuts in training
                reproduce these bits.
        Raises:
            ValueError: both given, or a partition that is none of the batch's sequences.
        """
        if partition is not None and tokens_per_microbatch is not None:
            raise ValueError(
                "HybridActor.score: tokens_per_microbatch and partition each cut the batch; give "
                "one of them"
            )
        if partition is None:
            partition = batch.split(tokens_per_microbatch or max(1, batch.num_tokens))
        if sorted(b for part in partition for b in part) != list(range(batch.num_sequences)):
            raise ValueError(
                f"HybridActor.score: expected a partition of the batch's {batch.num_sequences} "
                "sequences, "
                f"got {[list(part) for part in partition]}"
            )
        columns = [
            torch.zeros(batch.num_tokens, dtype=torch.float32, device=batch.device)
            for _ in range(2 if self.value_head is None else 3)
        ]
        mine = deal(costs_of(batch.lengths, partition), self.ranks.size)[self.ranks.rank]
        for part in (partition[index] for index in mine):
            if not len(part):
                continue
            micro = batch.select(part)
            hidden_NH = self.forward(micro)
            scored = [
                *self.logprobs(micro, hidden_NH, temperature),
                *([] if self.value_head is None else [self.values(micro, hidden_NH)]),
            ]
            slots = batch.slots(part)
            for column, x_N in zip(columns, scored, strict=True):
                column[slots] = x_N
        self.ranks.sum("scores", *columns)
        return Scored(columns[0], columns[1], columns[2] if self.value_head is not None else None)

    # ---- the weights -----------------------------------------------------------------------------
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the decoder, then of the value head."""
        yield from self.decoder.named_parameters(prefix="decoder")
        if self.value_head is not None:
            yield from self.value_head.named_parameters(prefix="value_head")

    def parameters(self) -> Iterator[nn.Parameter]:
        """The decoder's parameters, then the value head's; an optimizer trains those that require a
        gradient."""
        return (parameter for _, parameter in self.named_parameters())

    def mark_updated(self) -> None:
        """Tell that the weights changed: a new version, for which no cached prefix is valid.

        Changes are noticed without it, too. It is needed for writes that `model.watch` does not
        find, and where every optimizer step shall have a version of its own.
        """
        self._watch.mark()

    # ---- an adapter ------------------------------------------------------------------------------
    def add_adapter(self, lora: LoRAConfig, *, seed: int = 0) -> None:
        """Freeze the decoder and train LoRA adapters in its place, which change nothing at first.
        Make the optimizer afterwards.

        Raises:
            ConfigError: a target that the family does not have.
            ValueError: there is an adapter already.
        """
        add_adapter(self.decoder, lora, seed=seed)
        self.mark_updated()

    def load_adapter(self, directory: str | Path) -> None:
        """Put the LoRA adapter of a PEFT directory, ours or PEFT's own, on the decoder; it can be
        trained on. Errors as `lora_files.load_adapter`."""
        load_adapter(self.decoder, directory)
        self.mark_updated()

    def save_adapter(self, directory: str | Path, *, base_model: str | None = None) -> None:
        """Write the adapter as PEFT reads it; `base_model`: the directory or id to name in it.
        Raises ValueError without an adapter."""
        save_adapter(self.decoder, directory, base_model=base_model)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """A context in which the actor is its base model, bitwise, for scoring and for the calls of
        `generate` and `stream` that are made in it; nothing without an adapter. It is of the thread
        that enters it, as `no_grad` is."""
        return self.decoder.disable_adapter()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that transformers loads, with the tokenizer, and the value head beside
        it; an adapter is merged into the weights."""
        self._watch.look("all")
        save_pretrained(self.decoder, directory, tokenizer=self.tokenizer)
        if self.value_head is not None:
            save_value_head(self.value_head, directory)
