import json

import pytest
import torch

from fusedrl.engine.base.ordering import data_order
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import KLConfig, OptimConfig, PenaltyConfig, PolicyConfig
from fusedrl.engine.optim.schedule import learning_rate
from fusedrl.engine.policy.control import Control, KLController, PenaltyController


def test_kl_controller_follows_ziegler():
    kl = KLController(KLConfig(coef=0.1, target=6.0, horizon=1000.0))
    kl.update(6.6, 100)  # 10% above: e = 0.1
    assert kl.coef == pytest.approx(0.1 * (1 + 0.1 * 100 / 1000))
    before = kl.coef
    kl.update(60.0, 100)  # far above: e is clipped to 0.2
    assert kl.coef == pytest.approx(before * (1 + 0.2 * 0.1))
    before = kl.coef
    kl.update(0.0, 100)
    assert kl.coef == pytest.approx(before * (1 - 0.2 * 0.1))
    fixed = KLController(KLConfig(coef=0.1))
    fixed.update(50.0, 100)
    assert fixed.coef == 0.1


def test_penalty_controller():
    penalty = PenaltyController(PenaltyConfig(coef=3.0, target=0.03))  # thresholds 0.02 and 0.045
    coefs = []
    for kl in (0.044, 0.046, 0.021, 0.019, 0.0):
        penalty.update(kl)
        coefs.append(penalty.coef)
    assert coefs == [3.0, 6.0, 6.0, 3.0, 1.5]
    assert PenaltyController(PenaltyConfig(kl_min=0.1, kl_max=0.2)).thresholds == (0.1, 0.2)


def test_scores_are_scaled_by_all_so_far_and_the_state_comes_back(device):
    config = PolicyConfig("m", "d", ("r.py:f",), scale_scores=True)
    control = Control(config)
    first, second = (
        torch.tensor([1.0, 3.0, 8.0], device=device),
        torch.tensor([-2.0, 4.0, 4.0], device=device),
    )
    empty = PackedBatch.from_sequences([([1], [2])] * 3, device=device)
    assert torch.allclose(
        control.scaled(empty.with_columns(scores=first)).scores, (first - 4.0) / first.std()
    )
    other = Control(config)
    other.load_state_dict(json.loads(json.dumps(control.state_dict())))
    both = torch.cat([first, second])
    for each in (control, other):
        assert torch.allclose(
            each.scaled(empty.with_columns(scores=second)).scores, (second - 4.0) / both.std()
        )  # less the mean of the first rollout
    assert control.state_dict() == other.state_dict()
    assert torch.equal(
        Control(config).scaled(empty.with_columns(scores=torch.ones(3, device=device))).scores,
        torch.zeros(3, device=device),
    )


def test_learning_rate_warms_up_and_decays():
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="linear")
    rates = [learning_rate(config, step, 12) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == 0.5
    assert rates[12] == 0.0
    assert learning_rate(OptimConfig(lr=2.0, schedule="constant"), 99, 100) == 2.0


def test_data_order_is_a_stream_of_shuffled_passes():
    whole = data_order(10, 3, 0, 40)
    assert all(sorted(whole[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    assert whole[:10] != whole[10:20]
    assert [
        x for start in range(0, 40, 7) for x in data_order(10, 3, start, min(start + 7, 40))
    ] == whole
    assert data_order(10, 4, 0, 10) != whole[:10]
    assert data_order(10, 3, 5, 5) == []
    assert data_order(10, 3 + 2**32, 0, 10) != whole[:10]


def test_config_refuses_what_ppo_cannot_do():
    def ppo(**kwargs):
        return PolicyConfig(model="m", data="d", reward=("r.py:f",), **kwargs)

    with pytest.raises(
        ValueError, match=r"minibatches <= prompts_per_step x samples_per_prompt = 4"
    ):
        ppo(prompts_per_step=4, minibatches=5)
    with pytest.raises(ValueError, match=r"kl.target > 0 with a coefficient > 0"):
        KLConfig(coef=0.0, target=1.0)
