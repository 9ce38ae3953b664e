"""Attention of a packed row in 7B's shapes: forward and backward by backend, grouped and repeated heads, deterministic.

    PYTHONPATH=.:kernels python benchmarks/attention.py --out attention.json

Queries sit at the end of their segments, as in a packed row (docs/packing.md). Every result is compared with SDPA in
float32; `same bits` says whether two runs gave the same gradients, with torch's deterministic algorithms and without.
"""

from __future__ import annotations

import contextlib

import torch

import harness
from amopo_fast.models.attention_backends import BACKENDS, AttentionNeeds, attend, choose_backend

HEADS, KV_HEADS, DIM = 28, 4, 128
TOLERANCE = 2e-2


def segments(count: int, queries: int, keys: int, device: str, dtype: torch.dtype):
    """`count` segments of `queries` rows whose paths hold `keys` rows."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows, heads):
        return torch.randn(rows, heads, DIM, generator=generator, device=device, dtype=dtype).requires_grad_()

    offsets = [torch.arange(count + 1, dtype=torch.int32, device=device) * rows for rows in (queries, keys)]
    return normal(count * queries, HEADS), normal(count * keys, KV_HEADS), normal(count * keys, KV_HEADS), *offsets


def runner(backend: str, repeated: bool, deterministic: bool):
    def run(inputs):
        q, k, v, cu_q, cu_k, max_q, max_k, upstream = inputs
        if repeated:
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        with deterministic_algorithms() if deterministic else contextlib.nullcontext():
            out = attend(backend, q, k, v, cu_q, cu_k, max_q, max_k, scaling=DIM**-0.5)
            return out, *torch.autograd.grad(out, inputs[:3], upstream.to(out.dtype))

    return run


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)  # with warn_only the backward stays as it is
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def possible(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why not, or None."""
    capability = torch.cuda.get_device_capability() if device.startswith("cuda") else None
    try:
        choose_backend(backend, AttentionNeeds(device.split(":")[0], capability, dtype, DIM))
    except ValueError as error:
        return str(error)
    return None


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    report = harness.Report("attention", arguments)
    deadline = harness.Deadline(arguments.minutes)
    device = arguments.device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    count, queries, keys = (2, 3, 5) if arguments.smoke else (32, 256, 640)
    q, k, v, cu_q, cu_k = segments(count, queries, keys, device, dtype)
    inputs = (q, k, v, cu_q, cu_k, queries, keys, torch.randn(q.shape, device=device))
    exact = tuple(x.detach().float().requires_grad_() for x in (q, k, v))
    wanted = runner("sdpa", False, False)((*exact, *inputs[3:]))
    variants = [(backend, False, deterministic) for backend in BACKENDS for deterministic in (False, True)]
    for backend, repeated, deterministic in [*variants, ("varlen", True, False)]:
        name = backend + (", deterministic" if deterministic else "") + (", repeated heads" if repeated else "")
        row = {"case": f"{count} segments of {queries} queries, {keys} keys", "variant": name}
        reason = possible(backend, device, dtype) or ("no time left" if deadline.over() else None)
        if reason:
            report.add(**row, status=f"not run: {reason}")
            continue
        run = runner(backend, repeated, deterministic)
        first, second = run(inputs), run(inputs)
        error = max(harness.relative_error(a.detach(), b.detach()) for a, b in zip(first, wanted, strict=True))
        row |= {"error": error, "same bits": all(map(torch.equal, first, second))}
        if not error <= TOLERANCE:
            report.add(**row, status=f"wrong: {error:.1e} from SDPA in float32")
            continue
        extra = harness.extra_memory(run, inputs, device=device)
        rounds = min(arguments.rounds, 5)
        times = harness.measure({name: run}, [inputs], device=device, rounds=rounds, deadline=deadline)
        report.add(**row, status="ok", extra_memory_bytes=extra, **times[name])


if __name__ == "__main__":
    main()
