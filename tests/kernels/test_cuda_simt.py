"""csrc/simt itself: what it computes, and the faults that it must catch (tests/kernels/conftest.py
drives it)."""

from ctypes import c_float, c_int32, c_int64

import pytest
import torch

from fusedrl.kernels.runtime.nvrtc import Launch

pytestmark = pytest.mark.cpu_only(
    "csrc/simt runs the CUDA sources on a CPU; on a card they are an implementation like the others"
)

SOURCE = """
constexpr unsigned kAll = 0xffffffffu;
extern "C" __global__ void warp(int* out, int* total) {
    const int t = threadIdx.x, lane = t % 32, n = blockDim.x;
    out[t] = __shfl_xor_sync(kAll, t, 5);
    out[n + t] = __shfl_down_sync(kAll, t, 3);
    out[2 * n + t] = __shfl_up_sync(kAll, t, 3);
    out[3 * n + t] = __shfl_sync(kAll, t, 7);
    out[4 * n + t] = int(__ballot_sync(kAll, lane % 3 == 0));
    if (lane < 8) out[5 * n + t] = __shfl_xor_sync(0xffu, t, 1);
    __syncwarp();
    atomicAdd(total, 1);
}
extern "C" __global__ void reverse(float* x, int barrier) {
    __shared__ float copy[64];
    copy[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    x[threadIdx.x] = copy[63 - threadIdx.x];
}
extern "C" __global__ void uninitialised(float* x) {
    __shared__ float shared[64];
    x[blockIdx.x] = shared[0];
    shared[0] = 1.0f;
}
extern "C" __global__ void some_leave() {
    if (threadIdx.x == 3) return;
    __syncthreads();
}
extern "C" __global__ void two_barriers() {
    if (threadIdx.x < 8) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
extern "C" __global__ void half_a_warp(int* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}
extern "C" __global__ void not_in_its_mask(int* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xffu, 1, 1);
}
extern "C" __global__ void outside_the_mask(int* out) {
    if (threadIdx.x < 8) out[threadIdx.x] = __shfl_sync(0xffu, 1, 9);
}
extern "C" __global__ void takes(int a, float b, long long c, float* out) { out[0] = a + b + c; }
"""


@pytest.fixture
def call(simt, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "faults"
    folder.mkdir(exist_ok=True)
    (folder / "faults.cu").write_text(SOURCE)

    def run(kernel, *arguments, block=64, grid=1, descending=False):
        simt.descending = descending
        simt.run([Launch("faults.cu", kernel, arguments, (grid, 1, 1), block)], sources=folder)

    return run


@pytest.mark.parametrize("descending", [False, True])
def test_warp_operations(call, descending):
    t, out, total = (
        torch.arange(64),
        torch.zeros(6, 64, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
    )
    call("warp", out, total, descending=descending)
    lane, first = t % 32, t // 32 * 32
    votes = sum(1 << i for i in range(0, 32, 3))
    small = torch.where(lane < 8, t ^ 1, 0)
    rows = (
        t ^ 5,
        torch.where(lane < 29, t + 3, t),
        torch.where(lane >= 3, t - 3, t),
        first + 7,
        torch.full((64,), votes),
        small,
    )
    assert torch.equal(out, torch.stack(rows).int())
    assert total == 64


def test_a_missing_barrier_shows(call):
    results = []
    for barrier in (1, 0):
        for descending in (False, True):
            x = torch.arange(64.0)
            call("reverse", x, c_int32(barrier), descending=descending)
            results.append(x)
    assert torch.equal(results[0], torch.arange(64.0).flip(0))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[2].nan_to_num(-1), results[3].nan_to_num(-1))


def test_shared_memory_starts_as_nan_in_every_block(call):
    x = torch.zeros(3)
    call("uninitialised", x, block=1, grid=3)
    assert x.isnan().all()


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("some_leave", "divergent barrier"),
        ("two_barriers", "divergent __syncthreads"),
        ("half_a_warp", "divergent barrier"),
        ("not_in_its_mask", "not in the mask of its own"),
        ("outside_the_mask", "outside its mask"),
    ],
)
@pytest.mark.parametrize("descending", [False, True])
def test_faults_are_errors(call, kernel, message, descending):
    arguments = (
        () if kernel in ("some_leave", "two_barriers") else (torch.zeros(64, dtype=torch.int32),)
    )
    with pytest.raises(RuntimeError, match=message):
        call(kernel, *arguments, descending=descending)
    x = torch.arange(64.0)
    call("reverse", x, c_int32(1))  # and the next launch is as good as ever
    assert x[0] == 63


def test_arguments_are_checked_by_size(call):
    out = torch.zeros(1)
    call("takes", c_int32(1), c_float(0.5), c_int64(2), out)
    assert out == 3.5
    for wrong in (
        (c_int32(1), c_float(0.5), c_int32(2), out),
        (c_int32(1), c_float(0.5), c_int64(2)),
    ):
        with pytest.raises(AssertionError, match="sizes of the arguments"):
            call("takes", *wrong)
