"""A CUDA device for a machine without one (`--device pretended`): tensors that say that they lie on
cuda:0 and have their numbers on the CPU.

What it shows: a test that leaves a tensor on the CPU beside those of its device (the operation
fails, as it would there), one that makes nothing on its device, one that reads a CUDA tensor by
.numpy(). The Python of the ops is that of CUDA: torch and Triton are chosen as there, Triton's
kernels interpreted. Fails here and not there: a shape changed in place (a product of a vector),
gradients that autograd itself fills with zeros, and products of bfloat16, whose bits the
interpreter truncates. What it does not show: compiled kernels, CUDA C++, streams, graphs,
torch.compile and opcheck (nothing happens in them), speed, memory, a card's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda:0")
ANYWHERE = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}  # also of tensors on two devices
FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
    "zeros_like",
)
MEMORY = 64 << 20  # of the card, bytes
made = 0  # tensors on the device so far


def is_card(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def bare(tree: Any) -> Any:
    return tree_map_only(OnCard, lambda x: x.inner, tree)


class OnCard(torch.Tensor):
    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnCard:
        global made
        made += 1
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",
            requires_grad=False,
        )
        self.inner = inner
        return self

    device = property(lambda self: DEVICE)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    def __repr__(self, **options: Any) -> str:
        return f"OnCard({self.inner!r})"

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        new = OnCard(self.inner.clone()).requires_grad_(self.requires_grad)
        return memo.setdefault(
            id(self),
            torch.nn.Parameter(new, self.requires_grad)
            if isinstance(self, torch.nn.Parameter)
            else new,
        )

    def numpy(self, **options: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def new_tensor(self, data: Any, **options: Any) -> torch.Tensor:
        return OnCard(self.inner.new_tensor(data, **options))

    def cpu(self, *args: Any) -> torch.Tensor:
        return _Move.apply(self, False)

    def cuda(self, *args: Any) -> torch.Tensor:
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name, leaves = (
            func._schema.name,
            [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)],
        )
        if name not in ANYWHERE and any(x.ndim and not isinstance(x, OnCard) for x in leaves):
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two "
                "devices, cuda:0 and cpu: "
                + ", ".join(f"{tuple(x.shape)} on {x.device}" for x in leaves)
            )
        wrappers = {id(x.inner): x for x in leaves if isinstance(x, OnCard)}
        args, kwargs = bare((args, kwargs or {}))
        if is_card(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if func is torch.ops.aten.mm.dtype:  # bfloat16 in, float32 out: a card's alone
            out = (args[0].float() @ args[1].float()).to(args[2])
        else:
            out = func(*args, **kwargs)
        if name == "aten::copy_" and id(args[0]) not in wrappers:  # to the host
            return out
        return tree_map_only(
            torch.Tensor, lambda x: wrappers[id(x)] if id(x) in wrappers else OnCard(x), out
        )


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, there):
        ctx.there = there
        return OnCard(x.detach().clone()) if there else x.inner.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad.inner.clone() if ctx.there else OnCard(grad.clone())), None


def _made(factory: Callable) -> Callable:
    def make(*args: Any, **options: Any) -> torch.Tensor:
        like = factory.__name__.endswith("_like")
        where = options.get("device") or (args[0].device if like else None)
        needs = options.pop("requires_grad", False)
        options.pop("pin_memory", None)
        if where is not None:
            options["device"] = "cpu" if is_card(where) else where
        args, options = tree_map_only(OnCard, lambda x: x.inner.detach(), (args, options))
        out = factory(*args, **options)
        return (OnCard(out) if is_card(where) else out).requires_grad_(needs)

    return make


def _to(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    where, rest = options.pop("device", None), []
    for x in args:
        if isinstance(x, torch.Tensor):
            where, x = x.device, x.dtype
        if isinstance(x, (str, torch.device)):
            where = x
        elif isinstance(x, torch.dtype):
            rest.append(x)
    if (
        where is not None
        and torch.device(where).type != "meta"
        and is_card(where) != isinstance(self, OnCard)
    ):
        self = _Move.apply(self, is_card(where))
        where = None
    if where is not None and not is_card(where):
        rest.insert(0, where)
    return _TO(self, *rest, **options) if rest or options else self


_TO = torch.Tensor.to


def begin() -> None:
    """From here to the end of the process there is a card."""
    from triton.runtime import interpreter

    from fusedrl.engine.generation import generator
    from fusedrl.engine.model import sharing, watch
    from fusedrl.engine.tools.verify import grid

    for name in FACTORIES:
        setattr(torch, name, _made(getattr(torch, name)))
    as_tensor = torch.as_tensor
    torch.as_tensor = lambda x, dtype=None, device=None: (
        x if isinstance(x, torch.Tensor) else as_tensor(x)
    ).to(device=device, dtype=dtype)
    torch.Tensor.to, torch.Tensor.cuda = _to, lambda self, *args: _Move.apply(self, True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    grid.interpreted = lambda impl, device: impl == "triton"
    torch.Tensor.pin_memory = lambda self: self
    torch.cuda.Event = lambda: SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    torch.cuda.current_stream = lambda device=None: None
    torch.cuda._lazy_init = lambda: None
    torch.cuda.mem_get_info = lambda device=None: (MEMORY, MEMORY)
    torch.cuda.max_memory_allocated = lambda device=None: 0
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        total_memory=MEMORY, name="pretended"
    )
    watch.Tensor = sharing.Tensor = OnCard  # of which its parameters are
    generator.CudaCapture = lambda device: lambda step, state: step
    torch.cuda.synchronize, torch.cuda.is_current_stream_capturing = (
        lambda device=None: None,
        lambda: False,
    )
    torch.compile = lambda function=None, **options: function or (lambda f: f)
    # of fake tensors of the class that it is given
    torch.library.opcheck = lambda *arguments, **options: None
    launch = interpreter.GridExecutor.__call__
    interpreter.GridExecutor.__call__ = lambda self, *args, **options: launch(
        self, *bare(args), **options
    )
