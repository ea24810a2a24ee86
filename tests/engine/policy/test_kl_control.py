"""The KL coefficient's controller on simulated policies: a distance sqrt(KL) that follows A /
coefficient^(p / 2) with a lag and at a bounded speed, measured with noise. Starts far from the
right coefficient on both sides, a KL of 0 at first, targets that move out of reach."""

import json
import math
import random
from pathlib import Path

import pytest

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.config import GenerationConfig, KLConfig, OptimConfig, PolicyConfig, RunConfig
from fusedrl.engine.policy.control import Control, KLController
from fusedrl.engine.stages.policy import train_policy

TARGET, FIRST = 6.0, 0.05


class Policy:
    """`needed`: the coefficient at which the KL is the target's; `lag`, `climb` in steps, the
    latter from 0 to the target at full speed."""

    def __init__(self, needed, *, power=2.0, lag=5, climb=20, noise=0.0, seed=0, most=math.inf):
        self.needed, self.power, self.lag, self.noise, self.most = needed, power, lag, noise, most
        self.speed, self.distance, self.draw = math.sqrt(TARGET) / climb, 0.0, random.Random(seed)

    def step(self, coef):
        """(the KL, what is measured of it)"""
        wanted = min(self.most, math.sqrt(TARGET * (self.needed / coef) ** self.power))
        self.distance += max(-self.speed, min(self.speed, (wanted - self.distance) / self.lag))
        kl = self.distance**2
        return kl, kl * (
            1 + self.noise * self.draw.gauss(0, 1)
        ) + 0.02 * TARGET * self.noise * self.draw.gauss(0, 1)  # an estimate of k1 may be negative


def run(policy, steps=400, **config):
    """(KL / target at every step, the controller)."""
    control, ratios = KLController(KLConfig(coef=FIRST, target=TARGET, **config)), []
    for _ in range(steps):
        kl, measured = policy.step(control.coef)
        ratios.append(kl / TARGET)
        control.update(measured, 64)
    return ratios, control


def settled(ratios):
    """The first step from which on 96% of the next 200 are within a factor of 1.6 of the target
    (one measurement in some dozens is far off)."""
    outside = [not 1 / 1.6 <= ratio <= 1.6 for ratio in ratios]
    return next(
        (
            i
            for i in range(len(ratios))
            if sum(outside[i : i + 200]) <= 0.04 * len(outside[i : i + 200])
        ),
        len(ratios),
    )


KINDS = [
    dict(power=power, lag=lag, climb=climb, noise=noise)
    for power in (1.0, 2.0)
    for lag in (1, 5, 15)
    for climb in (10, 30)
    for noise in (0.0, 0.3)
]


@pytest.mark.parametrize(
    "off, steps, peak",
    [(0.01, 110, 1.7), (0.1, 80, 1.7), (1.0, 25, 1.7), (10.0, 65, 3.7), (100.0, 110, 7.4)],
)
def test_it_settles_whatever_the_policy(off, steps, peak):
    """`off`: the right coefficient over the first one. Above 1 the policy runs away first, and its
    way back takes as long as its speed asks."""
    for kind in KINDS:
        ratios, _ = run(Policy(FIRST * off, **kind))
        assert settled(ratios) <= steps, (kind, settled(ratios))
        assert max(ratios) <= peak, (kind, max(ratios))


def test_the_first_steps_do_not_wear_it_down():
    """The KL is far below its target for 40 steps, as it begins at 0; the coefficient is the right
    one all the while."""
    ratios, control = run(Policy(FIRST, climb=40), steps=30)
    assert ratios[-1] < 0.6
    assert control.coef > 0.6 * FIRST
    assert max(run(Policy(FIRST, climb=40))[0]) < 1.5


def test_it_does_not_wind_up_where_the_target_is_out_of_reach():
    """A policy that stops at a third of the target for 300 steps, and can then move: the
    coefficient is at its bound, and comes back from there."""
    policy = Policy(FIRST, most=math.sqrt(TARGET / 3))
    control = KLController(KLConfig(coef=FIRST, target=TARGET))
    told = []
    for _ in range(300):
        control.update(policy.step(control.coef)[1], 64)
        told.append(control.warning())
    assert control.coef == FIRST / control.RANGE
    (step,) = [i for i, text in enumerate(told) if text]
    assert step <= 80
    assert "kl.target 6" in told[step]
    assert "more steps, a higher optim.lr, or a lower kl.target" in told[step]
    policy.most = math.inf
    ratios = []
    for _ in range(250):
        kl, measured = policy.step(control.coef)
        control.update(measured, 64)
        ratios.append(kl / TARGET)
    assert settled(ratios) < 150


def test_a_policy_that_cannot_be_held_is_told():
    policy, control = Policy(FIRST * 1e9), KLController(KLConfig(coef=FIRST, target=TARGET))
    told = []
    for _ in range(120):
        control.update(policy.step(control.coef)[1], 64)
        told.append(control.warning())
    (text,) = [text for text in told if text]
    assert control.coef == pytest.approx(FIRST * control.RANGE)
    assert "a critic of its own (critic.model) or a higher kl.target" in text


def test_a_long_horizon_does_not_reach_it_and_says_so():
    """What 10,000 episodes do at 64 a step, and what they are for: a run of thousands of steps."""
    ratios, control = run(Policy(FIRST * 10), horizon=10_000.0, steps=100)
    assert FIRST < control.coef < 1.15 * FIRST
    assert ratios[-1] > 10
    assert "leave kl.horizon out, or shorten it (now 10000 sequences)" in control.warning()
    assert control.warning() is None
    ratios, control = run(Policy(FIRST * 10), steps=100)
    assert ratios[-1] < 3


def test_noise_alone_does_not_move_it():
    """The right coefficient, 40% of noise: it stays within a factor of two, and its mean is the
    right one within a fifth."""
    control, policy = (
        KLController(KLConfig(coef=FIRST, target=TARGET)),
        Policy(FIRST, noise=0.4, climb=10),
    )
    coefs = []
    for _ in range(600):
        control.update(policy.step(control.coef)[1], 64)
        coefs.append(control.coef)
    assert all(FIRST / 2 < coef < FIRST * 2 for coef in coefs)
    assert math.exp(sum(map(math.log, coefs[100:])) / 500) == pytest.approx(FIRST, rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_changes_nothing(bad):
    control = KLController(KLConfig(coef=FIRST, target=TARGET))
    control.update(3.0, 64)
    before = control.state_dict()
    control.update(bad, 64)
    assert control.state_dict() == before


def test_its_state_comes_back_through_json():
    config = PolicyConfig("m", "d", ("r.py:f",), kl=KLConfig(target=TARGET))
    whole, policy = Control(config), Policy(FIRST * 3, noise=0.2)
    measured = [policy.step(FIRST)[1] for _ in range(80)]
    for kl in measured[:30]:
        whole.kl.update(kl, 64)
    other = Control(config)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for control in (whole, other):
        for kl in measured[30:]:
            control.kl.update(kl, 64)
    assert other.state_dict() == whole.state_dict()


def test_targets_that_nothing_can_follow_are_refused():
    for config in (
        dict(kl=KLConfig(coef=0.0, target=None, measure=True)),
        dict(algorithm="grpo", kl=KLConfig(target=3.0)),
        dict(kl=KLConfig(target=3.0, placement="loss")),
    ):
        PolicyConfig("m", "d", ("r.py:f",), **config)
    with pytest.raises(
        ConfigError, match=r"kl.target > 0 with a coefficient > 0 .* kl.coef 0.05 is a usual start"
    ):
        PolicyConfig("m", "d", ("r.py:f",), "dapo", kl=KLConfig(target=3.0))  # whose row has no KL
    with pytest.raises(ConfigError, match=r"kl.horizon > 0, and only with kl.target"):
        KLConfig(horizon=100.0)


@pytest.mark.full
def test_a_real_policy_reaches_its_target(shared, tmp_path):
    """stories260k, paid for cheerful words, 64 completions a step, with a coefficient that is far
    too small at first. About a minute."""
    examples = Path(__file__).resolve().parents[3] / "examples"
    config = PolicyConfig(
        str(shared / "models" / "stories260k"),
        str(examples / "prompts" / "stories.jsonl"),
        (f"{examples / 'rewards' / 'cheerful.py'}:cheerful",),
        "rloo",
        steps=60,
        prompts_per_step=16,
        kl=KLConfig(target=3.0),
        generation=GenerationConfig(max_new_tokens=48, stop_token_ids=(1,)),
        optim=OptimConfig(lr=2e-4),
        run=RunConfig(str(tmp_path / "run"), progress=False),
    )
    train_policy(config)
    found = [
        json.loads(line)["kl"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(found) < 15
    assert 2.0 < sum(found[45:]) / 15 < 4.5
