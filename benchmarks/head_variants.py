"""Ours and the peers' ways from (hidden, weight, labels) to log-probabilities and gradients, behind one signature.

A variant maps Inputs to (what autograd differentiates, its upstream gradient, logps (N,) or None). A peer that computes
a fixed loss instead of taking per-row gradients says so in `gradient`, and is judged against the oracle of that loss.
Peers are called as their own code documents; a peer that is not installed raises ImportError when it is built.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from amopo_kernels import linear_sequence_stats
from head_problem import SEQUENCES, Inputs, Oracle

BETA, GAMMA = 0.8, 2.0  # of the SimPO loss
Result = tuple[Tensor, Tensor | None, Tensor | None]


def per_sequence(inputs: Inputs, oracle: Oracle) -> Tensor:
    return inputs.gradient


def of_a_mean(inputs: Inputs, oracle: Oracle) -> Tensor:
    return torch.full_like(inputs.gradient, -1 / inputs.labels.numel())


def of_simpo(inputs: Inputs, oracle: Oracle) -> Tensor:
    pairs = SEQUENCES // 2
    mean = oracle.logps.view(SEQUENCES, -1).mean(1)
    slope = BETA * torch.sigmoid(GAMMA - BETA * (mean[:pairs] - mean[pairs:])) / pairs
    rows = oracle.logps.numel() // SEQUENCES
    return torch.cat([-slope, slope]).repeat_interleave(rows) / rows


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    build: Callable[[], Callable[[Inputs], Result]]
    gradient: Callable[[Inputs, Oracle], Tensor] = per_sequence  # what it computes the gradient of, (N,)
    options: str = ""  # for the table's reader
    minimum_cuda: tuple[int, int] | None = None  # None: runs on the CPU too


def ours(backend: str, **options) -> Callable[[], Callable[[Inputs], Result]]:
    def build():
        def run(inputs: Inputs) -> Result:
            stats = linear_sequence_stats(
                inputs.hidden, inputs.weight, inputs.labels, inputs.cu_seqlens,
                backend=backend, validate=False, **options,
            )  # fmt: skip
            return stats.logp_sum, inputs.sequence_gradient, stats.logps

        return run

    return build


def _per_row(logps: Tensor, inputs: Inputs) -> Result:
    return logps, inputs.gradient, logps


def _plain_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")


def plain():
    return lambda inputs: _per_row(_plain_logps(inputs.hidden, inputs.weight, inputs.labels), inputs)


def compiled_plain():
    torch.compiler.reset()  # every case is compiled for its own shapes
    function = torch.compile(_plain_logps, fullgraph=True, dynamic=False)
    return lambda inputs: _per_row(function(inputs.hidden, inputs.weight, inputs.labels), inputs)


def torch_linear_cross_entropy(chunks: int | None = None):
    """With its own choice of chunks, or this many."""

    def build():
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")

        def run(inputs: Inputs) -> Result:
            chosen = {} if chunks is None else {
                "chunking_method": None, "batch_chunk_size": -(-inputs.labels.numel() // chunks)
            }  # fmt: skip
            with warnings.catch_warnings():
                # It warns where it leaves the chunked path: a row under its name must not be another algorithm.
                warnings.simplefilter("error")
                losses = F.linear_cross_entropy(
                    inputs.hidden, inputs.weight, inputs.labels, reduction="none",
                    options=torch.nn.LinearCrossEntropyOptions(**chosen),
                )  # fmt: skip
            return _per_row(-losses, inputs)

        return run

    return build


def liger_scaled():
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return lambda inputs: _per_row(-function.apply(inputs.hidden, inputs.weight, inputs.labels), inputs)


def liger_flce(reduction: str):
    def build():
        module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        function = module.LigerFusedLinearCrossEntropyFunction

        def run(inputs: Inputs) -> Result:
            arguments = (inputs.hidden, inputs.weight, inputs.labels, None, None, -100, 0.0, 0.0, reduction)
            result = function.apply(*arguments)
            loss = result[0] if isinstance(result, tuple) else result
            return _per_row(-loss, inputs) if reduction == "none" else (loss, None, None)

        return run

    return build


def liger_simpo():
    module = importlib.import_module("liger_kernel.chunked_loss")
    loss = module.LigerFusedLinearSimPOLoss(beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=True)

    def run(inputs: Inputs) -> Result:
        hidden = inputs.hidden.view(SEQUENCES, -1, inputs.hidden.shape[1])
        result = loss(inputs.weight, hidden, inputs.labels.view(SEQUENCES, -1))
        return (result[0] if isinstance(result, tuple) else result), None, None

    return run


def cce(filter_eps):
    def build():
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

        def run(inputs: Inputs) -> Result:
            losses = function(
                inputs.hidden, inputs.weight, inputs.labels, reduction="none", filter_eps=filter_eps, impl="cce"
            )
            return _per_row(-losses, inputs)

        return run

    return build


BACKENDS = {"cuda": ("fused", "chunked", "torch"), "cpu": ("torch",)}
PEERS = [
    Variant("plain logits", plain, options="cross_entropy(linear(x, w).float())"),
    Variant("plain logits, torch.compile", compiled_plain),
    Variant("torch linear_cross_entropy", torch_linear_cross_entropy(), options="LinearCrossEntropyOptions()"),
    Variant("torch linear_cross_entropy, 8 chunks", torch_linear_cross_entropy(8), options="batch_chunk_size=N/8"),
    Variant("Liger scaled CE", liger_scaled, options="LigerFusedLinearScaledCrossEntropyFunction"),
    Variant("Liger FLCE, per row", liger_flce("none"), minimum_cuda=(7, 0)),
    Variant("Liger FLCE, mean", liger_flce("mean"), of_a_mean, minimum_cuda=(7, 0)),
    Variant("Liger SimPO", liger_simpo, of_simpo, "chunked, a pair at a time, compiled", minimum_cuda=(7, 0)),
    Variant("CCE", cce("high"), options="cce, filter_eps='high'", minimum_cuda=(8, 0)),
    Variant("CCE, exact", cce(None), options="cce, filter_eps=None", minimum_cuda=(8, 0)),
]


def our_variants(device: str, suffix: str = "", **options) -> list[Variant]:
    return [Variant(f"ours, {backend}{suffix}", ours(backend, **options)) for backend in BACKENDS[device]]
