"""What the installed Triton's compiler makes of every shipped launch, for GPUs that are not there.

    PYTHONPATH=.:kernels python benchmarks/compile_report.py --out compiled.json [--cc 90] [--only d_hidden]

Launches are recorded from the code that makes them (tests/kernels). A row: registers a thread, bytes of stack a thread
(spills), shared memory a block, matrix instructions, machine instructions. A launch that does not compile, spills or
does not fit the chip is a row "wrong: ...". Nothing is measured.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import harness

TESTS = harness.ROOT / "tests" / "kernels"
sys.path[:0] = [str(TESTS), str(TESTS / "head")]
os.environ.pop("TRITON_INTERPRET", None)  # which would make functions of the kernels that nothing compiles

import torch  # noqa: E402
from compiling import SHARED_MEMORY_LIMIT, Compiled, Launch, compile_here, use_absent_gpu  # noqa: E402
from head_launches import CASES, EDGES, is_matmul, launches_of, name_of  # noqa: E402
from small_launches import small_launches  # noqa: E402


def shipped(cc: int) -> Iterator[tuple[str, str, Launch, bool | None]]:
    """(kernel, case, launch, whether it is a matmul; None: whichever instructions the compiler takes)."""
    for kind, launches in small_launches(cc).items():
        for number, launch in enumerate(launches):
            yield launch.kernel.split(":")[1].strip("_"), f"{kind} {number + 1}", launch, False
    seen = set()
    for case, options in (CASES | (EDGES if cc == 90 else {})).items():
        for backend in ("fused", "chunked"):
            for launch in launches_of(cc, backend, **options):
                if repr(launch) not in seen:
                    seen.add(repr(launch))
                    matmul = None if options.get("dtype") == torch.float32 else is_matmul(launch)
                    yield name_of(launch).strip("_"), f"{backend}, {case}", launch, matmul


def judge(compiled: Compiled, matmul: bool | None) -> str:
    try:
        compiled.check(matmul)
    except AssertionError as error:
        return "wrong: " + str(error).split(":")[0]
    return "ok"


def row(launch: Launch, matmul: bool | None) -> dict:
    shape = {name.lower(): value for name, value in launch.arguments.items()
             if name in ("ROWS", "COLUMNS", "DEPTH", "STRIP")}  # fmt: skip
    fields = {"cc": launch.cc, "num_warps": launch.num_warps, "num_stages": launch.num_stages, **shape}
    try:
        compiled = compile_here(launch)
    except Exception as error:  # a crash of one launch's compiler is a finding, not the end of the report
        return {**fields, "status": f"wrong: does not compile: {str(error).strip().splitlines()[-1][:200]}"}
    return {
        **fields,
        "status": judge(compiled, matmul),
        "registers": compiled.registers,
        "stack_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes,
        "shared_limit": SHARED_MEMORY_LIMIT[launch.cc],
        "matrix_instructions": sorted(compiled.mma_instructions),
        "sass_instructions": compiled.sass_instructions,
    }


def main() -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--cc", action="append", type=int, choices=(80, 90, 100), help="default: all three")
    parser.add_argument("--only", help="a regular expression on kernel and case")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    report = harness.Report("compiled", arguments)
    only = "statistics" if arguments.smoke else arguments.only
    wanted = (
        one for cc in arguments.cc or ([90] if arguments.smoke else [80, 90, 100])
        for one in shipped(cc)
        if not only or re.search(only, ", ".join(one[:2]))
    )  # fmt: skip
    chosen = list(itertools.islice(wanted, 1 if arguments.smoke else None))
    wrong = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context, initializer=use_absent_gpu) as pool:
        waiting = [pool.submit(row, launch, matmul) for _, _, launch, matmul in chosen]
        for (kernel, case, launch, _), one in zip(chosen, waiting, strict=True):
            try:
                found = one.result()
            except BrokenProcessPool:
                found = {"cc": launch.cc, "status": "wrong: a compiler's process died, with this launch or one before"}
            wrong += found["status"] != "ok"
            report.add(case=case, variant=f"{kernel}, sm_{launch.cc}", kernel=kernel, **found)
    return 1 if wrong or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
