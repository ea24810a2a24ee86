"""HybridActor: what generates is what scores is what trains is what is saved."""

import pytest
import torch

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "tie_word_embeddings": True,
}
PROMPTS = [[1, 4, 9], [1], [1, 7, 8, 30, 41, 5, 5, 9], [1, 50]]
PARAMS = SamplingParams(max_new_tokens=24, n=3)


def make_actor(device, value_head=True, **kwargs):
    decoder = Decoder.random(model_config(CONFIG), 0, device=device, **kwargs)
    head = ValueHead(32) if value_head else None
    if head is not None:
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
        torch.nn.init.constant_(head.bias, 0.25)
        head = head.to(decoder.device)
    return HybridActor(decoder, value_head=head, cache=CacheConfig(max_sequences=8))


@pytest.fixture(scope="module")
def actor(device):
    return make_actor(device)


@pytest.fixture(scope="module")
def batch(actor, device):
    return PackedBatch.from_completions(PROMPTS, actor.generate(PROMPTS, PARAMS), device=device)


def test_generate_returns_n_completions_per_prompt_in_order(actor):
    outs = actor.generate(PROMPTS, [SamplingParams(max_new_tokens=5, n=n) for n in (1, 3, 2, 1)])
    assert [len(group) for group in outs] == [1, 3, 2, 1]
    assert [c.prompt_ids for group in outs for c in group] == [
        p for p, n in zip(PROMPTS, (1, 3, 2, 1), strict=True) for _ in range(n)
    ]
    assert actor.generate([]) == []


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_scorer_says_what_the_sampler_said(actor, temperature):
    outs = actor.generate(PROMPTS, SamplingParams(max_new_tokens=24, n=2, temperature=temperature))
    batch = PackedBatch.from_completions(PROMPTS, outs, device=actor.decoder.device)
    scored = actor.score(batch, temperature=temperature)
    assert (scored.logp - batch.rollout_logp).abs().max() <= 1e-4


def test_scorer_against_a_dense_definition(actor, batch):
    scored, at = actor.score(batch, temperature=0.7), 0
    for ids, mask in (
        (batch.token_ids[at : at + n], batch.action_mask[at : at + n])
        for at, n in zip(batch.cu_seqlens.tolist(), batch.lengths, strict=False)
    ):
        n = len(ids)
        with torch.no_grad():
            positions, ends = (
                torch.arange(n, device=ids.device),
                torch.tensor([0, n], dtype=torch.int32, device=ids.device),
            )
            hidden = actor.decoder(ids, positions, ends, n).double()
        z = torch.log_softmax(hidden @ actor.decoder.head_weight.detach().double().T / 0.7, -1)
        values = (hidden @ actor.value_head.weight.detach().double().T).squeeze(-1) + 0.25
        for t in range(n):
            logp, entropy = (
                (z[t - 1, ids[t]], -(z[t - 1].exp() * z[t - 1]).sum()) if mask[t] else (0.0, 0.0)
            )
            assert abs(scored.logp[at + t] - logp) < 1e-4
            assert abs(scored.entropy[at + t] - entropy) < 1e-4
            assert abs(scored.values[at + t] - (values[t - 1] if t else 0.0)) < 1e-4
        at += n


@pytest.mark.parametrize("tokens", [None, 40, 100])
def test_training_repeats_the_scores_bit_for_bit(actor, batch, tokens):
    partition = batch.split(tokens or batch.num_tokens)
    scored = actor.score(batch, tokens_per_microbatch=tokens)
    again = actor.score(batch, partition=partition)
    for a, b in zip(scored, again, strict=True):
        assert torch.equal(a, b)
    with_scores = batch.with_columns(old_logp=scored.logp, values=scored.values)
    for part in partition:
        micro = with_scores.select(part)
        hidden = actor.forward(micro)
        assert hidden.requires_grad
        logp, entropy = actor.logprobs(micro, hidden)
        assert torch.equal(logp.detach(), micro.old_logp)
        assert torch.equal(actor.values(micro, hidden).detach(), micro.values)
        assert entropy.shape == logp.shape == (micro.num_tokens,)


def test_gradients_reach_every_parameter(batch, device):
    actor = make_actor(device)
    hidden = actor.forward(batch)
    logp, entropy = actor.logprobs(batch, hidden)
    (logp.sum() + 0.1 * entropy.sum() + actor.values(batch, hidden).square().sum()).backward()
    names = [name for name, _ in actor.named_parameters()]
    assert len(names) == len(set(names)) == len(list(actor.parameters()))
    assert "value_head.weight" in names
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in actor.parameters())


def test_an_update_is_seen_by_the_next_generate(device):
    actor = make_actor(device, value_head=False)
    prompts = [list(range(3, 40))]
    params = SamplingParams(max_new_tokens=12, min_new_tokens=12, temperature=0.0)
    before = actor.generate(prompts, params)
    with torch.no_grad():
        for p in actor.parameters():
            p.mul_(1.2)
    actor.mark_updated()
    assert actor.weights_version == 1
    after = actor.generate(prompts, params)
    assert set(before[0][0].weights_versions) == {0}
    assert set(after[0][0].weights_versions) == {1}
    batch = PackedBatch.from_completions(prompts, after, device=device)
    assert (actor.score(batch).logp - batch.rollout_logp).abs().max() <= 1e-4
    assert batch.weights_versions.unique().tolist() == [0, 1]
    assert actor.score(batch).values is None
    with pytest.raises(ValueError, match="no value head"):
        actor.values(batch, actor.forward(batch))


def test_releasing_the_cache(device):
    actor = make_actor(device)
    want = actor.generate(PROMPTS, PARAMS)
    actor.mark_updated()
    actor.release_cache()
    assert actor._generator is None
    again = actor.generate(PROMPTS, PARAMS)
    assert [[c.token_ids for c in group] for group in again] == [
        [c.token_ids for c in group] for group in want
    ]
    assert set(again[0][0].weights_versions) == {1}
    stream = actor.stream(PROMPTS, PARAMS)
    next(stream)
    actor.release_cache()
    assert len(list(stream)) == 11


def test_abort_ends_a_stream(actor):
    stream = actor.stream(PROMPTS, SamplingParams(max_new_tokens=60, min_new_tokens=50, n=4))
    seen = []
    for finished in stream:
        seen.append(finished)
        actor.abort()
    assert len({(f.prompt, f.sample) for f in seen}) == len(seen) == 16
    assert {f.completion.finish_reason for f in seen} >= {"aborted"}


def test_score_refuses(actor, batch):
    with pytest.raises(ValueError, match="give one of them"):
        actor.score(batch, tokens_per_microbatch=8, partition=[[0]])
    with pytest.raises(ValueError, match="expected a partition of the batch's 12 sequences"):
        actor.score(batch, partition=[[0, 1], [1]])


def test_empty_batch(actor):
    scored = actor.score(PackedBatch.from_sequences([], device=actor.decoder.device))
    assert [tuple(x.shape) for x in scored] == [(0,)] * 3


def test_tokenizer_larger_than_the_model(device):
    class Tokenizer:
        def __len__(self):
            return 54

    with pytest.raises(ValueError, match="tokenizer has 54 tokens and the model's vocabulary 53"):
        HybridActor(make_actor(device).decoder, Tokenizer())


def test_round_trip_of_a_directory(tmp_path, batch, device):
    actor = make_actor(device)
    actor.save_pretrained(tmp_path / "saved")
    loaded = HybridActor.from_pretrained(
        tmp_path / "saved", dtype="float32", device=device, value_head=True
    )
    assert loaded.tokenizer is None
    for (name, a), (other, b) in zip(
        actor.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    for a, b in zip(actor.score(batch), loaded.score(batch), strict=True):
        assert torch.equal(a, b)
    assert (
        HybridActor.from_pretrained(tmp_path / "saved", dtype="float32", device=device).value_head
        is None
    )


def test_real_model_with_its_tokenizer(shared, tmp_path, device):
    actor = HybridActor.from_pretrained(
        shared / "models" / "stories260k", dtype="float32", device=device, value_head=True
    )
    outs = actor.generate(["Once upon a time", "The dog"], SamplingParams(max_new_tokens=40, n=4))
    batch = PackedBatch.from_completions(["Once upon a time", "The dog"], outs, device=device)
    scored = actor.score(batch, tokens_per_microbatch=128)
    assert (scored.logp - batch.rollout_logp).abs().max() <= 1e-4
    assert not scored.values.any()  # a new value head says 0
    actor.save_pretrained(tmp_path / "saved")
    again = HybridActor.from_pretrained(
        tmp_path / "saved", dtype="float32", device=device, value_head=True
    )
    assert again.tokenizer("The dog")["input_ids"] == actor.tokenizer("The dog")["input_ids"]
    outs_again = again.generate(
        ["Once upon a time", "The dog"], SamplingParams(max_new_tokens=40, n=4)
    )
    assert [[c.text for c in group] for group in outs_again] == [
        [c.text for c in group] for group in outs
    ]
