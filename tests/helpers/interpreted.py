"""Which kernels run in Triton's interpreter."""

import sys


def interpreted_kernels() -> list[str]:
    """The kernels of this project that were loaded so far and are interpreted."""
    ours = [(name, module) for name, module in sys.modules.items() if name.startswith(("amopo_kernels", "amopo_fast"))]
    return [
        f"{name}.{kernel}" for name, module in ours for kernel, value in list(vars(module).items())
        if type(value).__name__ == "InterpretedFunction"
    ]  # fmt: skip
