"""A model's recurrent functions as its own file writes them: for the trial of a miniature, on the CPU.

transformers puts fla's, causal-conv1d's and mamba-ssm's kernels in their place where these packages are installed. They
need a GPU, and compute no float64.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.integrations import hub_kernels

from amopo_fast.models.small_sizes import SIZES


@contextmanager
def plain_functions(model: nn.Module) -> Iterator[None]:
    """While open, functions of the files of `model`'s modules are torch's, with chunks shorter than the trial's
    sequences where a file says a length and a configuration does not."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    forwards = filter(inspect.isfunction, (vars(kind).get("forward") for kind in kinds))
    files = {id(file): file for file in (inspect.unwrap(forward).__globals__ for forward in forwards)}
    before = []
    try:
        for file in files.values():
            for name, value in list(file.items()):
                if inspect.isfunction(value) and value.__module__ == file["__name__"]:
                    plain = _with_small_chunks(_plain(value))
                    if plain is not value:
                        before.append((file, name, value))
                        file[name] = plain
        yield
    finally:
        for file, name, value in before:
            file[name] = value


def _plain(function: Callable) -> Callable:
    """What `use_kernel_func_from_hub_with_fallback` was given, or the function itself."""
    link: Any = function
    while link is not None and getattr(link, "__globals__", {}).get("__name__") != hub_kernels.__name__:
        link = getattr(link, "__wrapped__", None)
    return function if link is None else inspect.unwrap(link)


def _with_small_chunks(function: Callable) -> Callable:
    parameter = inspect.signature(function).parameters.get("chunk_size")
    if parameter is None or not isinstance(parameter.default, int):
        return function
    return functools.partial(function, chunk_size=SIZES["chunk_size"])
