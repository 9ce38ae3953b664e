"""A row's length is compiled into no kernel, else a run would compile at every new one: twenty lengths make at most the
two variants that Triton has of a number in a tuple, by whether 16 divides it, and one where it is an argument alone. So
do twenty numbers of pairs, and twenty steps of the optimizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

LENGTHS = range(4000, 4020)
PROGRAM = f"""
import dataclasses, importlib, json
from collections import defaultdict

import torch
from compiling import Launch, _argument, use_absent_gpu
from head_launches import launches_of, name_of
from small_launches import small_launches
from triton.runtime import driver

use_absent_gpu()
driver.active.cc = 90
found = defaultdict(set)
small = small_launches(90)


def count(launch, name):
    fields = dataclasses.asdict(launch)
    module, kernel = launch.kernel.split(":")
    binder = getattr(importlib.import_module(module), kernel).device_caches[90][4]
    arguments = {{key: _argument(value) for key, value in fields["arguments"].items()}}
    _, specialisation, options = binder(**arguments, num_warps=launch.num_warps, num_stages=launch.num_stages)
    found[name].add((str(specialisation), str(options)))


for rows in {LENGTHS!r}:
    for case in ({{}}, {{"frozen": True}}):
        for launch in launches_of(90, "fused", rows=rows, **case):
            count(launch, f"{{name_of(launch)}}{{case}}")
    numbers = {{"rows": rows, "sequences": rows // 50, "BLOCK": 1024, "cu_seqlens": torch.int32}}
    sums = {{name: torch.float32 for name in ("logps", "logp_sum", "prob_mean", "prob_std")}}
    module = "amopo_kernels.statistics.sequence_sums"
    for kernel, tensors in (("_sequences_kernel", {{**sums, "length": torch.int32}}),
                            ("_rows_kernel", {{"grad_sum": torch.float32, "grad": torch.float32}})):
        count(Launch(f"{{module}}:{{kernel}}", numbers | tensors), kernel)
    gathered = {{"values_ptr": torch.bfloat16, "order_ptr": torch.int32, "offsets_ptr": torch.int32,
                "out_ptr": torch.bfloat16, "places": 2 * rows, "columns": 512, "BLOCK": 512}}
    count(Launch("amopo_kernels.rows.segment_sum:segment_sum_kernel", gathered), "segment_sum_kernel")
    changing = {{"loss": {{"pairs": rows}}, "adamw": {{"seed": (1 << 62) + rows, "first_row": 16 * (rows % 2)}}}}
    for kind, numbers in changing.items():
        count(dataclasses.replace(small[kind][0], arguments=small[kind][0].arguments | numbers), kind)
print(json.dumps({{name: len(each) for name, each in found.items()}}))
"""


@pytest.mark.slow
def test_twenty_lengths_make_no_more_kernels_than_two():
    import json

    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (here, here / "head", *filter(None, sys.path))))
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    alone = {"_sequences_kernel", "_rows_kernel", "segment_sum_kernel", "loss", "adamw"}
    assert alone < found.keys() and len(found) > 10
    assert {name: count for name, count in found.items() if count > (1 if name in alone else 2)} == {}
