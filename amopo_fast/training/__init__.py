"""The objective, the trainer and its options; floor 7."""
