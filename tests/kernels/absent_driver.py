"""Launches of Triton's kernels without a GPU: what reaches CUDA's driver, and what the host takes for it.

    absent = AbsentDriver(folder)      absent_driver.c is the driver; its library is built in the folder
    absent.use()                       from here on Triton compiles for sm_90 and launches on nothing
    absent.know(compiled); ...; absent.launches()

A process must have been started with `environment(folder)`: libraries are looked for where its start says.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

HEAD = struct.Struct("10Q")  # grid, block, shared memory, stream, function, attributes
SOURCE = Path(__file__).with_suffix(".c")
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


def environment(folder: Path) -> dict[str, str]:
    """Of the process that is to use it, with no interpreter of Triton's."""
    mine = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, (str(folder), mine.get("LD_LIBRARY_PATH"))))
    return mine | {"LD_LIBRARY_PATH": paths, "TRITON_LIBCUDA_PATH": str(folder)}


def compiler() -> str | None:
    """Of C, as Triton finds it."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


class AbsentDriver:
    def __init__(self, folder: Path):
        import triton.backends.nvidia

        headers = Path(triton.backends.nvidia.__file__).parent / "include"
        library = folder / "libcuda.so.1"
        if not library.exists():
            subprocess.run(
                [compiler(), "-O2", "-shared", "-fPIC", "-w", f"-I{headers}", SOURCE, "-o", library], check=True
            )  # fmt: skip
        self._library = ctypes.CDLL(str(library))
        self._library.absent_written.restype = self._library.absent_launches.restype = ctypes.c_size_t
        self._sizes: dict[int, list[int]] = {}

    def use(self) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver

        class Driver(CudaDriver):
            def __init__(self):
                super().__init__()
                self.get_device_capability = lambda device: (9, 0)
                self.get_current_stream = lambda device: 7
                self.get_current_device = lambda: 0

            def get_current_target(self):
                return GPUTarget("cuda", 90, 32)

        triton.runtime.driver.set_active(Driver())

    def know(self, compiled) -> None:
        """What parameters the kernel has, from its PTX: of others, launches have none."""
        if compiled.function in self._sizes:
            return
        found = re.findall(r"^\s*\.param (.*?)_param_\d+(?:\[(\d+)\])?,?$", compiled.asm["ptx"], re.M)
        sizes = [int(length) if length else _BYTES[re.search(r"\.[usbf](\d+)", type_)[1]] for type_, length in found]
        self._sizes[compiled.function] = sizes
        numbers = (ctypes.c_size_t * len(sizes))(*sizes)
        self._library.absent_parameters(ctypes.c_size_t(compiled.function), ctypes.c_size_t(len(sizes)), numbers)

    def write_down(self, on: bool) -> None:
        self._library.absent_write_down(on)

    def count(self) -> int:
        return self._library.absent_launches()

    def taken(self) -> bytes:
        """What was written down since the last call, and is forgotten now."""
        start = ctypes.c_void_p()
        length = self._library.absent_written(ctypes.byref(start))
        return ctypes.string_at(start, length) if length else b""

    def launches(self) -> list[tuple[tuple[int, ...], list[bytes]]]:
        """(HEAD, parameters) of every launch since the last call, of kernels that were known before they ran."""
        data, place, found = self.taken(), 0, []
        while place < len(data):
            head = HEAD.unpack_from(data, place)
            place += HEAD.size
            parameters = []
            for size in self._sizes.get(head[8], ()):
                parameters.append(data[place : place + size])
                place += size
            found.append((head, parameters))
        return found
