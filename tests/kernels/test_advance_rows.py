import pytest
import torch

from fusedrl.kernels.advance_rows import _advance_rows_triton, advance_rows_

WRITTEN = (
    "token_ids",
    "positions",
    "finished",
    "ring_tokens",
    "ring_logp",
    "cursor",
    "ring_values",
)


def make(device, R=9, W=3, K=4, seed=0, cursor=2, values=True):
    generator = torch.Generator().manual_seed(seed + 100 * R + W)

    def ids(*shape, high=9):
        return torch.randint(0, high, shape, generator=generator).to(device)

    drawn, at = ids(R), ids(R, high=40)
    drawn[::5] = -1
    made = {
        "drawn": drawn,
        "logp": -torch.rand(R, generator=generator).to(device),
        "stops": ids(W, R) - 1,
        "last_positions": at + ids(R, high=4) - 1,
        "token_ids": ids(R),
        "positions": torch.stack([at + 1, at]),
        "finished": ids(R) == 0,
        "ring_tokens": torch.full((K, R), -7, device=device),
        "ring_logp": torch.full((K, R), torch.nan, device=device),
        "cursor": torch.tensor([cursor], device=device),
    }
    return made | (
        {
            "values": torch.randn(R, generator=generator).to(device),
            "ring_values": torch.full((K, R), torch.nan, device=device),
        }
        if values
        else {}
    )


def run(x, function=advance_rows_, **options):
    """What is written, by name; x stays as it is."""
    own = {name: tensor.clone() for name, tensor in x.items()}
    function(**own, **options)
    for name in own.keys() - set(WRITTEN):
        assert torch.equal(own[name], x[name]), name
    return {name: own[name] for name in WRITTEN if name in own}


def define(x, keeps_going=False, forgets_the_limit=False):
    """The same, a row at a time, from the words of the contract."""
    out = {name: x[name].clone() for name in WRITTEN if name in x}
    step = int(x["cursor"])
    for r in range(len(x["drawn"])):
        token = int(x["drawn"][r])
        out["ring_tokens"][step, r], out["ring_logp"][step, r] = token, x["logp"][r]
        if "values" in x:
            out["ring_values"][step, r] = x["values"][r]
        ends = bool(x["finished"][r]) or token in x["stops"][:, r].tolist()
        if int(x["positions"][1, r]) >= int(x["last_positions"][r]) and not forgets_the_limit:
            ends = True
        out["finished"][r] = ends
        if not ends or keeps_going:
            out["token_ids"][r] = token
            out["positions"][:, r] += 1
    out["cursor"] += 1
    return out


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.each_impl("advance_rows_")
@pytest.mark.parametrize(
    "R,W,K",
    [(9, 3, 4), (0, 1, 1), (1, 1, 1), (5, 0, 2), (255, 2, 3), (256, 2, 8), (700, 5, 1)],
    ids=str,
)
def test_against_the_definition(impl, R, W, K, device):
    for cursor, values in ((0, True), (K - 1, True), (K - 1, False)):
        x = make(device, R, W, K, cursor=cursor, values=values)
        got = run(x, impl=impl)
        same(got, define(x))
        same(run(x, impl=impl), got)
        if R >= 9 and W:
            assert 0 < int(got["finished"].sum()) < R


def test_wrong_variants_fail(device):
    x = make(device, 60)
    for wrong in ({"keeps_going": True}, {"forgets_the_limit": True}):
        with pytest.raises(AssertionError):
            same(run(x), define(x, **wrong))


@pytest.mark.each_impl("advance_rows_")
def test_steps_fill_the_ring_and_what_has_ended_stays(impl, device):
    x = make(device, 40, 2, 6, cursor=0)
    now, draws = x, []
    for step in range(6):
        before = now
        drawn = make(device, 40, seed=step)["drawn"]
        draws.append(drawn)
        now = x | run(now | {"drawn": drawn}, impl=impl)
        ended = before["finished"]
        assert torch.equal(now["token_ids"][ended], before["token_ids"][ended])
        assert torch.equal(now["positions"][:, ended], before["positions"][:, ended])
        assert now["finished"][ended].all()
    assert torch.equal(now["ring_tokens"], torch.stack(draws))
    assert now["cursor"].tolist() == [6]


@pytest.mark.each_impl("advance_rows_")
def test_rows_are_independent(impl, device):
    x = make(device, 50)
    alone = {
        name: tensor if name == "cursor" else tensor[..., 17:18].contiguous()
        for name, tensor in x.items()
    }
    whole, one = run(x, impl=impl), run(alone, impl=impl)
    for name in one.keys() - {"cursor"}:
        torch.testing.assert_close(
            whole[name][..., 17:18], one[name], rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.each_impl("advance_rows_")
@pytest.mark.parametrize(
    "change,error,message",
    [
        (lambda x: {"stops": x["stops"][:, :-1].contiguous()}, ValueError, "stops"),
        (lambda x: {"positions": x["positions"][0]}, ValueError, "positions"),
        (
            lambda x: {"positions": x["positions"].T.contiguous().T},
            ValueError,
            "expected positions contiguous, got strides",
        ),
        (lambda x: {"drawn": x["drawn"].int()}, TypeError, "expected drawn of dtype"),
        (lambda x: {"finished": x["drawn"]}, TypeError, "expected finished of dtype"),
        (
            lambda x: {"cursor": x["cursor"] + 2},
            IndexError,
            r"expected the cursor in \[0, 4\), the steps of the ring, got 4",
        ),
        (lambda x: {"cursor": x["cursor"] - 3}, IndexError, "got -1"),
        (
            lambda x: {"values": None},
            ValueError,
            "expected values and ring_values together, got only ring_values",
        ),
        (
            lambda x: {"ring_values": None},
            ValueError,
            "expected values and ring_values together, got only values",
        ),
        (lambda x: {"values": x["values"].double()}, TypeError, "expected values of dtype"),
        (lambda x: {"ring_values": x["ring_values"][1:]}, ValueError, "ring_values"),
    ],
)
def test_bad_arguments_are_refused(impl, change, error, message, device):
    if error is IndexError and device.type != "cpu":
        pytest.skip("the cursor is read on the host for tensors of a CPU alone")
    x = make(device)
    with pytest.raises(error, match=message):
        advance_rows_(**(x | change(x)), impl=impl)


@pytest.mark.each_impl("advance_rows_")
@pytest.mark.parametrize("values", [True, False])
def test_opcheck_and_one_graph(impl, values, device):
    x = make(device, values=values)
    op = {"cpp": "advance_rows_", "triton": "advance_rows_triton_"}.get(impl)
    if op:
        torch.library.opcheck(
            _advance_rows_triton if impl == "triton" else torch.ops.fusedrl.advance_rows_.default,
            tuple(x.values()),
        )
    same(
        run(x, torch.compile(advance_rows_, fullgraph=True, backend="aot_eager"), impl=impl),
        define(x),
    )
