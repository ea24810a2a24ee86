"""Module for verl to import in each of its processes, which registers the rollout "fusedrl":
VERL_USE_EXTERNAL_MODULES=fusedrl.engine.rollout.verl_plugin. It needs verl."""

from fusedrl.engine.rollout.verl import register

register()
