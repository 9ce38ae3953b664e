"""Sets of options by name: `amopo-fast train --preset NAME`."""

from __future__ import annotations

from typing import Any

# The published hyper-parameters (arXiv 2506.07165, and the reference code's configuration), all of them, so that they
# replace those of a YAML file. How many pairs make a step depends on the GPUs there and is left to the run.
PAPER: dict[str, Any] = {
    "objective": "amopo", "weighting": "gaussian", "compat": "paper", "beta": 0.8, "gamma": 2.0, "sft_coef": 0.0,
    "learning_rate": 3e-7, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "num_train_epochs": 3.0,
    "max_grad_norm": 3.0, "max_length": 1024, "prompt_order": "dimension_first",
}  # fmt: skip
PRESETS = {"paper": PAPER}
