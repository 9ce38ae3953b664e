"""Triton's interpreter: which kernels run in it, and what its older versions need."""

import functools
import importlib.metadata
import inspect
import sys


def interpreted_kernels() -> list[str]:
    """The kernels of this project that were loaded so far and are interpreted."""
    ours = [(name, module) for name, module in sys.modules.items() if name.startswith(("amopo_kernels", "amopo_fast"))]
    return [
        f"{name}.{kernel}" for name, module in ours for kernel, value in list(vars(module).items())
        if type(value).__name__ == "InterpretedFunction"
    ]  # fmt: skip


def mend_the_interpreter() -> None:
    """At every call of a kernel, and of a function in one, the interpreter looks through all of `triton.language` for
    what is to be replaced: a third of its time. It has no `atomic_add` of a tensor descriptor. Before 3.7.1 it converts
    a bound of a `range` by int() of an array of one element, which numpy 2.5 refuses."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return
    from triton.runtime import interpreter

    interpreter._patch_builtin = _patch_builtin
    interpreter.InterpreterBuilder.create_descriptor_reduce = _add_to_descriptor
    if tuple(map(int, version.split(".")[:3])) >= (3, 7, 1):
        return
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


@functools.cache
def _builtins(package: object) -> list[tuple[str, object]]:
    """What is to be replaced, found at the first call, before anything is."""
    from triton.language.core import is_builtin

    return [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package, builder, scope) -> None:
    from triton.runtime.interpreter import _patch_attr

    members = _builtins(package)
    if members and getattr(package, members[0][0]) is members[0][1]:  # else a kernel around this one replaced them
        for name, member in members:
            _patch_attr(package, name, member, builder, scope)


def _add_to_descriptor(builder, kind, descriptor, value, offsets) -> None:
    from triton.runtime.interpreter import TensorHandle, _ir

    assert kind == _ir.DESCRIPTOR_REDUCE_KIND.ADD
    before = builder.create_descriptor_load(descriptor, offsets, None)
    builder.create_descriptor_store(descriptor, TensorHandle(before.data + value.data, value.dtype), offsets)
