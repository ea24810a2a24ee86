"""What can be counted of the kernels behind the head and the sampler without a GPU: instructions in
the machine code for sm_90, chunks and bytes planned on the host. docs/kernel-report.md has the
same numbers."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fusedrl.engine.generation.arena import Arena
from fusedrl.kernels.linear_head import largest_workspace, workspace
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.linear_policy_loss import computes_in_scratch, linear_policy_loss
from fusedrl.kernels.runtime import nvrtc
from fusedrl.kernels.runtime.dispatch import use_impl

pytest.importorskip("triton")
pytestmark = pytest.mark.cpu_only("compilers, and sizes that the host computes")

from fusedrl.kernels.linear_logprob import _triton as product  # noqa: E402
from fusedrl.kernels.linear_policy_loss import _triton as policy  # noqa: E402

GPU = torch.device("cuda")
VOCABULARIES = (151936, 49152, 32000, 50257, 7)

# Compiled in a process of its own: here Triton is its interpreter.
COUNT = """
import json, sys
from tests.offline_compile import TARGETS, compile_entry, kernels
from tests.support.machine_code import disassemble

def count(op, name):
    entry = kernels([op])[f"{op}.{name}"]
    (code,) = disassemble(compile_entry(entry, TARGETS["sm_90"]).asm["cubin"]).values()
    loops, stretch = code.loops(), code.longest_stretch()
    return {
        "whole": code.count(), "loop": loops[-1].count() if loops else 0,
        "loops": sum(loop.count() for loop in loops),
        "barriers": sum(loop.count("BAR") for loop in loops),
        "stretch": stretch.count(), "products": code.count("HGMMA"), "async": code.count("LDGSTS"),
        "vectors": code.count("LDG.E.128"), "stores": code.count("STG.E.128"),
        "narrow_stores": code.count("STG.E") - code.count("STG.E.128", "STG.E.64"),
    }

print(json.dumps({name: count(*name.split(".")) for name in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def counted():
    names = (
        "logprob.forward_kernel_bf16_entropy_aligned",
        "logprob.forward_kernel_bf16_entropy",
        "logprob.forward_kernel_fp32_entropy_aligned",
        "logprob.backward_kernel_bf16_entropy_aligned",
        "linear_logprob.logits_bf16_wide",
        "linear_logprob.logits_store_bf16_wide",
        "linear_logprob.gradient_bf16",
    )
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *names], env=kept, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(json.dumps(found, indent=1))
    return found


# A thread takes 16 logits an iteration: 318, 372 and 310 instructions before.
@pytest.mark.parametrize(
    "name, most",
    [("bf16_entropy_aligned", 11), ("bf16_entropy", 12), ("fp32_entropy_aligned", 10)],
)
def test_logprob_forward(counted, name, most):
    found = counted[f"logprob.forward_kernel_{name}"]
    assert 6 * 16 < found["loop"] <= most * 16  # whole tiles; the other loop is the row's end
    assert found["barriers"] == 0
    assert bool(found["vectors"]) == name.endswith("aligned")


def test_logprob_backward(counted):
    found = counted["logprob.backward_kernel_bf16_entropy_aligned"]
    assert found["stretch"] <= 16 * 16  # 597 before
    assert found["vectors"]
    assert found["stores"]


def test_the_product_of_the_head(counted):
    for name in ("logits_bf16_wide", "logits_store_bf16_wide"):
        found = counted[f"linear_logprob.{name}"]
        assert found["products"] >= 4
        assert found["async"] >= 24
    # outside the loop over H, of a thread's 128 logits: 3,597 before
    found = counted["linear_logprob.logits_bf16_wide"]
    assert found["whole"] - found["loops"] <= 19 * 128
    assert product._PART == 128  # columns behind three float32 numbers: 32 before
    assert counted["linear_logprob.logits_store_bf16_wide"]["stores"] == 32  # 16 bytes each


def test_the_gradient_of_the_logits(counted):
    found = counted["linear_logprob.gradient_bf16"]
    assert found["whole"] <= 28 * 16  # of a thread's 16 logits: 942 before
    assert found["vectors"] >= 4
    assert found["narrow_stores"] == 0


def test_logprob_in_cuda():
    if nvrtc.loading_fault() is not None:
        pytest.skip(f"{nvrtc.loading_fault()}: pip install cuda-bindings nvidia-cuda-nvrtc")
    from tests.support.machine_code import disassemble

    code = disassemble(nvrtc.compile_cubin("logprob.cu", ("-DDTYPE=1", "-DKEPT=0"), "sm_90"))
    loop = code["logprob_forward"].loops()[0]  # four vectors of 8: 770 before
    assert loop.count("LDG.E.128") == 4
    assert loop.count("LDG.E.U16") == 0
    assert loop.count() <= 11 * 32


def test_the_sampler_s_reads_are_four_vectors_ahead():
    """So that the one block of a row has 32 KB on the way, where it had 8."""
    if nvrtc.loading_fault() is not None:
        pytest.skip(f"{nvrtc.loading_fault()}: pip install cuda-bindings nvidia-cuda-nvrtc")
    from tests.support.machine_code import disassemble

    code = disassemble(nvrtc.compile_cubin("sampling.cu", ("-DDTYPE=0",), "sm_90"))["sample"]
    read = [loop.count("LDG.E.128") for loop in code.loops()]
    assert read.count(4) == 8  # walks of a row: none before
    assert set(read) <= {0, 1, 4}  # what is left of a segment, and the draw


# ---- chunks --------------------------------------------------------------------------------------
def passes(workspace_bytes, N, V, itemsize):
    """(rows of a chunk, how often the products of the gradients run) if all rows are active."""
    R, C = policy.rows_of(workspace_bytes, N, V, itemsize)
    assert policy.padded(V) * (4 * R + itemsize * C) <= max(
        workspace_bytes, policy.padded(V) * (4 + itemsize)
    )
    held = flushes = 0
    for begin in range(0, N, R):
        end = min(begin + R, N)
        held += end - begin
        if held + min(R, N - end) > C or end == N:
            flushes, held = flushes + 1, 0
    return R, flushes


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_default_workspace_goes_by_rows(V, itemsize):
    for N, flushes in ((1, 1), (130, 1), (1000, 1), (1024, 1), (2048, 1), (4096, 2), (16384, 8)):
        given = workspace(None, N, V, GPU, gradients=itemsize)
        R, found = passes(given, N, V, itemsize)
        assert min(N, 1024) <= R <= N
        assert found <= flushes
        before = max(4 << 20, min(256 << 20, N * V * 4 // 8))
        assert given <= max(4 << 20, 6 * 1024 * (4 + 2 * itemsize) * V) or V < 1000
        assert workspace(None, N, V) == before  # on a CPU as ever
    # 1,024 rows of 151,936: chunks of 64 rows, and 7 or more flushes, before
    assert passes(workspace(None, 1024, 151936, GPU, gradients=2), 1024, 151936, 2) == (1024, 1)


def test_a_larger_workspace_runs_the_products_once():
    whole = largest_workspace(16384, 151936, 2)
    assert passes(whole, 16384, 151936, 2) == (16384, 1)
    assert passes(whole // 2, 16384, 151936, 2)[1] == 1  # all gradients beside chunks of logits
    assert passes(6 << 30, 16384, 151936, 2)[1] == 1
    assert passes(1, 16384, 151936, 2) == (1, 16384)  # a row at the least


def test_the_arena_lends_what_is_idle():
    lent = torch.zeros(1 << 20, dtype=torch.uint8)
    arena = Arena([lent])
    taken = arena.spare(10_000)
    assert taken.numel() == 10_000
    assert taken.data_ptr() == lent.data_ptr()
    rest = arena.spare(1 << 30)
    assert rest.numel() == (1 << 20) - 10_240  # from a multiple of 256 on
    assert arena.spare(1) is None
    del taken, rest
    assert arena.used == 0


def test_scratch_changes_no_bit_and_is_free_again(small_tiles):
    generator = torch.Generator().manual_seed(0)
    N, H, V = 9, 16, 133
    hidden, weight = (torch.randn(n, H, generator=generator) for n in (N, V))
    ids = torch.randint(0, V, (N,), generator=generator)
    old = linear_logprob(hidden, weight, ids)
    advantages = torch.randn(N, generator=generator)
    weights = torch.ones(N)
    hidden[4], weights[4], advantages[4] = torch.nan, 0.0, torch.nan  # masked
    arena = Arena([torch.full((1 << 22,), 255, dtype=torch.uint8)])  # NaN, read as floats

    def run(scratch):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss = linear_policy_loss(
            leaves[0], leaves[1], ids, old, advantages, weights, impl="triton", scratch=scratch
        ).loss
        loss.backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    plain = run(None)
    lent = run(arena.spare(4 << 20))
    assert arena.used == 0
    assert all(torch.equal(a, b) for a, b in zip(plain, lent, strict=True))
    assert (plain[1][4] == 0).all()
    assert plain[2].isfinite().all()
    with use_impl("triton"):
        assert computes_in_scratch(hidden.device)
    with use_impl("torch"):
        assert not computes_in_scratch(hidden.device)
