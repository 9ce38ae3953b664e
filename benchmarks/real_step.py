"""A training step of SmolLM2-135M-Instruct on real pairs: ours beside the reference way and beside TRL's CPO trainer.

    python benchmarks/real_step.py --device cpu --data PAIRS.json --rounds 2 --out real_step.json

Loss and gradients of all weights, float32, layers recomputed in the backward pass as TRL's trainers do by default, of
the pairs of a file in AMoPO's format whose length is nearest to that of `--quantile`. On a CPU compare `min_cpu_ms`,
the least CPU time of interleaved runs (OMP_NUM_THREADS=1); what takes longer than 20 s is run once.

    K = 4   the reference way (2K padded sequences a pair, logits of all tokens in float32, AMoPO's loss), ours in both
            orders of the prompt; dimension_last has other prompts, so its loss is another
    K = 1   TRL's CPOTrainer with loss_type simpo, its own tokens and collator, and ours on the tokens that TRL made;
            `extra_labels` counts those that TRL trains beside the response and its end token

`loss_error` and `gradient_error` are against the first variant of the case with the same tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402
from amopo_fast.data.pairs import Pair, read_pairs  # noqa: E402
from amopo_fast.models.check import prepare_model  # noqa: E402
from amopo_fast.models.scoring import score  # noqa: E402
from amopo_fast.packing.plan import build_plan  # noqa: E402
from amopo_fast.prompts.builder import PromptBuilder  # noqa: E402
from amopo_fast.prompts.tokenizer import load_tokenizer  # noqa: E402
from amopo_fast.prompts.tokens import PairTokens  # noqa: E402
from amopo_fast.training.objective import AMoPO, Batch  # noqa: E402
from amopo_fast.training.objectives import SimPO  # noqa: E402
from amopo_kernels import amopo_loss  # noqa: E402
from step import Padded, padded_stats  # noqa: E402

DIMENSIONS = ("no_object", "helpfulness", "correctness", "instruction_following")
BETA, GAMMA = 2.0, 0.5
SLOW_SECONDS = 20  # of the first variant's CPU time: what takes longer is run and timed once
TOLERANCE = 1e-3  # of ||error|| / ||.||
# Computes the loss with gradients in its own model's parameters.
Step = Callable[[Any], torch.Tensor]


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON file in AMoPO's format")
    parser.add_argument("--model", type=Path, help="folder; default: SmolLM2, made by smollm2.py")
    parser.add_argument("--quantile", type=float, default=0.25, help="of the pairs' lengths")
    parser.add_argument("--only", choices=("4", "1"), help="one K")
    arguments = parser.parse_args()
    kept = {name: value for name, value in vars(arguments).items() if name not in ("data", "model")}
    report = harness.Report("real_step", argparse.Namespace(**kept))
    deadline = harness.Deadline(arguments.minutes)
    with tempfile.TemporaryDirectory() as folder:
        name = arguments.model
        if name is None:
            from smollm2 import make_folder

            name = make_folder(folder)
        bench = Bench(str(name), arguments, Path(folder))
        for dimensions, pairs in ((4, 1), (1, 2)):
            if arguments.only in (None, str(dimensions)):
                bench.case(dimensions, pairs, report, deadline)


class Bench:
    """Two copies of a model, one for packed rows and one as transformers has it, and some pairs."""

    def __init__(self, name: str, arguments: argparse.Namespace, scratch: Path):
        self.arguments, self.scratch = arguments, scratch
        self.tokenizer = load_tokenizer(name)
        self.own, self.plain = (
            AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(arguments.device).train() for _ in "ab"
        )
        prepare_model(self.own)
        for model in (self.own, self.plain):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        pairs, _ = read_pairs(arguments.data, dimensions=DIMENSIONS)
        length = {p.record: len(p.messages[-1].content) + len(p.chosen) + len(p.rejected) for p in pairs}
        middle = np.quantile(list(length.values()), arguments.quantile)
        self.pairs = sorted(pairs, key=lambda pair: abs(length[pair.record] - middle))

    def case(self, dimensions: int, count: int, report: harness.Report, deadline: harness.Deadline) -> None:
        pairs = self.pairs[:count]
        variants = self.amopo(pairs) if dimensions > 1 else self.simpo(pairs)
        wanted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        rows, times = {}, {}
        for name, (model, step, facts) in variants.items():
            begin, cpu_begin = time.perf_counter(), time.process_time()
            loss = step(None)
            times[name] = harness.summary([1e3 * (time.perf_counter() - begin)])
            times[name]["min_cpu_ms"] = 1e3 * (time.process_time() - cpu_begin)
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            wanted.setdefault(facts["tokens_of"], (loss, gradient))
            errors = [harness.relative_error(x, y)
                      for x, y in zip((loss, gradient), wanted[facts["tokens_of"]], strict=True)]  # fmt: skip
            rows[name] = {
                "case": f"K = {dimensions}, {count} pair{'s' * (count > 1)}", "variant": name,
                "status": "ok" if max(errors) < TOLERANCE else "wrong: loss or gradient", **facts,
                "loss": loss.item(), "loss_error": errors[0], "gradient_error": errors[1],
            }  # fmt: skip
        first = next(iter(variants))
        if times[first]["min_cpu_ms"] < 1e3 * SLOW_SECONDS:
            times = harness.measure(
                {name: step for name, (_, step, _) in variants.items()}, [None], device=self.arguments.device,
                rounds=self.arguments.rounds, warmup=0, deadline=deadline,
            )  # fmt: skip
        clock = "min_cpu_ms" if self.arguments.device == "cpu" else "median_ms"
        for name, row in rows.items():
            # The wall clock of a CPU that other programs share says nothing.
            own = {"min_cpu_ms": times[name]["min_cpu_ms"]} if clock == "min_cpu_ms" else times[name]
            report.add(**row, **own, share_of_time=times[name][clock] / times[first][clock])

    def amopo(self, pairs: list[Pair]) -> dict[str, tuple[nn.Module, Step, dict]]:
        first, last = (self.tokens(pairs, order) for order in ("dimension_first", "dimension_last"))
        padded = Padded.of(first, self.arguments.device)

        def reference(_) -> torch.Tensor:
            stats = padded_stats(self.plain, padded)
            loss = amopo_loss(stats, order="alternating", num_dimensions=len(DIMENSIONS), beta=BETA, gamma=GAMMA,
                              weighting="mean").loss  # fmt: skip
            return self.backward(self.plain, loss)

        facts = {"tokens_of": "dimension_first", "computed_tokens": padded.input_ids.numel()}
        objective = AMoPO(beta=BETA, gamma=GAMMA, weighting="mean")
        return {
            "reference way": (self.plain, reference, facts),
            "ours, dimension_first": self.packed(first, objective, "dimension_first"),
            "ours, dimension_last": self.packed(last, objective, "dimension_last"),
        }

    def tokens(self, pairs: list[Pair], order: str) -> list[PairTokens]:
        return PromptBuilder(self.tokenizer, DIMENSIONS, score_range=(0, 5), order=order).tokenize(pairs)[0]

    def packed(self, tokens: list[PairTokens], objective, name: str) -> tuple[nn.Module, Step, dict]:
        plan = build_plan(tokens).to(self.arguments.device)
        batch = Batch(plan.num_dimensions)

        def step(_) -> torch.Tensor:
            return self.backward(self.own, objective(score(self.own, plan), batch).loss)

        return self.own, step, {"tokens_of": name, "computed_tokens": plan.num_tokens}

    @staticmethod
    def backward(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def simpo(self, pairs: list[Pair]) -> dict[str, tuple[nn.Module, Step, dict]]:
        from datasets import Dataset
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        def turn(role: str, text: str) -> list[dict[str, str]]:
            return [{"role": role, "content": text}]

        data = Dataset.from_list([
            {"prompt": turn("user", p.messages[-1].content), "chosen": turn("assistant", p.chosen),
             "rejected": turn("assistant", p.rejected)} for p in pairs
        ])  # fmt: skip
        config = CPOConfig(
            output_dir=str(self.scratch / "cpo"), loss_type="simpo", cpo_alpha=0.0, beta=BETA, simpo_gamma=GAMMA,
            max_length=2048, gradient_checkpointing=True, bf16=False, report_to=[], disable_dropout=True,
            use_cpu=self.arguments.device == "cpu",
        )  # fmt: skip
        trainer = CPOTrainer(self.plain, args=config, train_dataset=data, processing_class=self.tokenizer)
        rows = [trainer.train_dataset[i] for i in range(len(pairs))]
        batch = trainer.data_collator(rows)
        batch = {name: x.to(self.arguments.device) if torch.is_tensor(x) else x for name, x in batch.items()}

        def theirs(_) -> torch.Tensor:
            return self.backward(self.plain, trainer.get_batch_loss_metrics(self.plain, batch)[0])

        same = [of_trl(pair.record, row) for pair, row in zip(pairs, rows, strict=True)]
        usual = [dataclasses.replace(each, prompts=each.prompts[:1]) for each in self.tokens(pairs, "dimension_first")]
        extra = sum(len(a.chosen) + len(a.rejected) - len(b.chosen) - len(b.rejected)
                    for a, b in zip(same, usual, strict=True))  # fmt: skip
        padded = 2 * len(pairs) * max(batch["chosen_input_ids"].shape[1], batch["rejected_input_ids"].shape[1])
        facts = {"tokens_of": "TRL", "computed_tokens": padded, "extra_labels": extra}
        objective = SimPO(beta=BETA, gamma=GAMMA)
        return {
            "TRL CPOTrainer, simpo": (self.plain, theirs, facts),
            "ours, TRL's tokens": self.packed(same, objective, "TRL"),
        }


def of_trl(record: int, row: dict[str, list[int]]) -> PairTokens:
    """A pair of one dimension from a row that TRL's CPO trainer tokenised."""
    sides = [np.array(row[f"{side}_input_ids"]) for side in ("chosen", "rejected")]
    labels = [np.array(row[f"{side}_labels"]) != -100 for side in ("chosen", "rejected")]
    prompt = sides[0][~labels[0]]
    return PairTokens(record, (prompt,), sides[0][labels[0]], sides[1][labels[1]], truncated=False)


if __name__ == "__main__":
    main()
