"""Fisher products against the matrix itself, enumerated in float64, and against the second
derivative of the KL; on every kind of layer, and on adapters."""

import pytest
import torch
from tests.engine.model.test_decoder import MODELS, SIZES
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedrl.engine import HybridActor, PackedBatch
from fusedrl.engine.base.packing import IGNORE
from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.policy import fisher
from fusedrl.engine.policy.fisher import FlatParameters, fisher_product, policy_kl
from fusedrl.kernels.runtime import native

SMALL = {
    "model_type": "llama",
    "vocab_size": 7,
    "hidden_size": 6,
    "intermediate_size": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.5,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = [
    "llama-biases",
    "mistral",
    "qwen3",
    "phi3-partial",
    "smollm3-biases",
    "olmo2",
    "gemma2-bias",
    "gpt2",
    "gpt_neox",
]
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "n_inner": 37,
    "initializer_range": 0.2,
}
SEQUENCES = [([1, 4, 5], [3, 6, 2]), ([1], [5]), ([1, 3, 3, 6, 5], []), ([1, 6], [4, 4, 0, 5, 2])]


def random_actor(device, options, dtype=torch.float64, lora=None, **kwargs):
    decoder = Decoder.random(model_config(options), 3, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in decoder.parameters():  # norms and biases, too, say something
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
    actor = HybridActor(decoder, **kwargs)
    if lora is not None:
        actor.add_adapter(lora)
        with torch.no_grad():
            for name, p in decoder.named_parameters():
                if name.endswith("_b") and p.requires_grad:
                    p.copy_(
                        0.3
                        * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(device)
                    )
    return actor


def action_logits(actor, batch):
    """[R, V] of the slots with an action behind, differentiable."""
    rows = (batch.labels() != IGNORE).nonzero()[:, 0]
    return (actor.forward(batch) @ actor.decoder.head_weight.T)[rows]


def enumerated(actor, parameters, batch, temperature):
    """[P, P]: the mean over the states of sum_v p_v grad log p_v (grad log p_v)^T, a gradient at a
    time."""
    logp_RV = (action_logits(actor, batch) / temperature).log_softmax(1)
    F = 0.0
    for row in logp_RV:
        gradients = []
        for logp in row:
            found = torch.autograd.grad(
                logp, list(parameters.named.values()), retain_graph=True, allow_unused=True
            )
            gradients.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for g, p in zip(found, parameters.named.values(), strict=True)
                    ]
                )
            )
        G_VP = torch.stack(gradients)
        F = F + G_VP.T @ (row.detach().exp()[:, None] * G_VP)
    return F / len(logp_RV)


def vector(parameters, dtype=torch.float64, seed=0):
    size = sum(p.numel() for p in parameters.named.values())
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def product(actor, batch, v_P, temperature=0.7, parts=None):
    return fisher_product(
        actor,
        FlatParameters(actor.decoder),
        batch,
        parts or [range(batch.num_sequences)],
        temperature,
        v_P,
    )


def distance(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, alpha=3.0)])
def test_products_are_those_of_the_enumerated_matrix(tied, lora, device):
    actor = random_actor(device, SMALL | {"tie_word_embeddings": tied}, lora=lora)
    parameters, batch = (
        FlatParameters(actor.decoder),
        PackedBatch.from_sequences(SEQUENCES, device=device),
    )
    F = enumerated(actor, parameters, batch, 0.7)
    for seed in range(3):
        v_P = vector(parameters, seed=seed)
        assert distance(product(actor, batch, v_P), F @ v_P) < 1e-6
        # the cut is nothing
        assert distance(product(actor, batch, v_P, parts=[[3], [2], [1, 0]]), F @ v_P) < 1e-6
        # a wrong temperature is something
        assert distance(product(actor, batch, v_P, temperature=1.0), F @ v_P) > 1e-2
        # and so are other states
        assert distance(product(actor, batch, v_P, parts=[[0, 1]]), F @ v_P) > 1e-2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisher, "_WORKSPACE", 3 * 7 * 8)  # three rows at a time
        assert distance(product(actor, batch, v_P), F @ v_P) < 1e-6
    assert all(p.grad is None for p in actor.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_the_second_derivative_of_the_kl(family, device):
    """In float32 with the kernels that train, against float64 and reverse mode twice: of every
    family's layers."""
    options = GPT2 if family == "gpt2" else SIZES | MODELS[family]
    actor, exact = (
        random_actor(device, options, dtype) for dtype in (torch.float32, torch.float64)
    )
    rng = torch.Generator().manual_seed(5)
    batch = PackedBatch.from_sequences(
        [
            (
                torch.randint(0, 61, (n,), generator=rng).tolist(),
                torch.randint(0, 61, (m,), generator=rng).tolist(),
            )
            for n, m in ((4, 9), (1, 1), (7, 0), (2, 5))
        ],
        device=device,
    )
    parameters = FlatParameters(exact.decoder)
    v_P = vector(parameters)
    with sdpa_kernel(SDPBackend.MATH):
        logp_RV = action_logits(exact, batch).log_softmax(1)
    kl = (logp_RV.detach().exp() * (logp_RV.detach() - logp_RV)).sum(1).mean()
    named = list(parameters.named.values())
    first = torch.autograd.grad(kl, named, create_graph=True)
    second = torch.autograd.grad(
        sum((g * v).sum() for g, v in zip(first, parameters.views(v_P).values(), strict=True)),
        named,
    )
    want_P = torch.cat([x.flatten() for x in second])
    assert distance(product(exact, batch, v_P, temperature=1.0), want_P) < 1e-10
    assert distance(product(actor, batch, v_P.float(), temperature=1.0), want_P) < 1e-4


@pytest.mark.skipif(not native.capability, reason="strict needs the C++ kernels")
@pytest.mark.parametrize("how", ["strict", "checkpointed"])
def test_other_forwards_have_the_same_products(how, device):
    options = SIZES | MODELS["qwen3"]
    actor, other = (
        random_actor(device, options, torch.float32, strict=strict)
        for strict in (False, how == "strict")
    )
    other.decoder.checkpoint_activations = how == "checkpointed"
    batch = PackedBatch.from_sequences(SEQUENCES, device=device)
    v_P = vector(FlatParameters(actor.decoder), torch.float32)
    assert distance(product(other, batch, v_P), product(actor, batch, v_P).double()) < 1e-4


def test_the_kl_is_that_of_the_whole_vocabulary(device):
    """old || new, at the states of actions alone, with the temperature; and half of d F d for a
    small move."""
    actor = random_actor(device, SIZES | MODELS["qwen2"], torch.float32)
    parameters, batch = (
        FlatParameters(actor.decoder),
        PackedBatch.from_sequences(SEQUENCES, device=device),
    )
    old_P = parameters.values()
    with torch.no_grad():
        states_NH, old_RV = (
            actor.forward(batch),
            (action_logits(actor, batch).double() / 0.7).log_softmax(1),
        )
    move_P = vector(parameters, torch.float32) * 3e-3
    quadratic = torch.dot(move_P.double(), product(actor, batch, move_P).double()).item() / 2
    parameters.write(old_P + move_P)
    with torch.no_grad():
        new_RV = (action_logits(actor, batch).double() / 0.7).log_softmax(1)
        found = policy_kl(
            actor, batch, actor.forward(batch), states_NH, parameters.views(old_P)["embedding"], 0.7
        ).item()
    want = (old_RV.exp() * (old_RV - new_RV)).sum().item()
    backwards = (new_RV.exp() * (new_RV - old_RV)).sum().item()
    assert found == pytest.approx(want, rel=1e-3)
    assert abs(backwards / want - 1) > 5e-3
    assert quadratic * len(old_RV) == pytest.approx(want, rel=0.2)
    parameters.write(old_P)
    assert torch.equal(parameters.values(), old_P)
