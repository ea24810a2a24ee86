"""The run directory: checkpoints, metrics, what is saved and when."""
