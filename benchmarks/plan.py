"""Planning a row (pairs to token trie, gather indices and offsets) on the CPU, and what sharing saves.

The target is 64 pairs of 8 sequences of 1000 tokens in under 50 ms: a step of a 7B model on such a row takes seconds.
The data sets of step_data.py, in rows of 8 pairs, show the tokens that are left to compute, in both prompt orders, and
the gathered keys per token: what attention reads, and keeps where layers are not recomputed.
"""

from __future__ import annotations

import numpy as np

import harness
from amopo_fast.packing.plan import Plan, build_plan
from amopo_fast.prompts.tokens import PairTokens
from step_data import lengths, random_pairs


def uniform_pairs(count: int, tokens: int, dimensions: int = 4, response: int = 400) -> list[PairTokens]:
    """Sequences of `tokens` tokens; a tenth of a prompt is the dimension's instruction."""
    rng = np.random.default_rng(0)
    prompt = tokens - response
    own = prompt // 10
    pairs = []
    for record in range(count):
        user = rng.integers(0, 150_000, prompt - own)
        prompts = tuple(np.concatenate([rng.integers(0, 150_000, own), user]) for _ in range(dimensions))
        chosen, rejected = (rng.integers(0, 150_000, response) for _ in range(2))
        pairs.append(PairTokens(record, prompts, chosen, rejected, truncated=False))
    return pairs


def plan_rows(pairs: list[PairTokens], size: int = 8) -> list[Plan]:
    return [build_plan(pairs[i : i + size]) for i in range(0, len(pairs), size)]


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    report = harness.Report("plan", arguments)
    deadline = harness.Deadline(arguments.minutes)
    count = 8 if arguments.smoke else None
    cases = {"64 pairs of 8 x 1000 tokens": (build_plan, uniform_pairs(4 if arguments.smoke else 64, 1000))}
    for name in ("qa", "short", "long"):
        for order in ("dimension_first", "dimension_last"):
            cases[f"{name}, {order}"] = plan_rows, random_pairs(lengths(name), order, 150_000, count)
    for case, (function, pairs) in cases.items():
        plans = plan_rows(pairs) if function is plan_rows else [function(pairs)]
        tokens = {
            "padded_tokens": sum(plan.padded_tokens for plan in plans),
            "unpadded_tokens": sum(plan.unshared_tokens for plan in plans),
            "computed_tokens": sum(plan.num_tokens for plan in plans),
        }
        keys = sum(plan.paths.kv_indices.shape[0] for plan in plans) / tokens["computed_tokens"]
        times = harness.measure({"plan": function}, [pairs], device="cpu", rounds=arguments.rounds, deadline=deadline)
        ratio = tokens["padded_tokens"] / tokens["computed_tokens"]
        report.add(
            case=case, variant=function.__name__, status="ok", pairs=len(pairs), **tokens, padded_per_computed=ratio,
            keys_per_token=keys, **times["plan"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
