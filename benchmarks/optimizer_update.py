"""The AdamW update of one large tensor: bytes and rate by kind of state, beside torch's fused AdamW.

    PYTHONPATH=.:kernels python benchmarks/optimizer_update.py --out optimizer_update.json

bfloat16 weights and gradients of the 32B model's head, 152064 x 5120. The update is bound by memory: weights, gradients
and states are read, weights and states written.
"""

from __future__ import annotations

import functools

import torch

import harness
from amopo_fast.optim import update_triton
from amopo_fast.optim.states import moment_bytes, moments_of, new_state
from amopo_fast.optim.update import Step, rounding_seed, update_

STEP = Step(3e-7, 0.9, 0.999, 1e-8, 0.01, 2, rounding_seed(0, 2, 0))


def ours(parameter: torch.Tensor, states: str):
    """(the update, its bytes)."""
    state = new_state(parameter, states)
    update = update_triton.update_ if parameter.is_cuda else update_
    moments = moments_of(state)
    moved = (2 + 2 + 2) * parameter.numel() + 2 * moment_bytes(parameter.numel(), states)
    return lambda grad: update(parameter, grad, *moments, STEP), moved


def torchs(parameter: torch.Tensor):
    """bfloat16 states, rounded to nearest: what fits beside it without our kernel."""
    leaf = torch.nn.Parameter(parameter.clone())
    optimizer = torch.optim.AdamW([leaf], lr=3e-7, fused=True)

    def run(grad):
        leaf.grad = grad
        optimizer.step()

    return run, (2 + 2 + 2 + 2 * 4) * parameter.numel()


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    report = harness.Report("optimizer_update", arguments)
    deadline = harness.Deadline(arguments.minutes)
    shape = (512, 256) if arguments.smoke else (152064, 5120)
    parameter = torch.empty(shape, dtype=torch.bfloat16, device=arguments.device).normal_(std=0.02).view(-1)
    gradients = [torch.randn_like(parameter).mul_(1e-3) for _ in range(2)]
    variants = {f"ours, {states}": functools.partial(ours, parameter, states) for states in ("4bit", "8bit", "fp32")}
    variants["torch, fused, bfloat16 states"] = functools.partial(torchs, parameter)
    for name, build in variants.items():
        row = {"case": f"{shape[0]} x {shape[1]}", "variant": name}
        if deadline.over():
            report.add(**row, status="not run: no time left")
            continue
        run, moved = build()
        times = harness.measure({name: run}, gradients, device=arguments.device, rounds=min(arguments.rounds, 8))[name]
        report.add(**row, status="ok", moved_bytes=moved, bytes_per_s=moved / (times["median_ms"] / 1e3), **times)
        del run


if __name__ == "__main__":
    main()
