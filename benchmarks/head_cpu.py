"""The head on one thread of a CPU beside plain logits, and what of both is matmuls.

    python benchmarks/head_cpu.py --out head_cpu.json --rounds 7

N = 512, H = 512, V = 32000. `matmuls alone` are those that a way must do, in the slices in which it does them: three,
with a frozen head two. Their time is a floor. `of plain` is the share of plain logits' median CPU time in the same
rounds, `of plain, least` and `floor of plain` are shares of least times.
"""

from __future__ import annotations

import dataclasses

import torch

import harness
from amopo_kernels import linear_logps
from amopo_kernels.head.torch_slices import SLICE_COLUMNS, _mm, _mm_into

N, H, V = 512, 512, 32000


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    dtype: torch.dtype = torch.float32
    spread: float = 1.0  # standard deviation of the logits
    frozen: bool = False
    entropy: bool = False

    def inputs(self, n: int, h: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = self.spread * torch.randn(n, h, generator=generator)
        w = torch.randn(v, h, generator=generator) / h**0.5
        y = torch.randint(v, (n,), generator=generator)
        return x.to(self.dtype).requires_grad_(), w.to(self.dtype).requires_grad_(not self.frozen), y


CASES = [
    Case("float32"), Case("float32, entropy", entropy=True), Case("float32, frozen head", frozen=True),
    Case("float32, logits far apart", spread=22.0), Case("bfloat16", torch.bfloat16),
]  # fmt: skip


def plain(case: Case):
    def outputs(x, w, y):
        log_p = (x @ w.T).float().log_softmax(-1)
        logps = log_p.gather(1, y[:, None])[:, 0]
        return (logps, -(log_p.exp() * log_p).sum(-1)) if case.entropy else (logps,)

    return outputs


def ours(case: Case):
    def outputs(x, w, y):
        found = linear_logps(x, w, y, return_entropy=case.entropy)
        return found if case.entropy else (found,)

    return outputs


def with_gradients(function):
    def run(inputs):
        wanted = [x for x in inputs[:2] if x.requires_grad]
        total = sum(x.sum() for x in function(*inputs))
        return torch.autograd.grad(total, wanted)

    return run


def matmuls(case: Case, sliced: bool):
    """The products alone, results thrown away; of ours in the order and the dtypes of torch_slices."""
    sixteen = case.dtype == torch.bfloat16

    @torch.no_grad()
    def run(inputs):
        x, w, _ = inputs
        columns = SLICE_COLUMNS if sliced else len(w)
        d_weight, d_hidden = torch.empty_like(w), torch.zeros_like(x)
        kept = torch.empty(len(w), len(x), dtype=w.dtype) if sliced and sixteen else None
        for begin in range(0, len(w), columns):
            rows, out = w[begin : begin + columns], d_weight[begin : begin + columns]
            if not sliced:
                z = x @ rows.T
            elif case.frozen:
                z = _mm(x.float(), rows.float().T)
            else:
                z = _mm(rows.float(), x.float().T).T
            if kept is not None:
                kept[begin : begin + columns] = z.T
                continue
            if not case.frozen:
                _mm_into(out, z.T, x)
            _mm_into(d_hidden, z, rows, add=True)
        if kept is not None:
            torch.mm(kept.T, w, out=d_hidden)
            for begin in range(0, len(w), columns):
                torch.mm(kept[begin : begin + columns], x, out=d_weight[begin : begin + columns])

    return run


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deadline = harness.Deadline(arguments.minutes)
    report = harness.Report("head_cpu", arguments)
    sizes = (16, 32, 300) if arguments.smoke else (N, H, V)
    for case in CASES:
        inputs = case.inputs(*sizes)
        runs = {"plain logits": with_gradients(plain(case)), "ours": with_gradients(ours(case))}
        floors = {"plain logits": matmuls(case, False), "ours": matmuls(case, True)}
        exact = with_gradients(plain(dataclasses.replace(case, dtype=torch.float64)))(
            [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
        )
        everything = runs | {f"{name}, matmuls": run for name, run in floors.items()}
        times = harness.measure(
            everything, [inputs], device="cpu", rounds=arguments.rounds, warmup=1, deadline=deadline
        )
        whole, least = (times["plain logits"][name] for name in ("median_cpu_ms", "min_cpu_ms"))
        for name, run in runs.items():
            found = run(inputs)
            report.add(
                case=case.name, variant=name, status="ok", **times[name],
                of_plain=times[name]["median_cpu_ms"] / whole, of_plain_least=times[name]["min_cpu_ms"] / least,
                matmuls_alone_ms=times[f"{name}, matmuls"]["min_cpu_ms"],
                floor_of_plain=times[f"{name}, matmuls"]["min_cpu_ms"] / least,
                extra_memory_bytes=harness.extra_memory(run, inputs, device="cpu"),
                dx_error=harness.relative_error(found[0], exact[0]),
            )  # fmt: skip


if __name__ == "__main__":
    main()
