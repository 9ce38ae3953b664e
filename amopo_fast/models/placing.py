"""Loads a model's parameters into memory that was taken before, one tensor at a time: without a second copy of them.

transformers sets each parameter that it has loaded, converted and merged on its module, where a registration hook moves
it to its home. Meanwhile files are read in place of being mapped, as every page of a mapped file would stay with the
process until the file is closed; and tensor by tensor, as transformers' threads would read ahead of the hook.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import modeling_utils

_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' variable: no threads that read ahead


@contextmanager
def loading_into(homes: Mapping[str, Tensor]) -> Iterator[None]:
    """What from_pretrained loads is copied into its home as soon as it is set, and lies there; what has none, or one of
    another shape or dtype, stays where it was loaded.

    homes: by the parameters' names in the model that is loaded.
    """
    parents: dict[nn.Module, tuple[nn.Module, str]] = {}

    def on_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            parents[child] = module, name

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.is_meta:
            return
        while module in parents:
            module, part = parents[module]
            name = f"{part}.{name}"
        _move(parameter, homes.get(name), copy=True)

    with ExitStack() as stack:
        for handle in (
            register_module_module_registration_hook(on_module),
            register_module_parameter_registration_hook(on_parameter),
        ):
            stack.callback(handle.remove)
        stack.enter_context(_files_read_in_order())
        yield


def created_in(homes: Mapping[str, Tensor], create: Callable[[], nn.Module]) -> nn.Module:
    """The model that `create` makes, each parameter in its home before it is initialised.

    Args:
        homes: by the parameters' names.
        create: is called twice, once on the meta device, for the order in which modules register their parameters.
    """
    order: list[nn.Parameter] = []
    with torch.device("meta"), _on_parameters(order.append):
        names = {parameter: name for name, parameter in create().named_parameters()}
    places = iter([homes.get(names.get(parameter, "")) for parameter in order])
    with _on_parameters(lambda parameter: _move(parameter, next(places, None), copy=False)):
        return create()


@contextmanager
def _on_parameters(call: Callable[[nn.Parameter], object]) -> Iterator[None]:
    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            call(parameter)

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _move(parameter: nn.Parameter, home: Tensor | None, *, copy: bool) -> None:
    if home is None or (home.shape, home.dtype) != (parameter.shape, parameter.dtype):
        return
    if copy:
        with torch.no_grad():
            home.copy_(parameter)
    parameter.data = home


@contextmanager
def _files_read_in_order() -> Iterator[None]:
    before = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    modeling_utils.safe_open = lambda *given, **options: safe_open(*given, **{**options, "backend": "pread"})
    try:
        yield
    finally:
        modeling_utils.safe_open = safe_open
        if before is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = before
