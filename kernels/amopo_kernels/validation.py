"""When public functions read the values of their arguments, to refuse bad ones."""

from __future__ import annotations

import torch
from torch import Tensor


def wants_values(validate: bool | None, tensor: Tensor) -> bool:
    """validate=None checks values where that costs no synchronisation: on the CPU, outside torch.compile."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() if validate is None else validate
