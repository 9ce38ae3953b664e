"""Pictures and pages of runs and evaluations, and the lines that a training run prints."""
