"""From prompts to scored completions, and what keeps or compares them."""
