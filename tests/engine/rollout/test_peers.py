"""Weights that arrive from elsewhere, and vLLM's names of sampling options."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusedrl.engine import HybridActor, SamplingParams
from fusedrl.engine.model.weights import hf_views
from fusedrl.engine.rollout.peers import ReceivedWeights, request_number, sampling_of


def test_weights_arrive_in_parts_and_count(tiny_model, device):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    actor = HybridActor.from_pretrained(tiny_model, dtype="float32", device=device)
    received = ReceivedWeights(actor)
    received.require()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    named = list(model.state_dict().items())
    prompt, params = [[1, 5, 6]], SamplingParams(max_new_tokens=8, seed=1)
    before = actor.generate(prompt, params)
    for part in (named[:3], named[3:4], named[4:]):
        received.take(part)
        with pytest.raises(RuntimeError, match="did not arrive completely"):
            received.require()
    received.end()
    received.require()
    assert received.bytes == sum(p.nbytes for n, p in named if n != "lm_head.weight")
    for name, view in hf_views(actor.decoder).items():
        assert torch.equal(view.cpu(), dict(named)[name].float())
    assert actor.generate(prompt, params) != before
    shared = HybridActor.from_module(model.float())
    assert [c.token_ids for c in actor.generate(prompt, params)[0]] == [
        c.token_ids for c in shared.generate(prompt, params)[0]
    ]


def test_an_update_of_another_model_is_refused(tiny_model, device):
    received = ReceivedWeights(
        HybridActor.from_pretrained(tiny_model, dtype="float32", device=device)
    )
    other = torch.ones(5, device=device)
    for name, message in (
        ("model.norm.weight", r"model.norm.weight \[5\], .* has \[32\]"),
        ("base_model.model.q.lora_A", "no such tensor.*without an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            received.take([(name, other)])
    with pytest.raises(ValueError, match="tensors are missing, such as"):
        received.end()
    with pytest.raises(RuntimeError, match="send them again"):
        received.require()


def test_options_under_vllms_names_are_followed_or_refused():
    params = sampling_of(
        {
            "temperature": 0.5,
            "top_k": -1,
            "top_p": 1.0,
            "min_p": 0.0,
            "max_tokens": 9,
            "repetition_penalty": 1.0,
            "logprobs": 1,
            "skip_special_tokens": True,
            "stop": None,
            "n": 1,
            "seed": 4,
            "min_tokens": 2,
        },
        20,
    )
    assert params == SamplingParams(
        max_new_tokens=9, temperature=0.5, seed=4, min_new_tokens=2, return_kept=True
    )
    assert sampling_of({"max_new_tokens": 30}, 20) == SamplingParams(max_new_tokens=20)
    assert sampling_of({"top_k": 5, "stop": ["x"]}, 3).return_kept
    for wrong in ({"repetition_penalty": 1.1}, {"n": 2}, {"guided_json": "{}"}):
        with pytest.raises(ValueError, match="cannot be followed"):
            sampling_of(wrong, 20)


def test_numbers_of_requests_are_of_their_names():
    found = {request_number("train", step, i) for step in range(20) for i in range(20)}
    assert len(found) == 400
    assert all(0 <= number < 2**63 for number in found)
    assert request_number("a", 1) == request_number("a", 1) != request_number("a1")
