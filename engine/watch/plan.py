"""Memory that a run will need, computed before it starts: the tables of `fusedrl plan`.

Shapes    N tokens of a micro-batch, L layers, H hidden, Hq query and Hkv key/value heads, D head
          dim, F feed-forward width, V vocabulary. A parameter has e bytes, an activation a bytes
          (`step.activation_dtype`): 4 if parameters are bfloat16, else e. The KV cache has the
          dtype `step.cache_dtype`.
Held      Each layer holds for its backward pass: two norms' inputs and outputs 4 N H, the fused
          projection N (Hq + 2 Hkv) D (v is a part of it), q and k after RoPE N (Hq + Hkv) D, the
          output of attention N Hq D, and the feed-forward's activations N 3F; times a bytes, and
          some floats a token. A checkpointed layer holds its inputs, 2 N H. While a policy trains,
          activations are placed in the KV pool's memory as far as they fit
          (HybridActor.lend_cache).
Gradients Sums over micro-batches take 4 bytes a trained parameter, also if it is bfloat16
          (optim/adamw.py). A backward pass's own gradient, of e bytes, is added to its sum as soon
          as it is complete. The optimizer's step reads the sums in place.
Peak      The moment of training that needs most memory, with the gradients of earlier micro-batches
          held. It is the backward pass of the head (whose gradient V H is complete before it is
          added), of the last layer or of the embedding; or generation, next to weights and
          gradients.
Critic    A separate critic is trained before the policy. Its weights and moments stay in memory;
          its gradients and activations are never in memory together with the policy's.
Exact     Weights, gradients, optimizer, reference, KV pool, cos and sin, activations held (C++
          kernels). All other numbers are upper bounds from the kernels' own rules.
Not in it The interpreter and its libraries, about half a GiB, or the CUDA context. On a CPU glibc's
          heap keeps some of the freed memory: a float32 model of 1.0 GiB peaked 5 and 7% above the
          plan (plain, checkpointed), and 0.4% with MALLOC_MMAP_THRESHOLD_=131072, which turns that
          off.

One file: the terms of one sum.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.memory import format_bytes
from fusedrl.engine.config import (
    DPOConfig,
    KTOConfig,
    PolicyConfig,
    RejectionConfig,
    RewardModelConfig,
)
from fusedrl.engine.config.base import GivenTextsConfig, SamplingConfig, StageConfig
from fusedrl.engine.data.readers import ReadOptions, load_prompts, parse_data
from fusedrl.engine.data.rows import may_be_read
from fusedrl.engine.data.tokenize import count_tokens, encode_prompts
from fusedrl.engine.generation.cache import CacheConfig, block_bytes, blocks_for, resolve_num_blocks
from fusedrl.engine.model.adapters import LayerAdapter
from fusedrl.engine.model.configuration import ModelConfig, model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.directories import local_directory
from fusedrl.engine.model.heads import RewardModel
from fusedrl.engine.model.lora import add_adapter
from fusedrl.engine.model.step import activation_dtype, cache_dtype
from fusedrl.engine.model.weights import (
    load_tokenizer,
    read_model_config,
    resolve_device,
    resolve_dtype,
)
from fusedrl.engine.model.wide import TILE, narrow_products
from fusedrl.engine.optim.adamw import BLOCK, quantized
from fusedrl.engine.parallel.lanes import buffer_bytes, deal
from fusedrl.engine.parallel.ranks import lanes_of
from fusedrl.engine.policy.advantages import find_advantage
from fusedrl.engine.policy.objectives import make_objective, two_steps
from fusedrl.engine.rollout.prompts import room_for_prompts
from fusedrl.kernels.linear_head import keeps_logits, workspace
from fusedrl.kernels.runtime import native

_SHARE = 0.9  # of the GPU memory that training leaves; the rest is for losses of allocators
_MOST_TOKENS = 1 << 24  # more than any micro-batch: int32 counts its tokens


def machine_memory(device: torch.device) -> int:
    """Return the device's memory in bytes; for a CPU, at most the limit of its control group."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory, limit = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        Path("/sys/fs/cgroup/memory.max"),
    )
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return min(memory, int(allowed)) if allowed.isdigit() else memory


@dataclass(frozen=True)
class Parts:
    """Memory of a run in bytes, by purpose."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    kv_pool: int
    rotary: int  # cos and sin of every position (kernels/rope.py), of each model that is loaded
    # held from forward to backward, without the part that the KV pool's memory holds
    activations: int
    workspace: int  # at the peak, beside all of the above

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the micro-batch."""
        return (
            self.weights
            + self.reference
            + self.gradients
            + self.optimizer
            + self.kv_pool
            + self.rotary
        )

    @property
    def peak(self) -> int:
        """Bytes at the moment of highest use."""
        return self.fixed + self.activations + self.workspace


@dataclass(frozen=True)
class Plan:
    """Plan of a run's memory.

    Attributes:
        devices: number of devices the run is split across; all byte counts are for one device.
        demand: the most the run needs of its KV cache; None if the run does not generate.
        demand_met: whether the KV cache holds `demand`. If not, memory limits the cache, and some
            sequences wait until others are done.
        activations: bytes of activations of a micro-batch, without (False) and with (True)
            checkpointed activations.
        peaks: bytes at the peak, keyed as `activations`.
        largest: the largest micro-batch in tokens that fits in `memory`, keyed as `activations`; 0
            if none fits.
        tensor_parallel: what tensor parallelism would hold, by the devices to a group; it is not
            built. Activations and workspace are left as they are, which is more than they would be.
    """

    model: str
    dtype: str
    device: str
    devices: int
    memory: int
    tokens_per_microbatch: int
    checkpoint_activations: bool
    demand: Demand | None
    demand_met: bool
    parts: Parts
    activations: dict[bool, int]
    peaks: dict[bool, int]
    largest: dict[bool, int]
    tensor_parallel: dict[int, Parts]

    @property
    def fits(self) -> bool:
        """Whether the run's peak fits in `memory`."""
        return self.parts.peak <= self.memory

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        names = {False: "plain", True: "checkpointed"}
        tables = {
            key: {names[c]: value for c, value in getattr(self, key).items()}
            for key in ("activations", "peaks", "largest")
        }
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "devices": self.devices,
            "memory_bytes": self.memory,
            "fits": self.fits,
            "tokens_per_microbatch": self.tokens_per_microbatch,
            "checkpoint_activations": self.checkpoint_activations,
            "kv_cache": None
            if self.demand is None
            else {**self.demand._asdict(), "bound_by": "demand" if self.demand_met else "memory"},
            "bytes": vars(self.parts) | {"peak": self.parts.peak},
            "activation_bytes": tables["activations"],
            "peak_bytes": tables["peaks"],
            "largest_tokens_per_microbatch": tables["largest"],
            "tensor_parallel_fixed_bytes": {
                str(t): parts.fixed for t, parts in self.tensor_parallel.items()
            },
        }


class Demand(NamedTuple):
    """Demand of a run on its KV cache: at most `sequences` at once, of `tokens` tokens each."""

    sequences: int
    tokens: int


def demand_of(
    config: PolicyConfig | RejectionConfig,
    model: ModelConfig,
    longest: int | None = None,
    devices: int = 1,
) -> Demand:
    """Return the most that a run needs of its KV cache on each device, for rollouts and evaluation.

    Args:
        longest: number of tokens of the longest prompt. If None, it is not known, and
            max_prompt_length or the longest prompt that fits the model is assumed.
        devices: number of devices the run is split across.
    """
    new = config.generation.max_new_tokens
    sequences = -(-config.prompts_per_step // devices) * config.samples_per_prompt
    if longest is None:
        longest = min(model.max_positions - new, config.max_prompt_length or model.max_positions)
    most = CacheConfig().max_sequences
    whole = longest + new
    if isinstance(config, PolicyConfig) and config.plays:
        whole = config.turns.max_length or model.max_positions
    if isinstance(config, PolicyConfig) and (held_out := config.evaluation) is not None:
        prompts = -(-(held_out.prompts or most) // devices)
        sequences = max(sequences, prompts * held_out.samples_per_prompt)
    return Demand(min(sequences, most), min(model.max_positions, max(1 + new, whole)))


def longest_prompt(config: PolicyConfig | RejectionConfig) -> int | None:
    """Return the number of tokens of the longest prompt in a run's data, held-out prompts included;
    None if the data or the model's tokenizer is missing.

    Raises:
        DataError: a run would refuse the data.
    """
    names = [config.data]
    if isinstance(config, PolicyConfig) and config.evaluation is not None:
        names.append(config.evaluation.data)
    sources = [source for name in names for source in parse_data(name)]
    directory = None if Path(config.model).is_file() else local_directory(config.model)
    tokenizer = None if directory is None else load_tokenizer(directory)
    if tokenizer is None or not all(may_be_read(source) for source in sources):
        return None
    room = room_for_prompts(read_model_config(config.model), config.generation.max_new_tokens)
    options = ReadOptions(count_tokens=partial(count_tokens, tokenizer))
    found = 0
    for source in sources:
        examples = load_prompts(source, skip_bad_lines=config.skip_bad_lines, options=options)
        limit = min(room, config.max_prompt_length or room)
        fitting, _ = encode_prompts(tokenizer, examples, limit)
        found = max(found, *(len(ids) for _, ids in fitting))
    return found


class Planner:
    """Planner of one configuration's memory: byte counts as functions of the micro-batch's tokens.

    Args:
        model: the decoder's configuration.
        config: the stage's configuration.
        cache: configuration of the KV pool, if it is not the default.
        memory: bytes of the device. On CUDA the default KV pool takes a share of them.
        longest: number of tokens of the longest prompt, as for `demand_of`.
        values: whether a reward model's trunk gives a value at every token, as a separate critic.
        devices: number of devices the run is split across. Bytes are those of the fullest device.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: StageConfig,
        *,
        cache: CacheConfig | None = None,
        memory: int | None = None,
        longest: int | None = None,
        values: bool = False,
        devices: int = 1,
    ) -> None:
        self.model, self.config, self._values, self._devices = model, config, values, devices
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, config.device)
        self._decoder = Decoder(model, dtype=self.dtype, device="meta")
        self._cached = cache_dtype(self.dtype, self.device)
        self._e, self._a = self.dtype.itemsize, activation_dtype(self.dtype).itemsize
        base, self._lora = sum(p.nbytes for p in self._decoder.parameters()), config.lora
        if self._lora is not None:
            add_adapter(self._decoder, self._lora)
        self._imitates = isinstance(config, RewardModelConfig) and config.imitation_coef > 0
        # whether log-probabilities are computed in a step of their own, before the loss
        self._apart = self._imitates or isinstance(config, DPOConfig | KTOConfig)
        if isinstance(config, PolicyConfig) and not (config.strict or config.generation.truncates):
            objective = make_objective(config, config.penalty.coef)
            self._apart = two_steps(config, objective, strict=False, scored=True) is not None
        whole = (
            RewardModel.from_decoder(self._decoder, imitation=self._imitates)
            if isinstance(config, RewardModelConfig)
            else self._decoder
        )
        self._count_trained(whole, values)
        self._count_others(base)
        self._phases: list[Planner] = [self]  # what trains, one after the other
        self._count_critic()
        self._cache = cache or CacheConfig()
        self.kv_pool, self.demand_met = 0, True
        self.demand: Demand | None = None
        if isinstance(config, PolicyConfig | RejectionConfig):
            self.demand = demand_of(config, model, longest, devices)
            pool = self._kv_pool(
                self.demand,
                machine_memory(self.device)
                if memory is None and self.device.type == "cuda"
                else memory or 0,
            )
            for phase in self._phases:
                phase.kv_pool = pool

    def _count_trained(self, whole: Decoder | RewardModel, values: bool) -> None:
        """Count weights, gradients and optimizer state of the model that is trained."""
        model, config = self.model, self.config
        trained = [(p.numel(), p.element_size()) for p in whole.parameters() if p.requires_grad]
        head, idle = (
            self._decoder.head,
            isinstance(config, RewardModelConfig) and not self._imitates,
        )
        unused = (
            [(head.numel(), self._e)] if idle and head is not None and head.requires_grad else []
        )
        self._critic = (
            isinstance(config, PolicyConfig)
            and config.own_critic is None
            and find_advantage(config.advantage).needs == "critic"
        )
        value_head = (
            [(model.hidden_size, 4), (1, 4)] if self._critic else [(1, 4)] if values else []
        )
        trained += value_head
        self.weights = sum(p.nbytes for p in whole.parameters()) + sum(n * e for n, e in value_head)
        # a reward model uses all but the language model's head
        reached = [(n, e, sign) for found, sign in ((trained, 1), (unused, -1)) for n, e in found]
        # gradients of 2 bytes are summed in float32; sums of lanes are kept until all are there
        waiting = self._lanes // self._devices
        self.gradients = sum(sign * n * max(e, 4) for n, e, sign in reached) * waiting.bit_length()
        # messages that gradients are exchanged in, after the backward passes
        self._exchange = buffer_bytes(sum(n for n, _ in trained), self._devices)
        self._backward = sum(sign * n * e for n, e, sign in reached)  # of one backward pass
        # moments, and masters; the most that one device owns
        states = [self._moments(n) + (4 * n if e < 4 else 0) for n, e in trained]
        owned = deal([n for n, _ in trained], self._devices)
        self.optimizer = max(sum(states[i] for i in items) for items in owned)
        self.optimizer -= sum(self._moments(n) for n, _ in unused) if self._devices == 1 else 0
        # old values, gradient, four of conjugate gradient; moments of the value head
        if isinstance(config, PolicyConfig) and config.objective == "trpo":
            decoder = [p.numel() for p in self._decoder.parameters() if p.requires_grad]
            self.optimizer += sum(6 * 4 * n - self._moments(n) for n in decoder)
        # the head's own, while it warms up
        if self._critic and isinstance(config, PolicyConfig) and config.critic_warmup:
            self.optimizer += sum(4 + 8 * n for n, _ in value_head)

    @property
    def _lanes(self) -> int:
        strict = isinstance(self.config, PolicyConfig) and self.config.strict
        return lanes_of(self.config.parallel.lanes, strict, self._devices)

    def _count_others(self, base: int) -> None:
        """Count the reference, the reward models, and the rotary tables of all models."""
        config = self.config
        kind = (
            config.reference_kind
            if isinstance(config, DPOConfig | KTOConfig | PolicyConfig) and config.needs_reference
            else "adapter_off"
        )
        other = getattr(config, "reference_model", None)
        if other is not None and kind != "adapter_off":
            theirs = self._reward_trunk(other)
            base = sum(p.nbytes for p in theirs.parameters())
        # on the GPU only while it scores
        self._visiting = base if kind == "host" and self.device.type == "cuda" else 0
        self.reference = 0 if kind == "adapter_off" or self._visiting else base
        judges = config.reward if isinstance(config, SamplingConfig) else ()
        judges += config.monitor_reward if isinstance(config, PolicyConfig) else ()
        self.reference += sum(self._reward_bytes(spec) for spec in judges)
        self.rotary = self._rotary_bytes(self._decoder) * (1 if kind == "adapter_off" else 2)
        self.rotary += sum(
            self._rotary_bytes(self._reward_trunk(spec)) for spec in judges if Path(spec).is_dir()
        )

    def _count_critic(self) -> None:
        """Count a separate critic, which is trained before the policy."""
        model, config = self.model, self.config
        if isinstance(config, PolicyConfig) and (critic := config.own_critic) is not None:
            trunk = model if critic.model == "policy" else read_model_config(critic.model)
            apart = RewardModelConfig(
                critic.model,
                config.data,
                optim=critic.optim,
                dtype=config.dtype,
                device=config.device,
                parallel=config.parallel,
            )
            # without a head
            tied = replace(trunk, tie_embeddings=True)
            self._phases.insert(0, Planner(tied, apart, values=True, devices=self._devices))
            self.weights += self._phases[0].weights
            self.optimizer += self._phases[0].optimizer
            self.rotary += self._rotary_bytes(self._phases[0]._decoder)

    def _moments(self, numel: int) -> int:
        eight = self.config.optim.state == "int8" and quantized(numel)
        return 4 + (2 * (numel + 4 * numel // BLOCK) if eight else 8 * numel)

    def _reward_bytes(self, spec: str) -> int:
        """Return the bytes of a reward model's weights; 0 for a reward function."""
        if not Path(spec).is_dir():
            return 0
        trunk = self._reward_trunk(spec)
        return (
            sum(p.nbytes for name, p in trunk.named_parameters() if name != "head")
            + 4 * trunk.config.hidden_size
        )

    def _reward_trunk(self, spec: str) -> Decoder:
        return Decoder(model_config(spec), dtype=self.dtype, device="meta")

    def _rotary_bytes(self, decoder: Decoder) -> int:
        """Return the bytes of a model's rotary tables after the longest text that the configuration
        allows. Captured decoding steps (CUDA graphs) need the tables of all positions at once."""
        config, most = self.config, decoder.config.max_positions
        if isinstance(config, SamplingConfig):
            longest = (
                None
                if config.max_prompt_length is None
                else config.max_prompt_length + config.generation.max_new_tokens
            )
            longest = (
                None
                if self.device.type == "cuda"
                or (isinstance(config, PolicyConfig) and config.ptx is not None)
                else longest
            )
        else:
            longest = config.max_length if isinstance(config, GivenTextsConfig) else None
        return decoder.weights().rope_table.bytes_upto(min(most, longest or most))

    def _kv_pool(self, demand: Demand, memory: int) -> int:
        c, size = (
            self._cache,
            block_bytes(self._decoder.weights(), self._cache.block_size, self._cached),
        )
        granted = self._granted_blocks(memory, size)
        needed = blocks_for(c, demand.sequences, demand.tokens)
        self.demand_met = needed <= granted
        given = (c.num_blocks, c.memory_bytes, c.memory_fraction) != (None, None, None)
        return ((granted if given else min(needed, granted)) + 1) * size

    def _granted_blocks(self, memory: int, size: int) -> int:
        """Return the number of blocks that memory allows the KV pool, however many are needed."""
        c = self._cache
        if self.device.type != "cuda" or c.num_blocks is not None or c.memory_bytes is not None:
            return resolve_num_blocks(
                c, self._decoder.weights(), self.model.max_positions, self._cached
            )
        # at the first rollout nothing else is in memory
        free = memory - self.weights - self.reference - self.rotary
        if c.memory_fraction is not None:
            return max(2, int(free * c.memory_fraction) // size) - 1
        tokens, checkpointed = self.config.tokens_per_microbatch, self.config.checkpoint_activations
        # activations are held in the pool; first subtract what training needs outside the pool
        spare = (
            free
            - self.optimizer
            - max(
                phase.gradients + phase.workspace_bytes(tokens, checkpointed, beyond_pool=0)
                for phase in self._phases
            )
        )
        return max(2, int(spare * _SHARE) // size) - 1

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the KV pool that sequences can use."""
        return (
            self.kv_pool
            // block_bytes(self._decoder.weights(), self._cache.block_size, self._cached)
            - 1
        )

    # ---- the training forward --------------------------------------------------------------------
    def layer_bytes(self, tokens: int) -> int:
        """Return the bytes that one layer holds for its backward pass, its input included."""
        c, N, layer = self.model, tokens, self._decoder.layers[0]
        qkv, out = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.num_heads * c.head_dim
        rotated = (c.num_heads + c.num_kv_heads) * c.head_dim if c.inv_freq else 0
        norms = 4 if c.norms == "sandwich" else 2
        floats = (
            norms
            + c.num_heads
            + {"head": c.num_heads + c.num_kv_heads, "projection": 2, None: 0}[c.qk_norm]
        )  # 1 / rms of norms, attention's log-sum-exps
        # gated GELU is torch's own, and keeps its gate's value as well
        feed_forward = 2 if not c.gated else 3 if c.activation == "silu" else 4
        width = (
            (1 if c.parallel else 2) * c.hidden_size
            + norms * c.hidden_size
            + feed_forward * c.intermediate_size
        )
        floats += norms if c.layer_norm else 0  # means
        inner = (
            sum(self._lora.rank * len(rows) for rows in cast(LayerAdapter, layer.lora).rows)
            if self._lora is not None
            else 0
        )  # A x
        # products, attention and the MLP hold their inputs in two bytes (model/wide.py)
        if self._cached.itemsize < self._a:
            behind = {"pre": 0, "post": 2, "sandwich": 2}[c.norms]
            wide = (
                (1 if c.parallel else 2) * c.hidden_size
                + behind * c.hidden_size
                + inner
                + (qkv if c.qk_norm else 0)
            )
            narrow = 2 * c.hidden_size + qkv + out + (3 if c.gated else 2) * c.intermediate_size
            copies = sum(p.numel() for name, p in layer.named_parameters() if "norm" in name)
            return (
                N * (wide * self._a + narrow * self._e + 4 * (floats - c.num_heads))
                + copies * self._a
            )
        copies = (
            sum(p.numel() for name, p in layer.named_parameters() if "norm" in name)
            if self._a > self._e
            else 0
        )  # as wide as what they multiply
        return N * ((width + qkv + rotated + out + inner) * self._a + 4 * floats) + copies * self._a

    def activation_bytes(self, tokens: int, checkpointed: bool) -> int:
        """Return the bytes that the training forward holds for the backward pass, as autograd's
        saved tensors count them. Heads are included, but logits that a head keeps are not."""
        c, N, e, L = self.model, tokens, self._e, self.model.num_layers
        boundary = N * c.hidden_size * self._a
        # The first layer has one input; in a parallel layout the second layer shares it.
        layers = (
            (2 * L - 1 - (c.parallel and L > 1)) * boundary
            if checkpointed
            else L * self.layer_bytes(N)
        )
        angles = 1 if c.learned_positions else len(c.inv_freq)  # positions, or cos and sin
        ids = N * 8 if self._lora is None else 0  # for an embedding that is trained
        # token ids, angles, the last norm
        trunk = ids + N * 8 * angles + layers + boundary + (8 if c.layer_norm else 4) * N
        if isinstance(self.config, RewardModelConfig):
            return (
                trunk
                + (N * c.hidden_size * e + N * (8 + 12) if self._imitates else 0)
                + (N * (4 * c.hidden_size + 1) if self._values else 0)
            )
        return (
            trunk
            + N * c.hidden_size * e
            + N * (8 + 12 + 1)
            + (N + (N * c.hidden_size * 4 if e < 4 else 0) if self._critic else 0)
        )

    def _kept_logits(self, tokens: int) -> int:
        """Return the bytes of logits that the C++ heads keep for their backward pass, which is the
        first to run: those of one model if log-probabilities are computed before the loss, of two
        models for the KL over the vocabulary."""
        config, each = self.config, 4 * tokens * self.model.vocab_size
        if self.device.type != "cpu" or not native.capability:
            return 0
        whole = (
            isinstance(config, PolicyConfig)
            and config.kl.estimator == "full"
            and config.kl.placement == "loss"
        )
        return (each if self._apart and keeps_logits(None, each) else 0) + (
            2 * each if whole and keeps_logits(None, 2 * each) else 0
        )

    def _head_workspace(self, tokens: int, checkpointed: bool) -> int:
        """Return the bytes of logits, and on a GPU of their gradients, that the head allocates. On
        a GPU it computes in what the activations leave of the KV pool if that is enough."""
        V = self.model.vocab_size
        if self.device.type == "cpu":
            return min(workspace(None, tokens, V), 4 * tokens * V)
        needed = workspace(None, tokens, V, self.device, gradients=self._e)
        idle = self.kv_pool - self.activation_bytes(tokens, checkpointed)
        return 0 if idle >= needed else needed

    def beyond_pool(self, tokens: int, checkpointed: bool) -> int:
        """Return the bytes of activations that do not fit into the KV pool's memory, which training
        borrows."""
        return max(0, self.activation_bytes(tokens, checkpointed) - self.kv_pool)

    def workspace_bytes(
        self, tokens: int, checkpointed: bool, beyond_pool: int | None = None
    ) -> int:
        """Return the bytes that the peak needs besides the fixed parts and the activations; at
        least 0. `beyond_pool` is the bytes of activations that do not fit into the KV pool; by
        default, what the method `beyond_pool` returns."""
        c, N, e, a = self.model, tokens, self._e, self._a
        boundary, F = N * c.hidden_size * a, c.intermediate_size
        head, down = (
            (c.vocab_size * c.hidden_size, F * c.hidden_size) if self._lora is None else (0, 0)
        )  # what has a gradient
        rise = 0

        def widened(numel: int) -> int:
            """Return how many bytes of a weight are widened to float32 at a time."""
            return min(TILE, 4 * numel) if a > e else 0

        if not isinstance(self.config, RewardModelConfig) or self._imitates:
            each, learnt = (
                4 * N * c.vocab_size,
                c.vocab_size * c.hidden_size if self._imitates else head,
            )
            logits = self._head_workspace(N, checkpointed)
            if isinstance(self.config, PolicyConfig) and self.config.strict:
                # the backward pass holds the logits and their gradient
                logits = 2 * each if keeps_logits(None, each) else logits
            tile, narrow_copy = widened(c.vocab_size * c.hidden_size), learnt * e if e < 4 else 0
            rise = N * c.hidden_size * e
            if kept := self._kept_logits(N):  # the weight is not read again beside its gradient
                rise += kept + max(each + max(learnt * 4, tile), learnt * 4 + narrow_copy)
            else:
                rise += logits + learnt * 4 + max(narrow_copy, tile)
        # The backward pass of the last layer: the gradients of its feed-forward, whose inputs are
        # freed on the way; or the gradient of its wider product, with a widened tile, or with its
        # inputs in two bytes.
        up = (2 if c.gated else 1) * F * c.hidden_size
        narrow = narrow_products(self.device, self.dtype)
        rounded = N * (up // c.hidden_size + 2 * c.hidden_size) * e if narrow else 0
        inside = (
            max(
                max(2 * N * F * a, N * F * a + down * e, 2 * down * e) + widened(F * c.hidden_size),
                (up * e if down else 0) + (rounded if narrow else widened(up)),
            )
            + 2 * boundary
        )
        inside += self.layer_bytes(N) if checkpointed else 0
        held = self.beyond_pool(N, checkpointed) if beyond_pool is None else beyond_pool
        embedding = head * e + 3 * boundary - held  # by then the activations are gone
        generate = max(self._generation_bytes(), self._visiting) - held
        # with tied embeddings, the head's gradient is kept until the embedding's is added
        tied = head * e if c.tie_embeddings and rise and not self._imitates else 0
        if isinstance(self.config, PolicyConfig) and self.config.strict:
            # the recomputed forward's gradients are complete before they are added
            embedding += self._backward
        return max(0, rise, inside + tied, embedding + tied, generate, self._exchange - held)

    def _generation_bytes(self) -> int:
        if not isinstance(self.config, SamplingConfig):
            return 0
        c, rows = (
            self.model,
            min(
                self._cache.max_sequences,
                self.config.prompts_per_step * self.config.samples_per_prompt,
            ),
        )
        return 4 * rows * c.vocab_size

    # ---- together --------------------------------------------------------------------------------
    def parts(self, tokens: int, checkpointed: bool) -> Parts:
        """Return the memory of a run whose micro-batches have `tokens` tokens."""
        each = (
            Parts(
                self.weights,
                self.reference,
                phase.gradients,
                self.optimizer,
                self.kv_pool,
                self.rotary,
                phase.beyond_pool(tokens, checkpointed),
                phase.workspace_bytes(tokens, checkpointed),
            )
            for phase in self._phases
        )
        return max(each, key=lambda parts: parts.peak)

    def largest(self, memory: int, checkpointed: bool) -> int:
        """Return the largest micro-batch, in tokens, that fits in `memory`; 0 if none fits."""
        low, high = 0, _MOST_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high)
                if self.parts(middle, checkpointed).peak <= memory
                else (low, middle - 1)
            )
        return low


def plan(
    config: StageConfig,
    *,
    memory: int | None = None,
    cache: CacheConfig | None = None,
    devices: int = 1,
) -> Plan:
    """Return the memory that a run of this configuration takes. Only the model's config.json is
    read, and the prompts, if they exist, for the length of the longest.

    Args:
        memory: bytes the run may take; if None, the device's memory.
        cache: configuration of the KV pool, if it is not the default.
        devices: number of devices the run is split across; the plan is for one device.
    Raises:
        ConfigError: the number of lanes is not a multiple of `devices`.
        FileNotFoundError, ValueError: the model is missing, or of a family that is not supported.
        DataError: a run would refuse the prompts.
    """
    device = resolve_device(config.device)
    memory = machine_memory(device) if memory is None else memory
    longest = longest_prompt(config) if isinstance(config, PolicyConfig | RejectionConfig) else None
    planner_of = partial(
        Planner,
        read_model_config(config.model),
        config,
        cache=cache,
        memory=memory,
        longest=longest,
    )
    planner = planner_of(devices=devices)
    tokens, both = config.tokens_per_microbatch, (False, True)
    parts = planner.parts(tokens, config.checkpoint_activations)
    return Plan(
        config.model,
        str(planner.dtype).removeprefix("torch."),
        str(device),
        devices,
        memory,
        tokens,
        config.checkpoint_activations,
        planner.demand,
        planner.demand_met,
        parts,
        {c: planner.activation_bytes(tokens, c) for c in both},
        {c: planner.parts(tokens, c).peak for c in both},
        {c: planner.largest(memory, c) for c in both},
        {
            t: _by_groups(parts, planner_of(devices=devices // t), t)
            for t in (2, 4, 8)
            if devices % t == 0
        },
    )


def _by_groups(parts: Parts, replicas: Planner, t: int) -> Parts:
    """Return what a device would hold in a tensor-parallel group of `t`: a part of what it would
    hold if each group was one device. The cache stays as it is: a group generates the sequences of
    t devices, with 1 / t of a token's cache on each."""
    return replace(
        parts,
        weights=replicas.weights // t,
        reference=replicas.reference // t,
        gradients=replicas.gradients // t,
        optimizer=replicas.optimizer // t,
    )


def cache_for(config: PolicyConfig | RejectionConfig, devices: int = 1) -> CacheConfig:
    """Return the KV cache that `train` gives a policy; on a CPU, the default one.

    Call it before anything is loaded. On a GPU the cache gets the memory that is free now minus
    what training will need, but never more than the run needs (`demand_of`). Once the prompts are
    read, `HybridActor.limit_cache` can reduce it further.

    Raises:
        ConfigError: training leaves no memory for the cache; the message gives the figures.
    """
    device = resolve_device(config.device)
    if device.type != "cuda":
        return CacheConfig()
    free = torch.cuda.mem_get_info(device)[0]
    planner = Planner(read_model_config(config.model), config, memory=free, devices=devices)
    parts = planner.parts(config.tokens_per_microbatch, config.checkpoint_activations)
    if parts.peak > free:
        held, rest = (
            format_bytes(parts.fixed - parts.kv_pool),
            format_bytes(parts.peak - parts.fixed + parts.kv_pool),
        )
        raise ConfigError(
            f"config: expected training to leave memory for the KV cache: of {format_bytes(free)} "
            f"free on {device}, weights, reference, "
            f"gradients and optimizer take {held}, and a micro-batch of "
            f"{config.tokens_per_microbatch} tokens {rest}; lower "
            "tokens_per_microbatch, or set checkpoint_activations or optim.state int8; fusedrl "
            "plan shows what would fit"
        )
    return CacheConfig(num_blocks=planner.num_blocks)


def _cache_row(found: Plan) -> str:
    if found.demand is None:
        return "KV cache"
    sequences, tokens = found.demand
    asked = f"{sequences:,} sequences of {tokens:,} tokens"
    if found.demand_met:
        return f"KV cache: {asked}"
    # a cache has at least the blocks of one sequence, whatever is left
    least = found.parts.peak > found.memory
    return f"KV cache: {'the least' if least else 'what is left'}; {asked} wait"


def _tensor_table(found: Plan) -> Any:
    """Return a table of what a device would hold with tensor parallelism."""
    from rich.table import Table

    table = Table(
        title="with tensor parallelism: computed; not built, so that a run cannot choose it",
        title_justify="left",
    )
    for name in ("devices to a group", "weights", "gradients", "optimizer", "all that is fixed"):
        table.add_column(name, justify="right")
    for t, parts in {1: found.parts, **found.tensor_parallel}.items():
        counts = (parts.weights, parts.gradients, parts.optimizer, parts.fixed)
        table.add_row(str(t), *map(format_bytes, counts))
    return table


def no_fit(found: Plan, options: Collection[str]) -> str:
    """Return why a plan does not fit, and which of the stage's options would make it smaller."""
    parts = found.parts
    fixes = []
    some = any(found.largest.values())
    if most := found.largest[found.checkpoint_activations]:
        fixes.append(f"--tokens_per_microbatch {most} or less")
    if not found.checkpoint_activations and (most := found.largest[True]):
        fewer = f" with --tokens_per_microbatch {most}" * (most < found.tokens_per_microbatch)
        fixes.append(f"--checkpoint_activations true{fewer}")
    if parts.kv_pool:
        fixes.append("a lower --max_prompt_length and --generation.max_new_tokens")
    if not some:
        fixes.append("--optim.state int8")
        fixes.append("--lora.rank 16, which trains adapters alone")
    known = [one for one in fixes if re.findall(r"--([\w.]+)", one)[0] in options]
    if found.devices == 1:
        known.append("--devices N")
    known.append("a smaller model")
    return (
        f"plan: expected a peak of at most {format_bytes(found.memory)}, got "
        f"{format_bytes(parts.peak)}; what makes it smaller: {'; '.join(known)}"
    )


def print_plan(found: Plan) -> None:
    """Print the plan as a table on standard output."""
    from rich.table import Table

    from fusedrl.engine.base.tables import console, show

    parts, tokens = found.parts, found.tokens_per_microbatch
    each = f", each of {found.devices}" if found.devices > 1 else ""
    table = Table(
        title=f"{found.model}: {found.dtype} on {found.device}{each}, {tokens:,} tokens a "
        "micro-batch",
        title_justify="left",
    )
    table.add_column("memory")
    table.add_column("bytes", justify="right")
    more = ", checkpointed" if found.checkpoint_activations else ""
    more += ", beyond the cache" if parts.kv_pool else ""
    rows = {
        "weights": parts.weights,
        "reference and reward models": parts.reference,
        "gradients": parts.gradients,
        "optimizer: moments and float32 masters": parts.optimizer,
        _cache_row(found): parts.kv_pool,
        "tables of cos and sin": parts.rotary,
        f"activations of a micro-batch{more}": parts.activations,
        "workspace at the peak": parts.workspace,
    }
    for name, count in rows.items():
        if count:
            table.add_row(name, format_bytes(count))
    table.add_section()
    table.add_row("peak", format_bytes(parts.peak))
    table.add_row("available", format_bytes(found.memory))
    to = console()
    show(table, to)
    if found.tensor_parallel:
        show(_tensor_table(found), to)
    for checkpointed, name in ((False, "without"), (True, "with")):
        most, needed = found.largest[checkpointed], format_bytes(parts.fixed)
        verdict = (
            f"at most {most:,} tokens a micro-batch"
            if 0 < most < _MOST_TOKENS
            else "any micro-batch fits"
            if most
            else f"nothing fits: {needed} are taken before the first token"
        )
        to.print(
            f"{name} checkpoint_activations: {verdict} (activations of {tokens:,}: "
            f"{format_bytes(found.activations[checkpointed])})",
        )
    to.print(
        "The interpreter and its libraries, about 0.5 GiB, or a CUDA context come on top.",
    )
