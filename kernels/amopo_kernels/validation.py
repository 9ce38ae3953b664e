"""What public functions take: the type, dtype, device and shape of every tensor, and when values are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .errors import ShardedTensorError

INTEGERS = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    tensor,
    shape: Sequence[int | str],
    *,
    device: torch.device | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Refuse what is not a tensor of these sizes; reads no values.

    Args:
        shape: a number is that size, a name stands for any size, "..." at an end for any number of sizes.
        device: that of the other arguments.
        dtypes: None: floating point.

    Raises:
        TypeError: not a tensor, or of another dtype. ShardedTensorError: a DTensor. ValueError: device or shape.
    """
    if isinstance(tensor, torch.nn.Module):
        raise TypeError(
            f"{name} is a module ({type(tensor).__name__}); pass its tensors, such as {name}.weight and {name}.bias, "
            "or let LinearLogps.from_model read the head of a model"
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; make one with torch.tensor")
    if type(tensor).__name__ == "DTensor":
        raise ShardedTensorError(
            f"{name} is a DTensor. If FSDP shards it and every rank has rows of its own, "
            "call this inside the wrapped forward, where it is gathered, or pass tensor.full_tensor(). If the ranks "
            "share their rows (tensor parallel, Shard(0) of the vocabulary), say so: "
            "process_group=tensor.device_mesh.get_group()"
        )
    if dtypes is None and not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if dtypes is not None and tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {device}; move them to one device")
    if not _fits(tuple(tensor.shape), tuple(shape)):
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must be ({wanted}), got {tuple(tensor.shape)}")


def _fits(found: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    if "..." in wanted:
        fixed = len(wanted) - 1
        found = found[len(found) - fixed :] if wanted[0] == "..." and len(found) > fixed else found[:fixed]
        wanted = tuple(size for size in wanted if size != "...")
    return len(found) == len(wanted) and all(a == b for a, b in zip(found, wanted, strict=True) if isinstance(b, int))


def wants_values(validate: bool | None, tensor: Tensor) -> bool:
    """Whether to read values and refuse bad ones. validate=None: where that costs no synchronisation, on the CPU.

    Never where there are none to read: while torch compiles, exports, or maps a function over a batch.
    """
    if not _has_values(tensor):
        return False
    return tensor.device.type == "cpu" if validate is None else validate


def _has_values(tensor: Tensor) -> bool:
    return not (
        torch.compiler.is_compiling()
        or isinstance(tensor, FakeTensor)
        or tensor.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
