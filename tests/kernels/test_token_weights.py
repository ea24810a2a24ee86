import itertools

import pytest
import torch

from fusedrl.kernels.policy_loss import token_weights

BY_HAND = {
    "token_mean": (1 / 6, 1 / 6),
    "sequence_mean_token_mean": (1 / 2 / 2, 1 / 2 / 4),
    "sequence_mean_token_sum": (1 / 2, 1 / 2),
    "sequence_sum_norm": (1 / 2 / 10, 1 / 2 / 10),
    "token_sum": (1.0, 1.0),
}


@pytest.fixture
def packed(device):
    """The mask and cu_seqlens: one sequence of 3 (2 count), an empty one, one of 4 (all count), one
    of 2 (none counts)."""
    mask = torch.tensor([True, False, True, True, True, True, True, False, False], device=device)
    return mask, torch.tensor([0, 3, 3, 7, 9], dtype=torch.int32, device=device)


def weights(mask, aggregation, cu_seqlens=None):
    return token_weights(
        mask,
        aggregation,
        cu_seqlens=cu_seqlens,
        max_length=10 if aggregation == "sequence_sum_norm" else None,
    )


@pytest.mark.parametrize("aggregation", BY_HAND)
def test_by_hand(aggregation, packed, device):
    mask, cu = packed
    first, second = BY_HAND[aggregation]
    want = torch.tensor([first, 0, first, *[second] * 4, 0, 0], dtype=torch.float32, device=device)
    assert torch.equal(weights(mask, aggregation, cu), want)
    padded = torch.zeros(4, 4, dtype=torch.bool, device=device)
    padded[0, :3], padded[2] = mask[:3], mask[3:7]
    assert torch.equal(weights(padded, aggregation)[padded], want[mask])
    assert not weights(padded, aggregation)[~padded].any()
    assert torch.equal(
        weights(None, aggregation, cu),
        weights(torch.ones(9, dtype=torch.bool, device=device), aggregation, cu),
    )


@pytest.mark.parametrize("aggregation", BY_HAND)
@pytest.mark.parametrize("N", [0, 5])
def test_nothing_unmasked_weighs_nothing(aggregation, N, device):
    got = weights(
        torch.zeros(N, dtype=torch.bool, device=device),
        aggregation,
        torch.tensor([0, N], dtype=torch.int32, device=device),
    )
    assert got.dtype == torch.float32
    assert got.shape == (N,)
    assert not got.any()


# A mean over sequences of means over tokens, written as one.
def test_sequence_mean_of_token_means(device):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 0, 17, 3]
    cu = torch.tensor([0, *torch.tensor(lengths, device=device).cumsum(0).tolist()], device=device)
    mask, loss = (
        torch.rand(26, generator=generator).to(device) < 0.5,
        torch.randn(26, generator=generator, dtype=torch.float64).to(device),
    )
    means = [loss[a:b][mask[a:b]].mean() for a, b in itertools.pairwise(cu) if mask[a:b].any()]
    torch.testing.assert_close(
        (weights(mask, "sequence_mean_token_mean", cu).double() * loss).sum(),
        torch.stack(means).mean(),
        rtol=1e-6,
        atol=1e-7,
    )


def test_refuses_what_it_does_not_support(packed, device):
    mask, cu = packed
    with pytest.raises(
        ValueError, match=r"expected aggregation to be one of token_mean, .*, got 'mean'"
    ):
        token_weights(mask, "mean")
    with pytest.raises(
        ValueError, match="expected max_length with sequence_sum_norm and with nothing else"
    ):
        token_weights(mask, "sequence_sum_norm", cu_seqlens=cu)
    with pytest.raises(
        ValueError, match="expected max_length with sequence_sum_norm and with nothing else"
    ):
        token_weights(mask, "token_mean", max_length=3)
    with pytest.raises(ValueError, match="expected max_length >= 1"):
        token_weights(mask, "sequence_sum_norm", cu_seqlens=cu, max_length=0)
    with pytest.raises(ValueError, match="expected cu_seqlens with a packed mask"):
        token_weights(mask, "sequence_mean_token_sum")
    if device.type == "cpu":  # elsewhere no bound is read
        with pytest.raises(ValueError, match="expected cu_seqlens to rise from 0 to 9"):
            token_weights(
                mask, "sequence_mean_token_sum", cu_seqlens=torch.tensor([0, 5], device=device)
            )
    with pytest.raises(ValueError, match="expected a mask, cu_seqlens, or both"):
        token_weights(None, "token_sum")
    with pytest.raises(ValueError, match="whose rows are the sequences"):
        token_weights(mask[None], "token_sum", cu_seqlens=cu)
    with pytest.raises(TypeError, match="expected mask of dtype bool"):
        token_weights(mask.float(), "token_sum")
