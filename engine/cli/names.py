"""Hints for unknown options: the names that TRL, OpenRLHF, verl or another stage use, with the
names here; and which known names are spelled like an unknown one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Of several names the first that the command has is told.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    # the model and the data
    "model_name_or_path": ("model",),
    "pretrain": ("model",),
    "actor_rollout_ref.model.path": ("model",),
    "dataset_name": ("data",),
    "dataset": ("data",),
    "prompt_data": ("data",),
    "data.train_files": ("data",),
    "data.val_files": ("evaluation.data",),
    "eval_dataset": ("evaluation.data",),
    "train_file": ("data",),
    "dataset_config": ("data",),
    "dataset_train_split": ("data",),
    "dataset_split": ("data",),
    "input_key": ("data",),
    "column_map": ("data",),
    "prompts": ("rows",),
    "num_prompts": ("rows",),
    "limit": ("rows",),
    "max_samples": ("rows",),
    "max_rows": ("rows",),
    "max_examples": ("rows",),
    "prompt_key": ("data",),
    "torch_dtype": ("dtype",),
    "bf16": ("dtype",),
    "use_cpu": ("device",),
    "fp16": ("dtype",),
    "precision": ("dtype",),
    "reward_model_path": ("reward",),
    "reward_model": ("reward",),
    "reward_pretrain": ("reward",),
    "remote_rm_url": ("reward",),
    "reward_funcs": ("reward",),
    "reward_model.model.path": ("reward",),
    "custom_reward_function.path": ("reward",),
    "critic_pretrain": ("critic.model",),
    "critic.model.path": ("critic.model",),
    "value_model_path": ("critic.model",),
    "sft_model_path": ("model",),
    "ref_model": ("reference",),
    "adv_estimator": ("loss.advantage",),
    "algorithm.adv_estimator": ("loss.advantage",),
    "advantage_estimator": ("loss.advantage",),
    "loss_type": ("loss.aggregation", "loss"),
    "scale_rewards": ("loss.advantage",),
    "multi_objective_aggregation": ("loss.advantage",),
    "pretrain_data": ("ptx.data",),
    "ptx_coef": ("ptx.coef",),
    # batches
    "per_device_train_batch_size": (
        *("prompts_per_step", "sequences_per_step", "pairs_per_step", "answers_per_step"),
    ),
    "gradient_accumulation_steps": ("tokens_per_microbatch",),
    "train_batch_size": ("prompts_per_step", "sequences_per_step", "pairs_per_step"),
    "rollout_batch_size": ("prompts_per_step",),
    "data.train_batch_size": ("prompts_per_step", "sequences_per_step", "pairs_per_step"),
    "batch_size": ("prompts_per_step", "sequences_per_step", "pairs_per_step"),
    "generation_batch_size": ("prompts_per_step",),
    "micro_train_batch_size": ("tokens_per_microbatch",),
    "micro_rollout_batch_size": ("tokens_per_microbatch",),
    "micro_batch_size": ("tokens_per_microbatch",),
    "ppo_micro_batch_size": ("tokens_per_microbatch",),
    "ppo_micro_batch_size_per_gpu": ("tokens_per_microbatch",),
    "log_prob_micro_batch_size_per_gpu": ("tokens_per_microbatch",),
    "ppo_max_token_len_per_gpu": ("tokens_per_microbatch",),
    "ppo_mini_batch_size": ("minibatches",),
    "num_mini_batches": ("minibatches",),
    "mini_batch_size": ("minibatches",),
    "gradient_checkpointing": ("checkpoint_activations",),
    "enable_gradient_checkpointing": ("checkpoint_activations",),
    # length of a run
    "num_train_epochs": ("steps", "epochs"),
    "max_epochs": ("epochs",),
    "num_episodes": ("steps",),
    "total_episodes": ("steps",),
    "max_steps": ("steps", "epochs"),
    "total_epochs": ("steps", "epochs"),
    "trainer.total_epochs": ("steps", "epochs"),
    "total_training_steps": ("steps", "epochs"),
    "num_iterations": ("epochs",),
    "num_ppo_epochs": ("epochs",),
    "ppo_epochs": ("epochs",),
    "actor.ppo_epochs": ("epochs",),
    # sampling
    "num_generations": ("samples_per_prompt",),
    "n_samples_per_prompt": ("samples_per_prompt",),
    "rollout.n": ("samples_per_prompt",),
    "actor_rollout_ref.rollout.n": ("samples_per_prompt",),
    "rloo_k": ("samples_per_prompt",),
    "num_samples": ("samples_per_prompt",),
    "n": ("samples_per_prompt",),
    "best_of": ("samples_per_prompt",),
    "max_completion_length": ("generation.max_new_tokens", "max_length", "max_new_tokens"),
    "response_length": ("generation.max_new_tokens", "max_new_tokens"),
    "generate_max_len": ("generation.max_new_tokens", "max_new_tokens"),
    "max_response_length": ("generation.max_new_tokens", "max_new_tokens"),
    "data.max_response_length": ("generation.max_new_tokens",),
    "max_tokens": ("generation.max_new_tokens", "max_new_tokens"),
    "prompt_max_len": ("max_prompt_length",),
    "data.max_prompt_length": ("max_prompt_length",),
    "max_len": ("max_length",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "temperature": ("generation.temperature",),
    "rollout.temperature": ("generation.temperature",),
    "lora.r": ("lora.rank",),
    "stop_token": ("generation.stop_token_ids", "stop_token_ids"),
    "stop_token_id": ("generation.stop_token_ids", "stop_token_ids"),
    # optimizer
    "learning_rate": ("optim.lr",),
    "actor_learning_rate": ("optim.lr",),
    "actor.optim.lr": ("optim.lr",),
    "actor_rollout_ref.actor.optim.lr": ("optim.lr",),
    "critic_learning_rate": ("critic.optim.lr",),
    "adam_beta1": ("optim.betas",),
    "adam_beta2": ("optim.betas",),
    "adam_betas": ("optim.betas",),
    "adam_epsilon": ("optim.eps",),
    "lr_scheduler_type": ("optim.schedule",),
    "lr_scheduler": ("optim.schedule",),
    "lr_warmup_steps": ("optim.warmup_steps",),
    "warmup_ratio": ("optim.warmup_steps",),
    "lr_warmup_ratio": ("optim.warmup_steps",),
    "max_norm": ("optim.max_grad_norm",),
    "grad_clip": ("optim.max_grad_norm",),
    "l2": ("optim.weight_decay",),
    "optim": ("optim.state",),
    # KL, clipping, advantages
    "beta": ("kl.coef", "beta"),
    "kl_coef": ("kl.coef",),
    "init_kl_coef": ("kl.coef",),
    "kl_loss_coef": ("kl.coef",),
    "kl_ctrl.kl_coef": ("kl.coef",),
    "algorithm.kl_ctrl.kl_coef": ("kl.coef",),
    "actor.kl_loss_coef": ("kl.coef",),
    "kl_target": ("kl.target",),
    "target_kl": ("kl.target",),
    "kl_horizon": ("kl.horizon",),
    "kl_estimator": ("kl.estimator",),
    "kl_loss_type": ("kl.estimator",),
    "kl_penalty": ("kl.estimator",),
    "use_kl_loss": ("kl.placement",),
    "use_kl_in_reward": ("kl.placement",),
    "cliprange": ("loss.clip_low",),
    "clip_range": ("loss.clip_low",),
    "epsilon": ("loss.clip_low",),
    "epsilon_low": ("loss.clip_low",),
    "eps_clip": ("loss.clip_low",),
    "clip_ratio": ("loss.clip_low",),
    "clip_ratio_low": ("loss.clip_low",),
    "epsilon_high": ("loss.clip_high",),
    "clip_ratio_high": ("loss.clip_high",),
    "eps_clip_low_high": ("loss.clip_low",),
    "cliprange_value": ("loss.value_clip",),
    "value_clip": ("loss.value_clip",),
    "vf_coef": ("loss.value_coef",),
    "entropy_coeff": ("loss.entropy_coef",),
    "entropy_loss_coef": ("loss.entropy_coef",),
    "lambd": ("loss.lam",),
    "lam": ("loss.lam",),
    "gae_lambda": ("loss.lam",),
    "missing_eos_penalty": ("missing_eos_penalty",),
    "reward_clip_range": ("score_clip",),
    # LoRA, saving, watching
    "lora_r": ("lora.rank",),
    "lora_rank": ("lora.rank",),
    "lora_alpha": ("lora.alpha",),
    "lora_target_modules": ("lora.targets",),
    "target_modules": ("lora.targets",),
    "use_peft": ("lora.rank",),
    "output_dir": ("run.dir",),
    "save_path": ("run.dir",),
    "ckpt_path": ("run.dir",),
    "default_local_dir": ("run.dir",),
    "trainer.default_local_dir": ("run.dir",),
    "resume_from_checkpoint": ("run.resume",),
    "load_checkpoint": ("run.resume",),
    "resume_mode": ("run.resume",),
    "save_steps": ("run.save_every",),
    "save_freq": ("run.save_every",),
    "trainer.save_freq": ("run.save_every",),
    "save_total_limit": ("run.keep",),
    "max_ckpt_num": ("run.keep",),
    "eval_steps": ("evaluation.every", "eval_every"),
    "test_freq": ("evaluation.every", "eval_every"),
    "disable_tqdm": ("run.progress",),
    "report_to": ("run.log",),
    "use_wandb": ("run.log",),
    "log_with": ("run.log",),
    "trainer.logger": ("run.log",),
    "logging_dir": ("run.log",),
}
# how some of them are written here, which the name alone does not say
HOW = {
    "input_key": "FILE:prompt=COLUMN",
    "prompt_key": "FILE:prompt=COLUMN",
    "column_map": "FILE:prompt=COLUMN",
    "dataset_config": "hf:ID:SPLIT:config=NAME",
    "dataset_train_split": "hf:ID:SPLIT",
    "dataset_split": "hf:ID:SPLIT",
    "dataset_name": "hf:ID, or a file",
}
# What is nearest, in a stage that has it not, to an option of other stages: sft, reward and dpo
# count epochs.
OF_OTHER_STAGES: dict[str, tuple[str, ...]] = {
    "steps": ("epochs",),
    "prompts_per_step": ("sequences_per_step", "pairs_per_step", "answers_per_step"),
    "sequences_per_step": ("prompts_per_step", "pairs_per_step", "answers_per_step"),
    "pairs_per_step": ("prompts_per_step", "sequences_per_step", "answers_per_step"),
    "answers_per_step": ("prompts_per_step", "sequences_per_step", "pairs_per_step"),
    "max_prompt_length": ("max_length",),
    "max_length": ("max_prompt_length",),
    "kl.coef": ("beta",),
    "eval_every": ("evaluation.every",),
    "evaluation.every": ("eval_every",),
    "evaluation.data": ("eval_fraction",),
    "eval_fraction": ("evaluation.data",),
}
STAGES_ELSEWHERE = {
    "rm": "reward",
    "reward_model": "reward",
    "reward_modeling": "reward",
    "raft": "rejection",
    "rft": "rejection",
    "best_of_n": "rejection",
    "rejection_sampling": "rejection",
    "reinforce++": "reinforce_pp",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce++_baseline": "reinforce_pp_baseline",
    "drgrpo": "dr_grpo",
    "ipo": "dpo",
    "cdpo": "dpo",
    "simpo": "dpo",
    "orpo": "dpo",
    "bco": "kto",
    "finetune": "sft",
}


def known_elsewhere(name: str, known: Mapping[str, object]) -> str | None:
    """Return the name in `known` for an option that another trainer calls `name`, with or without
    that trainer's prefixes; None if there is no such option."""
    parts = name.lower().replace("-", "_").split(".")
    for first in range(len(parts)):
        if (
            found := next(
                (ours for ours in ELSEWHERE.get(".".join(parts[first:]), ()) if ours in known), None
            )
        ) is not None:
            return found
    return None


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """List at most three known dotted names that a mistyped name may mean: it has the same last
    part, a few wrong letters, or the same beginning or words. Empty if no name is similar."""
    name = name.lower().replace("-", "_")
    known = sorted(known, key=lambda key: (key.count("."), key))
    own = name.rpartition(".")[2]
    leaves = [(key, key.rpartition(".")[2]) for key in known]
    if same := [key for key, leaf in leaves if leaf == own]:
        return (
            same[:1]
            if "." not in name or len(same) == 1
            else sorted(same, key=lambda key: slips(key, name))[:1]
        )
    flat = name.replace(".", "_")
    near = sorted(
        (slips(leaf, own), slips(key, name), at)
        for at, (key, leaf) in enumerate(leaves)
        if is_near(leaf, own)
    ) or sorted(
        (slips(key.replace(".", "_"), flat), 0, at)
        for at, key in enumerate(known)
        if "." not in name and is_near(key.replace(".", "_"), flat)
    )
    if near:
        return [known[near[0][2]]]
    group = name.rpartition(".")[0]
    begun = [
        key
        for key, leaf in leaves
        if len(own) >= 3
        and key.startswith(group)
        and (
            leaf.startswith(own)
            or (group and len(leaf) >= 3 and own.startswith(leaf))
            or set(own.split("_")) < set(leaf.split("_"))
        )
    ]
    return begun if len(begun) <= 3 else []


def is_near(a: str, b: str) -> bool:
    """Whether one word may be the other mistyped: at most one slip, or one in four letters, and
    fewer slips than letters."""
    longer, shorter = max(len(a), len(b)), min(len(a), len(b))
    most = min(max(1, longer // 4), shorter - 1)
    return longer - shorter <= most and slips(a, b) <= most


def slips(a: str, b: str) -> int:
    """Count the letters left out, added, changed, or swapped with their neighbour between two words
    (optimal string alignment distance)."""
    before, row = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], older[j - 2] + 1)
    return row[-1]
