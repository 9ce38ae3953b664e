"""Compile Triton kernels for GPUs that are not there, and read what the compiler made of them.

    from compiling import Launch, compile_kernels

    compiled = compile_kernels([Launch("amopo_kernels.rows.segment_sum:segment_sum_kernel",
                                       {"values_ptr": torch.bfloat16, "columns": 512, "BLOCK": 512, ...}, cc=90)])
    compiled[0].check()

A launch is written as the launcher would make it: a torch dtype stands for a tensor of it (16-byte aligned), a
`Descriptor` for a host-side tensor descriptor, a tuple for a tuple of these, numbers and constexprs for themselves.
Triton specialises them as at a real launch. The work is done in a child process, because the other tests run with
TRITON_INTERPRET=1, which Triton reads when a kernel is decorated. It waits for more, as importing torch and triton is
half of the time, and ends with this process. Triton's own cache keeps what was compiled before.
`compile_here` does it in this process, for programs that have Triton compile (benchmarks/compile_report.py).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any

import torch

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block, CUDA programming guide


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A `TensorDescriptor` of a contiguous tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    block_shape: tuple[int, ...]
    gluon: bool = False  # for a kernel in Gluon, which asks for its layout in shared memory, too


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: str  # "module:name", the name of a @triton.jit function
    arguments: dict[str, Any]
    cc: int = 90  # compute capability: 80, 90, 100
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # others of triton, such as maxnreg


@dataclasses.dataclass(frozen=True)
class Compiled:
    launch: Launch
    ptx: str
    registers: int  # per thread
    stack_bytes: int  # per thread; local memory: spills, or arrays indexed at run time
    shared_bytes: int  # per block, dynamic shared memory included
    triton_version: str
    cubin: bytes = dataclasses.field(repr=False)

    @property
    def sass_instructions(self) -> int:
        """Of the machine code, loops counted once. Disassembled here: it takes longer than all else that is read."""
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?);", _cuobjdump(self.cubin, "--dump-sass"))
        return sum(not each.startswith("NOP") for each in instructions)

    @property
    def wgmma(self) -> bool:
        return "wgmma.mma_async" in self.ptx

    @property
    def mma_instructions(self) -> set[str]:
        """The matrix instructions of the PTX: wgmma (sm_90), tcgen05 (sm_100), mma.sync (sm_80's, slow on later)."""
        names = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
        return {name for name, text in names.items() if text in self.ptx}

    def check(self, matmul: bool | None = None) -> None:
        """No local memory, shared memory within the chip; with `matmul`, the chip's own matrix instructions alone."""
        limit = SHARED_MEMORY_LIMIT[self.launch.cc]
        report = (
            f"{self.launch.kernel} for sm_{self.launch.cc}: {self.registers} registers, {self.stack_bytes} bytes of "
            f"stack, {self.shared_bytes} of {limit} bytes of shared memory, {sorted(self.mma_instructions)}, "
            f"triton {self.triton_version}; {self.launch}"
        )
        assert self.stack_bytes == 0, f"spills: {report}"
        assert self.shared_bytes <= limit, f"shared memory: {report}"
        if matmul is not None:
            wanted = {{80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[self.launch.cc]} if matmul else set()
            assert self.mma_instructions == wanted, f"matrix instructions: {report}"


def compile_kernels(launches: list[Launch]) -> list[Compiled]:
    """Compile all of them in the child process. Raises RuntimeError with the compiler's message."""
    child, errors = _child()
    try:
        pickle.dump((sys.path, [dataclasses.asdict(launch) for launch in launches]), child.stdin)
        child.stdin.flush()
        results = pickle.load(child.stdout)
    except (EOFError, BrokenPipeError):  # the compiler crashed
        _child.cache_clear()
        child.kill()
        errors.seek(0)
        results = f"exit status {child.wait()}\n{errors.read()}"
    if isinstance(results, str):
        raise RuntimeError(f"compiling failed:\n{results}")
    return [Compiled(launch=launch, **result) for launch, result in zip(launches, results, strict=True)]


@functools.cache
def _child() -> tuple[subprocess.Popen, IO[str]]:
    """It, and the file of what it says."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    errors = tempfile.TemporaryFile("w+")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    return subprocess.Popen([sys.executable, __file__], env=environment, **pipes), errors


# ----- the child process -----


class _AbsentGPU:
    """A Triton driver that only names its target; compute capabilities stand for devices."""

    def __init__(self):
        self.cc = 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.cc, 32)

    def get_current_device(self):
        return self.cc

    def get_current_stream(self, device):
        return 0


def _argument(value):
    import triton.tools.tensor_descriptor as descriptors
    from triton.runtime.jit import MockTensor

    if isinstance(value, torch.dtype):
        return MockTensor(value)
    if isinstance(value, tuple):
        return type(value)(*map(_argument, value))
    if isinstance(value, dict) and "block_shape" in value:
        strides = [1]
        for size in reversed(value["shape"][1:]):
            strides.insert(0, strides[0] * size)
        base = MockTensor(value["dtype"], list(value["shape"]))
        if value["gluon"]:
            return _in_gluon(base, strides, list(value["block_shape"]))
        return descriptors.TensorDescriptor(base, list(value["shape"]), strides, list(value["block_shape"]))
    return value


def _in_gluon(base, strides: list[int], block: list[int]):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[base.dtype]
    return TensorDescriptor(
        base, list(base.shape), strides, block, gl.NVMMASharedLayout.get_default_for(block, element)
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> dict[str, int]:
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _cuobjdump(cubin, "--dump-resource-usage")))
    return {"registers": int(usage["REG"]), "stack_bytes": int(usage["STACK"]) + int(usage["LOCAL"])}


def use_absent_gpu() -> None:
    """From here on Triton compiles in this process, and launches nothing."""
    from triton.runtime import driver

    driver.set_active(_AbsentGPU())


def compile_here(launch: Launch) -> Compiled:
    """After `use_absent_gpu`. Raises what the compiler raises."""
    result = _compile(dataclasses.asdict(launch))
    return Compiled(launch=launch, **result)


def _compile(launch: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.runtime import driver

    driver.active.cc = launch["cc"]
    module, name = launch["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    compiled = kernel.warmup(
        **{name: _argument(value) for name, value in launch["arguments"].items()}, grid=(1,),
        num_warps=launch["num_warps"], num_stages=launch["num_stages"], **launch["options"],
    )  # fmt: skip
    _build_launcher(compiled)
    return {"ptx": compiled.asm["ptx"], "shared_bytes": compiled.metadata.shared,
            "triton_version": triton.__version__, "cubin": compiled.asm["cubin"],
            **_resources(compiled.asm["cubin"])}  # fmt: skip


def _build_launcher(compiled) -> None:
    """Triton 3.6 also compiles a C module per signature, at the first launch: where there is a driver to link with, its
    cache gets that, too."""
    from triton.backends.nvidia import driver as nvidia

    if hasattr(nvidia, "make_launcher") and torch.cuda.is_available():
        nvidia.CudaLauncher(compiled.src, compiled.metadata)


def _main() -> None:
    results_file, sys.stdout = sys.stdout.buffer, sys.stderr
    use_absent_gpu()
    while True:
        try:
            path, launches = pickle.load(sys.stdin.buffer)
        except EOFError:  # its parent has ended
            return
        sys.path[:] = path
        try:
            results = [_compile(launch) for launch in launches]
        except Exception:
            results = traceback.format_exc()
        pickle.dump(results, results_file)
        results_file.flush()


if __name__ == "__main__":
    _main()
