"""Tinker's calls over a HybridActor: a loop that was written for Tinker's training and sampling
clients runs on this machine, from one copy of the weights.

    client = TinkerClient(HybridActor.from_pretrained("MODEL"), "runs/mine")
    out = client.sample(prompt, 4, tinker.SamplingParams(max_tokens=64)).result()
    client.forward_backward(data, "importance_sampling")
    client.optim_step(tinker.AdamParams(learning_rate=1e-5)).result()

Calls return at once and run in the order in which they were made. Samples run side by side, and a
step of the optimizer waits for those before it. Nothing is sent anywhere: of the package tinker
only its types are used.

Source    tinker 0.38 (tinker/types, lib/public_interfaces).
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import CheckpointError, SetupError
from fusedrl.engine.base.packing import PackedBatch, split_by_tokens
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.optim.adamw import make_optimizer
from fusedrl.engine.rollout.tinker_losses import (
    LOSSES,
    Config,
    Example,
    examples_of,
    ids_of,
    loss_of,
)
from fusedrl.engine.runs.checkpoint import latest_checkpoint, save_checkpoint
from fusedrl.engine.runs.saving import trained

T = TypeVar("T")
# the part of a loss that example i adds, from its targets' log-probabilities [N]
Part = Callable[[int, Tensor], Tensor]
_SAMPLERS = 256  # calls of `sample` that run side by side; more wait for one to end


# ---- what calls return ---------------------------------------------------------------------------
class Pending(Generic[T]):
    """Result of a call, now or later, as Tinker's APIFuture gives it: `.result()` waits for it, and
    `await` works in a coroutine."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> T:
        """Return the result, after at most `timeout` seconds. Raise what the call raised, or
        TimeoutError."""
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """Return the result in a coroutine. Errors are those of `result`."""
        return await asyncio.wait_for(asyncio.wrap_future(self._future), timeout)

    def future(self) -> Future[T]:
        """Return the `concurrent.futures.Future` of the call."""
        return self._future

    async def coroutine(self) -> T:
        """Return the result, as a coroutine for functions such as asyncio.create_task."""
        return await self.result_async()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()


class TinkerClient:
    """Training client and sampling client of Tinker in one object, over an actor.

    There is one copy of the weights, so the client is its own sampling client, and its samples come
    from the weights as they are when they are drawn, like those of Tinker's kind "inflight". What
    is trained are the actor's parameters that require a gradient: all of them, or the adapter after
    `actor.add_adapter`. Let nothing else write to the weights or generate while a call is open.

    Differences from Tinker: the logprobs of a sample are those of the distribution that it was
    drawn from, with temperature, top_k and top_p. An EOS always ends a sample. Weight decay leaves
    norms and biases alone. The losses "stable_reinforce" and those of a graph (LossHandle), images,
    top-k log-probabilities and targets of more than one token are not supported.

    Args:
        actor: actor that is trained and generates.
        directory: directory of what `save_state` and `save_weights_for_sampler` write.
        seed: seed of samples whose SamplingParams have none. They are numbered, so that no draw is
            used twice, and a resumed client draws what it would have drawn.
        tokens_per_microbatch: tokens of one forward and backward pass.
    Raises:
        SetupError: the package tinker is not installed.
    """

    def __init__(
        self,
        actor: HybridActor,
        directory: str | Path,
        *,
        seed: int = 0,
        tokens_per_microbatch: int = 8192,
    ) -> None:
        try:
            from tinker import types
        except ImportError as error:
            raise SetupError(
                f"TinkerClient: expected the package tinker, whose types calls take and return "
                f"({error}); pip install 'fusedrl[tinker]'"
            ) from error
        self._types, self._actor, self._seed = types, actor, seed
        self._states, self._samples = Path(directory) / "states", Path(directory) / "sampler"
        self._tokens = tokens_per_microbatch
        self._optimizer = make_optimizer(actor.named_parameters(), lr=0.0, accumulate="float32")
        self._failed: BaseException | None = None  # why gradients since the last step are missing
        self._drawn = 0  # samples that were numbered so far
        self._line = ThreadPoolExecutor(1, "fusedrl-tinker")
        self._samplers = ThreadPoolExecutor(_SAMPLERS, "fusedrl-sample")
        self._sampling: set[Future[Any]] = set()

    # ---- the order of calls ----------------------------------------------------------------------
    def _in_line(self, work: Callable[..., T], *args: Any) -> Pending[T]:
        """Run after what was called before; a sample may still be on the way."""
        return Pending(self._line.submit(work, *args))

    def _alone(self, work: Callable[..., T], *args: Any) -> Pending[T]:
        """Run after what was called before has ended."""

        def run() -> T:
            wait(self._sampling)
            self._sampling.clear()
            return work(*args)

        return Pending(self._line.submit(run))

    def _beside(self, work: Callable[[int], T], numbered: bool) -> Pending[T]:
        """Begin after what was called before, and run beside what is called later. `numbered`: pass
        the number of the sample, else 0."""
        given: Future[T] = Future()

        def hand_over(done: Future[T]) -> None:
            if (error := done.exception()) is not None:
                given.set_exception(error)
            else:
                given.set_result(done.result())

        def begin() -> None:
            self._sampling = {future for future in self._sampling if not future.done()}
            begun = self._samplers.submit(work, self._drawn if numbered else 0)
            self._drawn += numbered
            self._sampling.add(begun)
            begun.add_done_callback(hand_over)

        self._line.submit(begin)
        return Pending(given)

    # ---- sampling --------------------------------------------------------------------------------
    def sample(
        self,
        prompt: Any,
        num_samples: int,
        sampling_params: Any,
        include_prompt_logprobs: bool = False,
        **others: Any,
    ) -> Pending[Any]:
        """Draw `num_samples` continuations of a prompt (tinker.ModelInput).

        Args:
            sampling_params: tinker.SamplingParams. Without max_tokens, a sample may fill the
                model's positions. The same seed and prompt give the same samples.
            include_prompt_logprobs: also score the prompt's tokens, at temperature 1.
        Returns:
            tinker.SampleResponse.
        Raises:
            ValueError: an option that is not supported, or an empty or too long prompt.
        """
        if unknown := [name for name, value in others.items() if value]:
            raise ValueError(
                f"TinkerClient.sample: {', '.join(unknown)} is not supported; compute_logprobs and "
                "forward score given tokens"
            )
        ids = ids_of(prompt, "sample", self._actor.decoder)
        params = self._params(sampling_params, num_samples, len(ids))
        return self._beside(
            lambda number: self._sample(ids, params, number, include_prompt_logprobs),
            sampling_params.seed is None,
        )

    async def sample_async(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `sample` returns, in a coroutine."""
        return await self.sample(*args, **kwargs)

    def _params(self, asked: Any, n: int, prompt: int) -> SamplingParams:
        room = self._actor.decoder.config.max_positions - prompt
        stop = asked.stop
        if stop is not None and not isinstance(stop, str) and not len(stop):
            raise ValueError(
                "TinkerClient.sample: expected stop to be None, texts or token ids, got an empty "
                "list, which would let a sample run past its EOS; that is not supported"
            )
        stop = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
        texts = [part for part in stop if isinstance(part, str)]
        params = SamplingParams(
            max_new_tokens=max(1, room) if asked.max_tokens is None else asked.max_tokens,
            temperature=float(asked.temperature),
            top_p=float(asked.top_p),
            top_k=max(0, asked.top_k),
            n=n,
            seed=self._seed if asked.seed is None else asked.seed,
            stop=tuple(texts),
            stop_token_ids=tuple(part for part in stop if not isinstance(part, str)),
        )
        # the logprobs are then those of what is left
        return replace(params, return_kept=params.truncates)

    def _sample(self, ids: list[int], params: SamplingParams, number: int, score: bool) -> Any:
        (found,) = self._actor.generate([ids], params, [number])
        if any(completion.finish_reason == "aborted" for completion in found):
            raise RuntimeError("TinkerClient.sample: the actor was told to abort; sample again")
        types = self._types
        return types.SampleResponse(
            sequences=[
                types.SampledSequence(
                    stop_reason="length" if c.finish_reason == "length" else "stop",
                    sequence_id=f"{params.seed}-{number}-{c.sample}",
                    tokens_np=np.array(c.token_ids, dtype=np.int32),
                    logprobs_np=np.array(c.logprobs, dtype=np.float32),
                )
                for c in found
            ],
            prompt_logprobs_np=self._prompt_logprobs(ids) if score else None,
        )

    def compute_logprobs(self, prompt: Any) -> Pending[list[float | None]]:
        """Compute the log-probability of each token of a prompt after those before it, at
        temperature 1; None for the first.

        Raises:
            ValueError: an empty or too long prompt.
        """
        ids = ids_of(prompt, "compute_logprobs", self._actor.decoder)

        def scored() -> list[float | None]:
            return [None, *self._prompt_logprobs(ids)[1:].tolist()]

        return self._in_line(scored)

    def _prompt_logprobs(self, ids: list[int]) -> np.ndarray:
        batch = PackedBatch.from_sequences([(ids[:1], ids[1:])], device=self._actor.decoder.device)
        logp_N = self._actor.score(batch).logp.cpu().numpy().astype(np.float32)
        logp_N[0] = np.nan
        return logp_N

    def get_tokenizer(self) -> Any:
        """Return the actor's tokenizer."""
        return self._actor.tokenizer

    # ---- training --------------------------------------------------------------------------------
    def forward_backward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Config | None = None
    ) -> Pending[Any]:
        """Compute a loss, and add its gradient to that of the calls since the last `optim_step`.

        Args:
            data: tinker.Datum's. Position i of the model input predicts target_tokens[i]; the other
                inputs have a number for each target.
            loss_fn: a name of `tinker_losses.LOSSES`.
            loss_fn_config: numbers of the loss, such as clip_low_threshold.
        Returns:
            tinker.ForwardBackwardOutput: the targets' log-probabilities, and the metric "loss:sum".
        Raises:
            ValueError: an unknown loss, or data or a configuration that it does not take; nothing
                is then computed.
        """
        examples, part = self._asked(data, loss_fn, loss_fn_config)
        return self._in_line(self._train, examples, part)

    def forward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Config | None = None
    ) -> Pending[Any]:
        """Compute what `forward_backward` returns, without a gradient. Errors are the same."""
        examples, part = self._asked(data, loss_fn, loss_fn_config)
        return self._in_line(lambda: self._output(*self._pass(examples, part, False)))

    def forward_backward_custom(
        self,
        data: Sequence[Any],
        loss_fn: Callable[[Sequence[Any], list[Tensor]], tuple[Tensor, Mapping[str, float]]],
    ) -> Pending[Any]:
        """Compute a loss of one's own, and add its gradient. It costs one more forward pass.

        Args:
            loss_fn: function of (data, a CPU tensor of the targets' log-probabilities for each
                datum) that returns the loss, differentiable in them, and metrics.
        Raises:
            ValueError: data without target_tokens; later, a loss that does not depend on any
                log-probability.
        """
        if not callable(loss_fn):
            raise ValueError(
                "TinkerClient.forward_backward_custom: expected a function of data and "
                f"log-probabilities, got {type(loss_fn).__name__}"
            )
        examples = examples_of(data, None, self._actor.decoder)
        return self._in_line(self._train_custom, list(data), examples, loss_fn)

    def optim_step(self, adam_params: Any) -> Pending[Any]:
        """Make a step of AdamW with the gradient of the calls since the last one, which is then
        dropped.

        Args:
            adam_params: tinker.AdamParams.
        Returns:
            tinker.OptimStepResponse with the metric "grad_norm", of the gradient before clipping.
        Raises:
            ValueError: other parameters than AdamParams, or values outside AdamW's range.
            RuntimeError, by the result: there is no gradient, it is not finite, or a call before
                failed. The weights are then unchanged, and the gradient is dropped.
        """
        p = adam_params
        if not isinstance(p, self._types.AdamParams):
            raise ValueError(
                f"TinkerClient.optim_step: expected tinker.AdamParams, got {type(p).__name__}"
            )
        numbers = p.learning_rate, p.eps, p.weight_decay, p.beta1, p.beta2, p.grad_clip_norm
        inside = p.learning_rate >= 0 and p.eps > 0 and p.weight_decay >= 0
        inside = inside and 0 <= p.beta1 < 1 and 0 <= p.beta2 < 1
        if not (inside and all(map(math.isfinite, numbers))):
            raise ValueError(
                "TinkerClient.optim_step: expected finite numbers, learning_rate and weight_decay "
                f">= 0, betas in [0, 1) and eps > 0, got {p}"
            )
        return self._alone(self._step, p)

    async def forward_backward_async(self, *args: Any, **kwargs: Any) -> Pending[Any]:
        """Return `forward_backward`'s result to be awaited."""
        return self.forward_backward(*args, **kwargs)

    async def optim_step_async(self, adam_params: Any) -> Pending[Any]:
        """Return `optim_step`'s result to be awaited."""
        return self.optim_step(adam_params)

    def _asked(
        self, data: Sequence[Any], name: str, config: Config | None
    ) -> tuple[list[Example], Part]:
        loss = loss_of(name, config)
        examples = examples_of(data, LOSSES[name].inputs, self._actor.decoder)
        return examples, lambda index, logp_N: loss(examples[index], logp_N)

    def _pass(
        self, examples: Sequence[Example], part: Part, backward: bool
    ) -> tuple[list[Tensor], float]:
        """Return the targets' log-probabilities, a CPU tensor for each example, and the loss."""
        logps: list[Tensor] = [torch.empty(0)] * len(examples)
        total = 0.0
        sizes = enumerate(len(example.tokens) + 1 for example in examples)
        for group in split_by_tokens(sizes, self._tokens):
            some = [examples[index] for index in group]
            batch = PackedBatch.from_sequences(
                ((e.tokens[:1], [*e.tokens[1:], e.targets[-1]]) for e in some),
                device=self._actor.decoder.device,
            )
            # what is predicted, in the place of what is read
            asked = [token for e in some for token in (e.tokens[0], *e.targets)]
            wanted = batch.with_columns(token_ids=torch.tensor(asked, device=batch.device))
            with nullcontext() if backward else torch.no_grad():
                logp_N, _ = self._actor.logprobs(wanted, self._actor.forward(batch))
                rows = [row[1:] for row in logp_N.split(list(batch.lengths))]
                parts = [part(i, row) for i, row in zip(group, rows, strict=True)]
                loss = torch.stack(parts).sum()
            if backward:
                loss.backward()
            total += float(loss.detach())
            for index, row in zip(group, rows, strict=True):
                logps[index] = row.detach().float().cpu()
        return logps, total

    def _train(self, examples: list[Example], part: Part) -> Any:
        try:
            return self._output(*self._pass(examples, part, True))
        except BaseException as error:
            # a part of the gradient is there, and a step must not use it
            self._failed = error
            self._optimizer.zero_grad()
            raise

    def _train_custom(
        self, data: list[Any], examples: list[Example], loss_fn: Callable[..., Any]
    ) -> Any:
        try:
            logps, _ = self._pass(examples, lambda _, logp: logp.sum(), False)
            leaves = [logp.requires_grad_() for logp in logps]
            loss, metrics = loss_fn(data, leaves)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise ValueError(
                    "TinkerClient.forward_backward_custom: expected a loss that depends on the "
                    "log-probabilities that the function was given"
                )
            found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
            device = self._actor.decoder.device
            grads = [
                (torch.zeros_like(leaf) if grad is None else grad).to(device)
                for leaf, grad in zip(leaves, found, strict=True)
            ]
            logps, _ = self._pass(examples, lambda i, logp: (logp * grads[i]).sum(), True)
            return self._output(logps, float(loss.detach().sum()), metrics)
        except BaseException as error:
            self._failed = error
            self._optimizer.zero_grad()
            raise

    def _output(
        self, logps: Sequence[Tensor], loss: float, metrics: Mapping[str, float] | None = None
    ) -> Any:
        types = self._types
        return types.ForwardBackwardOutput(
            loss_fn_output_type="ArrayRecord",
            loss_fn_outputs=[{"logprobs": types.TensorData.from_torch(logp)} for logp in logps],
            metrics={"loss:sum": loss, **(metrics or {})},
        )

    def _step(self, p: Any) -> Any:
        failed, self._failed = self._failed, None
        try:
            if failed is not None:
                raise RuntimeError(
                    "TinkerClient.optim_step: a call since the last step failed, so its gradient "
                    "is not whole; the weights are unchanged, and the gradient is dropped"
                ) from failed
            optimizer = self._optimizer
            optimizer.set(p.learning_rate, (p.beta1, p.beta2), p.eps, p.weight_decay)
            result = optimizer.step(max_grad_norm=max(0.0, p.grad_clip_norm) or None)
        finally:
            self._optimizer.zero_grad()
        if not result.applied:
            raise RuntimeError(
                f"TinkerClient.optim_step: the norm of the gradient is {result.grad_norm}; the "
                "weights are unchanged, and the gradient is dropped. Look for log-probabilities "
                "far from the model's, and lower the learning rate"
            )
        self._actor.mark_updated()
        return self._types.OptimStepResponse(metrics={"grad_norm": result.grad_norm})

    # ---- saving ----------------------------------------------------------------------------------
    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Pending[Any]:
        """Save what is trained and the optimizer's moments in <directory>/states/<name>, as
        safetensors and JSON. A state is there whole or not at all, also while it is overwritten.

        Args:
            name: a plain file name.
            ttl_seconds: changes nothing: a state stays until it is deleted.
            overwrite: replace a state of this name.
            user_metadata: texts to be kept in the state's JSON.
        Returns:
            tinker.SaveWeightsResponse, whose path `load_state` takes.
        Raises:
            ValueError: the name is not plain, or is taken.
            RuntimeError, by the result: there are gradients that no step has used.
            CheckpointError, OSError, by the result: see `save_checkpoint`.
        """
        path = self._place(self._states, name)
        return self._alone(self._save, path, overwrite, dict(user_metadata or {}))

    async def save_state_async(self, *args: Any, **kwargs: Any) -> Pending[Any]:
        """Return `save_state`'s result to be awaited."""
        return self.save_state(*args, **kwargs)

    def _save(self, path: Path, overwrite: bool, metadata: dict[str, str]) -> Any:
        earlier = [int(found.name[5:]) for found in path.glob("checkpoints/step_????????")]
        if earlier and not overwrite:
            raise ValueError(
                f"TinkerClient.save_state: {path} exists; choose another name, or overwrite=True"
            )
        if self._optimizer.gradients():
            raise RuntimeError(
                "TinkerClient.save_state: expected no gradient since the last optim_step, which a "
                "state does not hold; make the step first"
            )
        save_checkpoint(
            path,
            max(earlier, default=-1) + 1,
            {"model": trained(self._actor), "optimizer": self._optimizer.state_dict()},
            {"samples": self._drawn, "user_metadata": metadata},
            keep=1,
        )
        return self._types.SaveWeightsResponse(path=str(path), type="save_weights")

    def load_state(self, path: str | Path) -> Pending[Any]:
        """Load the weights of a saved state; the optimizer begins anew. Gradients are dropped.

        Raises:
            CheckpointError, by the result: no state is there, it is broken, or it is of another
                model. Nothing is then changed.
        """
        return self._alone(self._load, Path(path), False)

    def load_state_with_optimizer(self, path: str | Path) -> Pending[Any]:
        """Load a saved state: weights, moments, and the number of the next sample. On a CPU what
        follows is bitwise what followed the save. Errors are those of `load_state`."""
        return self._alone(self._load, Path(path), True)

    def _load(self, path: Path, moments: bool) -> Any:
        if (found := latest_checkpoint(path)) is None:
            raise CheckpointError(f"TinkerClient.load_state: no saved state in {path}")
        parameters, saved = trained(self._actor), found.tensors.get("model", {})
        if saved.keys() != parameters.keys() or any(
            saved[name].shape != p.shape or saved[name].dtype != p.dtype
            for name, p in parameters.items()
        ):
            raise CheckpointError(
                f"TinkerClient.load_state: {found.path} is of another model: its tensors are not "
                "those that the actor trains, in name, shape or dtype"
            )
        drawn = found.state.get("samples")
        if moments and not isinstance(drawn, int):
            raise CheckpointError(
                f"TinkerClient.load_state_with_optimizer: {found.path} is not a state that "
                "save_state wrote; load_state takes its weights alone"
            )
        state = found.tensors.get("optimizer", {})
        if not moments:  # masters without moments, as at the beginning
            state = {
                f"{name}.master": saved[name].float()
                for name, p in parameters.items()
                if f"{name}.master" in state
            }
        try:
            self._optimizer.load_state_dict(state)
        except ValueError as error:
            raise CheckpointError(f"TinkerClient.load_state: {found.path}: {error}") from error
        self._optimizer.zero_grad()
        self._failed = None
        if moments and isinstance(drawn, int):
            self._drawn = drawn
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name])
        self._actor.mark_updated()
        return self._types.LoadWeightsResponse(path=str(path), type="load_weights")

    def save_weights_for_sampler(self, name: str, **_: Any) -> Pending[Any]:
        """Write the model to <directory>/sampler/<name>, a directory that transformers and other
        engines load. The client itself needs no such copy.

        Raises:
            ValueError: the name is not plain; by the result: it is taken.
        """
        path = self._place(self._samples, name)

        def save() -> Any:
            if path.exists():
                raise ValueError(
                    f"TinkerClient.save_weights_for_sampler: {path} exists; choose another name"
                )
            self._actor.save_pretrained(path)
            return self._types.SaveWeightsForSamplerResponse(path=str(path))

        return self._alone(save)

    def save_weights_and_get_sampling_client(self, *_: Any, **__: Any) -> Pending[TinkerClient]:
        """Return this client: it samples from the weights that it trains, and nothing is copied."""
        return self._in_line(lambda: self)

    async def save_weights_and_get_sampling_client_async(self, *_: Any, **__: Any) -> TinkerClient:
        """Return this client."""
        return self

    def _place(self, root: Path, name: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(
                f"TinkerClient: expected a name of letters, digits, '_', '.' and '-', got {name!r}"
            )
        return root / name
