"""What keeps a run alive: whole checkpoints, finite numbers, signals; floor 4."""
