"""Where the preference losses end, against their closed forms, on the task of test_closed_forms.py:
vocabulary 5, at most 4 tokens, 2 prompts, beta 0.5.

With every pair of a prompt's 341 completions and labels p = sigmoid(r_w - r_l) nothing is sampled:
the minimum of the sigmoid loss is exactly pi* = ref exp(r / beta) / Z, and that of ipo ref
exp(mean_l p(w, l) / beta) / Z. The policy is a table; its log-probabilities go through PackedBatch
and pair_scores, as in the stage.
"""

import math

import pytest
import torch
from tests.engine.policy.test_closed_forms import BETA, EOS, OFFSETS, PROMPTS, T, Tree, V

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.preference.losses import PairScores, pair_scores, preference_loss


class Completions:
    """Every completion of every prompt of a tree: its states and tokens, as one batch of tables,
    and its reward."""

    def __init__(self, tree: Tree) -> None:
        rows = []
        for prompt in range(PROMPTS):
            open_ = [([], prompt)]
            for d in range(T):
                longer = []
                for path, code in open_:
                    for token in range(V):
                        step = (*path, (OFFSETS[d] + code, token))
                        if token == EOS or d == T - 1:
                            rows.append((prompt, step))
                        else:
                            longer.append((step, code * EOS + token))
                open_ = longer
        device = tree.ref.device
        self.prompts = torch.tensor([prompt for prompt, _ in rows], device=device)
        self.rewards = torch.stack([tree.rewards[path[-1]] for _, path in rows]).double()
        # Slot 0 of a sequence is its prompt, which no completion token can be.
        self.cells = torch.tensor(
            [
                cell
                for _, path in rows
                for cell in [0, *(state * V + token for state, token in path)]
            ],
            device=device,
        )
        self.batch = PackedBatch.from_sequences(
            (([0], [token for _, token in path]) for _, path in rows), device=device
        )
        self.batch = self.batch.with_columns(ref_logp=self.column(tree.ref.double()))

    def column(self, logp: torch.Tensor) -> torch.Tensor:
        """[N] of a policy [STATES, V]; nan at prompts, which must not count."""
        return torch.where(self.batch.action_mask, logp.reshape(-1)[self.cells], math.nan)

    def ratios(self, logp: torch.Tensor) -> torch.Tensor:
        """[completions] log pi - log ref, as the stage sums them (a pair is two sequences in
        turn)."""
        scores = pair_scores(self.batch, self.column(logp))
        return torch.stack([scores.chosen_ratio, scores.rejected_ratio], 1).reshape(-1)


def every_pair(completions: Completions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(w, l, p): all pairs of one prompt, each once, and how probable it is that w is preferred
    (Bradley and Terry)."""
    w, l = torch.triu(completions.prompts[:, None] == completions.prompts, 1).nonzero().unbind(1)
    return w, l, torch.sigmoid(completions.rewards[w] - completions.rewards[l])


def minimise(tree: Tree, loss, steps: int = 60) -> torch.Tensor:
    """The table of log-probabilities that minimises loss(ratios of all completions), from the
    reference on; the loss is exact, so L-BFGS serves."""
    completions = Completions(tree)
    logits = tree.ref.double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(completions.ratios(logits.log_softmax(1)))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(1)


def objective(tree: Tree, name: str, p=None, **options):
    w, l, exact = every_pair(Completions(tree))
    label = exact if p is None else p(exact)
    return lambda g: preference_loss(name, g[w] - g[l], label, beta=BETA, **options).mean()


def test_the_tree_is_enumerated(device):
    tree = Tree.random(device)
    completions = Completions(tree)
    assert len(completions.prompts) == PROMPTS * (1 + 4 + 16 + 64 * 5)
    assert torch.equal(
        completions.ratios(tree.ref.double()),
        torch.zeros(len(completions.prompts), dtype=torch.float64, device=device),
    )
    total = torch.stack(
        [
            part.exp().sum()
            for part in _logp(completions, tree.ref.double()).split(
                len(completions.prompts) // PROMPTS
            )
        ]
    )
    assert total.tolist() == pytest.approx([1.0] * PROMPTS)


def _logp(completions, logp):
    """[completions] log-probabilities, summed by hand."""
    return torch.stack(
        [part[1:].sum() for part in completions.column(logp).split(list(completions.batch.lengths))]
    )


@pytest.mark.parametrize("deviation, steps", [(1, 60), (2, 150)])
def test_dpo_with_exact_labels_reaches_the_optimum(deviation, steps, device):
    tree = Tree.random(device)
    tree = Tree(tree.ref, deviation * tree.rewards)
    assert tree.gap(minimise(tree, objective(tree, "sigmoid"), steps)) >= 0.999


def test_robust_sees_through_known_noise_and_plain_dpo_does_not(device):
    tree, flipped = Tree.random(device), 0.2
    noisy = lambda p: p * (1 - flipped) + (1 - p) * flipped  # noqa: E731
    assert (
        tree.gap(minimise(tree, objective(tree, "robust", noisy, label_smoothing=flipped))) >= 0.999
    )
    assert tree.gap(minimise(tree, objective(tree, "sigmoid", noisy), steps=40)) < 0.8


def test_ipo_reaches_its_own_closed_form(device):
    """Azar et al. (2023): pi proportional to ref exp(E_l p(w, l) / tau), the optimum of the
    KL-regularised total preference."""
    tree = Tree.random(device)
    completions = Completions(tree)
    w, l, p = every_pair(completions)
    count = len(completions.prompts) // PROMPTS
    wins = (
        torch.zeros(len(completions.prompts), dtype=torch.float64, device=device)
        .index_add(0, w, p)
        .index_add(0, l, 1 - p)
        / count
    )  # and half of one tie, with itself
    expected = _logp(completions, tree.ref.double()) + wins / BETA
    expected = torch.cat([part.log_softmax(0) for part in expected.split(count)])
    found = _logp(completions, minimise(tree, objective(tree, "ipo")))
    assert (expected.exp() * (expected - found)).sum() / PROMPTS == pytest.approx(0.0, abs=1e-5)
    start = _logp(completions, tree.ref.double())
    assert (expected.exp() * (expected - start)).sum() / PROMPTS > 0.04, (
        "the reference is not there already"
    )


@pytest.mark.parametrize("wrong", ["mean for sum", "no reference", "sign"])
def test_what_others_got_wrong_ends_elsewhere(wrong, device):
    tree = Tree.random(device)
    completions, true = Completions(tree), objective(tree, "sigmoid")
    tokens = torch.tensor(completions.batch.lengths, device=device) - 1
    log_ref = _logp(completions, tree.ref.double())
    loss = {
        "mean for sum": lambda g: true(g / tokens),
        "no reference": lambda g: true(g + log_ref),
        "sign": lambda g: true(-g),
    }[wrong]
    assert tree.gap(minimise(tree, loss, steps=30)) < 0.95


# ---- one pair: the minimum by hand ---------------------------------------------------------------
def minimum(device, name, p, **options):
    """The h at which the loss of one pair is least, by bisection of its slope."""
    low, high = -200.0, 200.0
    for _ in range(80):
        h = torch.tensor([(low + high) / 2], dtype=torch.float64, requires_grad=True, device=device)
        preference_loss(
            name, h, torch.tensor([p], dtype=torch.float64, device=device), **options
        ).sum().backward()
        low, high = (h.item(), high) if h.grad.item() < 0 else (low, h.item())
    return low


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_minimum_of_one_pair(beta, device):
    for p in (0.5, 0.7, 0.95):
        assert minimum(device, "sigmoid", p, beta=beta) == pytest.approx(
            math.log(p / (1 - p)) / beta, abs=1e-9
        )
        assert minimum(device, "ipo", p, beta=beta) == pytest.approx(
            (2 * p - 1) / (2 * beta), abs=1e-9
        )
    # Azar et al.: no label is so sure that h should grow for ever
    assert minimum(device, "ipo", 1.0, beta=beta) == pytest.approx(1 / (2 * beta), abs=1e-9)
    for e in (0.1, 0.3):
        assert minimum(device, "sigmoid", 1.0, beta=beta, label_smoothing=e) == pytest.approx(
            math.log((1 - e) / e) / beta, abs=1e-9
        )
        assert (
            minimum(device, "robust", 1 - e - 1e-3, beta=beta, label_smoothing=e)
            > minimum(device, "sigmoid", 1 - e - 1e-3, beta=beta) + 1 / beta
        )
    assert minimum(device, "hinge", 1.0, beta=beta) == pytest.approx(1 / beta, abs=1e-9)


@pytest.mark.full
def test_dpo_from_sampled_labels_comes_near(device):
    """200,000 pairs drawn alike from all, one label each: .970; of 20,000 it is .68."""
    tree, rng = Tree.random(device), torch.Generator().manual_seed(3)
    w, l, p = every_pair(Completions(tree))
    drawn = torch.randint(len(w), (200_000,), generator=rng).to(device)
    w, l, label = (
        w[drawn],
        l[drawn],
        (torch.rand(len(drawn), generator=rng).to(device) < p[drawn]).double(),
    )
    found = minimise(
        tree, lambda g: preference_loss("sigmoid", g[w] - g[l], label, beta=BETA).mean()
    )
    assert tree.gap(found) > 0.95


def test_scores_are_of_their_own_tokens_alone(device):
    """Companions, their order, prompts and what stands under the mask change nothing."""
    draw = torch.Generator().manual_seed(0)
    sequences = [([1] * (1 + i % 3), [2] * (1 + i)) for i in range(6)]
    batch = PackedBatch.from_sequences(sequences, device=device)
    logp, ref = (torch.randn(batch.num_tokens, generator=draw).to(device) for _ in range(2))
    logp, ref = (torch.where(batch.action_mask, x, math.nan) for x in (logp, ref))
    batch = batch.with_columns(ref_logp=ref, old_logp=logp)
    whole = pair_scores(batch, logp)
    for pair in range(3):
        alone = batch.select([2 * pair, 2 * pair + 1])
        assert all(
            torch.equal(a[pair : pair + 1], b)
            for a, b in zip(whole, pair_scores(alone, alone.old_logp), strict=True)
        )
    parts = [
        part[len(prompt) :].double()
        for part, (prompt, _) in zip(logp.split(list(batch.lengths)), sequences, strict=True)
    ]
    assert whole.chosen_logp.tolist() == pytest.approx(
        [part.sum().item() for part in parts[0::2]], rel=1e-12
    )
    assert whole.rejected_tokens.tolist() == [2.0, 4.0, 6.0]
    assert isinstance(whole, PairScores)
