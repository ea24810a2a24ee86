"""Functions and models that score completions, and their sum."""
