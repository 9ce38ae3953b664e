"""Triton's interpreter: which kernels run in it, and what its older versions need."""

import importlib.metadata
import sys


def interpreted_kernels() -> list[str]:
    """The kernels of this project that were loaded so far and are interpreted."""
    ours = [(name, module) for name, module in sys.modules.items() if name.startswith(("amopo_kernels", "amopo_fast"))]
    return [
        f"{name}.{kernel}" for name, module in ours for kernel, value in list(vars(module).items())
        if type(value).__name__ == "InterpretedFunction"
    ]  # fmt: skip


def mend_the_interpreter() -> None:
    """Before 3.7.1 it converts a bound of a `range` by int() of an array of one element, which numpy 2.5 refuses."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return
    if tuple(map(int, version.split(".")[:3])) >= (3, 7, 1):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
