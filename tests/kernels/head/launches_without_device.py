"""Launches of the head as they reach CUDA's driver, where there is none: of Triton's launcher and of direct_launch.

    python tests/kernels/head/launches_without_device.py FOLDER WHAT                           compares them; JSON
    python tests/kernels/head/launches_without_device.py FOLDER exact --rounds 400             CPU time of a call, too

WHAT: kernel (a small one), a mode of the head, or warp_specialized: mode exact with the kernel of warp_specialized.py.
A child process of the test and of benchmarks/head_host.py, with absent_driver's `environment`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton

sys.path[:0] = [str(Path(__file__).parents[1])]
from absent_driver import AbsentDriver  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from amopo_kernels.head import direct_launch, launch, passes, score_loop, slice_gradients  # noqa: E402
from amopo_kernels.head.options import Options  # noqa: E402
from amopo_kernels.head.problem import Gradients, Problem  # noqa: E402

Call = Callable[[], None]
CASE_B = 4096, 896, 151936  # N, H, V


def one_kernel() -> Call:
    """Slices of every kind through a small kernel."""
    from kernels_for_tests import of_a_slice

    matrix, out = torch.zeros(32, 96, dtype=torch.bfloat16), torch.zeros(64, 64)
    unaligned = torch.zeros(33)[1:]
    # Each differs from the one before in one property: whether 16 divides a pointer, an integer, whether that is 1
    sets = [(None, 32, 1 << 33, 1), (unaligned, 1, 7, 1), (out, 1, 7, 1), (out, 1, 7, 3), (out, 1, 16, 3)]

    def call() -> None:
        for missing, rows, wide, one in sets:
            run = launch.SliceLaunch(
                of_a_slice, lambda columns: (columns, 2, 3), TensorDescriptor(matrix, [32, 96], [96, 1], [32, 32]),
                ((out, None), 64), 0.5, missing, one, rows, wide, BLOCK=32, num_warps=2,
            )  # fmt: skip
            for begin, end in ((0, 32), (32, 64), (64, 77), (80, 93), (1, 96), (32, 96)):
                run(begin, end)

    return call


def head(mode: str) -> Call:
    """Forward and backward of case B on the host's memory, in which nothing is written but small vectors."""
    rows, features, vocabulary = CASE_B

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    cache = 2 * rows * vocabulary if mode == "cached" else 0
    options = Options(None, 1.0, None, "", torch.bfloat16, "fused", mode, cache, False, False)
    problem = Problem(
        empty(rows, features), empty(vocabulary, features), None, torch.zeros(rows, dtype=torch.int64), options
    )
    upstream, d_weight = Gradients(torch.ones(rows)), empty(vocabulary, features)

    def call() -> None:
        forward = passes.forward(problem)
        if mode != "frozen":
            passes.backward(problem, forward, upstream, need_hidden=True, d_weight=d_weight, d_bias=None)

    return call


@contextlib.contextmanager
def on_sm_90(absent: AbsentDriver):
    zeros = torch.zeros(1, *CASE_B[:2])  # on a GPU a launch; here filling it would be most of a call's time
    original = direct_launch.DirectKernel.of

    def of(compiled):
        absent.know(compiled)
        return original(compiled)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (launch, "INTERPRETED", False), (launch, "tiles", lambda device, dtype: launch.SIXTEEN_BIT[90]),
            (launch, "processors", lambda device: 132), (slice_gradients, "new_d_hidden", lambda problem: zeros),
            (direct_launch.DirectKernel, "of", staticmethod(of)),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def compare(call: Call, absent: AbsentDriver) -> dict:
    """Of the slices of a call, each launched in both ways: how many, how many directly, which parameters differ."""
    direct_launch.ENABLED = True
    call()  # compiles, and knows the parameters
    of_slice = launch.SliceLaunch.__call__
    counts = {"slices": 0, "direct": 0}
    different: list[str] = []

    def launched(run: launch.SliceLaunch, begin: int, end: int, enabled: bool) -> tuple:
        direct_launch.ENABLED = enabled
        absent.taken()
        of_slice(run, begin, end)
        (found,) = absent.launches()
        return found

    def both(run: launch.SliceLaunch, begin: int, end: int) -> None:
        found = launched(run, begin, end, True)
        counts["slices"] += 1
        last = run._launches.get((end - begin, begin % 16, begin == 1 or end == 1))
        counts["direct"] += isinstance(last, direct_launch.DirectLaunch)
        same = launch.SliceLaunch(run._kernel, run._grid, *run._arguments, **run._constants)
        expected = launched(same, begin, end, False)
        if found != expected:
            numbers = [i for i, (a, b) in enumerate(zip(found[1], expected[1], strict=True)) if a != b]
            different.append(f"{run._kernel.__name__}({begin}, {end}): parameters {numbers}, {found[0]}, {expected[0]}")

    with mock.patch.object(launch.SliceLaunch, "__call__", both):
        call()
    return {**counts, "different": different[:3]}


def milliseconds(call: Call, rounds: int) -> dict[str, dict[str, float]]:
    """Of the CPU, in rounds that take turns."""
    times: dict[str, list[float]] = {"triton": [], "direct": []}
    for _ in range(rounds):
        for way, taken in times.items():
            direct_launch.ENABLED = way == "direct"
            begin = time.process_time()
            call()
            taken.append(1e3 * (time.process_time() - begin))
    return {way: {"min": min(taken), "median": sorted(taken)[rounds // 2]} for way, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("kernel", "exact", "cached", "frozen", "warp_specialized"))
    parser.add_argument("--rounds", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    absent = AbsentDriver(arguments.folder)
    absent.use()
    score_loop.WARP_SPECIALIZED = arguments.what == "warp_specialized"
    mode = "exact" if score_loop.WARP_SPECIALIZED else arguments.what
    with on_sm_90(absent):
        call = one_kernel() if mode == "kernel" else head(mode)
        found: dict = {"triton": triton.__version__, **compare(call, absent)}
        if arguments.rounds:
            absent.write_down(False)
            found["cpu_ms"] = milliseconds(call, arguments.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
