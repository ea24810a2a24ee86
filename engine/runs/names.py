"""Names of all metrics that a run may report, as docs/metrics.md explains them, and the check of
names that an option gives. Nothing here needs torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from fusedrl.engine.base.errors import ConfigError

# an asterisk stands for the name of a reward, a phase or a number
_NAMES = """
    accuracy alarm/reward_hacking clip_ratio/high_mean clip_ratio/low_mean
    clip_ratio/region_mean completions/clipped_ratio completions/distinct_trigrams
    completions/invalid completions/longest_run completions/loop_fraction completions/max_length
    completions/mean_length completions/min_length completions/repeated_trigrams correction/chi2
    correction/ess correction/fraction correction/max correction/mean correction/off_policy_fraction
    critic/below_epsilon critic/grad_norm critic/learning_rate divergence drift/chosen entropy
    entropy_coef environment/* eval_accuracy eval_accuracy_high eval_accuracy_low eval_answers
    eval_brier eval_completions/clipped_ratio eval_completions/loop_fraction
    eval_completions/mean_length eval_completions/repeated_trigrams eval_ece eval_examples
    eval_gold/*/mean eval_kl eval_length_correlation eval_loss eval_margin eval_pairs
    eval_pass@* eval_perplexity eval_perplexity_ref eval_reward eval_rewards/*/mean
    eval_rewards/accuracies eval_rewards/accuracies_high eval_rewards/accuracies_low
    eval_rewards/margins frac_reward_zero_std gold/*/mean grad_norm imitation_loss
    kept/fraction kept/mean_length kept/prompts_skipped kept/reward kl kl_coef learning_rate
    logps/chosen logps/rejected loss loss/policy_avg loss/ptx loss/value_avg margin
    mem/*_gib mem/peak_gib num_tokens objective/non_score_reward objective/rlhf_reward
    optim/below_epsilon parallel/experience_bytes parallel/gradients_bytes
    parallel/imbalance parallel/imbalance_time parallel/imbalance_tokens
    parallel/parameters_bytes parallel/rank*/* perplexity perplexity_ref policy/approxkl_avg
    policy/clamped_fraction policy/first_approxkl policy/first_clipfrac
    policy/first_ratio_max policy/first_ratio_min policy/last_approxkl
    policy/left_out_fraction ranking_loss refill/generated_groups refill/kept_groups
    replay/age_max replay/age_mean replay/ess replay/fraction replay/size reward reward_failures
    reward_std rewards/*/mean rewards/accuracies rewards/chosen rewards/margins rewards/rejected
    sampling/ratio_outside_fraction sampling/sampling_logp_difference/max
    sampling/sampling_logp_difference/mean sampling/value_diff_max score_clip_fraction score_shift
    skipped_updates speculation/accepted speculation/drafted speculation/tokens_per_verification
    step step_tokens timing/* timing/environment_wait timing/exchange timing/reward_wait timing/step
    timing/waiting tokens_per_s trpo/accepted trpo/cg_residual trpo/expected_improvement
    trpo/fraction trpo/improvement trpo/kl turns/failures turns/max turns/mean
    turns/observation_tokens updates val/clipfrac_avg val/explained_variance val/ratio val/ratio_max
    val/ratio_min val/ratio_outside_fraction val/ratio_p01 val/ratio_p99
"""
METRICS = tuple(_NAMES.split())


def check_metrics(option: str, names: Sequence[str]) -> None:
    """Raise ConfigError for a name without an asterisk that is no metric of any run. `option` is
    what gave the names."""
    for name in names:
        if "*" in name or any(fnmatchcase(name, known) for known in METRICS):
            continue
        close = difflib.get_close_matches(name, METRICS, 1, 0.5)
        raise ConfigError(
            f"config: expected {option} to name metrics, got {name!r}"
            f"{f', did you mean {close[0]}?' if close else ''}; docs/metrics.md lists them, and "
            "metrics.jsonl of a run has its own"
        )
