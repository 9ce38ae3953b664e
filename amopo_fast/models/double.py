"""Runs a model in float64 throughout, whatever its code casts to: for the trial of a miniature, on the CPU."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

_CASTS = {torch.Tensor.float: torch.Tensor.double, torch.Tensor.half: torch.Tensor.double,
          torch.Tensor.bfloat16: torch.Tensor.double}  # fmt: skip
_NARROW = {torch.float32, torch.bfloat16, torch.float16}


def _wide(value):
    return torch.float64 if type(value) is torch.dtype and value in _NARROW else value


class Double(TorchFunctionMode):
    """While open, a cast to a narrower floating dtype is one to float64, and so is the default dtype.

    Norms, routers, rotary embeddings and recurrences of transformers compute in float32 whatever the weights are;
    without this their rounding would hide a small error, or look like one.
    """

    def __enter__(self):
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception):
        torch.set_default_dtype(self.default)
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = _CASTS.get(func, func)
        return func(*map(_wide, args), **{name: _wide(value) for name, value in (kwargs or {}).items()})
