"""Planning a row: pairs to a Plan (token trie, gather indices, offsets), on the CPU, as DataLoader workers do it.

The target is 64 pairs of 8 sequences of 1000 tokens in under 50 ms: a step of a 7B model on such a row takes seconds.
"""

from __future__ import annotations

import numpy as np

import harness
from amopo_fast.batching import PairSizes
from amopo_fast.plan import build_plan
from amopo_fast.prompts import PairTokens
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


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    report = harness.Report("plan", arguments)
    deadline = harness.Deadline(arguments.minutes)
    scale = 1 if not arguments.smoke else 16
    cases = {"64 pairs of 8 x 1000 tokens": uniform_pairs(64 // scale, 1000)}
    for order in ("dimension_first", "dimension_last"):
        cases[f"8 qa pairs, {order}"] = random_pairs(lengths("qa"), order, 150_000, 8)
    for case, pairs in cases.items():
        plan = build_plan(pairs)
        times = harness.measure(
            {"build_plan": build_plan, "PairSizes": PairSizes.of}, [pairs], device="cpu", rounds=arguments.rounds,
            deadline=deadline,
        )  # fmt: skip
        sizes = {"padded": plan.padded_tokens, "unshared": plan.unshared_tokens, "computed": plan.num_tokens}
        for variant, row in times.items():
            report.add(case=case, variant=variant, status="ok", **{f"{k}_tokens": v for k, v in sizes.items()}, **row)


if __name__ == "__main__":
    main()
