"""Module for verl to import in each of its processes, which puts this package's advantages and
losses in place of verl's: VERL_USE_EXTERNAL_MODULES=fusedrl.engine.rollout.verl_algos_plugin. It
needs verl. `patched.calls` counts the calls of this process."""

from fusedrl.engine.rollout.verl_algos import use_algos

patched = use_algos()
