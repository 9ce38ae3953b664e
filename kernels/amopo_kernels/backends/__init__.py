"""The ways to compute. Built so far: torch_slices (vocabulary slices in plain torch)."""
