"""From pairs of text to token ids, and what a run's prompts look like; floor 3."""
