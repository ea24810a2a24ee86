"""HybridActor: one copy of the weights for generation, scoring, the training forward and the value
head.

One file: generating and scoring follow the same rules for reading the weights.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fusedrl.engine.base.activity import Activity
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.packing import IGNORE, PackedBatch
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.generation.arena import Arena
from fusedrl.engine.generation.cache import CacheConfig, block_bytes, resolve_num_blocks
from fusedrl.engine.generation.calls import OpenCall
from fusedrl.engine.generation.divided import divided
from fusedrl.engine.generation.drafts import Drafts
from fusedrl.engine.generation.generator import Drawing, Finished, Generator
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.decoder import Decoder, own_precision
from fusedrl.engine.model.directories import resolve_directory
from fusedrl.engine.model.heads import (
    VALUE_HEAD_FILE,
    ValueHead,
    last_values,
    load_value_head,
    save_value_head,
)
from fusedrl.engine.model.lora import add_adapter
from fusedrl.engine.model.lora_files import load_adapter, save_adapter
from fusedrl.engine.model.peft_adapters import inner_model
from fusedrl.engine.model.sharing import share
from fusedrl.engine.model.strict import strict_fault, strict_hidden, strict_logprob
from fusedrl.engine.model.watch import Watch
from fusedrl.engine.model.weights import load_decoder, load_tokenizer, save_pretrained
from fusedrl.engine.parallel.lanes import costs_of, deal
from fusedrl.engine.parallel.ranks import ALONE
from fusedrl.kernels.linear_head import largest_workspace
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.linear_policy_loss import (
    LinearPolicyLoss,
    computes_in_scratch,
    linear_policy_loss,
)
from fusedrl.kernels.objective import PolicyObjective

_LIKELIHOOD = PolicyObjective(kind="reinforce")  # used with all advantages 1


class Scored(NamedTuple):
    """Results of scoring a batch with the training forward, one number per token slot. Slots
    without an action hold 0 (`values`: the first slot of each sequence holds 0)."""

    logp: Tensor  # [N] float32
    entropy: Tensor  # [N] float32
    # [N] float32, read at the position before the token; None without a value head
    values: Tensor | None


class HybridActor:
    """A decoder that trains and generates from one copy of its weights.

    Any change of the weights reaches both: an optimizer step, an in-place operation,
    `load_state_dict`, a cast, a replaced parameter or layer. The actor notices a change whenever it
    reads the weights, also in the middle of a stream, and increases `weights_version`. Changes that
    it cannot track (a sharded, pruned or parametrised decoder, one without memory) raise a
    RuntimeError that tells you what to do. `model.watch` lists which writes are found when nothing
    counts them.

    Several threads may generate at once, and compute training forwards while others generate. A
    step of a `torch.optim` optimizer and a decoding step of the sampler wait for each other. Let
    nothing else write to the weights while another thread reads them.

    The first `generate` allocates the KV cache; `release_cache` frees it. Setting
    `decoder.checkpoint_activations` makes the training forward slower and saves memory.

    Attributes:
        ranks: processes that hold the same weights and call `generate` and `score` with the same
            arguments. They share the work, and each gets the whole result. By default only this
            process.
        activity: what is being generated or scored right now, for whoever shows it.

    Args:
        decoder: the model, which holds the weights.
        tokenizer: a transformers tokenizer, or None if prompts are token ids.
        value_head: a value head that reads this decoder's hidden states, or None.
        cache: sizes of the KV cache and of the decoding steps that use it.
        strict: make the training forward's log-probabilities bitwise equal to the sampler's,
            whatever else is in the batch. It costs one more forward in training, and works in
            float32 and bfloat16, with the C++ kernels on a CPU and Triton on a GPU.
    Raises:
        ValueError: the tokenizer has ids that the model does not have, or `strict` is not possible
            for this model on this device.
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
                "watch sampling/sampling_logp_difference/max"
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
        self.activity = Activity()
        self._generator: Generator | None = None
        self._making = threading.Lock()  # held while a generator is created
        self._lent: Arena | None = None  # while the cache's memory is lent

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
        """Load the decoder and tokenizer from a directory or Hugging Face id. If `value_head` is
        set, also load the value head saved there, or create one that outputs 0 if none was saved.

        Args:
            dtype: "auto" is float32 on CPU and bfloat16 on CUDA.
            device: None chooses CUDA if there is a GPU, else the CPU.
        Raises:
            As `load_decoder`; ValueError if the tokenizer has more tokens than the model's
                vocabulary.
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
        """Create an actor that shares its weights with a transformers model that other code trains.

        The weights are copied once, into fused storage. Afterwards the model's own parameters are
        views of that storage, so that a step of the model's optimizer changes the actor as well.
        Nothing has to be synchronised, and the actor notices such steps like its own.

        Args:
            module: a model of a family in `families.FAMILIES`, with all parameters of one dtype and
                on one device. It is not wrapped and keeps working. It may be a PEFT model with one
                active LoRA adapter: A and B are shared as well, and where PEFT disables or merges
                the adapter, the actor follows.
            tokenizer: a transformers tokenizer, or None if prompts are token ids.
            value_head: add a new value head, which outputs 0 at first.
        Raises:
            TypeError, ValueError: the model cannot be shared (see `sharing.share`). RuntimeError,
                later, when the weights are read: the model was cast, moved or otherwise
                re-allocated, and no longer shares its weights with the actor.
        """
        module = inner_model(module)
        decoder = share(module)
        head = ValueHead(decoder.config.hidden_size, device=decoder.device) if value_head else None
        actor = cls(decoder, tokenizer, value_head=head, cache=cache, strict=strict)
        actor._watch = Watch(decoder, module)
        return actor

    @property
    def decoder(self) -> Decoder:
        """Decoder of this actor. Its values may change in any way; a different decoder needs a new
        actor."""
        return self._decoder

    @property
    def weights_version(self) -> int:
        """Number of changes of the weights that were noticed, or reported by `mark_updated`."""
        return self._watch.version

    @weights_version.setter
    def weights_version(self, version: int) -> None:
        """Set the version of the present weights, for example to the number stored in a checkpoint.
        Later changes count on from there."""
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
        finished: Callable[[Finished], None] | None = None,
        drafts: Drafts | None = None,
    ) -> list[list[Completion]]:
        """Generate completions of prompts.

        Args:
            prompts: strings (tokenised with the tokenizer's special tokens), token-id lists,
                message lists (rendered by the chat template), or completions to continue: aborted
                ones, or those that `extend` returns. A completion under the same request id and the
                same weights continues as if it had never stopped. max_new_tokens limits the tokens
                that this call adds.
            params: one SamplingParams for all prompts, or one per prompt; None uses its defaults.
            request_ids: one integer per prompt, by default the prompt's index. Each random draw
                depends only on (seed, request id, sample index, position) and the logits.
            finished: called with each completion as soon as it finishes; of several ranks each
                calls it with its own. It must not change the weights.
            drafts: guess next tokens from the texts in it, and add what is drawn (drafts.keep()
                lets later calls draw on that). This changes no bit of a completion, and saves time
                where few sequences are left and the guesses are good. Without effect on a GPU, and
                on a CPU without the C++ kernels.
        Returns:
            One list per prompt, with the prompt's n completions.
        Raises:
            TypeError, ValueError: raised before anything is generated. A prompt has no tokens, or
                ids outside the vocabulary, or more tokens than the model has positions or the cache
                can hold (the message gives both numbers); or the numbers of prompts and params
                differ.
        """
        generate = partial(self._generate, drafts=drafts)
        if self.ranks.size > 1:
            outs = divided(self.ranks, generate, prompts, params, request_ids, finished)
        else:
            outs = generate(prompts, params, request_ids, finished)
        if drafts is not None:
            drafts.end(outs, self.ranks.gather("drafts", drafts.of_call))
        return outs

    def _generate(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        request_ids: Sequence[int] | None,
        finished: Callable[[Finished], None] | None,
        drafts: Drafts | None = None,
    ) -> list[list[Completion]]:
        found = []
        for one in self._run(prompts, params, request_ids, to_caller=False, drafts=drafts):
            found.append(one)
            if finished is not None:
                finished(one)
        outs: list[list[Completion]] = [[] for _ in range(len(prompts))]
        for one in sorted(found, key=lambda one: one[:2]):
            outs[one.prompt].append(one.completion)
        return outs

    def stream(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        request_ids: Sequence[int] | None = None,
    ) -> Iterator[Finished]:
        """Generate as `generate` does, and yield each completion as soon as it finishes. Items are
        Finished(prompt, sample, completion); the first two are indices from 0.

        Closing the iterator discards unfinished completions; `abort` delivers them as they are. The
        weights may change during the call. Completions that start after a change use the new
        weights alone. Completions in progress continue with the new weights, but keep the keys and
        values computed by the older ones; each token records the version that drew it. If there is
        an adapter, it stays on or off for the whole call, as it was when `stream` was called.
        """
        return self._run(prompts, params, request_ids, to_caller=True)

    def follow(
        self, prompt: Any, params: SamplingParams | None = None, request_id: int = 0
    ) -> Iterator[Drawing]:
        """Complete one prompt, and yield tokens as they are drawn, for someone who reads along.
        Items are Drawing(token_ids, completion): what a step has added, and with the last of them
        the completion, None before. `generation.pieces` makes texts of them.

        The completion is that of `generate` with the same arguments, one sample. Closing the
        iterator discards it. Other calls that run meanwhile are slower: each step hands its tokens
        out.

        Raises:
            TypeError, ValueError: as `generate`; `params.n` is not 1.
        """
        params = params if params is not None else SamplingParams()
        if params.n != 1:
            raise ValueError(f"HybridActor.follow: expected n = 1, got {params.n}")
        return self._generation().follow(prompt, params, request_id)

    def open_call(self) -> OpenCall:
        """Open a call to which prompts are added while others are generated, on this rank alone;
        close it at the end. Trajectories of several turns are generated by one. The weights must
        not change while it is open."""
        return OpenCall(self._generation())

    def _run(
        self,
        prompts: Sequence[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
        request_ids: Sequence[int] | None,
        to_caller: bool,
        drafts: Drafts | None = None,
    ) -> Iterator[Finished]:
        params = params if params is not None else SamplingParams()
        return self._generation().run(prompts, params, request_ids, to_caller, drafts)

    def extend(self, completion: Completion, token_ids: Sequence[int]) -> Completion:
        """Append observation tokens (a tool's answer, the user's next turn) to a completion; they
        are not actions. `generate` accepts the result as a prompt. It reuses the cached keys and
        values of all full blocks, unless the weights have changed or the memory was needed for
        something else."""
        return completion.extend(token_ids, self.weights_version)

    def abort(self) -> None:
        """End every completion in progress. Each keeps the tokens it has, gets finish_reason
        "aborted", and is delivered by its stream."""
        if self._generator is not None:
            self._generator.abort()

    def limit_cache(self, sequences: int, tokens: int) -> None:
        """Limit the KV cache to what `sequences` sequences of `tokens` tokens each need, if nothing
        larger will be generated. With more sequences, some wait for others to finish; a longer
        sequence is refused. The limit applies when a cache is next allocated: call this before the
        first `generate`."""
        c, weights = self._cache, self.decoder.weights()
        needed = min(sequences, c.max_sequences) * -(-tokens // c.block_size)
        granted = resolve_num_blocks(
            c, weights, self.decoder.config.max_positions, self.decoder.cache_dtype
        )
        self._cache = replace(
            c, num_blocks=min(needed, granted), memory_bytes=None, memory_fraction=None
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, which the first `generate` allocates. Errors are those of
        `resolve_num_blocks`."""
        c, decoder = self._cache, self.decoder
        weights, dtype = decoder.weights(), decoder.cache_dtype
        blocks = resolve_num_blocks(c, weights, decoder.config.max_positions, dtype)
        return (blocks + 1) * block_bytes(weights, c.block_size, dtype)

    def release_cache(self) -> None:
        """Free the KV cache's memory; the next `generate` allocates it again. Completions in
        progress are aborted."""
        self.abort()
        self._generator = None

    @contextlib.contextmanager
    def lend_cache(self, *others: nn.Module) -> Iterator[Arena | None]:
        """Lend the KV cache's memory, within the block, to the training forward of the actor and of
        `others`, which store there what their backward passes need. Run both the forward and the
        backward pass inside the block. Yield the arena that manages the memory.

        The cache stays allocated, but its contents are lost, and nothing can be generated inside
        the block. Gradients are the same bits. Tensors that do not fit are stored where they would
        have been without the loan. If there is no cache, yield None.

        Raises:
            RuntimeError: completions are in progress, `generate` is called inside the block, or an
                autograd graph made inside outlives the block (it then keeps the memory).
        """
        if (generator := self._generator) is None or self._lent is not None:
            yield None
            return
        arena = self._lent = Arena(
            generator.vacate(),
            keep=[*self.parameters(), *(p for other in others for p in other.parameters())],
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
        """Give the cache back to the sampler. Return the number of its bytes that are still in use;
        if there are any, the sampler allocates a new cache next time."""
        self._lent = None
        if held := arena.used:
            self._generator = None
        else:
            generator.take_back()
        return held

    def _generation(self) -> Generator:
        if self._lent is not None:
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
                    activity=self.activity,
                )
            self._generator = generator
        return generator

    # ---- the training forward --------------------------------------------------------------------
    def forward(self, batch: PackedBatch) -> Tensor:
        """Return the hidden states [N, H] of the training forward, with gradient. Pass them to
        `logprobs` and `values`."""
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
        """Return (logp, entropy), both [N] float32, of the batch's actions given the tokens before
        them; 0 at other slots. Differentiable. If the batch has a `kept` column (the tokens that
        top-k, top-p or min-p left), the distribution is over these tokens alone.

        Training and `score` both use this method, so the same split into micro-batches gives the
        same bits. At temperature 0 the results are those of temperature 1, as `generate` reports
        them.
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
        """Compute the loss of the batch's actions given the tokens before them, in one pass over
        the head. The gradient is computed in the same pass, while the logits exist.

        Args:
            weights_N, advantages_N, old_logp, ref_logp, rollout_logp: [N] float32, with the number
                of each action at the action's slot. `terms`: see `linear_policy_loss`.
        Returns:
            (loss, stats, logp, entropy). The last two are [N] float32 without gradient: those of
                the actions that have a weight, and 0 elsewhere. If every action has a weight, they
                are the bits of `logprobs`.
        Raises:
            ValueError: the actor is strict (its matrix products are the sampler's), or the batch
                has `kept`. Use `logprobs` and a loss of its results instead.
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
        scratch = None
        if self._lent is not None and computes_in_scratch(head_VH.device):
            scratch = self._lent.spare(
                largest_workspace(len(labels_N), len(head_VH), head_VH.element_size())
            )
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
                scratch=scratch,
                **terms,
            )
        logp_N, entropy_N = (
            torch.where(batch.action_mask, batch.to_next(x), 0.0)
            for x in (found.logp, found.entropy)
        )
        return found._replace(logp=logp_N, entropy=entropy_N)

    def cross_entropy(self, batch: PackedBatch, hidden_NH: Tensor, scale: float) -> Tensor:
        """Return `scale` times the sum, as a 0-d tensor, over the batch's actions of -log p, in
        nats. Differentiable."""
        if self.strict or batch.kept is not None:
            return -scale * self.logprobs(batch, hidden_NH)[0].sum()
        weights_N = (
            batch.action_mask.to(torch.promote_types(hidden_NH.dtype, torch.float32)) * scale
        )
        return self.policy_loss(
            batch, hidden_NH, weights_N, torch.ones_like(weights_N), objective=_LIKELIHOOD
        ).loss

    def values(self, batch: PackedBatch, hidden_NH: Tensor) -> Tensor:
        """Return [N] float32, the value of the state before each token; 0 at the first slot of a
        sequence. Differentiable.

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
        """Return the training forward's log-probabilities, entropies and values of a batch, without
        gradient.

        Args:
            temperature: divides the logits, as in sampling.
            tokens_per_microbatch: split the batch by `batch.split`; None makes one micro-batch.
            partition: the sequence indices of each micro-batch, instead of tokens_per_microbatch.
                The same partition in training reproduces these bits.
        Raises:
            ValueError: both are given, or `partition` does not contain each sequence of the batch
                once.
        """
        return self.score_with_ends(batch, temperature, tokens_per_microbatch, partition)[0]

    @torch.no_grad()
    def score_with_ends(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        tokens_per_microbatch: int | None = None,
        partition: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Scored, Tensor | None]:
        """Return what `score` returns, and of a batch with the column cut_off what
        `heads.last_values` returns; None without that column or without a value head."""
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
        open_ended = None if batch.cut_off is None else self.value_head
        if open_ended is not None:
            columns.append(torch.zeros(batch.num_sequences, device=batch.device))
        mine = deal(costs_of(batch.lengths, partition), self.ranks.size)[self.ranks.rank]
        self.activity.begin("scoring", "micro-batches", len(mine))
        for part in (partition[index] for index in mine):
            self.activity.done += 1
            if not len(part):
                continue
            micro = batch.select(part)
            hidden_NH = self.forward(micro)
            scored = [
                *self.logprobs(micro, hidden_NH, temperature),
                *([] if self.value_head is None else [self.values(micro, hidden_NH)]),
            ]
            slots = batch.slots(part)
            for column, x_N in zip(columns, scored, strict=False):
                column[slots] = x_N
            if open_ended is not None:
                after_B = last_values(open_ended, micro, hidden_NH, strict=self.strict)
                columns[3][list(part)] = after_B
        self.ranks.sum("scores", *columns)
        values = None if self.value_head is None else columns[2]
        ends = None if open_ended is None else columns[3]
        return Scored(columns[0], columns[1], values), ends

    # ---- the weights -----------------------------------------------------------------------------
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and parameters of the decoder, then those of the value head."""
        yield from self.decoder.named_parameters(prefix="decoder")
        if self.value_head is not None:
            yield from self.value_head.named_parameters(prefix="value_head")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the decoder's parameters, then the value head's. Pass an optimizer those that
        require a gradient."""
        return (parameter for _, parameter in self.named_parameters())

    def mark_updated(self) -> None:
        """Report that the weights changed. The version increases, and cached prefixes become
        invalid.

        Most changes are noticed without this call. Call it after writes that `model.watch` does not
        find, or to give every optimizer step its own version.
        """
        self._watch.mark()

    # ---- an adapter ------------------------------------------------------------------------------
    def add_adapter(self, lora: LoRAConfig, *, seed: int = 0) -> None:
        """Freeze the decoder and add LoRA adapters, which are trained instead and change no output
        at first. Create the optimizer afterwards.

        Raises:
            ConfigError: the model family does not have one of the targets.
            ValueError: the decoder already has an adapter.
        """
        add_adapter(self.decoder, lora, seed=seed)
        self.mark_updated()

    def load_adapter(self, directory: str | Path) -> None:
        """Load a LoRA adapter from a directory that `save_adapter` or PEFT wrote. It can be trained
        further. Raise the errors of `lora_files.load_adapter`."""
        load_adapter(self.decoder, directory)
        self.mark_updated()

    def save_adapter(self, directory: str | Path, *, base_model: str | None = None) -> None:
        """Write the adapter in PEFT's format. `base_model`: directory or id of the base model, to
        be named in the files. Raise ValueError if there is no adapter."""
        save_adapter(self.decoder, directory, base_model=base_model)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Switch the adapter off within a `with` block: the actor is then bitwise its base model.
        This applies to scoring and to calls of `generate` and `stream` made in the block. Without
        an adapter, do nothing. Only the thread that enters the block is affected, as with
        `no_grad`."""
        return self.decoder.disable_adapter()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that transformers can load, with the tokenizer and the value head if
        there are any. An adapter is merged into the weights."""
        self._watch.look("all")
        save_pretrained(self.decoder, directory, tokenizer=self.tokenizer)
        if self.value_head is not None:
            save_value_head(self.value_head, directory)
