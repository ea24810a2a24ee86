"""TRL's GRPOTrainer trains a transformers model, and the actor in its storage generates."""
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine import HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.trl_rollout import rollout_func


class Trainer:
    """What rollout_func reads of a trainer."""

    class args:
        max_completion_length, temperature, top_p, top_k, min_p, seed = 6, 0.9, 1.0, 0, None, 5


def test_one_completion_a_prompt_in_order_and_never_the_same_draw(tiny_model):
    actor = HybridActor.from_pretrained(tiny_model)
    call = rollout_func(actor)
    prompts = ["w1 w2", "w1 w2", "w3", "w1 w2"]
    first, second = call(prompts, Trainer), call(prompts, Trainer)
    assert [len(column) for column in first.values()] == [4, 4, 4]
    assert first["prompt_ids"] == second["prompt_ids"] == [actor.tokenizer(p)["input_ids"] for p in prompts]
    assert first["completion_ids"] != second["completion_ids"]
    assert len({tuple(ids) for out in (first, second) for ids in out["completion_ids"]}) > 4
    assert all(0 < len(ids) <= 6 and len(ids) == len(logp) for ids, logp in zip(first["completion_ids"], first["logprobs"], strict=True))
    again = rollout_func(actor)(prompts, Trainer)
    assert again == first
    greedy = rollout_func(actor, SamplingParams(max_new_tokens=3, temperature=0.0))(prompts, Trainer)
    assert greedy["completion_ids"][0] == greedy["completion_ids"][1] == greedy["completion_ids"][3]


def test_grpo_trainer(tiny_model, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), AutoTokenizer.from_pretrained(tiny_model)
    actor = HybridActor.from_module(model, tokenizer)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    generate, differences, versions = rollout_func(actor), [], []

    def checked(prompts, trainer):
        out = generate(prompts, trainer)
        versions.append(actor.weights_version)
        with torch.no_grad():  # transformers' own log-probabilities of what was drawn, with the weights of this moment
            for prompt, completion, logp in zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True):
                ids = torch.tensor([prompt + completion])
                expected = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1:, 0]
                differences.append(float((expected - torch.tensor(logp)).abs().max()))
        return out

    def likes_w5(completions, **_):
        return [float(text.split().count("w5")) for text in completions]

    arguments = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=16, num_generations=8, max_steps=8, max_completion_length=12,
                           learning_rate=2e-2, temperature=1.0, beta=0.0, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
                           logging_steps=1, disable_tqdm=True, seed=0)
    trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=likes_w5, args=arguments, rollout_func=checked,
                          train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]}))
    trainer.train()
    assert trainer.model is model
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == storages
    assert max(differences) < 1e-4
    assert versions == list(range(8)), "one weights version a step, noticed without being told"
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-2:]) > 2 * sum(rewards[:2])
    batch = PackedBatch.from_completions([[1, 4]], actor.generate([[1, 4]], SamplingParams(max_new_tokens=4)))
    assert actor.score(batch).logp.shape == (batch.num_tokens,)
