"""What every op promises beside its numbers: registration, one graph, no look from the host, inputs
left alone, memory within its bounds."""

import contextlib
import ctypes
import importlib
import os
import pkgutil
import signal
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrl.kernels
from fusedrl.engine.tools.verify.catalogue import CATALOGUE, pairs
from fusedrl.engine.tools.verify.grid import oracle, run, same_bits
from fusedrl.kernels.runtime.dispatch import CannotServe, Implementations

pytestmark = pytest.mark.usefixtures("small_tiles")


def plain_for(entry, impl):
    """The plain case; in bfloat16 for what serves narrow dtypes alone."""
    return entry.plain(
        **({"dtype": torch.bfloat16} if impl in ("flash_attn", "torch_varlen") else {})
    )


def modules():
    names = sorted(
        m.name
        for m in pkgutil.iter_modules(fusedrl.kernels.__path__)
        if not m.name.startswith("_C_")
    )
    return [importlib.import_module(f"fusedrl.kernels.{name}") for name in names]


def test_every_table_has_an_entry():
    tables = {
        id(value): value.op
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, Implementations)
    }
    mine = {entry.table.op for entry in CATALOGUE.values()}
    # "rms_norm of float64" is another table of rms_norm
    missing = {op for op in tables.values() if op.split(" of ")[0] not in mine}
    assert not missing, (
        f"engine/tools/verify/catalogue lacks {sorted(missing)}: its docstring shows an entry"
    )
    assert all(impl in {"torch", "cpp", "triton"} for _, impl in pairs())


# ---- registration --------------------------------------------------------------------------------
class Recorded(TorchFunctionMode):
    """Calls of torch.ops.fusedrl.* from Python, with what the dispatcher calls below them: op ->
    lists of arguments, one a signature."""

    def __init__(self):
        super().__init__()
        self.calls = {}
        outer = self

        class Below(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                outer.note(func, args, kwargs)
                return func(*args, **(kwargs or {}))

        self.below = Below()

    def note(self, func, args, kwargs):
        op = getattr(func, "default", func)
        name = str(op).removesuffix(".default").replace(".", "::")
        if name.startswith("fusedrl::") and not kwargs:
            kind = tuple(type(a).__name__ for a in args)
            self.calls.setdefault(name, {}).setdefault(kind, (op, [kept(a) for a in args]))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.note(func, args, kwargs)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        super().__enter__()
        self.below.__enter__()
        return self

    def __exit__(self, *exception):
        self.below.__exit__(*exception)
        super().__exit__(*exception)


def kept(argument):
    """A copy as it came: a leaf that requires a gradient where it did."""
    if isinstance(argument, torch.Tensor):
        return argument.detach().clone().requires_grad_(argument.requires_grad)
    return [kept(a) for a in argument] if isinstance(argument, list) else argument


@pytest.fixture(scope="session")
def recorded(device):
    with Recorded() as log:
        for op, impl in pairs(device):
            entry = CATALOGUE[op]
            with contextlib.suppress(CannotServe):  # on a GPU some serve narrow dtypes alone
                run(entry, entry.problem(entry.plain(), device=device), impl)
        entry = CATALOGUE["decode_step"]  # between bfloat16 weights it has products of its own
        run(entry, entry.problem(entry.plain(dtype=torch.bfloat16), device=device), "triton")
    return log.calls


def registered(kind="cpu"):
    """Those that serve tensors of a kind of device."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fusedrl::")}
    if kind == "cuda":
        return sorted(
            name
            for name in names
            if any(
                torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
                for key in ("CUDA", "CompositeExplicitAutograd")
            )
        )
    # Ops of CUDA tensors alone are run without a GPU by test_cuda_*.py, their kernels through
    # csrc/simt.
    return sorted(
        name
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        or torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
        or (
            torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutogradCPU")
            and "_cuda" not in name
        )
    )


def test_every_registered_op_is_exercised(recorded, device):
    wanted = set(registered(device.type))
    assert wanted <= set(recorded), (
        f"no entry of the catalogue reaches {sorted(wanted - set(recorded))}"
    )


@pytest.mark.parametrize(
    "name",
    sorted({*registered(), *registered("cuda")} if torch.cuda.is_available() else registered()),
)
def test_opcheck(recorded, name, device):
    if name not in registered(device.type):
        pytest.skip(f"{name} does not serve tensors on {device.type}")
    op, arguments = next(iter(recorded[name].values()))
    if "forward" in name or "backward" in name:  # autograd calls it outside of any graph
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(op, tuple(arguments))


# ---- one graph, and no look from the host --------------------------------------------------------
# Tracing runs everything above the custom ops on fake tensors, of which .item(), .tolist(), bool()
# and nonzero() are graph breaks: fullgraph refuses them. The exception that the documentation
# names: torch's heads read how many rows are active.
READS_A_COUNT = {(op, "torch") for op in ("linear_logprob", "linear_full_kl", "linear_policy_loss")}


@pytest.mark.each_pair(xfail=dict.fromkeys(READS_A_COUNT, "reads the number of active rows"))
def test_compiles_as_one_graph(op, impl, device):
    entry = CATALOGUE[op]
    problem = entry.problem(plain_for(entry, impl), device=device)
    eager = run(entry, problem, impl)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: entry.forward(x, problem.settings, impl), fullgraph=True, backend="eager"
    )
    traced = run(entry, problem, impl, lambda x, s, impl: compiled(x))
    assert eager.keys() == traced.keys()
    assert all(
        torch.allclose(eager[n], traced[n], rtol=1e-6, atol=1e-6, equal_nan=True) for n in eager
    )


# ---- gradients -----------------------------------------------------------------------------------
SMOOTH = {
    "kl_loss": {"estimator": "k2"},
    "linear_logprob": {"H": 5},
    "linear_policy_loss": {"H": 5},
}


@pytest.mark.parametrize("op", [op for op, entry in CATALOGUE.items() if entry.wants])
def test_gradcheck_of_the_definition(op, device):
    entry = CATALOGUE[op]
    small = {"N": 5} | ({"V": 33} if "V" in entry.levels else {}) | SMOOTH.get(op, {})
    wide = entry.problem(
        entry.plain(**{name: value for name, value in small.items() if name in entry.levels}),
        device=device,
    ).wide()
    names = [name for name in entry.wants if wide.x.get(name) is not None]

    def function(*leaves):
        outputs = entry.definition(wide.x | dict(zip(names, leaves, strict=True)), wide.settings)
        return tuple(outputs[name] for name in wide.upstream)

    leaves = [wide.x[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        function, leaves, fast_mode=sum(leaf.numel() for leaf in leaves) > 300
    )


# ---- inputs and outputs --------------------------------------------------------------------------
# In place on a padded layout: the gradient takes the place of the logits and of nothing else. (That
# other ops leave their inputs alone, the storage around them included, is asserted in every case of
# the grid.)
@pytest.mark.each_pair(lambda op, impl: op == "logprob_")
def test_in_place_writes_its_own_columns_only(op, impl, device):
    entry = CATALOGUE[op]
    problem = entry.problem(entry.plain(layout="padded", dtype=torch.bfloat16), device=device)
    logits = problem.x["logits"]
    whole = logits.as_strided((logits.shape[0], logits.stride(0)), logits.stride())
    whole[:, logits.shape[1] :] = 7.0
    leaf = logits.detach().requires_grad_()
    logp, _ = entry.forward(problem.x | {"logits": leaf}, problem.settings, impl).values()
    logp.sum().backward()
    assert whole[:, logits.shape[1] :].eq(7.0).all()
    assert torch.equal(logits, leaf.grad)


@contextlib.contextmanager
def uninitialised_memory_is_nan():
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


@pytest.mark.each_pair
def test_every_element_of_a_result_is_written(op, impl, device):
    """What torch.empty hands out is NaN, or the largest integer: a result that is read or returned
    unwritten shows."""
    entry = CATALOGUE[op]
    problem = entry.problem(plain_for(entry, impl), device=device)
    plain = run(entry, problem, impl)
    with uninitialised_memory_is_nan():
        filled = run(entry, problem, impl)
    assert all(same_bits(plain[name], filled[name]) for name in plain)


GUARDED = """
import sys
sys.path[:0] = {path!r}
import torch
from fusedrl.engine.tools.verify.catalogue import CATALOGUE, pairs
from fusedrl.engine.tools.verify.grid import run, sample_of_grid
torch.set_num_threads(1)
for op, impl in pairs():
    if impl == "cpp":
        for case in [CATALOGUE[op].plain(), *sample_of_grid(CATALOGUE[op], "cpp", 6, 1 << 14)]:
            run(CATALOGUE[op], CATALOGUE[op].problem(case), impl)
print("intact", flush=True)
import ctypes
victim = torch.zeros(5)
ctypes.memset(victim.data_ptr() + 20, 0, 4)  # one element too many: the canary must sing
del victim
print("silent")
"""


def test_canaries_around_what_cpp_writes():
    """glibc's checking allocator puts a canary behind every block and aborts when it is gone at the
    block's release."""
    library = "libc_malloc_debug.so.0"
    try:
        ctypes.CDLL(library)
    except OSError:
        pytest.skip(f"no {library} beside this C library")
    environment = os.environ | {
        "LD_PRELOAD": library,
        "MALLOC_CHECK_": "3",
        "MALLOC_PERTURB_": "165",
    }
    here = [p for p in sys.path if p]
    done = subprocess.run(
        [sys.executable, *["-S"] * sys.flags.no_site, "-c", GUARDED.format(path=here)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith("intact"), (
        f"exit status {done.returncode}: {done.stdout} {done.stderr[-2000:]}"
    )
    assert done.returncode == -signal.SIGABRT


class Canaries:
    """Within the block, what Triton's launchers allocate lies between two zones of a known byte,
    and is itself that byte until it is written."""

    ZONE, BYTE = 256, 0xA5

    def __init__(self, monkeypatch):
        self.blocks, real = [], torch.empty

        def guarded(shape, dtype, device):
            shape = torch.Size(shape)
            size = shape.numel() * dtype.itemsize
            block = real(size + 2 * self.ZONE, dtype=torch.uint8, device=device).fill_(self.BYTE)
            self.blocks.append((block, size))
            return block[self.ZONE : self.ZONE + size].view(dtype).view(shape)

        def new_empty(tensor, *size, dtype=None, device=None, **rest):
            return guarded(
                size[0] if size and not isinstance(size[0], int) else size,
                dtype or tensor.dtype,
                device or tensor.device,
            )

        def empty(*size, dtype=torch.float32, device="cpu", **rest):
            return guarded(
                size[0] if size and not isinstance(size[0], int) else size, dtype, device
            )

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(
            torch,
            "empty_like",
            lambda t, dtype=None, **rest: guarded(t.shape, dtype or t.dtype, t.device),
        )

    def intact(self):
        return all(
            bool(
                (block[: self.ZONE] == self.BYTE).all()
                and (block[self.ZONE + size :] == self.BYTE).all()
            )
            for block, size in self.blocks
        )


@pytest.mark.each_pair(lambda op, impl: impl == "triton")
def test_canaries_around_what_triton_writes(op, impl, device):
    entry = CATALOGUE[op]
    problem = entry.problem(entry.plain(), device=device)
    with pytest.MonkeyPatch.context() as monkeypatch:
        canaries = Canaries(monkeypatch)
        run(entry, problem, impl)
    assert canaries.blocks
    assert canaries.intact()


@pytest.mark.cpu_only("a write beyond the end")
def test_a_canary_sings():
    with pytest.MonkeyPatch.context() as monkeypatch:
        canaries = Canaries(monkeypatch)
        out = torch.empty(5)
        out.zero_()
        assert canaries.intact()
        out.as_strided((6,), (1,))[5] = 0.0
        assert not canaries.intact()


# ---- memory --------------------------------------------------------------------------------------
@pytest.mark.cpu_only("torch's profiler counts what is allocated on a CPU")
@pytest.mark.each_pair(lambda op, impl: op.startswith("linear_") and impl != "triton")
def test_heads_stay_within_their_workspace(op, impl, device):
    """No block larger than the workspace (an N x V one would be ten times that), forward and
    backward; torch's steps hold a few of that size at once."""
    entry = CATALOGUE[op]
    case = entry.plain(N=33, V=1025, H=16, workspace=3, mask="all")
    problem = entry.problem(case, device=device)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run(entry, problem, impl)
    rows = 2 if op == "linear_full_kl" else 1
    weight_gradient = problem.x["weight"].numel() * 4
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= max(3 * rows * case["V"] * 4, weight_gradient), (largest, weight_gradient)


@pytest.mark.cpu_only("dtypes alone")
def test_oracle_is_float64():
    for entry in CATALOGUE.values():
        want = oracle(entry, entry.problem(entry.plain()))
        assert all(t.dtype in (torch.float64, torch.int64, torch.bool) for t in want.values()), (
            entry.op
        )
