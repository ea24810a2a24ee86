"""AdamW and its schedule, natural gradient."""
