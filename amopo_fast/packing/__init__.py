"""Which pairs form a step and a row, and how a row shares prefixes; floor 4."""
