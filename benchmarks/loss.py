"""The margin loss: statistics of P pairs in K dimensions to loss and d loss / d logp_sum, forward and backward.

Variants: the Triton launch (CUDA only), the plain torch path, that path under torch.compile, and each of them replayed
as a CUDA graph. At these sizes what is timed is launches; the graph shows the device's share.
"""

from __future__ import annotations

import functools

import torch

import harness
from amopo_kernels import SequenceStats, reference
from amopo_kernels.loss import amopo

OPTIONS = {
    "order": "alternating",
    "beta": 0.8,
    "gamma": 2.0,
    "num_pairs": None,
    "weighting": "gaussian",
    "prior": None,
    "tau": 1.0,
    "compat": "paper",
    "sft_coef": 0.0,
}
TOLERANCE = 1e-5


def random_stats(P: int, K: int, device: str, seed: int) -> tuple[SequenceStats, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (P * K * 2,)
    length = torch.randint(1, 500, shape, generator=generator, dtype=torch.int32)
    mean, std = (torch.rand(shape, generator=generator) for _ in range(2))
    logp_sum = -3 * torch.rand(shape, generator=generator) * length
    logp_sum, length, mean, std = (x.to(device) for x in (logp_sum, length, mean, std))
    stats = SequenceStats(logp_sum.requires_grad_(), length, mean, std, logps=logp_sum.detach())
    return stats, torch.randn((P, K, 2), generator=generator).to(device)


def step(function, K: int, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, d loss / d logp_sum)."""
    stats, noise = inputs
    result = function(stats, num_dimensions=K, noise=noise, **OPTIONS)
    return result.loss, torch.autograd.grad(result.loss, stats.logp_sum)[0]


def variants(K: int, device: str, inputs, compiled: bool) -> dict[str, harness.Variant]:
    if compiled:  # of plain torch, which takes a minute
        return {"compiled torch": functools.partial(step, torch.compile(amopo._torch_loss, fullgraph=True), K)}
    result = {"torch": functools.partial(step, amopo._torch_loss, K)}
    if device == "cuda":
        from amopo_kernels.loss import amopo_triton

        result["triton"] = functools.partial(step, amopo_triton.amopo_loss, K)
        result["torch, CUDA graph"] = harness.graph_of(result["torch"], inputs[0])
        result["triton, CUDA graph"] = harness.graph_of(result["triton"], inputs[0])
    return result


def check(variant: harness.Variant, K: int, inputs) -> float:
    """The larger relative error of loss and gradient against the float64 oracle."""
    stats, noise = inputs
    fields = [x.detach().cpu() for x in stats]
    fields = [x.double() if x.is_floating_point() else x for x in fields]
    oracle = SequenceStats(fields[0].requires_grad_(), *fields[1:])
    value = reference.amopo_loss(oracle, num_dimensions=K, noise=noise.cpu().double(), **OPTIONS).loss
    wanted = (value.detach(), torch.autograd.grad(value, oracle.logp_sum)[0])
    return max(harness.relative_error(a.cpu(), b) for a, b in zip(variant(inputs), wanted, strict=True))


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    report = harness.Report("loss", arguments)
    deadline = harness.Deadline(arguments.minutes)
    device = arguments.device
    sizes = (2,) if arguments.smoke else (1, 8, 64, 1024)
    for P, compiled in [(P, compiled) for compiled in (False, True)[: 1 + (device == "cuda")] for P in sizes]:
        K = 4
        inputs = [random_stats(P, K, device, seed) for seed in range(4)]
        timed = {}
        for name, variant in variants(K, device, inputs, compiled).items():
            error = check(variant, K, inputs[0])
            row = {"case": f"P={P}", "P": P, "K": K, "variant": name, "mode": "forward+backward", "error": error}
            if not error <= TOLERANCE:  # NaN too
                report.add(**row, status=f"wrong: relative error {error:.1e} against the float64 oracle")
            elif deadline.over():
                report.add(**row, status="not run: no time left")
            else:
                timed[name] = variant, row
        times = harness.measure(
            {name: variant for name, (variant, _) in timed.items()}, inputs,
            device=device, rounds=2 if arguments.smoke else 5 * arguments.rounds, deadline=deadline,
        )  # fmt: skip
        for name, (_, row) in timed.items():
            report.add(**row, status="ok", **times[name])


if __name__ == "__main__":
    main()
