"""The shipped launches of every kernel but the head's (head/head_launches.py), for `compiling`."""

import torch
from compiling import Launch

from amopo_fast.optim import update_triton
from amopo_kernels.loss import amopo_triton

LOSSES = [  # K, weighting, compat "upstream"
    (4, "gaussian", False), (3, "mean", True), (1, "uniform", False), (5, "worst_first", True),
    (3, "worst_first", False), (amopo_triton.TILE, "gaussian", True),
]  # fmt: skip


def small_launches(cc: int) -> dict[str, list[Launch]]:
    """By kind: "statistics", "rows", "loss", "adamw"."""
    return {
        "statistics": _statistics(cc),
        "rows": [_segment_sum(cc, torch.bfloat16, 512, 4), _segment_sum(cc, torch.float32, 1024, 8)],
        "loss": [_loss(cc, *case) for case in LOSSES],
        "adamw": [_adamw(cc, kind) for kind in ("fp32", "8bit", "4bit")],
    }


def _statistics(cc: int) -> list[Launch]:
    arguments = {"cu_seqlens": torch.int32, "rows": 4096, "sequences": 8, "BLOCK": 1024}
    sums = {name: torch.float32 for name in ("logps", "logp_sum", "prob_mean", "prob_std")} | {"length": torch.int32}
    rows = {"grad_sum": torch.float32, "grad": torch.float32}
    module = "amopo_kernels.statistics.sequence_sums"
    kernels = (("_sequences_kernel", sums), ("_rows_kernel", rows))
    return [Launch(f"{module}:{kernel}", arguments | tensors, cc=cc) for kernel, tensors in kernels]


def _segment_sum(cc: int, dtype: torch.dtype, columns: int, warps: int) -> Launch:
    return Launch(
        "amopo_kernels.rows.segment_sum:segment_sum_kernel",
        {"values_ptr": dtype, "order_ptr": torch.int32, "offsets_ptr": torch.int32, "out_ptr": dtype,
         "places": 9000, "columns": columns, "BLOCK": columns},
        cc=cc, num_warps=warps,
    )  # fmt: skip


def _loss(cc: int, K: int, weighting: str, upstream: bool) -> Launch:
    floats = ("logp_sum", "mean", "std", "loss", "weights", "margins", "chosen", "rejected", "gradient")
    arguments = {f"{name}_ptr": torch.float32 for name in floats} | {"length_ptr": torch.int32, "pairs": 8}
    arguments |= {"beta": 0.8, "gamma": 1.5, "tau": 1.0, "sft_coef": 0.1, "divisor": 8.0}
    block_k = 1 << (K - 1).bit_length()
    arguments |= {
        "noise_ptr": torch.float32 if weighting == "gaussian" else None,
        "prior_ptr": torch.float32 if weighting != "gaussian" else None,
        "normaliser_ptr": torch.float32 if upstream else None,
        "K": K, "BLOCK_P": amopo_triton.TILE // block_k, "BLOCK_K": block_k,
        "WEIGHTING": weighting, "PRIOR_ROWS": weighting == "worst_first", "UPSTREAM": upstream, "STACKED": upstream,
    }  # fmt: skip
    return Launch(
        "amopo_kernels.loss.amopo_triton:amopo_loss_kernel", arguments, cc=cc,
        options={"maxnreg": amopo_triton.MAX_REGISTERS},
    )  # fmt: skip


def _adamw(cc: int, kind: str) -> Launch:
    codes = torch.float32 if kind == "fp32" else torch.uint8
    moments = {f"{m}_ptr": codes for m in "mv"} | {
        f"{m}_{what}_ptr": torch.float32 for m in "mv" for what in ("scale", "table")
    }
    scalars = dict.fromkeys(("lr", "lr_decay", "weight1", "weight2", "correction1", "correction2_sqrt", "eps"), 0.5)
    return Launch(
        "amopo_fast.optim.update_triton:_adamw_kernel",
        {"p_ptr": torch.bfloat16, "g_ptr": torch.bfloat16, **moments, "grad_scale_ptr": torch.float32,
         "numel": 5120 * 5120, "seed": 2**62 + 1, "first_row": 0, **scalars, **update_triton.launch_options(kind),
         "HAS_GRAD_SCALE": True, "STOCHASTIC": True},
        cc=cc, num_warps=update_triton.NUM_WARPS,
    )  # fmt: skip
