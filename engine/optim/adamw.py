"""AdamW with float32 masters for low-precision parameters.

A bfloat16 weight of 0.02 has neighbours 1.2e-4 away: a step of 1e-6 rounds back to where it
started, and training stands still. So every low-precision parameter has a float32 master; the step
moves the master and rounds it into the parameter, in place. Float32 parameters are their own
masters. Other code may write to a parameter between two steps (weights that are loaded, an average
that is swapped in). Before the next step the master takes this over: an element that differs from
its rounded master becomes the new master.

A sum of gradients has the same trouble. If 256 micro-batches are added up in bfloat16, the later
ones are rounded away against the sum of the earlier ones (3.6% off; one micro-batch is 0.17% off,
and 256 added up in float32 0.015%). All stages use accumulate="float32": as soon as a backward pass
has a low-precision parameter's gradient, it is added to a float32 sum and freed, so `.grad` is None
afterwards. The sums take 4 bytes a parameter until `zero_grad`. Without them, `.grad` takes 2, and
the step copies to float32 as many gradients at a time as have 16 million numbers, or one that has
more.

With eps_mode="tensorflow", epsilon is added to the root of the biased second moment, as in
TensorFlow and in the paper's "epsilon hat":

    torch        m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    tensorflow   sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)  =  torch's with eps / sqrt(1 -
                 b2^t)          (Kingma and Ba, 2015, section 2)

With state="int8" the moments are codes of 8 bits in blocks of 256 with a float32 scale each
(Dettmers et al., 2022, 8-bit optimizers via block-wise quantization), through torchao: 2 bytes a
parameter in place of 8. Masters stay float32, and so do the moments of small and odd tensors.

With several ranks, each parameter has one rank that owns it. Only this rank has its master and its
moments, updates it, and sends it to the other ranks (Rajbhandari et al., 2020, ZeRO, stage 1).
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fusedrl.engine.base.errors import SetupError
from fusedrl.engine.config import OptimConfig
from fusedrl.engine.config.base import either
from fusedrl.engine.optim.masters import differing_parts
from fusedrl.engine.parallel.lanes import Gradients, Tree, added, owners_of, send_parameters
from fusedrl.engine.parallel.ranks import ALONE, Ranks

EPS = 1e-8  # Adam's epsilon, if neither a configuration nor an algorithm gives one
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
BLOCK = 256  # number of 8-bit moments that share a scale
SMALLEST = 4096  # number of elements below which torchao keeps the moments in float32
_NARROW = (torch.bfloat16, torch.float16)
_ROW = 4096  # elements whose squares are added up in float32
_SAMPLED = 1024  # second moments of a parameter that `below_epsilon` reads
_PART_OF_STATE = re.compile(r"\.(step|exp_avg(_sq)?(\.codes|\.scale)?|master)$")
_PART = 1 << 16  # elements that are converted to float32 at a time on a CPU
_MANY = 1 << 24  # elements of gradients that are copied to float32 at a time


def quantized(numel: int) -> bool:
    """Whether state="int8" keeps the moments of a parameter of this size in 8 bits."""
    return numel >= SMALLEST and numel % BLOCK == 0


class StepResult(NamedTuple):
    """Result of an optimizer step."""

    grad_norm: float  # before clipping
    applied: bool  # False: the norm was not finite, and nothing changed


class Optimizer:
    """AdamW optimizer made by `make_optimizer`. `lr` may be set between steps."""

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        state: Literal["float32", "int8"] = "float32",
        eps_mode: Literal["torch", "tensorflow"] = "torch",
        accumulate: Literal["parameter", "float32"] = "parameter",
        ranks: Ranks = ALONE,
    ) -> None:
        self._params = {name: p for name, p in params.items() if p.requires_grad}
        if not self._params:
            raise ValueError(
                "make_optimizer: expected parameters that require a gradient, got none"
            )
        self._ranks = ranks
        self._owners = owners_of({n: p.numel() for n, p in self._params.items()}, ranks.size)
        self._masters = {
            name: p.detach().float() if p.dtype in _NARROW else p
            for name, p in self._params.items()
            if self._owners[name] == ranks.rank
        }
        self._kinds = {name: (p.dtype, p.device) for name, p in self._params.items()}
        matrices, vectors = (
            [m for m in self._masters.values() if (m.ndim > 1) is wide] for wide in (True, False)
        )
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, weight_decay), (vectors, 0.0))
            if group
        ]
        self._eps, self._hat, self._done = eps, eps_mode == "tensorflow", 0
        self.begun = 0  # number of steps that have begun to write since this object was made
        self._adamw: Any = None  # stays None on a rank that owns nothing
        self._lr, self._int8 = lr, state == "int8"
        if not groups:
            pass
        elif self._int8:
            self._adamw = _adamw_8bit()(groups, lr=lr, betas=betas, eps=eps, block_size=BLOCK)
        else:
            self._adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        # float32 sums of the gradients of low-precision parameters since `zero_grad`
        self._sums: dict[str, Tensor] = {}
        if accumulate == "float32":
            hooks = [
                p.register_post_accumulate_grad_hook(_adder(self._sums, name))
                for name, p in self._params.items()
                if p.dtype in _NARROW
            ]
            weakref.finalize(self, lambda: [hook.remove() for hook in hooks])

    @property
    def lr(self) -> float:
        """Learning rate of all parameters."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = value
        for group in self._groups:
            # torchao compiles its step, and a new Python number would make it compile again
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def set(self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """Set AdamW's numbers for the steps from now on; see `make_optimizer`."""
        self.lr, self._eps = lr, eps
        for group in self._groups:
            wide = group["params"][0].ndim > 1
            group.update(betas=betas, eps=eps, weight_decay=weight_decay if wide else 0.0)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [] if self._adamw is None else self._adamw.param_groups

    def tree(self) -> Tree:
        """Return an empty sum for the gradients of lanes (parallel/lanes.py), for `step`."""
        like = {
            name: p.detach().new_empty((), dtype=_wide(p)).expand(p.shape)  # takes no memory
            for name, p in self._params.items()
        }
        return Tree(self._ranks, self._owners, like)

    @torch.no_grad()
    def step(self, *, max_grad_norm: float | None = None, trees: Sequence[Tree] = ()) -> StepResult:
        """Clip the gradients to a global norm, and update the parameters.

        A parameter without a gradient stays unchanged. If the norm is not finite, neither weights
        nor moments change. Reads the norm back from the device. Clipping may scale the gradients in
        place; call `zero_grad` afterwards.

        Args:
            trees: partial sums of gradients that the ranks hold; the gradient is their total. If
                empty, the gradient is what backward passes left, and every rank must have all of
                it.
        Raises:
            RuntimeError: no parameter has a gradient, or one was cast or moved since the optimizer
                was made.
        """
        self._check_kinds()
        grads: Gradients = {}
        if not trees:
            live = [name for name in self._params if self._reached(name)]
            norm = _norm_of(_row_norms(self._gradient(name)) for name in live)
            named = self._portions([name for name in live if name in self._masters])
            portions = [names for names in named if names] or [[]]
        else:
            found = set[str]()
            for tree in trees:
                part, names = tree.result()
                grads, found = added(grads, part), found.union(names)
            live = [name for name in self._params if name in found]
            norm = self._norm(grads)
            portions = [list(grads)]
        if not live:
            raise RuntimeError(
                f"Optimizer.step: none of its {len(self._params)} parameters has a gradient: no "
                "backward pass since zero_grad reached them. "
                "Where parameters were replaced since (load_state_dict(assign=True), another "
                "module), make a new optimizer"
            )
        if not math.isfinite(norm):
            return StepResult(norm, False)
        scale = max_grad_norm / norm if max_grad_norm is not None and norm > max_grad_norm else None
        self._done += 1
        if self._hat:
            for group in self._groups:
                group["eps"] = self._eps / math.sqrt(1.0 - group["betas"][1] ** self._done)
        self.begun += 1
        for names in portions:
            self._update({n: grads[n] if trees else self._gradient(n) for n in names}, scale)
        send_parameters(self._ranks, self._owners, self._params, live)
        return StepResult(norm, True)

    def _update(self, grads: Gradients, scale: float | None) -> None:
        """Update these parameters, with their gradients times `scale`. Without any it is a step all
        the same, which is noticed, on every rank alike."""
        if self._adamw is None:
            return
        if scale is not None and grads:
            torch._foreach_mul_(list(grads.values()), scale)
        low = [name for name in grads if self._masters[name] is not self._params[name]]
        self._follow(low)
        own = [name for name in self._masters if name not in grads]
        # AdamW leaves parameters alone that have no gradient
        aside = {name: self._masters[name].grad for name in own}
        for name in self._masters:
            self._masters[name].grad = grads.get(name)
        self._adamw.step()
        for name in low:
            self._masters[name].grad = None
            self._params[name].copy_(self._masters[name])
        for name, grad in aside.items():
            self._masters[name].grad = grad

    def _portions(self, names: Sequence[str]) -> list[list[str]]:
        """Divide parameters into those that are updated together: first all whose gradients are in
        the master's dtype already, then the others, few enough that their copies are small."""
        found, room = [[name for name in names if not self._copies(name)]], 0
        for name in names:
            if not self._copies(name):
                continue
            numel = self._params[name].numel()
            if numel > room:
                found.append([])
                room = _MANY
            found[-1].append(name)
            room -= numel
        return found

    def _norm(self, grads: Gradients) -> float:
        """Return the global norm of gradients that are divided among the ranks. The bits are the
        same for any number of ranks."""
        device = next(iter(self._params.values())).device
        sizes = [p.numel() // _ROW + 1 for p in self._params.values()]
        rows = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        for name, part in zip(self._params, rows.split(sizes), strict=True):
            if name in grads:
                part.copy_(_row_norms(grads[name]))
        self._ranks.sum("gradient norms", rows)
        return float(torch.linalg.vector_norm(rows))

    def _check_kinds(self) -> None:
        for name, p in self._params.items():
            if (p.dtype, p.device) != self._kinds[name]:
                was, now = (
                    f"{str(dtype).removeprefix('torch.')} on {device}"
                    for dtype, device in (self._kinds[name], (p.dtype, p.device))
                )
                raise RuntimeError(
                    f"Optimizer.step: {name} was {was} when the optimizer was made and is {now}; "
                    "its master and moments are of then. "
                    "Cast and move first, then make the optimizer"
                )

    def _follow(self, names: Iterable[str]) -> None:
        """Copy into the masters what other code wrote to their parameters since the last step."""
        pairs = [(self._params[name].detach(), self._masters[name]) for name in names]
        for narrow, wide in differing_parts(pairs):
            rounded = wide.to(narrow.dtype)
            wide.copy_(torch.where(rounded == narrow, wide, narrow.float()))

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients since `zero_grad` by name, in the masters' dtypes. They are the
        parameters' own gradients if these are float32 or wider, otherwise their float32 sums, or
        float32 copies of `.grad` if there are no sums. Parameters that no backward pass reached are
        missing."""
        return {name: self._gradient(name) for name in self._params if self._reached(name)}

    def _reached(self, name: str) -> bool:
        """Whether a backward pass has reached this parameter since `zero_grad`."""
        return self._params[name].grad is not None or name in self._sums

    def _copies(self, name: str) -> bool:
        """Whether `_gradient` is a copy."""
        p = self._params[name]
        return p.grad is not None and (name in self._sums or p.dtype != _wide(p))

    def _gradient(self, name: str) -> Tensor:
        """Return the gradient of a parameter that was reached, in the master's dtype."""
        p = self._params[name]
        if p.grad is None:
            return self._sums[name]
        if name in self._sums:  # the caller has set .grad by hand although there is a sum
            return self._sums[name] + p.grad
        return p.grad if p.dtype == _wide(p) else p.grad.float()

    def take(self) -> Gradients:
        """Return `gradients`, and keep none of them: they belong to the caller from now on."""
        found = self.gradients()
        self.zero_grad()
        return found

    def zero_grad(self) -> int:
        """Drop every gradient. Return the number of bytes freed."""
        freed = sum(p.grad.nbytes for p in self._params.values() if p.grad is not None) + sum(
            total.nbytes for total in self._sums.values()
        )
        for p in self._params.values():
            p.grad = None
        self._sums.clear()
        return freed

    @torch.no_grad()
    def below_epsilon(self) -> float | None:
        """Return the share of parameters whose second moment is below epsilon squared, among those
        that have had a nonzero gradient. Their steps are less than half of Adam's.

        It is estimated from at most 1,024 evenly spaced elements of each parameter. This costs one
        slice of each, a few operations on all, and one wait for the device. Return None before the
        first step, and with state "int8", which keeps no second moment that small.
        """
        if self._int8 or not self._done:
            return None
        shares = self._below_epsilon()
        self._ranks.sum("second moments", shares)
        below, live = shares.tolist()
        return below / live if live else None

    def _below_epsilon(self) -> Tensor:
        """Return (number below epsilon squared, number that have had a nonzero gradient) of this
        rank's parameters."""
        found = (
            [
                state["exp_avg_sq"].view(-1)
                for state in self._adamw.state.values()
                if "exp_avg_sq" in state
            ]
            if self._adamw is not None
            else []
        )
        if not found:
            device = next(iter(self._params.values())).device
            return torch.zeros(2, dtype=torch.float64, device=device)
        group = self._groups[0]  # the groups differ only in weight decay
        every = [-(-moment.numel() // _SAMPLED) or 1 for moment in found]
        some = [moment[::step] for moment, step in zip(found, every, strict=True)]
        weights = (
            torch.tensor(every, dtype=torch.float64)
            .repeat_interleave(torch.tensor([len(part) for part in some]))
            .to(found[0].device)
        )
        # correct the bias of moments that start from 0
        seen = torch.cat(some) / (1.0 - group["betas"][1] ** max(1, self._done))
        return torch.stack([(seen > 0) & (seen < group["eps"] ** 2), seen > 0]).double() @ weights

    def state_dict(self) -> dict[str, Tensor]:
        """Return moments and masters as a flat {name: tensor} of live tensors (no copies):
        `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`, `.master`. Moments of 8 bits are
        `.exp_avg.codes` and `.exp_avg.scale`. A parameter that was never updated has no moments.
        Learning rate and decay are not included, since the configuration sets them."""
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            moments = self._adamw.state.get(master, {})
            state |= {
                f"{name}.{key}{part}": tensor
                for key in _MOMENTS
                if key in moments
                for part, tensor in _stored(moments[key])
            }
            if master is not self._params[name]:
                state[f"{name}.master"] = master
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` returned; it may include parameters that other ranks own. If
        the state does not fit, nothing changes.

        Raises:
            ValueError: names that are missing or unknown, or shapes that differ.
        """
        steps = [float(tensor) for name, tensor in state.items() if name.endswith(".step")]
        elsewhere = self._params.keys() - self._masters.keys()
        state = {
            name: tensor
            for name, tensor in state.items()
            if _PART_OF_STATE.sub("", name) not in elsewhere
        }
        expected: dict[str, torch.Size] = {}
        for name, master in self._masters.items():
            if f"{name}.step" in state or f"{name}.exp_avg" in state:
                expected |= {f"{name}.{key}": shape for key, shape in self._shapes(master).items()}
            if master is not self._params[name]:
                expected[f"{name}.master"] = master.shape
        wrong = [f"missing {name}" for name in expected if name not in state] + [
            f"unknown {name}" for name in state if name not in expected
        ]
        wrong += [
            f"{n}: expected {list(s)}, got {list(state[n].shape)}"
            for n, s in expected.items()
            if n in state and state[n].shape != s
        ]
        if wrong:
            raise ValueError(
                "Optimizer.load_state_dict: the state is of other parameters: "
                f"{'; '.join(wrong[:10])}"
            )
        for name, master in self._masters.items():
            self._adamw.state.pop(master, None)
            if f"{name}.step" in state:
                self._adamw.state[master] = {
                    key: self._moment(master, name, key, state) for key in _MOMENTS
                }
            if master is not self._params[name]:
                master.copy_(state[f"{name}.master"])
                self._params[name].copy_(master)
        self._done = int(max(steps, default=0.0))

    def _shapes(self, master: Tensor) -> dict[str, torch.Size]:
        """Return the shapes of the moments that are saved for a parameter."""
        if not (self._int8 and quantized(master.numel())):
            return {"step": torch.Size(), "exp_avg": master.shape, "exp_avg_sq": master.shape}
        parts = {"codes": master.shape, "scale": torch.Size([master.numel() // BLOCK])}
        return {"step": torch.Size()} | {
            f"{key}.{part}": shape for key in _MOMENTS[1:] for part, shape in parts.items()
        }

    def _moment(self, master: Tensor, name: str, key: str, state: Mapping[str, Tensor]) -> Any:
        if f"{name}.{key}" in state:
            # the device on which each optimizer creates it
            device = "cpu" if self._int8 and key == "step" else master.device
            return state[f"{name}.{key}"].to(device, copy=True)
        moment = self._adamw._new_buffer(master, key == "exp_avg")  # the first moment has a sign
        for part, tensor in _stored(moment):
            tensor.copy_(state[f"{name}.{key}{part}"])
        return moment


def _adder(sums: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """Return a hook that moves a parameter's gradient into its float32 sum."""

    @torch.no_grad()
    def move(p: Tensor) -> None:
        if p.grad is None:  # another optimizer of the same parameter took it
            return
        grad, p.grad = p.grad, None
        if name not in sums:
            sums[name] = grad.float().contiguous()
        # on a CPU, adding two dtypes would first copy the whole gradient to float32
        elif grad.device.type == "cpu":
            for total, part in zip(
                sums[name].view(-1).split(_PART), grad.reshape(-1).split(_PART), strict=True
            ):
                total += part
        else:
            sums[name] += grad

    return move


def _stored(moment: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a moment that are saved: the moment itself, or its codes and scales."""
    return (
        [(".codes", moment.codes), (".scale", moment.scale)]
        if hasattr(moment, "codes")
        else [("", moment)]
    )


def _adamw_8bit() -> Any:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise SetupError(
            f"optim.state = int8 needs torchao, which cannot be imported ({error}); pip install "
            "'fusedrl[torchao]', or use float32"
        ) from error
    return AdamW8bit


def grad_norm(grads: Iterable[Tensor]) -> float:
    """Return the global L2 norm of these tensors; 0 without tensors. It is NaN or infinite if any
    of them contains such a value.

    Squares are summed in float32 over rows of 4096, and in float64 over the rows: one float32 sum
    of 67M squares is 0.5% off on a CPU.
    """
    return _norm_of(map(_row_norms, grads))


def _norm_of(rows: Iterable[Tensor]) -> float:
    """Return the norm of the numbers in these tensors; 0 without tensors."""
    found = list(rows)
    return float(torch.linalg.vector_norm(torch.cat(found))) if found else 0.0


def _row_norms(grad: Tensor) -> Tensor:
    """Return [numel // 4096 + 1] float64: the norms of a gradient's rows of 4096, and of the
    rest."""
    flat = grad.reshape(-1)
    whole = len(flat) // _ROW * _ROW
    wide = torch.promote_types(grad.dtype, torch.float32)
    rows = torch.linalg.vector_norm(flat[:whole].view(whole // _ROW, _ROW), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=wide)
    return torch.cat([rows, rest[None]]).double()


def _wide(p: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's master, in which its gradients are added up."""
    return torch.float32 if p.dtype in _NARROW else p.dtype


def make_optimizer(
    params: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = EPS,
    weight_decay: float = 0.0,
    state: Literal["float32", "int8"] = "float32",
    eps_mode: Literal["torch", "tensorflow"] = "torch",
    accumulate: Literal["parameter", "float32"] = "parameter",
    ranks: Ranks = ALONE,
) -> Optimizer:
    """Make AdamW (Loshchilov and Hutter, 2019) over named parameters, with float32 masters for
    parameters in bfloat16 or float16.

    Args:
        params: names and parameters, such as `module.named_parameters()`; frozen ones are left out.
        lr, betas, eps: AdamW's.
        weight_decay: decoupled; not applied to parameters of one dimension (norms, biases).
        state: precision of the moments; "int8" needs torchao, and a C++ compiler or Triton for its
            compiled step.
        eps_mode: where epsilon is added (top of this file).
        accumulate: where the gradients of several backward passes are added up. "parameter": in
            `.grad` and its dtype, as torch does. "float32": low-precision gradients in float32 sums
            of the optimizer, with `.grad` set to None (top of this file).
        ranks: ranks that share the parameters; each updates the parameters that it owns.
    Raises:
        ValueError: no parameter to train, values outside AdamW's range, or eps_mode "tensorflow"
            with "int8".
        SetupError: "int8" without torchao.
    """
    if eps_mode == "tensorflow" and state == "int8":
        raise ValueError(
            'make_optimizer: expected eps_mode "torch" with state "int8", whose compiled step has '
            'one epsilon, got "tensorflow"'
        )
    return Optimizer(dict(params), lr, betas, eps, weight_decay, state, eps_mode, accumulate, ranks)


def measure_optimizer(optimizer: Optimizer, prefix: str = "optim/") -> dict[str, float]:
    """Return the metrics of an optimizer that every stage logs, in addition to learning rate and
    gradient norm."""
    share = optimizer.below_epsilon()
    return {} if share is None else {f"{prefix}below_epsilon": share}


def optimizer_of(
    config: OptimConfig, params: Iterable[tuple[str, nn.Parameter]], ranks: Ranks = ALONE
) -> Optimizer:
    """Make the optimizer that a configuration describes, over named parameters. Low-precision
    gradients are added up in float32. Errors are those of `make_optimizer`."""
    return make_optimizer(
        params,
        lr=config.lr,
        betas=config.betas,
        eps=either(config.eps, EPS),
        weight_decay=config.weight_decay,
        state=config.state,
        eps_mode=config.eps_mode,
        accumulate="float32",
        ranks=ranks,
    )
