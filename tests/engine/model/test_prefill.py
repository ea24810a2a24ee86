"""Prompts over the paged cache as a GPU reads them: tiles of their tokens behind what is cached,
several sequences and rows that decode in one call, under Triton's interpreter."""

import pytest
import torch

from fusedrl.engine.model import step as step_module
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.step import allocate_cache, decode_step
from fusedrl.kernels.runtime.dispatch import unavailable

pytestmark = pytest.mark.skipif(
    unavailable("triton", "cpu") is not None, reason="no triton interpreter"
)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
# (row, tokens that are cached, tokens of the call), in the order of the call
CALL = [(2, 49, 1), (0, 130, 21), (1, 0, 9), (3, 16, 1)]
SIZE = 16


@pytest.fixture
def asked(monkeypatch):
    """Numbers of queries that were read by tiles."""
    found, op = [], step_module.paged_prefill

    def counted(q, *args, **kwargs):
        found.append(len(q))
        return op(q, *args, **kwargs)

    monkeypatch.setattr(step_module, "paged_prefill", counted)
    return found


def run(device, kind, impl, dtype, calls, out_slots=None, fixed=False):
    """Hidden states of the last of `calls`, each a list of (row, start, stop), over one cache."""
    config = model_config(SIZES | kind)
    decoder = Decoder.random(config, 0, dtype=torch.float32, device=device).to(dtype)
    weights, draw = decoder.weights(), torch.Generator().manual_seed(7)
    table = torch.randperm(48, generator=draw).int().to(device).view(4, 12)
    ids = torch.randint(3, 61, (4, 160), generator=draw).to(device)
    k, v = allocate_cache(weights, 48, SIZE)
    k.fill_(torch.nan), v.fill_(torch.nan)
    for call in calls:
        rows, positions = (
            torch.tensor(column, device=device)
            for column in zip(
                *((row, t) for row, start, stop in call for t in range(start, stop)), strict=True
            )
        )
        last = call is calls[-1]
        hidden = decode_step(
            *(weights, ids[rows, positions], positions, rows, table, k, v),
            out_slots if last else None,
            fixed=fixed and last,
            impl=impl if last else "torch",
        )
    return hidden


KINDS = {
    "llama": {"model_type": "llama"},
    "window": {"model_type": "mistral", "sliding_window": 40},
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, of scores to be replaced
@pytest.mark.parametrize("kind", KINDS)
def test_behind_prefixes_and_beside_rows_that_decode(kind, asked, device):
    before = [(row, 0, cached) for row, cached, _ in CALL if cached]
    call = [(row, cached, cached + count) for row, cached, count in CALL]
    out = torch.tensor([0, 21, 30, 31], device=device)  # the last token of each
    how = (device, KINDS[kind])
    got = run(*how, "triton", torch.float32, [before, call], out)
    assert asked == [32, 32]  # once a layer
    want = run(*how, "torch", torch.float64, [before, call], out)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)
    # the prefix that was computed a call before is the one that is computed now
    whole = [[(row, 0, cached + count) for row, cached, count in CALL]]
    ends = torch.tensor([c + n for _, c, n in CALL], device=device).cumsum(0) - 1
    again = run(*how, "torch", torch.float64, whole, ends)
    torch.testing.assert_close(want, again, rtol=0, atol=1e-10)


def test_which_calls_read_by_tiles(asked, device):
    """Rows that decode have their splits, and strict numerics the order of decoding."""
    before = [(row, 0, 20) for row in range(4)]
    how = (device, KINDS["llama"], "triton", torch.float32)
    run(*how, [before, [(row, 20, 21) for row in range(4)]])
    assert asked == []
    run(*how, [before, [(0, 20, 25), (1, 20, 21)]], torch.tensor([4, 5], device=device), True)
    assert asked == []
