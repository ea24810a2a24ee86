"""The run directory: checkpoints, metrics, and when each is saved."""
