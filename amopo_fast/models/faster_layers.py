"""Faster layers for the model's body: liger-kernel's kernels and torch.compile. The head is amopo_kernels'."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn
from torch.torch_version import TorchVersion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_liger_kernel_available

from amopo_fast.errors import OptionError
from amopo_fast.models.architecture import language_model_of
from amopo_fast.models.attention import KEYWORD
from amopo_fast.models.choice import choice_of
from amopo_fast.packing.plan import Layout

# What transformers' `liger_kernel_config` passes to Liger; a model's patch takes those that it knows. Never its
# cross-entropies: the head and the loss are amopo_kernels', and the fused one would replace the model's forward.
LIGER_BODY = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "geglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}
# torch 2.11's dynamo ends in an assertion of its own on Liger's norms (seen on an H100, with liger-kernel 0.8.5).
COMPILES_LIGER = TorchVersion(torch.__version__) >= (2, 12)


def liger_by_default() -> bool:
    """Whether Liger's kernels, which are Triton's, can run here."""
    return torch.cuda.is_available() and is_liger_kernel_available()


def liger_config(given: dict[str, bool] | None) -> dict[str, bool]:
    """`LIGER_BODY` with the user's changes.

    Raises:
        OptionError: a cross-entropy of Liger's is asked for.
    """
    given = given or {}
    for name in ("cross_entropy", "fused_linear_cross_entropy"):
        if given.get(name):
            raise OptionError(
                f"liger_kernel_config has {name}=True: AMoPO's head and loss are amopo_kernels'; leave it out",
                "liger_kernel_config",
            )
    return {**LIGER_BODY, **given}


@contextlib.contextmanager
def without_liger() -> Iterator[None]:
    """transformers' models as they are installed, for those that are built and run inside.

    Liger's patch of a model replaces functions and classes of its file, for every later model of the process; what it
    puts there runs on a GPU's real tensors alone, and takes a fake tensor's address for one.
    """
    patched = []
    for module in [*sys.modules.values()]:
        if getattr(module, "__name__", "").startswith("transformers.models."):
            own = {name: value for name, value in vars(module).items() if _from_liger(value)}
            if own:
                patched.append((module, own))
    for module, own in patched:
        vars(module).update({name: getattr(_as_installed(module.__name__), name) for name in own})
    try:
        yield
    finally:
        for module, own in patched:
            vars(module).update(own)


@functools.cache
def _as_installed(name: str) -> ModuleType:
    """A module executed once more, beside the one that is imported."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_liger(value: object) -> bool:
    return str(getattr(value, "__module__", "")).startswith("liger_kernel")


@functools.cache
def _compiled_class(layer_class: type[nn.Module], backend: str) -> type[nn.Module]:
    """A subclass whose forward is compiled for packed rows and the class's own for everything else.

    The compiled forward is inside gradient checkpointing, as the subclass is what transformers wraps with it.
    """
    compiled = torch.compile(layer_class.forward, dynamic=True, backend=backend)

    class Compiled(layer_class):
        def forward(self, *args, **kwargs):
            packed = KEYWORD in kwargs
            return (compiled if packed else layer_class.forward)(self, *args, **kwargs)

    Compiled.__name__, Compiled.__qualname__ = layer_class.__name__, layer_class.__qualname__  # FSDP wraps by name
    Compiled.__module__ = layer_class.__module__
    return Compiled


def _is_ligers(module: nn.Module) -> bool:
    """Liger replaces classes for new models, and methods of the modules of one that is there."""
    return _from_liger(module.forward) or _from_liger(type(module).forward)


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the decoder layers of a causal LM after `prepare_model`, in place: once for all layers of a kind and all
    row lengths.

    Padded batches and generate() run as before. Attention itself stays outside: its segments are data.

    Args:
        backend: of torch.compile.

    Raises:
        OptionError: the model trains in the layout separate, whose rows are padded batches; or its layers hold Liger's
            kernels, which this torch cannot compile.
        ValueError: the model has no layers that transformers could checkpoint.
    """
    choice = choice_of(model)
    if choice.layout is Layout.SEPARATE:
        reason = f" ({choice.reason})" if choice.reason else ""
        raise OptionError(
            f"compile_layers compiles layers for packed rows, and {type(language_model_of(model)).__name__} trains in "
            f"the layout separate{reason}: leave compile_layers out", "compile_layers",
        )  # fmt: skip
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no GradientCheckpointingLayer; leave compile_layers out")
    if not COMPILES_LIGER and any(_is_ligers(module) for module in model.modules()):
        raise OptionError(
            f"torch {torch.__version__} cannot compile Liger's kernels: leave compile_layers out, set "
            "use_liger_kernel=False, or install torch 2.12 or newer", "compile_layers",
        )  # fmt: skip
    for layer in layers:
        layer.__class__ = _compiled_class(layer.__class__, backend)
