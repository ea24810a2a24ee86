"""One process of a GRPO run: python trl_processes.py MODEL OUT [GRPOConfig's fields as JSON].
Writes OUT/rank<r>.json with what it saw at every rollout.

All prompts are the same, so that equal completions anywhere mean that random numbers were used
twice.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from fusedrl.engine.rollout.trl import rollout_func


def digest(model) -> str:
    return hashlib.sha256(
        b"".join(
            p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters()
        )
    ).hexdigest()


class Watched:
    def __init__(self):
        self.rollouts, self.seen, self.models = rollout_func(), [], []

    def __call__(self, prompts, trainer):
        out = self.rollouts(prompts, trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        gaps = [0.0]
        # transformers' own log-probabilities of what was drawn, with the weights of this moment
        with torch.no_grad():
            for prompt, completion, logp in zip(
                out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True
            ):
                ids = torch.tensor([prompt + completion])
                expected = (
                    model(ids)
                    .logits[0, :-1]
                    .log_softmax(-1)
                    .gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
                )
                gaps.append(float((expected - torch.tensor(logp)).abs().max()))
        self.seen.append(
            {
                "step": trainer.state.global_step,
                "training": trainer.model.training,
                "completions": out["completion_ids"],
                "gap": max(gaps),
                "weights": digest(model),
                "version": self.rollouts.actor.weights_version,
                "prompts": len(prompts),
                "wrapped": type(trainer.model_wrapped).__name__,
            }
        )
        return out


def likes_w5(completions, **_):
    return [float(text.split().count("w5")) + 0.01 * len(text) for text in completions]


def trainer(model_directory, out, watched, **options):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model_directory),
    )
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 2e-2,
        "temperature": 1.0,
        "beta": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        "ddp_backend": "gloo",
        "max_steps": 4,
        **options,
    }
    same = Dataset.from_dict({"prompt": ["w1 w2"] * 64})
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=likes_w5,
        args=GRPOConfig(output_dir=str(out), **settings),
        rollout_func=watched,
        train_dataset=same,
        eval_dataset=same.select(range(4)),
    )


def main(model_directory, out, options="{}"):
    torch.set_num_threads(1)
    out, options = Path(out), json.loads(options)
    resume = options.pop("resume", None)
    watched = Watched()
    run = trainer(model_directory, out, watched, **options)
    run.train()
    told = {
        "seen": watched.seen,
        "end": digest(run.accelerator.unwrap_model(run.model)),
        "world": run.accelerator.num_processes,
    }
    if resume is not None:
        watched = Watched()
        again = trainer(model_directory, out, watched, **options)
        again.train(resume_from_checkpoint=str(out / f"checkpoint-{resume}"))
        told |= {
            "resumed": watched.seen,
            "resumed_end": digest(again.accelerator.unwrap_model(again.model)),
        }
    (out / f"rank{run.accelerator.process_index}.json").write_text(json.dumps(told))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # what there is to know is on the disk, and gloo's threads now and then hang when Python takes
    # down what uses them
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
