"""Configuration of a run: frozen dataclasses, with one group of options for each subject. The
command line, YAML and Python construct the same objects.

Four options, and no others, set the sizes of a batch: `prompts_per_step`, `samples_per_prompt`,
`minibatches`, `tokens_per_microbatch`. The split into micro-batches never changes the gradient, so
`tokens_per_microbatch` affects memory only.
"""

from fusedrl.engine.config.base import (
    GenerationConfig,
    LoRAConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from fusedrl.engine.config.dpo import DPOConfig
from fusedrl.engine.config.kto import KTOConfig
from fusedrl.engine.config.loss import LossConfig
from fusedrl.engine.config.monitor import AlarmConfig, EvaluationConfig
from fusedrl.engine.config.off_policy import CorrectionConfig, ReplayConfig
from fusedrl.engine.config.offline import RewardModelConfig, SFTConfig
from fusedrl.engine.config.parts import CriticConfig, KLConfig, PenaltyConfig, PtxConfig, TRPOConfig
from fusedrl.engine.config.policy import PolicyConfig
from fusedrl.engine.config.rejection import RejectionConfig
from fusedrl.engine.config.turns import TurnsConfig

__all__ = [
    "AlarmConfig",
    "CorrectionConfig",
    "CriticConfig",
    "DPOConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "KLConfig",
    "KTOConfig",
    "LoRAConfig",
    "LossConfig",
    "OptimConfig",
    "ParallelConfig",
    "PenaltyConfig",
    "PolicyConfig",
    "PtxConfig",
    "RejectionConfig",
    "ReplayConfig",
    "RewardModelConfig",
    "RunConfig",
    "SFTConfig",
    "TRPOConfig",
    "TurnsConfig",
]
