"""verl's advantages, losses and KL penalties, computed by this package's ops in the processes of
its trainer.

    VERL_USE_EXTERNAL_MODULES=fusedrl.engine.rollout.verl_algos_plugin
        python -m verl.trainer.main_ppo ...

Which functions these are, and how they differ, stands in kernels/verl_algos.py.
"""

from __future__ import annotations

from fusedrl.engine.rollout.patching import Name, Patched
from fusedrl.kernels import verl_algos


def use_algos() -> Patched:
    """Put this package's functions in place of verl's in verl.trainer.ppo.core_algos, in what has
    imported them from there, and in its tables of advantages and policy losses. Return an object
    whose `calls` counts them by name, and which undoes it.

    Raises:
        ImportError: verl is not installed, or has no core_algos.
        RuntimeError: at an optimizer step before any call.
    """
    from verl.trainer.ppo import core_algos

    return Patched(
        "verl",
        {
            name: Name(getattr(core_algos, name), getattr(verl_algos, name))
            for name in verl_algos.NAMES
            if hasattr(core_algos, name)
        },
        tables=[core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.POLICY_LOSS_REGISTRY],
        remedy="a process that trains by other losses needs no use_algos(); leave the module out "
        "of VERL_USE_EXTERNAL_MODULES",
    )
