"""The optimizer's kernel compiles for every architecture, without spills."""

import torch
from compiling import Launch, compile_kernels

from amopo_fast.optim import update_triton

KINDS = ["fp32", "8bit", "4bit"]


def test_kernel_compiles_for_gpus_that_are_not_there():
    launches = []
    for cc in (80, 90, 100):
        for kind in KINDS:
            codes = torch.float32 if kind == "fp32" else torch.uint8
            moments = {f"{m}_ptr": codes for m in "mv"} | {
                f"{m}_{what}_ptr": torch.float32 for m in "mv" for what in ("scale", "map")
            }
            scalars = dict.fromkeys(
                ("lr", "lr_decay", "weight1", "weight2", "correction1", "correction2_sqrt", "eps"), 0.5
            )
            launches.append(
                Launch(
                    "amopo_fast.optim.update_triton:_adamw_kernel",
                    {"p_ptr": torch.bfloat16, "g_ptr": torch.bfloat16, **moments, "grad_scale_ptr": torch.float32,
                     "numel": 5120 * 5120, "seed": 2**62 + 1, **scalars, **update_triton.launch_options(kind),
                     "HAS_GRAD_SCALE": True, "STOCHASTIC": True},
                    cc=cc,
                    num_warps=update_triton.NUM_WARPS,
                )  # fmt: skip
            )
    for compiled in compile_kernels(launches):
        compiled.check(matmul=False)
