"""The definitions that fusedrl verify measures by: one for every op, none of its code, and torch
seen by them."""

import ast
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrl.engine.tools.verify import definitions
from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.definitions.rows import philox
from fusedrl.engine.tools.verify.grid import oracle, run
from fusedrl.engine.tools.verify.ops import try_op
from fusedrl.kernels import sampling

pytestmark = [pytest.mark.cpu_only("definitions are of float64 on the host")]

CPU = torch.device("cpu")
SOURCES = sorted(Path(definitions.__file__).parent.glob("*.py"))


# ---- independence --------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_definitions_import_nothing_of_the_product(path):
    """Nor a way to import at run time, nor torch.ops, behind which the compiled kernels lie."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"math", "numpy", "torch"}
        if isinstance(node, ast.ImportFrom):
            near = node.level == 1 or node.module.startswith(
                "fusedrl.engine.tools.verify.definitions."
            )
            assert near or node.module in ("__future__", "itertools", "typing", "torch"), (
                node.module
            )
        if isinstance(node, ast.Name | ast.Attribute):
            name = ast.unparse(node).split(".")[-1]
            assert name not in ("ops", "import_module", "__import__", "modules"), node.lineno


class Watched(TorchDispatchMode):
    """What of fusedrl.kernels runs: Python functions, and custom ops."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __enter__(self):
        sys.setprofile(self._call)
        return super().__enter__()

    def __exit__(self, *exception):
        sys.setprofile(None)
        return super().__exit__(*exception)

    def _call(self, frame, event, argument):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("fusedrl.kernels"):
            self.seen.add(f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusedrl":
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", CATALOGUE)
def test_every_op_has_a_definition_of_its_own(op):
    """Neither it nor the bounds made from it run a line of the kernels, whatever level is changed;
    a run of the op does."""
    entry = CATALOGUE[op]
    sizes = ("N", "V", "shape")
    changes = [
        {name: levels[1]}
        for name, levels in entry.levels.items()
        if len(levels) > 1 and name not in sizes
    ]
    for case in (entry.plain(**change) for change in [{}, *changes]):
        problem = entry.problem(case)
        with Watched() as watched:
            entry.bounds(problem, oracle(entry, problem))
        assert not watched.seen, (case, watched.seen)
    with Watched() as watched:
        run(entry, problem, "torch" if "torch" in entry.implementations() else None)
    assert watched.seen, "the watch sees nothing at all"


# ---- faults in torch -----------------------------------------------------------------------------
def _scaled(found):
    """Any result, off by a part in a thousand: floats alone, whatever they lie in."""
    if isinstance(found, torch.Tensor):
        return found * 1.001 if found.is_floating_point() else found
    if isinstance(found, tuple):
        parts = [_scaled(each) for each in found]
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
    return found


def _first_token(function):
    """It draws the first token of the vocabulary, always."""

    def faulty(*arguments):
        drawn = function(*arguments)
        return drawn._replace(token_ids=torch.zeros_like(drawn.token_ids))

    return faulty


def _never_ends(function):
    """No stop id is heard."""
    return lambda drawn, logp, stops, *rest: function(drawn, logp, stops - 100, *rest)


def _same_estimator(function):
    """k3 is taken for k1."""
    return lambda logp, ref_logp, estimator: function(
        logp, ref_logp, "k1" if estimator == "k3" else estimator
    )


def scaled(function):
    return lambda *arguments, **named: _scaled(function(*arguments, **named))


# op -> (module of kernels, or a whole name; function of the torch implementation; what goes wrong
# in it)
FAULTS = {
    "logprob": ("logprob", "logprob_reference", scaled),
    "full_kl": ("full_kl._reference", "_log_softmax", scaled),
    "sample": ("sampling", "sample_reference", _first_token),
    "advance_rows_": ("advance_rows", "advance_rows_reference", _never_ends),
    "linear_logprob": ("linear_logprob", "logprob_reference", scaled),
    "linear_full_kl": ("linear_full_kl", "full_kl_reference", scaled),
    "linear_policy_loss": ("linear_policy_loss", "logprob_reference", scaled),
    "policy_loss": ("policy_loss._reference", "_policy_terms", scaled),
    "policy_value_loss": ("policy_loss._reference", "_policy_terms", scaled),
    "value_loss": (
        "policy_loss._reference",
        "_squared_deviations",
        lambda function: lambda x, seen: x.abs().sum(),
    ),
    "token_kl": ("kl", "token_kl_reference", _same_estimator),
    "kl_loss": ("kl._reference", "_descended", scaled),
    "gae": ("gae._reference", "_advantages", scaled),
    "td_advantages": ("gae._reference", "_deltas", scaled),
    "discounted_returns": ("gae._reference", "_deltas", scaled),
    "k_step_advantages": ("gae._reference", "_deltas", scaled),
    "shaped_gae": ("gae._reference", "token_kl_reference", scaled),
    "masked_whiten": ("normalize", "masked_whiten_reference", scaled),
    "group_normalize": ("normalize", "group_normalize_reference", scaled),
    "pairwise_ranking_loss": ("ranking_loss", "pairwise_ranking_loss_reference", scaled),
    "kwise_ranking_loss": ("ranking_loss", "kwise_ranking_loss_reference", scaled),
    "rms_norm": ("rms_norm", "rms_norm_reference", scaled),
    "rope": ("rope", "rope_reference", scaled),
    "swiglu": ("swiglu", "swiglu_reference", scaled),
    "varlen_attention": ("attention", "_padded", scaled),
    "fixed_linear": ("fixed_linear", "fixed_linear_reference", scaled),
    "decode_step": ("fusedrl.engine.model.step", "paged_attention_reference", scaled),
    "paged_attention": ("paged_attention", "paged_attention_reference", scaled),
    "paged_prefill": ("paged_attention", "paged_attention_reference", scaled),
    "rope_and_cache": ("kv_cache", "rope_reference", scaled),
}


def test_all_that_have_a_torch_implementation_have_a_fault():
    """logprob_ runs logprob's."""
    assert set(FAULTS) == {
        op for op, entry in CATALOGUE.items() if "torch" in entry.implementations()
    } - {"logprob_"}


@pytest.mark.parametrize("op", FAULTS)
def test_a_fault_in_torch_is_told_of_torch(monkeypatch, op):
    """And of nothing else: the C++ of the op is as right as it was."""
    module, name, wrong = FAULTS[op]
    module = importlib.import_module(
        module if module.startswith("fusedrl.") else f"fusedrl.kernels.{module}"
    )
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    faulty = try_op(CATALOGUE[op], "torch", CPU, cases=2)
    assert faulty["state"] == "FAIL", faulty
    assert "error / bound" in "".join(faulty["why"]), faulty
    for impl in set(CATALOGUE[op].implementations()) & {"cpp"}:
        right = try_op(CATALOGUE[op], impl, CPU, cases=2)
        assert right["state"] == "ok", right


# ---- the definitions, where something else says what is right ------------------------------------
def test_definitions_by_hand():
    """Values that were worked out with a pencil."""
    rewards, values = (
        torch.tensor([[1.0, 9.0, 2.0]]).double(),
        torch.tensor([[0.5, 9.0, 0.25]]).double(),
    )
    mask, last = torch.tensor([[True, False, True]]), torch.tensor([4.0])
    found = definitions.gae(rewards, values, mask, None, 0.5, 0.5, last)
    # delta_2 = 2 + .5 * 4 - .25 = 3.75; delta_0 = 1 + .5 * .25 - .5 = .625; A_0 = .625 + .25 * 3.75
    assert found["advantages"].tolist() == [[1.5625, 0.0, 3.75]]
    assert found["returns"].tolist() == [[2.0625, 0.0, 4.0]]
    assert definitions.discounted_returns(rewards, mask, None, 0.5, last).tolist() == [
        [3.0, 0.0, 4.0]
    ]
    two_steps = definitions.k_step_advantages(rewards, values, mask, None, 2, 0.5, None)
    assert two_steps["advantages"].tolist() == [[1.5, 0.0, 1.75]]
    groups = definitions.group_normalize(
        torch.tensor([1.0, 3.0, 5.0, 5.0]).double(), [0, 0, 7, 7], "rloo", False
    )
    assert groups["advantages"].tolist() == [-2.0, 2.0, 0.0, 0.0]
    assert groups["zero_variance"].tolist() == [False, False, True, True]
    logp, entropy = definitions.logprob(
        torch.tensor([[0.0, 0.0, -torch.inf, 0.0]]).double(), torch.tensor([3])
    )
    torch.testing.assert_close(
        torch.cat([logp, -entropy]), torch.tensor(1 / 3).double().log().expand(2)
    )


def test_philox_is_that_of_its_authors():
    """The known answers of Random123's kat_vectors, of zeros, of ones and of digits of pi."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    for counter, key, want in (
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi[:4], pi[4:], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        assert " ".join(f"{word:08x}" for word in philox(counter, key)) == want
        assert (
            philox(counter, key)
            == sampling.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist()
        )
