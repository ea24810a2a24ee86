"""Rollouts: prompts to scored completions, and the modules that store or compare completions."""
