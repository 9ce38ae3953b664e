"""linear_cross_entropy: torch's loss of that name, and what Liger's and CCE's add to it, from one pass of the head.

With scores s = cap(x W^T + b) / temperature, their log-sum-exp lse, class weights c and smoothing e, a row of label y
is

    (1 - e) c_y (lse - s_y) + e / V sum_v c_v (lse - s_v) + z_loss lse^2

The first term is -c_y logp, which keeps its digits; the second needs lse and one weighted mean of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from ..head.logps import label_logps
from ..head.options import OUTPUTS, choose_options
from ..head.validation import check_linear
from ..head.vocabulary_shard import take_shard
from ..validation import check_tensor

REDUCTIONS = ("mean", "sum", "none")
EXTRAS = ("z_loss", "accuracy", *OUTPUTS)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    outputs: Sequence[str] = (),
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The cross entropy of a linear head, without its logits; arguments as torch.nn.functional.linear_cross_entropy.

    Args:
        input: (..., H). linear_weight: (V, H). target: (...) class indices, int64 or int32. linear_bias: (V,).
        weight: (V,) of all classes: a row counts as its label's. reduction: "mean" divides by the weights of the scored
            rows' labels, "sum" does not, "none" gives (...).
        ignore_index: rows with this target are left out; None: -100.
        label_smoothing: share of the loss that is spread over all classes.
        z_loss: coefficient of lse^2 (PaLM's), a mean over the scored rows where the loss is one.
        shift: input (..., T, H), target (..., T), and row t predicts target t + 1; "none" gives (..., T - 1).
        softcap, temperature, process_group, backend, validate: of `linear_logps`.
        outputs: what else to return, in this order: "z_loss" (the part of the loss that it is), "accuracy" (the share
            of scored rows whose target is the most likely class), both (...) with reduction "none"; and every output of
            `linear_logps`, of each row.

    Returns:
        loss, or (loss, *outputs): float32, float64 for float64 inputs. Sums of products are float32 or float64 always,
        for which other libraries have flags. Differentiable in input, linear_weight and linear_bias. With "mean" and
        no scored row it is NaN, as torch's.

    Raises:
        TypeError: targets that are probabilities. ValueError: reduction, label_smoothing, outputs. Otherwise as
        `linear_logps`.
    """
    if target.is_floating_point():
        raise TypeError("target has class probabilities; class indices are taken, with label_smoothing beside them")
    if shift:
        input, target = input[..., :-1, :], target[..., 1:]
        temperature = temperature[..., :-1] if isinstance(temperature, Tensor) else temperature
    linear_weight, linear_bias, shard = take_shard(linear_weight, linear_bias, process_group)
    check_linear(input, linear_weight, target, linear_bias, temperature, sharded=process_group is not None)
    vocabulary = shard.vocabulary or linear_weight.shape[0]
    if weight is not None:
        check_tensor("weight", weight, (vocabulary,), device=input.device)
    _check_numbers(reduction, label_smoothing, z_loss, outputs)
    ignore_index = -100 if ignore_index is None else ignore_index
    needed = {name for name in outputs if name in OUTPUTS}
    needed |= {"lse"} if label_smoothing or z_loss or "z_loss" in outputs else set()
    needed |= {"mean_logit"} if label_smoothing else set()
    needed |= {"top1"} if "accuracy" in outputs else set()
    if weight is not None and label_smoothing and "mean_logit" in outputs:
        raise ValueError("outputs has 'mean_logit', which class weights with label_smoothing need for themselves")
    options = choose_options(
        input, linear_weight, linear_bias, softcap=softcap, temperature=temperature, ignore_index=ignore_index,
        outputs=[name for name in OUTPUTS if name in needed], backend=backend, validate=validate,
        shard=shard,
    )  # fmt: skip
    shares = None
    if weight is not None and label_smoothing:
        shares = weight.detach().float()[shard.first : shard.first + len(linear_weight)] / vocabulary
    computed = label_logps(input, linear_weight, target, linear_bias, temperature, options, shares)._asdict()
    rows = {name: computed[name].reshape(target.shape) for name in ("logps", *needed)}

    scored = target != ignore_index
    share = scored.to(rows["logps"].dtype)  # of a row in the loss: its label's weight
    if weight is not None:
        share = share * weight.detach().to(share.dtype)[target.clamp(0, vocabulary - 1).long()]
    loss = -(1 - label_smoothing) * share * rows["logps"]
    if label_smoothing:
        total = 1.0 if weight is None else weight.detach().to(share.dtype).mean()
        loss = loss + label_smoothing * (total * rows["lse"] - rows["mean_logit"])
    divisor = share.sum() if reduction == "mean" else None
    loss, extra = _reduce(loss, reduction, divisor), {}
    if z_loss or "z_loss" in outputs:
        extra["z_loss"] = _reduce(z_loss * rows["lse"].square(), reduction, scored.sum())
        loss = loss + extra["z_loss"]
    if "accuracy" in outputs:
        right = (rows["top1"] == target) & scored
        extra["accuracy"] = right.to(loss.dtype) if reduction == "none" else right.sum() / scored.sum()
    found = rows | extra
    return (loss, *(found[name] for name in outputs)) if outputs else loss


def _reduce(rows: Tensor, reduction: str, divisor: Tensor | None) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / divisor if reduction == "mean" else rows.sum()


def _check_numbers(reduction: str, label_smoothing: float, z_loss: float, outputs: Sequence[str]) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not math.isfinite(z_loss):
        raise ValueError(f"z_loss must be finite, got {z_loss}")
    for output in outputs:
        if output not in EXTRAS:
            raise ValueError(f"outputs has {output!r}; choose among {', '.join(EXTRAS)}")
