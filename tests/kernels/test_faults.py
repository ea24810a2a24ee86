"""The flag by which kernels on a GPU report ids out of range: here raised by Triton's interpreter
on CPU tensors."""

import pytest
import torch

from fusedrl.kernels.kept import Kept
from fusedrl.kernels.logprob import logprob, logprob_, logprob_reference
from fusedrl.kernels.runtime import faults
from fusedrl.kernels.runtime.dispatch import unavailable

pytestmark = [
    pytest.mark.skipif(
        bool(unavailable("triton", "cpu")), reason=str(unavailable("triton", "cpu"))
    ),
    pytest.mark.cpu_only(
        "the flag as the interpreter raises it; a card's is read in test_generator.py"
    ),
]
LOGITS = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
GOOD, BAD = torch.tensor([1, -100, 49, 3]), torch.tensor([1, -100, 50, 3])


@pytest.fixture(autouse=True)
def _clean():
    yield
    for found in faults._flags.values():
        found.zero_()


def forward(ids, kept=(None, None)):
    return torch.ops.fusedrl.logprob_triton(LOGITS, ids, 1.0, None, True, -100, *kept)


def test_nothing_is_raised_without_cause():
    faults.raise_faults()
    forward(GOOD)
    logprob(LOGITS, GOOD, impl="triton")
    faults.raise_faults()
    faults.raise_faults(torch.device("cuda"))  # a device that has no flag


@pytest.mark.parametrize("wrong", [50, -1, -101, 2**40])
def test_an_id_out_of_range_is_raised_once(wrong):
    ids = GOOD.clone()
    ids[2] = wrong
    logp, _, _ = forward(ids)
    want, _ = logprob_reference(LOGITS, GOOD)
    assert logp.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(logp[[0, 1, 3]], want[[0, 1, 3]])
    faults.raise_faults(torch.device("cuda"))  # not that one's
    forward(GOOD)  # nobody takes it back
    with pytest.raises(
        IndexError, match=r"^logprob: expected token ids .* on cpu.* results of its row are NaN"
    ):
        faults.raise_faults(torch.device("cpu"))
    faults.raise_faults()


@pytest.mark.parametrize("wrong", [50, -1])
def test_a_kept_id_out_of_range(wrong):
    ids = torch.tensor([0, 1, 48, 49, 1, 3], dtype=torch.int32)
    kept = Kept(ids, torch.tensor([0, 2, 2, 4, 6]))
    forward(GOOD, kept)
    faults.raise_faults()
    ids[3] = wrong
    logp, entropy, _ = forward(GOOD, kept)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, False, True, False]
    with pytest.raises(IndexError, match=r"^logprob"):
        faults.raise_faults()


def test_the_heads_report_too():
    from fusedrl.kernels.linear_logprob import linear_logprob

    hidden, weight = torch.randn(4, 8), torch.randn(50, 8)
    compiled = torch.compile(
        lambda ids: linear_logprob(hidden, weight, ids, impl="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(GOOD)
    faults.raise_faults()
    assert compiled(BAD).isnan().tolist() == [False, False, True, False]
    with pytest.raises(IndexError, match=r"^linear_logprob: expected token ids"):
        faults.raise_faults()


def test_the_checks_on_cpu_tensors_come_first():
    for function in (logprob, logprob_):
        with pytest.raises(IndexError, match="got 50 in row 2"):
            function(LOGITS, BAD, impl="triton")
    faults.raise_faults()


def test_flag_under_compile_and_inference_mode():
    # A compiled graph reads no ids on the host, so the flag is all there is; functionalization
    # neither drops the call nor trips over it.
    compiled = torch.compile(
        lambda z, ids: logprob(z, ids, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    leaf = LOGITS.clone().requires_grad_()
    compiled(leaf, GOOD).sum().backward()
    faults.raise_faults()
    compiled(leaf, BAD).nan_to_num().sum().backward()
    with pytest.raises(IndexError, match=r"^logprob"):
        faults.raise_faults()
    faults._flags.clear()
    with torch.inference_mode():
        forward(BAD)
    with pytest.raises(IndexError, match=r"^logprob"):
        faults.raise_faults()
    faults.raise_faults()


def test_the_flag_stays_where_it_is():
    address = faults.flag("logprob", torch.device("cpu")).data_ptr()
    forward(BAD)
    with pytest.raises(IndexError):
        faults.raise_faults()
    assert faults.flag("logprob", torch.device("cpu")).data_ptr() == address
