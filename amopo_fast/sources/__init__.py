"""Where pairs come from: files into raw records (files.py), and one module per format from raw records to candidates."""
