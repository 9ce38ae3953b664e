"""AMoPO (arXiv 2506.07165): multi-objective preference optimization of causal language models.

The public names, each loaded when it is first used; docs/api.md lists them with their stability.
"""

import importlib

__version__ = "0.1.0"

_ROOMS = {
    "AMoPOConfig": "training.config",
    "AMoPOTrainer": "training.trainer",
    "DataConfig": "data.config",
    "ModelConfig": "models.config",
    "PromptBuilder": "prompts.builder",
    "estimate": "memory.estimate",
    "load_data": "prompts.dataset",
    "shared_logps": "models.shared_logps",
}
__all__ = sorted(_ROOMS)


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module 'amopo_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"amopo_fast.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
