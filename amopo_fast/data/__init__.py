"""Pairs of text with scores, from files and data sets; floor 2."""
