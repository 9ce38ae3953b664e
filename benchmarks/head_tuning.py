"""Launch configurations of the `fused` head for sm_90 beside the shipped one: tiles, stages, groups, widths of a slice,
and the warp-specialised score kernel (head/warp_specialized.py), which is timed in the forward alone, too.

    PYTHONPATH=.:kernels python benchmarks/head_tuning.py --out head_tuning.json

What is faster here goes into head/launch.py by hand, with the figures of this report: nothing is tuned at run time. The
kernels of all configurations are compiled first, in parallel; outputs are compared with the oracle of head.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch

import harness
from amopo_kernels.head import direct_launch, launch, layout, score_loop, warp_specialized
from compile_report import launches_of, row, use_absent_gpu
from head import CASES, Mode, judge, problems, runner
from head_variants import Variant, ours

Tile = launch.Tile
CAPABILITY = 90
BACKWARD = (Mode("forward+backward", lambda _: []),)
WITH_FORWARD = (*BACKWARD, Mode("forward", lambda _: [], backward=False))


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Of the three matmuls; None: as shipped."""

    name: str
    scores: Tile | None = None
    d_weight: Tile | None = None
    d_hidden: Tile | None = None
    add_in_l2: bool = True
    group: int | None = None  # row tiles that are walked together
    slice_columns: int | None = None
    ring: warp_specialized.Ring | None = None  # of the warp-specialised kernel; None: Triton's kernel
    direct: bool = False  # launches past Triton's launcher
    modes: tuple[Mode, ...] = BACKWARD

    def configuration(self) -> launch.Configuration:
        tiles = {name: getattr(self, name) for name in ("scores", "d_weight", "d_hidden") if getattr(self, name)}
        shipped = launch.SIXTEEN_BIT[CAPABILITY]
        return dataclasses.replace(shipped, **tiles, add_in_l2=self.add_in_l2)

    @contextlib.contextmanager
    def applied(self):
        with contextlib.ExitStack() as stack:
            changed = {CAPABILITY: self.configuration()}
            stack.enter_context(mock.patch.dict(launch.SIXTEEN_BIT, changed))
            if self.group is not None:
                stack.enter_context(mock.patch.object(launch, "GROUP", self.group))
            if self.slice_columns is not None:
                stack.enter_context(mock.patch.object(layout, "slice_columns", lambda *_: self.slice_columns))
            stack.enter_context(mock.patch.object(score_loop, "WARP_SPECIALIZED", self.ring is not None))
            stack.enter_context(mock.patch.object(warp_specialized, "RING", self.ring))
            stack.enter_context(mock.patch.object(direct_launch, "ENABLED", self.direct))
            yield


SMALL = Tile(128, 128, 64, 4, 3, per_processor=2)
Ring = warp_specialized.Ring
TUNINGS = [
    Tuning("shipped", modes=WITH_FORWARD),
    Tuning("slices of 4096 columns", slice_columns=4096),
    Tuning("slices of 8192 columns", slice_columns=8192),
    Tuning("slices of 32768 columns", slice_columns=32768),
    Tuning("dX32 read, added to and written", add_in_l2=False),
    Tuning("direct launches", direct=True),
    Tuning("two blocks a processor, 128 x 128 x 64, 4 warps, for the scores", scores=SMALL),
    Tuning("the same for all products", *[SMALL] * 3, add_in_l2=False),
    Tuning("warp-specialised, 9 stages of 32, lead 6", ring=Ring(32, 9, 6), modes=WITH_FORWARD),
    Tuning("warp-specialised, 4 stages of 64, lead 2", ring=Ring(64, 4, 2), modes=WITH_FORWARD),
    Tuning("warp-specialised, 4 stages of 64, lead 1", ring=Ring(64, 4, 1), modes=WITH_FORWARD),
    Tuning("warp-specialised, 4 stages of 64, lead 3", ring=Ring(64, 4, 3), modes=WITH_FORWARD),
    Tuning("3 stages", *[Tile(128, 256, 64, 8, 3)] * 3),
    Tuning("256 x 128 for dW", d_weight=Tile(256, 128, 64, 8, 4)),
    Tuning("groups of 8 row tiles", group=8),
    Tuning("groups of 32 row tiles", group=32),
]


def compile_ahead(tunings: list[Tuning], case) -> dict[str, str]:
    """Name -> what is wrong with it, of those that do not compile or spill."""
    wrong = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, os.cpu_count()), context, initializer=use_absent_gpu) as pool:
        waiting = []
        for tuning in tunings:
            with tuning.applied():
                shape = {"rows": case.N, "features": case.H, "vocabulary": case.V}
                launches = launches_of(CAPABILITY, "fused", specialised=tuning.ring is not None, **shape)
                waiting += [(tuning.name, pool.submit(row, x, None)) for x in launches]
        for name, one in waiting:
            status = one.result()["status"]
            if status != "ok":
                wrong[name] = status.removeprefix("wrong: ")
    return wrong


def main() -> None:
    parser = harness.parser("Launch configurations of the `fused` head for sm_90 beside the shipped one.")
    parser.add_argument("--only", help="a regular expression on the names of what is tried")
    arguments = parser.parse_args()
    report = harness.Report("head_tuning", arguments)
    deadline = harness.Deadline(arguments.minutes)
    device = arguments.device
    cuda = device.startswith("cuda")
    tunings = [x for x in TUNINGS if re.search(arguments.only or "", x.name)][: 2 if arguments.smoke else None]
    for name in ("B",) if arguments.smoke else ("B", "A", "C"):
        case = next(case for case in CASES["cuda"] if case.name == name)
        if name == "C":
            tunings = [tuning for tuning in tunings if tuning.ring or tuning is TUNINGS[0]]
        wrong = compile_ahead(tunings, case)
        if not cuda:  # the kernels have nothing to run on: that they compile is all that can be seen
            for tuning in tunings:
                found = wrong.get(tuning.name, "compiles; there is no GPU")
                report.add(case=name, variant=tuning.name, status=f"not run: {found}")
            continue
        inputs, oracle = problems(case, device)
        runs, rows = {}, {}
        for tuning in tunings:
            for mode in tuning.modes:
                key = f"{tuning.name}, {mode.name}"
                rows[key] = {"case": name, "variant": tuning.name, "mode": mode.name}
                if tuning.name in wrong or deadline.over():
                    rows[key]["status"] = f"not run: {wrong.get(tuning.name, 'no time left')}"
                    continue

                def run(chosen, tuning=tuning, mode=mode):
                    with tuning.applied():
                        return runner(ours("fused")(), mode)(chosen)

                errors = judge(run(inputs[0]), inputs[0], oracle, Variant(tuning.name, ours("fused")))
                rows[key] |= {"status": "ok", **errors}
                runs[key] = run
        rounds = min(arguments.rounds, 5)
        times = harness.measure(runs, inputs, device=device, rounds=rounds, deadline=deadline) if runs else {}
        for key, found in rows.items():
            report.add(**found, **times.get(key, {}))
        del inputs, oracle, runs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
