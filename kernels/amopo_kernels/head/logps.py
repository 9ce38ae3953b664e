"""linear_logps: log-probabilities of labels under a linear head, without materialising the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .function import head
from .operators import Inputs, Outputs
from .options import Options, choose_options
from .validation import check_linear
from .vocabulary_shard import take_shard


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    outputs: Sequence[str] = (),
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    validate: bool | None = None,
    logits_cache_bytes: int = 0,
) -> Tensor | tuple[Tensor, ...]:
    """log softmax(cap(hidden @ weight.T + bias) / temperature)[labels].

    Args:
        hidden: (..., H) floating point. weight: (V, H). labels: (...) int64 or int32: the token that each row
            predicts; nothing is shifted. bias: (V,).
        softcap: cap(x) = softcap * tanh(x / softcap), applied after the bias and before the temperature.
        temperature: a number, or a tensor (...), one of each row, without gradient.
        ignore_index: rows with this label give 0 in every output and no gradient, whatever they hold, and are not
            computed. On a GPU that skips whole tiles of rows, unless `validate` allows to read how many there are.
        outputs: what else to return of each row's scores, in this order, from the same pass: "entropy" (in nats),
            "lse" (log-sum-exp), "mean_logit" (over the vocabulary), which are differentiable; "top1" (int64, the most
            likely token) and "log_sum_p2" (log of the sum of squared probabilities), which are not.
        return_entropy: short for outputs=("entropy",).
        process_group: the vocabulary is sharded over its ranks, which have the same hidden, labels and upstream
            gradients: weight (V of this rank, H), or a DTensor that is Shard(0) over the group, and bias likewise;
            labels and "top1" count over all ranks, in their order. Shards may differ in size, or be empty; rows that
            only pad a vocabulary are cut off by the caller. One gather a call, one sum of the gradient of hidden.
        backend: "fused" (Triton matmuls), "chunked" (vendor matmuls over slices of the vocabulary, Triton epilogues),
            "torch" (slices in plain torch: any device and dtype) or "auto", the rule in `dispatch`.
        validate: read label values, which synchronises; default: on the CPU only. Unchecked bad labels give NaN.
        logits_cache_bytes: memory for probabilities that the forward keeps for the backward, as in
            `linear_sequence_stats`. With a softcap, gradients of entropy and mean logit make no use of them.

    Returns:
        logps (...), or (logps, *outputs): float32, float64 for float64 inputs. Differentiable once, in reverse mode,
        for any gradient per token, in hidden, weight and bias.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, options, labels. ShardedTensorError: a DTensor.
        BackendUnavailableError: the backend cannot run here. UnsupportedError: it cannot do this; forward-mode
        derivatives. DoubleBackwardError: a gradient of a gradient. ReleasedTensorError: in the backward pass, where
        the weight's memory is gone.
    """
    weight, bias, shard = take_shard(weight, bias, process_group)
    check_linear(hidden, weight, labels, bias, temperature, sharded=process_group is not None)
    if return_entropy and outputs:
        raise ValueError("return_entropy is short for outputs=('entropy',); name everything in outputs")
    outputs = ("entropy",) if return_entropy else tuple(outputs)
    options = choose_options(
        hidden, weight, bias, softcap=softcap, temperature=temperature, ignore_index=ignore_index, outputs=outputs,
        backend=backend, validate=validate, cache_bytes=logits_cache_bytes, shard=shard,
    )  # fmt: skip
    found = label_logps(hidden, weight, labels, bias, temperature, options)
    results = [getattr(found, name).reshape(labels.shape) for name in ("logps", *outputs)]
    return tuple(results) if outputs else results[0]


def label_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    options: Options,
    mean_shares: Tensor | None = None,  # (V,) of the tokens in "mean_logit"; None: equal ones
) -> Outputs:
    """Outputs of checked arguments, each row's (N,), N of them in `labels`."""
    temperature = temperature.detach().reshape(-1) if isinstance(temperature, Tensor) else None
    rows = hidden.reshape(-1, hidden.shape[-1])
    return head(Inputs(rows, weight, bias, labels.reshape(-1).long(), temperature, mean_shares), options)
