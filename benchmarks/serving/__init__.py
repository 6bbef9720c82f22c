"""Two servers on one machine, the same prompts: decode speed and tokens."""
