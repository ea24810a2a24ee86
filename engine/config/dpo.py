"""Direct preference optimisation: a policy from preference pairs alone, without a reward model and
without sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fusedrl.engine.config.base import LoRAConfig, OptimConfig, RunConfig, check_values, require

SMOOTHED = ("sigmoid", "robust")  # the losses that label_smoothing belongs to


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation (Rafailov et al., 2023) and its relatives, against the initial
    weights as reference.

    With h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)), sums over
    the tokens of each answer and no means:
    sigmoid -log sigmoid(beta h), ipo (h - 1 / (2 beta))^2, hinge max(0, 1 - beta h); see
    preference_losses.py.

    Args:
        model: directory or id of the policy to train; its initial weights are the reference.
        data: JSONL file (.gz too) of preference pairs: {"prompt", "chosen", "rejected"} or implicit
            {"chosen", "rejected"} such as HH-RLHF. A tie (WebGPT) is a pair of label 0.5; a
            "margin" column is what beta h should exceed (Amini et al., 2024).
        loss: sigmoid, ipo (of sums, as Azar et al. define it; TRL divides by lengths), hinge
            (RSO's, SLiC's with a reference), or robust (unbiased where a share label_smoothing of
            the labels is known to be wrong).
        beta: of the KL to the reference that is traded for preference; of ipo, its tau.
        label_smoothing: of sigmoid, the probability that a label is wrong, believed (Mitchell,
            2023, cDPO); of robust, known (Chowdhury et al., 2024).
        nll_coef: weight of the mean negative log-probability of the chosen answer's tokens, added
            to the loss of its pair (Pang et al., 2024).
        eval_fraction: part of the pairs held out for loss and accuracy.
        epochs: passes over the pairs.
        pairs_per_step: pairs of one optimizer step.
        tokens_per_microbatch: tokens of one forward and backward, both answers of a pair with their
            prompts; a pair is never cut.
        checkpoint_activations: keep layers' inputs alone and compute the rest again in the backward
            pass: less memory, one more forward.
        max_length: pairs with a longer side are dropped and counted; None is the model's own limit.
        skip_bad_lines: write malformed lines to <run>/rejects.jsonl and go on, instead of stopping
            with all of them listed.
        dtype: of the parameters: auto is float32 on CPU and bfloat16 on CUDA.
        device: cpu, cuda, or None for the best there is.
        lora: train adapters on the frozen model; lora.rank, lora.alpha, lora.targets or lora.rslora
            turns it on. <run>/model then holds them merged, <run>/adapter by themselves.
        reference: frozen is a second copy of the weights; adapter_off is the policy with its
            adapter switched off, which takes no memory; host is a copy in the host's memory that
            comes to the GPU to score; auto is adapter_off with lora and frozen without.
        optim: of the update. The peak learning rate here is Rafailov et al.'s, 1e-6, for all the
            weights of a large model; adapters and small models take more.
    """

    model: str
    data: str
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_coef: float = 0.0
    eval_fraction: float = 0.1
    epochs: int = 1
    pairs_per_step: int = 32
    tokens_per_microbatch: int = 8192
    checkpoint_activations: bool = False
    max_length: int | None = None
    skip_bad_lines: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None
    lora: LoRAConfig | None = None
    reference: Literal["auto", "frozen", "adapter_off", "host"] = "auto"
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6))
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self.beta > 0,
            "beta",
            "> 0 (at 0 nothing holds the policy near its reference, and nothing prefers)",
            self.beta,
        )
        require(
            0 <= self.label_smoothing < 0.5,
            "label_smoothing",
            "in [0, 0.5) (half of the labels wrong is no preference, more is the opposite one)",
            self.label_smoothing,
        )
        require(
            self.label_smoothing == 0 or self.loss in SMOOTHED,
            "label_smoothing",
            f"0 with loss {self.loss}, which does not read it (it belongs to "
            f"{' and '.join(SMOOTHED)})",
            self.label_smoothing,
        )
        require(
            self.label_smoothing > 0 or self.loss != "robust",
            "label_smoothing",
            "> 0 with loss robust: the share of labels that are wrong (without any it is sigmoid)",
            self.label_smoothing,
        )
        require(self.nll_coef >= 0, "nll_coef", ">= 0", self.nll_coef)
        require(0 <= self.eval_fraction < 1, "eval_fraction", "in [0, 1)", self.eval_fraction)
        for name in ("epochs", "pairs_per_step", "tokens_per_microbatch"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        require(
            self.reference != "adapter_off" or self.lora is not None,
            "reference",
            "frozen, host or auto without lora (there is no adapter to switch off)",
            self.reference,
        )

    @property
    def title(self) -> str:
        """What the run is called on the terminal."""
        return "dpo"

    @property
    def reference_kind(self) -> str:
        """`reference`, with auto resolved: frozen, adapter_off or host."""
        return (
            self.reference
            if self.reference != "auto"
            else "frozen"
            if self.lora is None
            else "adapter_off"
        )
