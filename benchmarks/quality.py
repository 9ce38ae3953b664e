"""Does AMoPO serve several dimensions better than SimPO? A small model from scratch, a task that a program judges.

    python benchmarks/quality.py --out quality.json                   20 minutes on 2 CPU cores
    python benchmarks/quality.py --setting gpu --out quality.json     10 minutes on one GPU
    python benchmarks/tables.py --add quality.json                    files it under results/ and writes the tables

For every seed a model learns the task from right answers and then sees answers in which each dimension is good half of
the time: it knows how, and does not do it. From that model all methods train on the same pairs, each until it has
computed the same number of tokens: AMoPO with every weighting on all dimensions, and SimPO, which is one dimension
(no_object). SimPO's steps compute fewer tokens, so it makes more of them; beside it stands SimPO with as many steps as
AMoPO, at about a quarter of the tokens. All share beta, gamma, the schedule and the pairs of a step; the learning rate
of each method is the best of a few on a seed that no result uses.

Judged are responses sampled at temperature 1 to held-out prompts with the no_object instruction, which all methods
trained on. A win rate compares a method's response with SimPO's to the same prompt, per dimension; ties count half.
Intervals are over seeds (Student's t, 95 %).
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import harness  # noqa: E402
from amopo_fast.data.pairs import Message, Pair  # noqa: E402
from amopo_fast.packing.plan import build_plan  # noqa: E402
from amopo_fast.prompts.builder import PromptBuilder  # noqa: E402
from amopo_fast.report import marks  # noqa: E402
from amopo_fast.report.figure import draw  # noqa: E402
from amopo_fast.report.sheet import Panel, Row  # noqa: E402
from amopo_fast.report.style import look  # noqa: E402
from amopo_fast.training.config import AMoPOConfig  # noqa: E402
from amopo_fast.training.trainer import AMoPOTrainer  # noqa: E402
from quality_task import (  # noqa: E402
    DIMENSIONS,
    JUDGED,
    judge,
    make_pairs,
    make_question,
    make_response,
    make_tokenizer,
    write_template,
)

# (dimensions, weighting)
METHODS = {
    "AMoPO gaussian": (DIMENSIONS, "gaussian"),
    "AMoPO mean": (DIMENSIONS, "mean"),
    "AMoPO uniform": (DIMENSIONS, "uniform"),
    "AMoPO worst_first": (DIMENSIONS, "worst_first"),
    "AMoPO score_gap": (DIMENSIONS, "score_gap"),
    "SimPO": (DIMENSIONS[:1], "uniform"),
    "SimPO, as many steps": (DIMENSIONS[:1], "uniform"),
}
BASELINE, SAME_STEPS = "SimPO", "SimPO, as many steps"
SCORES = (1, 5)
TUNING_SEED = 1000
# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Setting:
    seeds: int
    hidden: int
    layers: int
    skill_steps: int  # of pretraining on right answers
    mixed_steps: int  # and then on answers that are right half of the time
    pretrain_batch: int
    pairs: int
    steps: int  # of AMoPO; SimPO makes as many as compute the same number of tokens
    pairs_per_step: int
    learning_rates: tuple[float, ...]
    prompts: int
    samples: int  # per prompt


SETTINGS = {
    "cpu": Setting(5, 64, 2, 300, 200, 64, 1500, 90, 16, (1e-3, 3e-3), 300, 2),
    "gpu": Setting(8, 128, 4, 1000, 500, 256, 4000, 200, 32, (3e-4, 1e-3, 3e-3), 500, 4),
    "smoke": Setting(2, 16, 1, 2, 2, 4, 8, 2, 4, (1e-3,), 4, 1),
}
BETA, GAMMA = 2.0, 0.5


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=("cpu", "gpu"), default=None, help="default: by --device")
    arguments = parser.parse_args()
    name = "smoke" if arguments.smoke else arguments.setting or ("gpu" if arguments.device != "cpu" else "cpu")
    setting = SETTINGS[name]
    report = harness.Report("quality", arguments)
    deadline = harness.Deadline(arguments.minutes)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(setting, arguments.device, Path(scratch))
        rates = bench.tune(report)
        outcomes: dict[str, list[dict[str, np.ndarray]]] = {method: [] for method in METHODS}
        for seed in range(setting.seeds):
            if deadline.over():
                report.add(case=f"seed {seed}", status="not run: out of time")
                break
            start = bench.pretrain(seed)
            row = bench.judged(start, seed)
            report.add(case="pretrained", seed=seed, status="ok", **rates_of(row))
            for method in METHODS:
                began = time.perf_counter()
                model, tokens, steps = bench.train(start, method, seed, rates[method])
                outcome = bench.judged(model, seed)
                outcomes[method].append(outcome)
                report.add(
                    case=method, seed=seed, status="ok", learning_rate=rates[method], steps=steps,
                    computed_tokens=tokens, seconds=round(time.perf_counter() - began, 1), **rates_of(outcome),
                )  # fmt: skip
    summary = summarise(outcomes)
    enough = summary["seeds"] > 1
    report.add(case="summary", status="ok" if enough else "not run: fewer than two seeds", **summary)
    if enough:
        print(plot(summary, arguments.out.with_suffix(".png")))
        print(reading(summary))


class Bench:
    """Pretraining, training and judging of one setting."""

    def __init__(self, setting: Setting, device: str, scratch: Path):
        self.setting, self.device, self.scratch = setting, device, scratch
        self.tokenizer = make_tokenizer()
        template = write_template(scratch)
        self.builders = {
            dimensions: PromptBuilder(
                self.tokenizer, dimensions, score_range=SCORES, max_length=64, template=template
            )
            for dimensions in {dimensions for dimensions, _ in METHODS.values()}
        }
        # The wording of no_object is that of all dimensions for SimPO too: both train on the same prompt.
        self.all = self.builders[DIMENSIONS]

    def _prompt(self, text: str, dimension: str, score: int) -> str:
        pair = Pair(0, (Message("user", text),), "", "", {name: score for name in JUDGED})
        return self.tokenizer.apply_chat_template(
            self.all.messages(pair, dimension), tokenize=False, add_generation_prompt=True
        )

    def pretrain(self, seed: int) -> Qwen2ForCausalLM:
        """A model that can answer, and does so with each dimension good half of the time.

        Instructions are seen and say nothing.
        """
        rng = random.Random(f"pretrain {seed}")
        torch.manual_seed(seed)
        setting = self.setting
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(self.tokenizer), hidden_size=setting.hidden, intermediate_size=3 * setting.hidden,
                num_hidden_layers=setting.layers, num_attention_heads=4, num_key_value_heads=4,
                max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.08,
                eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id, bos_token_id=None,
            )
        ).to(self.device)  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        steps = setting.skill_steps + setting.mixed_steps
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
        for step in range(steps):
            right = 1.0 if step < setting.skill_steps else 0.5
            prompts, responses = [], []
            for _ in range(setting.pretrain_batch):
                question = make_question(rng)
                prompts.append(self._prompt(question.text, rng.choice(DIMENSIONS), rng.choice(SCORES)))
                responses.append(make_response(rng, question, right, 0.5, 0.5))
            ids, mask, labels = self._padded(prompts, responses)
            logits = model(ids, attention_mask=mask).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return model.eval()

    def _padded(self, prompts: list[str], responses: list[str]):
        heads = self.tokenizer(prompts, add_special_tokens=False)["input_ids"]
        tails = [
            [*ids, self.tokenizer.eos_token_id]
            for ids in self.tokenizer(responses, add_special_tokens=False)["input_ids"]
        ]
        longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
        ids = torch.full((len(heads), longest), self.tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            length = len(head) + len(tail)
            ids[row, :length] = torch.tensor([*head, *tail])
            labels[row, len(head) : length] = torch.tensor(tail)
            mask[row, :length] = 1
        return ids.to(self.device), mask.to(self.device), labels.to(self.device)

    def train(self, start: Qwen2ForCausalLM, method: str, seed: int, learning_rate: float):
        """(model, computed tokens, steps) of a method from a copy of the pretrained model."""
        dimensions, weighting = METHODS[method]
        pairs = make_pairs(random.Random(f"pairs {seed}"), self.setting.pairs)
        full = self.all.tokenize(pairs)[0]
        own = full
        if dimensions != DIMENSIONS:
            kept = [DIMENSIONS.index(name) for name in dimensions]
            own = [type(pair)(pair.record, tuple(pair.prompts[k] for k in kept), pair.chosen, pair.rejected, False)
                   for pair in full]  # fmt: skip
        sample = range(0, len(full), max(1, len(full) // 200))
        cost = [statistics.mean(build_plan([tokens[i]]).num_tokens for i in sample) for tokens in (own, full)]
        steps = self.setting.steps
        if method != SAME_STEPS:
            steps = round(steps * cost[1] / cost[0])
        model = Qwen2ForCausalLM(start.config).to(self.device)
        model.load_state_dict(start.state_dict())
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            config = AMoPOConfig(
                output_dir=folder, seed=seed, beta=BETA, gamma=GAMMA, weighting=weighting, max_steps=steps,
                pairs_per_step=self.setting.pairs_per_step, tokens_per_micro_batch=1 << 16, max_grad_norm=1.0,
                learning_rate=learning_rate, warmup_steps=0.1, weight_decay=0.0, use_cpu=self.device == "cpu",
                save_strategy="no", logging_strategy="no", disable_tqdm=True, report_to="none",
            )  # fmt: skip
            trainer = AMoPOTrainer(
                model, config, dimensions=dimensions, train_dataset=own, processing_class=self.tokenizer
            )
            trainer.remove_callback(PrinterCallback)
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
        return model.eval(), round(steps * self.setting.pairs_per_step * cost[0]), steps

    @torch.no_grad()
    def judged(self, model: Qwen2ForCausalLM, seed: int) -> dict[str, np.ndarray]:
        """By dimension, whether sampled responses to held-out prompts are good: (prompts * samples,) of 0 and 1."""
        rng = random.Random(f"held out {seed}")
        questions = [make_question(rng) for _ in range(self.setting.prompts)] * self.setting.samples
        prompts = [self._prompt(question.text, "no_object", 5) for question in questions]
        inputs = self.tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.device)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws for every method and device
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        done = torch.zeros(len(ids), dtype=torch.bool)
        answers: list[list[int]] = [[] for _ in questions]
        for _ in range(14):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, 0]
            logits = logits.float().cpu()
            # Gumbel's trick with shared noise: methods differ in what they prefer, not in their luck.
            noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator).clamp(min=1e-20)))
            token = (logits.log_softmax(-1) + noise).argmax(-1)
            done |= token == self.tokenizer.eos_token_id
            for row in torch.nonzero(~done)[:, 0].tolist():
                answers[row].append(int(token[row]))
            if done.all():
                break
            ids = torch.cat([ids, token[:, None].to(ids.device)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        texts = [self.tokenizer.decode(answer) for answer in answers]
        scores = [judge(question, text) for question, text in zip(questions, texts, strict=True)]
        return {name: np.array([float(each[name] == 5) for each in scores]) for name in JUDGED}

    def tune(self, report: harness.Report) -> dict[str, float]:
        """The learning rate of each method with the most good dimensions, on a seed that no result uses."""
        best = {}
        rates = self.setting.learning_rates
        start = self.pretrain(TUNING_SEED) if len(rates) > 1 else None
        for method in METHODS:
            if method == SAME_STEPS:
                best[method] = best[BASELINE]
                continue
            found = {}
            for rate in rates if start is not None else ():
                outcome = self.judged(self.train(start, method, TUNING_SEED, rate)[0], TUNING_SEED)
                found[rate] = float(np.mean([values.mean() for values in outcome.values()]))
                report.add(case="tuning", variant=f"{method}, {rate:g}", status="ok", mean=found[rate])
            best[method] = max(found, key=lambda rate: found[rate]) if found else rates[0]
        return best


def rates_of(outcome: dict[str, np.ndarray]) -> dict[str, float]:
    every = np.logical_and.reduce([values > 0 for values in outcome.values()]).mean()
    return {**{name: round(float(values.mean()), 4) for name, values in outcome.items()}, "all": round(float(every), 4)}


def over_seeds(values: list[float]) -> dict[str, float]:
    """{"value", "low", "high"}: mean over seeds with its 95 % interval by Student's t."""
    mean, count = statistics.mean(values), len(values)
    half = T95.get(count - 1, 1.96) * statistics.stdev(values) / math.sqrt(count) if count > 1 else 0.0
    return {"value": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def summarise(outcomes: dict[str, list[dict[str, np.ndarray]]]) -> dict:
    """Rates of every method, and win rates of the others against SimPO of either kind, over seeds."""
    summary: dict = {"seeds": len(outcomes[BASELINE]), "rates": {}, "win_rates": {}, "win_rates_as_many_steps": {}}
    for method, found in outcomes.items():
        if not found:
            continue
        per_seed = [rates_of(each) for each in found]
        summary["rates"][method] = {name: over_seeds([each[name] for each in per_seed]) for name in per_seed[0]}
        if method not in (BASELINE, SAME_STEPS):
            summary["win_rates"][method] = win_rates(found, outcomes[BASELINE])
            summary["win_rates_as_many_steps"][method] = win_rates(found, outcomes[SAME_STEPS])
    return summary


def win_rates(found: list[dict[str, np.ndarray]], against: list[dict[str, np.ndarray]]) -> dict:
    """By dimension and for the number of good dimensions, the share of responses that are better; ties count half."""
    wins: dict[str, list[float]] = {name: [] for name in (*JUDGED, "sum")}
    for own, other in zip(found, against, strict=True):
        for name in JUDGED:
            wins[name].append(float((0.5 + (own[name] - other[name]) / 2).mean()))
        total = sum(own.values()) - sum(other.values())
        wins["sum"].append(float((0.5 + np.sign(total) / 2).mean()))
    return {name: over_seeds(values) for name, values in wins.items()}


def plot(summary: dict, path: Path) -> Path:
    """Rates of all methods and win rates against SimPO, with intervals."""
    panels = [
        Panel(title, partial(draw_shares, found, even), "", y_label)
        for title, y_label, found, even in (
            ("Good responses", "% of responses", summary["rates"], None),
            (f"Win rate against {BASELINE}", "%, ties half", summary["win_rates"], 50),
            (f"Win rate against {SAME_STEPS}", "%, ties half", summary["win_rates_as_many_steps"], 50),
        )
    ]
    foot = f"Means of {summary['seeds']} seeds with 95 % intervals (Student's t over seeds)."
    return draw([Row(panels)], path, "AMoPO and SimPO on the synthetic task", foot=foot)


def draw_shares(found: dict[str, dict[str, dict[str, float]]], even: float | None, axis) -> None:
    """Shares (0 to 1, {"value", "low", "high"}) by method and by what was judged, in per cent."""
    if even is not None:
        marks.reference(axis, even)
    names = list(next(iter(found.values())))
    shown: list[float] = []
    for index, (method, values) in enumerate(found.items()):
        mark = look(list(METHODS).index(method))
        places = [x + 0.12 * (index - (len(found) - 1) / 2) for x in range(len(names))]
        marks.key(axis, method, mark, marker=True, line=False)
        marks.intervals(axis, places, [values[name] for name in names], mark, scale=100)
        shown += marks.bounds([values[name] for name in names], scale=100)
    marks.fit_y(axis, shown, lowest=-1.5, highest=101.5)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_xticks(range(len(names)), names)


def reading(summary: dict) -> str:
    """What the win rates say, in words that the numbers decide."""
    lines = []
    compared = [(BASELINE, "win_rates"), (SAME_STEPS, "win_rates_as_many_steps")]
    for against, method, found in ((b, m, f) for b, key in compared for m, f in summary[key].items()):
        better = [name for name, value in found.items() if value["low"] > 0.5]
        worse = [name for name, value in found.items() if value["high"] < 0.5]
        open_ = [name for name in found if name not in better + worse]
        parts = [f"better in {', '.join(better)}"] * bool(better) + [f"worse in {', '.join(worse)}"] * bool(worse)
        parts += [f"undecided in {', '.join(open_)}"] * bool(open_)
        lines.append(f"{method} against {against}: {'; '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
