"""Causal language models: which can be packed, how they are loaded, and a packed row through one; floor 5."""
