"""TRL's trainers score with this package's kernel: counted in real steps, equal to TRL's own."""

import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine.rollout.patching import Name, Patched
from fusedrl.engine.rollout.trl import rollout_func
from fusedrl.engine.rollout.trl_head import fused_head

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
pytestmark = pytest.mark.cpu_only("TRL's trainer is told to use the CPU")


def train(model, directory, trainer=trl.GRPOTrainer, config=trl.GRPOConfig, **options):
    from datasets import Dataset

    given = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2} | options
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=lambda completions, **_: [float(text.count("w")) for text in completions],
        args=config(
            output_dir=str(directory),
            max_completion_length=6,
            learning_rate=1e-2,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            seed=0,
            **given,
        ),
        **({"rollout_func": rollout_func()} if trainer is trl.GRPOTrainer else {}),
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]}),
    )
    return made


def course(trainer) -> list[dict[str, float]]:
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "kl", "reward")
    return [
        {name: row[name] for name in names if name in row}
        for row in trainer.state.log_history
        if "loss" in row
    ]


def test_a_real_step_calls_it_and_is_the_step_of_trl(tiny_model, tmp_path):
    """Two steps with a reference model and two optimizer steps a rollout: per rollout the old and
    the reference's log-probabilities, per optimizer step the policy's."""
    options = {"beta": 0.1, "num_iterations": 2, "max_steps": 4}
    theirs = course(train(tiny_model, tmp_path / "theirs", **options))
    with fused_head() as head:
        trainer = train(tiny_model, tmp_path / "ours", **options)
        assert "trl_head" in trainer.model.forward.__func__.__code__.co_filename
        ours = course(trainer)
    assert head.calls["add_fused_lm_head"] == 4 + 2 + 2
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys() >= {"loss", "grad_norm", "entropy", "kl"}
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    from trl.trainer import grpo_trainer, utils

    assert grpo_trainer.add_fused_lm_head is utils.add_fused_lm_head
    assert "trl" in utils.add_fused_lm_head.__module__


def test_rloo_calls_it_too(tiny_model, tmp_path):
    with fused_head() as head:
        trainer = train(tiny_model, tmp_path, trl.RLOOTrainer, trl.RLOOConfig, beta=0.0)
        course(trainer)
    assert head.calls["add_fused_lm_head"] >= 2


def test_a_step_that_does_not_call_it_is_refused(tiny_model, tmp_path):
    trainer = train(tiny_model, tmp_path)  # has TRL's own head by now
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with fused_head() as head, pytest.raises(RuntimeError, match="none of add_fused_lm_head was"):
        trainer.train()
    assert not head.calls
    assert all(
        torch.equal(p.cpu(), q) for p, q in zip(trainer.model.parameters(), before, strict=True)
    )
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()  # nobody watches any more


def test_what_it_does_not_compute_is_refused(tiny_model):
    with fused_head():
        from trl.trainer import utils

        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        with pytest.raises(ValueError, match="expected outputs of log_probs, entropy, got is_top1"):
            utils.add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
        model.config.logit_scale = 0.5
        with pytest.raises(ValueError, match=r"without a factor, got logit_scale = 0.5"):
            utils.add_fused_lm_head(model)
        model.config.logit_scale = None
        utils.add_fused_lm_head(model, temperature=0.7)
        ids = torch.tensor([[3, 4, 5, 6]])
        assert model(ids).logits.shape[:2] == (1, 4), "without the flag it is the model's own"
        labels = ids.clone()
        labels[0, 1] = -100
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        logp = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)
        expected = logp.gather(-1, ids[0, 1:, None])[:, 0] * torch.tensor([0.0, 1.0, 1.0])
        torch.testing.assert_close(out.log_probs[0], expected)
        torch.testing.assert_close(out.loss, -expected.sum() / 2)
        assert out.entropy is None


def test_names_are_swapped_where_they_are_held_and_given_back(monkeypatch):
    first, second = types.ModuleType("somelib"), types.ModuleType("somelib.inner")
    table = {}

    def theirs(x):
        return x

    def ours(x):
        return -x

    first.function = second.alias = table["key"] = theirs
    monkeypatch.setitem(sys.modules, "somelib", first)
    monkeypatch.setitem(sys.modules, "somelib.inner", second)
    names = {"function": Name(theirs, ours)}
    with Patched("somelib", names, tables=[table], remedy="do that") as patched:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        with pytest.raises(RuntimeError, match=r"none of function was called .* do that"):
            optimizer.step()
        assert [first.function(2), second.alias(3), table["key"](4)] == [-2, -3, -4]
        assert patched.calls == {"function": 3}
        optimizer.step()
    assert first.function is second.alias is table["key"] is theirs
