"""A rollout for verl: its trainer's workers keep their model and their placement, and completions
come from a HybridActor in a Ray actor beside each of them.

    VERL_USE_EXTERNAL_MODULES=fusedrl.engine.rollout.verl_plugin python -m verl.trainer.main_ppo
        actor_rollout_ref.rollout.name=fusedrl
        actor_rollout_ref.rollout.tensor_model_parallel_size=1 ...

verl's workers hold the weights, mostly as shards, in processes of their own. So the weights here
are a copy on each device, and every update is sent to it: verl's worker hands out whole tensors,
which travel through Ray's shared memory on the host. `Server.stats` counts their bytes.

Source    verl 0.9.1 (verl.workers.rollout: replica, base, vllm_rollout). It is imported where it
          is used: this file can be imported without it.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.generation.cache import CacheConfig
from fusedrl.engine.rollout.peers import ReceivedWeights, request_number, sampling_of

NAME = "fusedrl"
_LOOK = 0.005  # seconds between looks at whether requests may begin, or have ended


class Part(NamedTuple):
    """A tensor on its way from a worker to a server."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray  # its bytes


def _packed(name: str, tensor: Tensor) -> Part:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Part(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat)


def _unpacked(part: Part) -> tuple[str, Tensor]:
    # Ray's arrays cannot be written to, and torch knows no such tensors
    flat = torch.from_numpy(np.array(part.data))
    return part.name, flat.view(getattr(torch, part.dtype)).view(part.shape)


def register() -> None:
    """Tell verl of this rollout, under the name "fusedrl". Every process of a run needs it; with
    VERL_USE_EXTERNAL_MODULES=fusedrl.engine.rollout.verl_plugin each one calls it.

    Raises:
        ImportError: verl is not installed, or is not of a version with RolloutReplicaRegistry.
    """
    from verl.workers.rollout import base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register(NAME, replica_class)
    base._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.ServerAdapter"


class Server:
    """Ray actor that generates for one of verl's replicas. Requests run side by side in one batch.

    Args:
        config: verl's RolloutConfig.
        model_config: verl's HFModelConfig, or the part of the configuration that describes it.
        replica_rank: number of the replica.
    """

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        path = getattr(model_config, "local_path", None)
        if path is None:
            from verl.utils.fs import copy_to_local

            path = copy_to_local(model_config.path)
        self._config, self._rank = config, replica_rank
        self.actor = HybridActor.from_pretrained(path, dtype=config.dtype)
        on_gpu = self.actor.decoder.device.type == "cuda"
        self.actor = HybridActor(
            self.actor.decoder,
            self.actor.tokenizer,
            cache=CacheConfig(
                max_sequences=config.max_num_seqs,
                max_tokens_per_step=max(config.max_num_batched_tokens, config.max_num_seqs),
                memory_fraction=config.gpu_memory_utilization if on_gpu else None,
            ),
        )
        self._weights = ReceivedWeights(self.actor)
        self._threads = ThreadPoolExecutor(config.max_num_seqs)
        self._closed = self._rejects = self._updating = False
        self._running = 0
        self._step: int | None = None

    # ---- generation ------------------------------------------------------------------------------
    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        **_: Any,
    ) -> Any:
        """Return verl's TokenOutput for one prompt. A draw depends on the seed, the request id and
        the position, so runs with rollout.full_determinism draw the same twice.

        Raises:
            ValueError: images or videos, or sampling options that cannot be followed.
            RuntimeError: the last update of the weights is not whole.
        """
        from verl.workers.rollout.replica import TokenOutput

        if image_data or video_data:
            raise ValueError("fusedrl's rollout takes text only, got images or videos")
        while self._closed or self._updating:
            if self._closed and self._rejects:
                return TokenOutput(token_ids=[], log_probs=[], stop_reason="aborted")
            await asyncio.sleep(_LOOK)
        c, ids = self._config, list(prompt_ids)
        longest = min(
            c.max_model_len or c.prompt_length + c.response_length,
            self.actor.decoder.config.max_positions,
        )
        extra = {"global_steps": self._step}
        if (room := longest - len(ids)) < 1:
            return TokenOutput(
                token_ids=[], log_probs=[], stop_reason="completed", extra_fields=extra
            )
        limits = {"max_tokens", "max_new_tokens"} & sampling_params.keys()
        options = {"seed": c.seed, **({} if limits else {"max_tokens": c.response_length})}
        params = sampling_of({**options, **sampling_params}, room)
        self._weights.require()
        self._running += 1
        try:
            ((completion,),) = await asyncio.get_running_loop().run_in_executor(
                self._threads, self.actor.generate, [ids], params, [request_number(request_id)]
            )
        finally:
            self._running -= 1
        aborted = completion.finish_reason == "aborted"
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.logprobs if sampling_params.get("logprobs") else None,
            stop_reason="aborted" if aborted else "completed",
            extra_fields=extra,
        )

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """End every request with the tokens that it has, and hold (or reject) those that come,
        until `resume_generation`."""
        self._closed, self._rejects = True, reject_request
        while self._running:  # one that is just beginning is met by the next round
            self.actor.abort()
            await asyncio.sleep(_LOOK)

    async def resume_generation(self) -> None:
        """Admit requests again."""
        self._closed = self._rejects = False

    # ---- weights and memory ----------------------------------------------------------------------
    async def begin_update(self) -> None:
        """Wait for the requests under way, and hold new ones until `end_update`."""
        self._updating = True
        while self._running:
            await asyncio.sleep(_LOOK)
        self._weights.restart()

    async def receive(self, parts: list[Part]) -> None:
        """Copy in a part of an update. Raise ValueError if it does not fit the model."""
        await asyncio.to_thread(self._weights.take, map(_unpacked, parts))

    async def end_update(self, global_steps: int | None) -> None:
        """End an update, which the trainer made at this step. Raise ValueError if tensors are
        missing."""
        self._weights.end()
        self._updating = False
        if global_steps is not None:
            self._step = global_steps

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Do nothing: the weights stay where they are, and the cache comes with the next
        request."""

    async def sleep(self) -> None:
        """Free the KV cache, if verl asks for that. The weights stay."""
        if self._config.free_cache_engine:
            await self.release_kv_cache()

    async def clear_kv_cache(self) -> None:
        """Forget cached prefixes. New weights do so by themselves."""
        self.actor.mark_updated()

    async def release_kv_cache(self) -> None:
        """Free the KV cache's memory, after the requests under way."""
        while self._running:
            await asyncio.sleep(_LOOK)
        self.actor.release_cache()

    async def resume_kv_cache(self) -> None:
        """Do nothing: the next request allocates the cache."""

    async def start_profile(self, **_: Any) -> None:
        """Do nothing: verl's profilers see the trainer's processes alone."""

    async def stop_profile(self) -> None:
        """Do nothing; see `start_profile`."""

    async def stats(self) -> dict[str, int]:
        """Return the bytes of weights received, and the version of the weights."""
        return {"bytes": self._weights.bytes, "weights_version": self.actor.weights_version}


class ServerAdapter:
    """Hands new weights from a worker of verl to the server of its replica, and has the methods of
    verl's BaseRollout. A replica is one device, so each worker has one of its own.

    Args:
        config, model_config, device_mesh: verl's.
        replica_rank: number of the replica; -1: the worker's rank.
    Raises:
        ValueError: a replica of several devices.
    """

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any = None, replica_rank: int = -1
    ) -> None:
        _check(config)
        self.config, self.model_config, self.device_mesh = config, model_config, device_mesh
        self.replica_rank = device_mesh.get_rank() if replica_rank < 0 else replica_rank
        self.is_leader_rank = True
        self._server: Any = None

    def _handle(self) -> Any:
        if self._server is None:  # launched after the workers
            import ray

            self._server = ray.get_actor(_server_name(self.replica_rank))
        return self._server

    async def resume(self, tags: list[str]) -> None:
        """Wake the server up."""
        await self._handle().wake_up.remote(tags=tags)

    async def release(self) -> None:
        """Free the server's KV cache."""
        await self._handle().sleep.remote()

    async def update_weights(
        self,
        weights: Any,
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: Any = None,
        **_: Any,
    ) -> None:
        """Send the server all weights: (name, tensor) pairs under Hugging Face's names.

        Raises:
            ValueError: another wire format, an adapter that is not merged, or tensors that are not
                the model's.
        """
        if wire_format != "named_tensors" or peft_config is not None:
            raise ValueError(
                "fusedrl's rollout takes whole weights, got "
                + (f"wire format {wire_format}" if peft_config is None else "a LoRA adapter")
                + "; set actor_rollout_ref.model.lora.merge=True for an adapter, and "
                "rollout.checkpoint_engine.backend to another than delta_sharded"
            )
        from verl.workers.rollout.utils import ensure_async_iterator

        server = self._handle()
        room = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        parts: list[Part] = []
        await server.begin_update.remote()
        async for name, tensor in ensure_async_iterator(weights):
            if parts and sum(part.data.nbytes for part in parts) + tensor.nbytes > room:
                await server.receive.remote(parts)
                parts = []
            parts.append(_packed(name, tensor))
        await server.receive.remote(parts)
        await server.end_update.remote(global_steps)

    def generate_sequences(self, prompts: Any) -> Any:
        """Raise NotImplementedError: verl 0.9 generates through its servers alone."""
        raise NotImplementedError("fusedrl's rollout generates through verl's servers")


def _check(config: Any) -> None:
    sizes = {
        name: getattr(config, name)
        for name in (
            "tensor_model_parallel_size",
            "data_parallel_size",
            "pipeline_model_parallel_size",
        )
    }
    if wrong := {name: size for name, size in sizes.items() if size != 1}:
        raise ValueError(
            "fusedrl's rollout holds the whole model on one device: expected "
            f"{', '.join(f'rollout.{name}=1' for name in wrong)}, got "
            f"{', '.join(map(str, wrong.values()))}"
        )


def _server_name(replica_rank: int, kind: str = "", suffix: str = "") -> str:
    return f"{NAME}_server_{kind}{replica_rank}_0{suffix}"


@cache
def replica_class() -> Any:
    """Return the class of verl's RolloutReplica that launches a `Server`; verl calls this by its
    registry. Raise ImportError without verl."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    from verl.plugin.platform import get_platform
    from verl.workers.rollout.replica import RolloutReplica

    class FusedRLReplica(RolloutReplica):
        """A replica of one device."""

        def __init__(self, replica_rank: int, config: Any, *args: Any, **kwargs: Any) -> None:
            _check(config)
            super().__init__(replica_rank, config, *args, **kwargs)

        async def launch_servers(self) -> None:
            """Start the server on the node and the device of the replica's worker."""

            def where(_: Any) -> tuple[str, list[str]]:
                context = ray.get_runtime_context()
                name = get_platform().ray_resource_name()
                return context.get_node_id(), context.get_accelerator_ids().get(name, [])

            (worker,) = self.workers
            node, devices = await worker.__ray_call__.remote(where)
            variables = dict.fromkeys(get_platform().ray_noset_envvars(), "1")
            if devices:
                variables[get_platform().visible_devices_envvar()] = ",".join(devices)
            kind = (
                "reward_" if self.is_reward_model else "teacher_" if self.is_teacher_model else ""
            )
            server = (
                ray.remote(Server)
                .options(
                    name=_server_name(self.replica_rank, kind, self.name_suffix),
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                    runtime_env={"env_vars": variables},
                    max_concurrency=self.max_concurrency,
                )
                .remote(self.config, self.model_config, self.replica_rank)
            )
            await server.stats.remote()  # it has loaded its model
            self.servers = [server]
            self._server_handle = server
            # no HTTP: the load balancer needs a name alone
            self._server_address = _server_name(self.replica_rank, kind, self.name_suffix)

    return FusedRLReplica
