"""Where pairs come from: files into raw records (files.py), and a module per format from those to candidates."""
