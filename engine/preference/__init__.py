"""Comparisons and pairs, their losses, the reward model's report."""
