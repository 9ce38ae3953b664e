"""The language-model head from hidden states to log-probabilities, statistics and gradients, beside its peers.

    python benchmarks/head.py --out head.json                     cases A, B and C in every mode
    python benchmarks/head.py --out head_sweeps.json --sweeps     one sweep per axis, forward+backward
    python benchmarks/head.py --out head_cpu.json --device cpu    the torch backend in float32

Every output is compared with a sliced float64 oracle before it is timed. A variant that is absent, refuses the case or
runs out of memory is a row "not run: reason"; one whose output is off is a row "wrong: ...", without a time. Ours are
measured and written first; then the peers beside them, in turns, and ours are written again.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence

import torch

import harness
from head_problem import Case, Inputs, Oracle, random_inputs
from head_variants import PEERS, Variant, our_variants

CASES = {
    # The heads of 32B and 0.5B models, and of today's 27B ones: 2.5 GB
    "cuda": [Case("A", 4096, 5120, 152064), Case("B", 4096, 896, 151936), Case("C", 4096, 5120, 248320)],
    "cpu": [Case("0.5B", 512, 896, 151936, torch.float32), Case("small", 1024, 256, 100003, torch.float32)],
}
BASE = Case("base", 4096, 3584, 152064)
SWEEPS = {
    "N": (512, 1024, 2048, 4096, 8192, 16384, 32768),
    "H": (896, 1536, 2048, 3584, 5120, 8192),
    "V": (32000, 65536, 131072, 262144),
}
SLOW_SECONDS = 30
TOO_LATE = "not run: no time left"
FEW_PEERS = (
    "plain logits", "torch linear_cross_entropy, 8 chunks", "Liger scaled CE", "Liger FLCE, per row", "CCE, exact"
)  # fmt: skip
# Above these a variant computes something else: |error| / (1 + max |logit|) of logps, ||error|| / ||.|| of gradients.
TOLERANCES = {torch.bfloat16: (5e-3, 3e-2), torch.float32: (1e-5, 1e-4)}


@dataclasses.dataclass(frozen=True)
class Mode:
    name: str
    variants: Callable[[str], list[Variant]]  # of a device
    backward: bool = True
    frozen: bool = False  # no gradient of the weight


def modes(case: Case) -> list[Mode]:
    """In order of importance. The cache may hold every logit in bf16, and what goes with it."""
    cache = int(2.1 * case.N * case.V)
    return [
        Mode("forward+backward", lambda device: our_variants(device) + PEERS),
        Mode("cached", lambda device: our_variants(device, ", cached", logits_cache_bytes=cache)),
        Mode("frozen head", lambda device: our_variants(device) + PEERS, frozen=True),
        Mode("forward", lambda device: our_variants(device) + PEERS, backward=False),
    ]


def runner(function, mode: Mode) -> harness.Variant:
    """Inputs to (logps or None, dX or None, dW or None), the work of one timed run."""

    def run(inputs: Inputs):
        if not mode.backward:
            with torch.no_grad():
                return function(inputs)[2], None, None
        output, upstream, logps = function(inputs)
        wanted = (inputs.hidden,) if mode.frozen else (inputs.hidden, inputs.weight)
        upstream = None if upstream is None else upstream.to(output.dtype)
        gradients = torch.autograd.grad(output, wanted, upstream)
        return None if logps is None else logps.detach(), *gradients, *([None] if mode.frozen else [])

    return run


def judge(outputs, inputs: Inputs, oracle: Oracle, variant: Variant) -> dict[str, float]:
    """{"logps_error", "dx_error", "dw_error"} of what was returned; NaN is kept."""
    logps, dx, dw = outputs
    errors = {}
    if logps is not None:
        difference = (logps.double() - oracle.logps).abs().max().item()
        errors["logps_error"] = difference / (1 + oracle.largest_logit)
    if dx is not None:
        wanted_dx, wanted_dw = oracle.gradients(variant.gradient(inputs, oracle))
        errors["dx_error"] = harness.relative_error(dx[oracle.rows], wanted_dx)
        if dw is not None:
            errors["dw_error"] = harness.relative_error(dw[oracle.columns], wanted_dw)
    return errors


def prepare(variant: Variant, mode: Mode, case: Case, inputs: Inputs, oracle: Oracle):
    """(runner or None, the row's fields): builds the variant, runs it and compares it with the oracle.

    The second run, in which memory is measured, is the only timed one of a variant that takes more than SLOW_SECONDS of
    CPU time.
    """
    device = inputs.hidden.device.type
    failure = None
    try:
        if variant.minimum_cuda is not None and device != "cuda":
            raise NotImplementedError("needs a CUDA device")
        run = runner(variant.build(), mode)
        outputs = run(inputs)
        if not mode.backward and outputs[0] is None:
            raise NotImplementedError("gives a loss, no log-probabilities")
        errors = judge(outputs, inputs, oracle, variant)
        del outputs
        begin, cpu_begin = time.perf_counter(), time.process_time()
        extra = harness.extra_memory(run, inputs, device=device)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    except torch.OutOfMemoryError:
        failure = "out of memory"
    except Exception as error:  # a peer may fail in any way, and must not end the others' measurement
        message = (str(error).strip() or "no message").splitlines()[0][:200]
        failure = f"{type(error).__name__}: {message}"
    if failure is not None:
        _recover(variant, device)
        return None, {"status": f"not run: {failure}"}
    logps_limit, gradient_limit = TOLERANCES[case.dtype]
    for name, error in errors.items():
        if not error <= (logps_limit if name == "logps_error" else gradient_limit):
            return None, {"status": f"wrong: {name} {error:.1e}", **errors, "extra_memory_bytes": extra}
    fields = {"status": "ok", **errors, "extra_memory_bytes": extra}
    if cpu_seconds > SLOW_SECONDS:
        return None, {**fields, **harness.summary([1e3 * seconds]), "min_cpu_ms": 1e3 * cpu_seconds}
    return run, fields


def _recover(variant: Variant, device: str) -> None:
    """Free what a failed variant held; an illegal access leaves no usable context, and nothing can be measured then."""
    gc.collect()
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise SystemExit(f"{variant.name} left the GPU unusable; run again with --without '{variant.name}'") from error


def problems(case: Case, device: str) -> tuple[list[Inputs], Oracle]:
    inputs = [random_inputs(case, device, seed) for seed in range(2 if device == "cuda" else 1)]
    return inputs, Oracle(inputs[0])


def benchmark(case: Case, mode: Mode, variants: Sequence[Variant], problem, report, arguments, deadline) -> None:
    """`problem`: of `problems`; may be None where the deadline is over."""
    common = {
        "case": case.name, "N": case.N, "H": case.H, "V": case.V, "dtype": str(case.dtype).removeprefix("torch."),
        "mode": mode.name,
    }  # fmt: skip
    rows = {x.name: {**common, "variant": x.name, "options": x.options, "status": TOO_LATE} for x in variants}
    inputs, oracle = problem or ([], None)
    if mode.frozen:
        inputs = [dataclasses.replace(one, weight=one.weight.detach()) for one in inputs]
    runs: dict[str, harness.Variant] = {}

    def measure(group: Sequence[Variant]) -> None:
        """Prepare the group, time it in turns with what was prepared before, and write all of it."""
        for variant in group:
            if deadline.over():
                break
            run, fields = prepare(variant, mode, case, inputs[0], oracle)
            rows[variant.name].update(fields)
            if run is not None:
                runs[variant.name] = run
        times = {}
        if runs and not deadline.over():
            warmup = 2 if arguments.device == "cuda" else 0  # everything has run twice by now
            times = harness.measure(
                runs, inputs, device=arguments.device, rounds=arguments.rounds, warmup=warmup, deadline=deadline
            )  # fmt: skip
        for name in (*runs, *(x.name for x in group if x.name not in runs)):
            row = rows[name]
            row.update(times.get(name, {}))
            too_late = name in runs and "median_ms" not in row
            report.put(f"{case.name} {mode.name} {name}", **row | ({"status": TOO_LATE} if too_late else {}))

    ours = [variant for variant in variants if variant.name.startswith("ours")]
    for group in (ours, [variant for variant in variants if variant not in ours]):
        if group:
            measure(group)


def sweep_cases() -> list[Case]:
    return [dataclasses.replace(BASE, name=f"{axis}={n}", **{axis: n}) for axis, ns in SWEEPS.items() for n in ns]


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--sweeps", action="store_true", help="one sweep per axis instead of the cases")
    parser.add_argument("--few_peers", action="store_true", help="the peers of the sweeps alone")
    parser.add_argument("--case", action="append", help="only this case; may be repeated")
    parser.add_argument("--mode", action="append", help="only this mode; may be repeated")
    parser.add_argument("--variant", action="append", help="only this variant; may be repeated")
    parser.add_argument("--without", action="append", default=[], help="not this variant; may be repeated")
    arguments = parser.parse_args()
    deadline = harness.Deadline(arguments.minutes)
    report = harness.Report("head_sweeps" if arguments.sweeps else "head", arguments)
    cases = sweep_cases() if arguments.sweeps else CASES["cuda" if arguments.device == "cuda" else "cpu"]
    if arguments.smoke and not arguments.sweeps:
        dtype = CASES["cuda" if arguments.device == "cuda" else "cpu"][0].dtype
        cases = [dataclasses.replace(x, N=16, H=32, V=300, dtype=dtype) for both in CASES.values() for x in both]
    elif arguments.smoke:
        cases = [dataclasses.replace(case, N=16, H=32, V=300) for case in cases[:2]]
    cases = [case for case in cases if not arguments.case or case.name in arguments.case]
    few = arguments.few_peers or arguments.sweeps
    # Mode by mode: the exact gradient of every case comes before the second mode of the first.
    problem, problem_case = None, None
    for number in range(1 if arguments.sweeps else len(modes(BASE))):
        for case in cases:
            mode = modes(case)[number]
            if arguments.mode and mode.name not in arguments.mode:
                continue
            variants = mode.variants(arguments.device)
            if few:
                variants = [x for x in variants if x.name.startswith("ours") or x.name in FEW_PEERS]
            if arguments.variant:
                variants = [x for x in variants if x.name in arguments.variant]
            variants = [x for x in variants if x.name not in arguments.without]
            if case is not problem_case and not deadline.over():
                problem = None  # frees the case before
                problem, problem_case = problems(case, arguments.device), case
            benchmark(case, mode, variants, problem, report, arguments, deadline)


if __name__ == "__main__":
    main()
