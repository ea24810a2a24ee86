"""Bugs that others shipped, where a rollout is made and scored: each check passes on the product
and refuses the faulty variant that stands beside it.

Numbers are those of the list in docs/algorithms.md, which names the tests of the other items too.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine import HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.config import GenerationConfig, PolicyConfig
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import RewardModel, save_reward_model
from fusedrl.engine.model.weights import load_decoder, save_pretrained
from fusedrl.engine.policy.advantages import Signals
from fusedrl.engine.rewards.rewards import Rollout, load_reward
from fusedrl.engine.rollout.rollout import _placed, sampling_params
from fusedrl.kernels.logprob import logprob
from fusedrl.kernels.sampling import sample, uniform

EOS = 2
POSITIONS = {
    "model_type": "gpt2",
    "vocab_size": 41,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.2,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}


def config(**kwargs):
    return PolicyConfig(
        "m",
        "d",
        ("r.py:f",),
        "reinforce",
        **({"generation": GenerationConfig(max_new_tokens=8)} | kwargs),
    )


def completion(ids, reason, prompt=(1, 5)):
    return Completion(list(prompt), list(ids), [-1.0] * len(ids), "", reason, [0] * len(ids))


@pytest.fixture(scope="module")
def by_position(device):
    """An actor whose positions are a table, so that a wrong position is a wrong answer; its
    config.json speaks of dropout."""
    return HybridActor(Decoder.random(model_config(POSITIONS), 0, device=device))


@pytest.fixture(scope="module")
def peer(by_position, tmp_path_factory, device):
    save_pretrained(by_position.decoder, tmp_path_factory.mktemp("peer") / "model")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path_factory.getbasetemp() / "peer0" / "model"
    ).to(device)


# ---- where the score stands: 1, 2, 3, 4, 15, 19 --------------------------------------------------
def rewards_of(device, batch):
    return Signals(
        batch.with_columns(
            old_logp=torch.zeros(batch.num_tokens, device=device),
            ref_logp=torch.zeros(batch.num_tokens, device=device),
        )
    ).rewards


ENDED, CUT = [7, 8, EOS], [7, 8, 9, 10]


def test_1_the_score_stands_at_the_last_real_token(device):
    """Not on a pad: TRL put it at the slot behind the last token, and at the row's last slot where
    there was none."""
    completions = [completion(ENDED, "stop"), completion(CUT, "length")]
    batch = PackedBatch.from_completions(
        [[1, 5]] * 2, [[c] for c in completions], device=device
    ).with_columns(scores=torch.tensor([2.0, 3.0], device=device))
    last = torch.tensor([4, 10], device=device)

    def check(rewards_N):
        expected = torch.zeros(batch.num_tokens, device=device).scatter(0, last, batch.scores)
        assert torch.equal(rewards_N, expected)

    check(rewards_of(device, batch))
    padded = batch.to_padded(torch.zeros(batch.num_tokens, device=device))
    padded[:, -1] += batch.scores
    with pytest.raises(AssertionError):
        check(batch.from_padded(padded))  # at the last slot of the row: the first score is lost
    with pytest.raises(AssertionError):
        check(
            torch.zeros(batch.num_tokens + 1, device=device).scatter(0, last + 1, batch.scores)[:-1]
        )  # behind the last token


def test_2_the_penalty_asks_whether_a_completion_ended_by_itself():
    """An end by another stop token or a stop string is one; asking for the tokenizer's EOS is TRL
    PR #5338's bug."""
    chosen = config(
        missing_eos_penalty=1.0, generation=GenerationConfig(max_new_tokens=8, stop_token_ids=(9,))
    )

    def check(placed):
        assert placed(completion([7, 9], "stop")) == 5.0
        assert placed(completion([7, EOS], "stop")) == 5.0
        assert placed(completion([7] * 8, "length")) == 4.0

    check(lambda c: _placed(5.0, c, chosen))
    with pytest.raises(AssertionError):
        check(lambda c: 5.0 - (c.token_ids[-1] != EOS))


@pytest.mark.parametrize("wrong", [lambda ids: ids != EOS, lambda ids: (ids == EOS).cumsum(0) == 0])
def test_3_an_eos_that_is_also_the_pad_is_a_token_like_any_other(wrong, device):
    """Lengths are carried, never inferred from ids: TRL PR #5303, transformers #35352."""
    batch = PackedBatch.from_completions(
        [[EOS, 5]], [[completion(ENDED, "stop", (EOS, 5))]], device=device
    )
    right = torch.tensor([False, False, True, True, True], device=device)

    def check(mask):
        assert torch.equal(mask, right)

    check(batch.action_mask)
    assert rewards_of(device, batch.with_columns(scores=torch.ones(1, device=device)))[-1] == 1.0, (
        "the score stands at the EOS"
    )
    with pytest.raises(AssertionError):
        check(
            torch.cat([torch.zeros(2, dtype=torch.bool, device=device), wrong(batch.token_ids[2:])])
        )


def test_4_a_completion_without_eos_counts_to_its_end_and_no_further(device):
    """verl #3805: a mask that runs through the first EOS takes in the pads where there is none."""
    batch = PackedBatch.from_completions(
        [[1, 5]] * 2, [[completion(CUT, "length")], [completion([7] * 6, "length")]], device=device
    )

    def check(mask_BT):
        assert mask_BT.sum(1).tolist() == [4, 6]

    check(batch.to_padded(batch.action_mask))
    padded = batch.to_padded(batch.token_ids)[:, 2:]
    ended = (padded == EOS).int()
    with pytest.raises(AssertionError):
        check((ended.cumsum(1) - ended) == 0)


def test_15_what_a_completion_is_worth_is_all_of_its_kl_and_its_score(device):
    """R = score - coef sum k1, and the score is added to the last token's KL, not written over it
    (TRL #2562: the index was off by one)."""
    rng = torch.Generator().manual_seed(0)
    batch = PackedBatch.from_sequences(
        [([1, 5], ENDED), ([1], CUT), ([1, 5, 6], [EOS])], device=device
    )
    batch = batch.with_columns(
        scores=torch.tensor([1.0, -2.0, 0.5], device=device),
        old_logp=torch.randn(batch.num_tokens, generator=rng).to(device),
        ref_logp=torch.randn(batch.num_tokens, generator=rng).to(device),
    )
    signals = Signals(batch, kl_coef=0.3)
    k1 = torch.where(batch.action_mask, batch.old_logp - batch.ref_logp, 0.0).double()
    right = torch.stack(
        [
            score - 0.3 * part.sum()
            for score, part in zip(
                batch.scores.double(), k1.split(list(batch.lengths)), strict=True
            )
        ]
    )

    def check(totals):
        torch.testing.assert_close(totals.double(), right, rtol=1e-5, atol=1e-5)

    check(signals.totals)
    check(torch.stack([part.sum() for part in signals.rewards.split(list(batch.lengths))]))
    with pytest.raises(AssertionError):
        written_over = (-0.3 * k1).scatter(
            0, batch.cu_seqlens[1:].long() - 1, batch.scores.double()
        )
        check(torch.stack([part.sum() for part in written_over.split(list(batch.lengths))]))
    with pytest.raises(AssertionError):
        check(
            torch.stack(
                [
                    score - 0.3 * part[:-1].sum()
                    for score, part in zip(
                        batch.scores.double(), k1.split(list(batch.lengths)), strict=True
                    )
                ]
            )
        )


def test_19_nothing_is_appended_to_what_was_sampled(device):
    """A completion that was cut off has no EOS, in the batch or in what a reward sees (OpenRLHF
    #238)."""
    batch = PackedBatch.from_completions([[1, 5]], [[completion(CUT, "length")]], device=device)

    def check(ids):
        assert ids.tolist() == [1, 5, *CUT]

    check(batch.token_ids)
    with pytest.raises(AssertionError):
        check(torch.tensor([1, 5, *CUT[:-1], EOS], device=device))
    with pytest.raises(AssertionError):
        check(torch.tensor([1, 5, *CUT, EOS], device=device))


# ---- the same distribution in sampling and in scoring: 5, 6, 7, 8, 9, 23 -------------------------
SEQUENCES = [[1, 5, 9, 30, 12, 7], [1, 8], [1, 11, 3, 3, 20, 21, 22, 23, 24, 25], [1, 5, 9]]


def padded_logps(device, peer, sequences, left, positions):
    """[B] lists of the log-probabilities of every token but the first, by transformers on a padded
    batch."""
    width = max(map(len, sequences))
    rows, live = [], []
    for ids in sequences:
        pads = [EOS] * (width - len(ids))
        rows.append(pads + ids if left else ids + pads)
        live.append([0] * len(pads) + [1] * len(ids) if left else [1] * len(ids) + [0] * len(pads))
    ids, mask = torch.tensor(rows, device=device), torch.tensor(live, device=device)
    with torch.no_grad():
        logp = peer(ids, attention_mask=mask, position_ids=positions(mask)).logits.log_softmax(-1)
    taken = logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return [row[keep[:-1].bool() & keep[1:].bool()] for row, keep in zip(taken, mask, strict=True)]


def test_5_no_padding_means_no_side_and_no_position_to_get_wrong(by_position, peer, device):
    """Packed scores are those of either padding with positions that count real tokens, alone and in
    company; slot numbers as positions are not (OpenRLHF #217, TRL #469, NeMo-Aligner #68)."""
    batch = PackedBatch.from_sequences([(ids[:1], ids[1:]) for ids in SEQUENCES], device=device)
    ours = [part[1:] for part in by_position.score(batch).logp.split(list(batch.lengths))]

    def check(theirs):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    for left in (True, False):
        check(
            padded_logps(
                device, peer, SEQUENCES, left, lambda mask: (mask.cumsum(1) - 1).clamp(min=0)
            )
        )
    with pytest.raises(AssertionError):
        check(
            padded_logps(
                device,
                peer,
                SEQUENCES,
                True,
                lambda mask: torch.arange(mask.shape[1], device=device).expand_as(mask),
            )
        )
    for ids, together in zip(SEQUENCES, ours, strict=True):
        alone = by_position.score(
            PackedBatch.from_sequences([(ids[:1], ids[1:])], device=device)
        ).logp[1:]
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [lambda z: z.log_softmax(-1), lambda z: z.log_softmax(-1) / 0.6],
    ids=["missing", "of the log-probabilities"],
)
def test_6_the_temperature_divides_logits_in_both(by_position, wrong, device):
    """TRL #3029, OpenRLHF #853: the trainer scored T = 1; prime-rl #697, TRL #4159: it divided
    log-probabilities."""
    (outs,) = by_position.generate(
        [[1, 5]], SamplingParams(max_new_tokens=12, temperature=0.6, seed=3, n=4)
    )
    batch = PackedBatch.from_completions([[1, 5]] * 4, [[out] for out in outs], device=device)

    def check(logp_N):
        assert (logp_N - batch.rollout_logp)[batch.action_mask].abs().max() < 1e-4

    check(by_position.score(batch, temperature=0.6).logp)
    with torch.no_grad():
        z = by_position.forward(batch) @ by_position.decoder.head_weight.T
    with pytest.raises(AssertionError):
        check(
            torch.cat(
                [
                    torch.zeros(1, device=device),
                    wrong(z)[:-1].gather(1, batch.token_ids[1:, None])[:, 0],
                ]
            )
        )


TRUNCATED = dict(top_k=3), dict(top_p=0.8), dict(min_p=0.2)


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_7_and_8_a_truncated_sampler_biases_ratios_and_the_kl(truncation, device):
    """Scored in full, its tokens have a mean weight of the kept mass and not 1 (TRL #6789), and a
    policy that *is* its reference seems to be at a negative distance of one that keeps the rest
    (TRL #235): rollouts say what they were drawn from, and that is scored."""
    asked = sampling_params(config(generation=GenerationConfig(**truncation)))
    assert asked == SamplingParams(max_new_tokens=64, return_kept=True, **truncation)
    plain = SamplingParams(max_new_tokens=8, temperature=0.7)
    assert (
        sampling_params(config(generation=GenerationConfig(max_new_tokens=8, temperature=0.7)))
        == plain
    ), "no bias, ban or least length either"
    z = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)).to(device) * 1.5
    n = 4000
    keys = torch.stack(
        [
            torch.zeros(n, device=device),
            torch.arange(n, device=device),
            torch.zeros(n, device=device),
            torch.zeros(n, device=device),
        ],
        1,
    ).long()

    def weights(**settings):
        drawn = sample(z.expand(n, -1).contiguous(), temperature=1.0, keys=keys, **settings)
        return drawn, (drawn.logp - drawn.logp_processed).exp()

    def check(weight):
        assert abs(weight.mean().item() - 1) < 0.05

    check(weights()[1])
    drawn, weight = weights(**truncation)
    with pytest.raises(AssertionError):
        check(weight)
    kept = z.softmax(1)[0, drawn.token_ids.unique()].sum().item()
    assert weight.mean().item() == pytest.approx(kept, abs=1e-5)
    # A reference that likes the likely tokens more still: the k1 of a sharper ref under the
    # truncated sampler is negative, the true KL is not.
    policy, ref = z.log_softmax(1)[0], (1.3 * z).log_softmax(1)[0]
    assert (policy.exp() * (policy - ref)).sum() > 0
    assert (policy - ref)[drawn.token_ids].mean() < 0
    drawn, _ = weights(**truncation, return_kept=True)
    scored = logprob(z.expand(n, -1).contiguous(), drawn.token_ids, kept=drawn.kept)
    check((scored - drawn.logp_processed).exp())
    # of the whole reference: over the kept tokens alone it would be close to whatever they are
    assert (scored - ref[drawn.token_ids]).mean() > 0
    everything = weights()[0].token_ids
    assert (policy - ref)[everything].mean() > 0


def test_9_dropout_of_a_config_is_not_applied(by_position, monkeypatch, device):
    """A ratio before any update is exactly 1; with dropout it would be far from it (trlX #107, TRL
    #454)."""
    batch = PackedBatch.from_sequences([(ids[:1], ids[1:]) for ids in SEQUENCES], device=device)
    scored = by_position.score(batch).logp

    def check():
        logp, _ = by_position.logprobs(batch, by_position.forward(batch))
        assert torch.equal((logp - scored).exp(), torch.ones_like(scored))

    by_position.decoder.train()
    check()
    forward = HybridActor.forward
    monkeypatch.setattr(
        HybridActor,
        "forward",
        lambda self, batch: torch.nn.functional.dropout(forward(self, batch), 0.1),
    )
    with pytest.raises(AssertionError):
        check()


def test_23_old_log_probabilities_come_in_the_cuts_of_training(monkeypatch, device):
    """Another cut of the same batch may give other bits (TRL #6789: 8% of the tokens outside [.9,
    1.1] in bfloat16); the same cut gives the same. Ours are almost independent of it, so the faulty
    order is tried on arithmetic that is not: what a token gets grows with its companions."""
    actor = HybridActor(
        Decoder.random(
            model_config(POSITIONS | {"n_embd": 128, "n_positions": 300, "vocab_size": 1000}),
            0,
            dtype=torch.bfloat16,
            device=device,
        )
    )
    rng = torch.Generator().manual_seed(0)
    batch = PackedBatch.from_sequences(
        [
            ([1], torch.randint(3, 1000, (n,), generator=rng).tolist())
            for n in (5, 200, 37, 3, 90, 11, 64, 29)
        ],
        device=device,
    )
    cuts = batch.split(120)
    old = actor.score(batch, partition=cuts).logp

    def check(partition):
        for part in partition:
            micro = batch.select(part)
            logp, _ = actor.logprobs(micro, actor.forward(micro))
            assert torch.equal(logp, old[batch.slots(part)])

    check(cuts)
    exact = actor.logprobs
    monkeypatch.setattr(
        actor,
        "logprobs",
        lambda micro, *rest, **options: [
            x + 1e-3 * micro.num_sequences for x in exact(micro, *rest, **options)
        ],
    )
    old = actor.score(batch, partition=cuts).logp
    check(cuts)
    with pytest.raises(AssertionError):
        check([[b] for b in range(batch.num_sequences)])


# ---- rewards and randomness: 22, 24 --------------------------------------------------------------
def test_22_a_reward_model_reads_the_end_that_it_was_trained_on(tiny_model, tmp_path, device):
    """Scores of a policy's completions are those of ids with their EOS (TRL PR #5813 scored them
    without)."""
    model = RewardModel.from_decoder(
        load_decoder(tiny_model, dtype="float32", device=device), seed=3
    )
    save_reward_model(
        model, tmp_path / "judge", tokenizer=AutoTokenizer.from_pretrained(tiny_model)
    )
    judge = load_reward(
        str(tmp_path / "judge"), tokenizer=AutoTokenizer.from_pretrained(tiny_model)
    )
    ids = [[5, 6, EOS], [9, EOS]]
    (right,) = model(PackedBatch.from_sequences([([1, 4], ids[0])], device=device)).tolist()

    def check(completion_ids):
        found = judge(Rollout(["w0"] * 2, ["", ""], [[1, 4]] * 2, completion_ids, {}))
        assert found[0] == pytest.approx(right, abs=1e-5)

    check(ids)
    with pytest.raises(AssertionError):
        check([one[:-1] for one in ids])


def test_24_uniform_numbers_never_reach_one(device):
    """A bound that is included makes an inverse transform infinite, or draws what has no
    probability (tt-metal #56016)."""
    most = 2**32 - 1
    words = torch.tensor([[most, most], [0, 0], [most, 0]], device=device)
    combined = ((words[:, 0] >> 5) * 2**26 + (words[:, 1] >> 6)).double()

    def check(u):
        assert ((u >= 0) & (u < 1)).all()
        assert (-torch.log1p(-u)).isfinite().all()

    check(combined * 2.0**-53)
    with pytest.raises(AssertionError):
        check(words[:, 0].double() / most)
    with pytest.raises(AssertionError):
        check((combined * 2.0**-53).float())  # the largest rounds up to 1
    keys = torch.arange(4 * 10_000, device=device).view(-1, 4)
    check(uniform(keys))
