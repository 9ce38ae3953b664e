"""Does asking change the answer? Every prompt is answered at every asked level, and a judge scores the answers.

    prompts x dimensions x levels -> Plan -> answers.jsonl -> scores.jsonl (and wins.jsonl) -> steer_summary.py

Both files are written as their lines come, in the plan's order, so a restart does the rest alone. Answers come in
batches that the plan fixes, each with a seed of its own: those of a restart are those of a run that was left alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from amopo_fast.data.sources.candidate import NO_OBJECT
from amopo_fast.errors import OptionError
from amopo_fast.evaluation.generation import Sampling, Target, TrainedModel, generate
from amopo_fast.judges.judge import Answer, Comparer, Judge, both_positions, nothing
from amopo_fast.prompts.recipe import Recipe
from amopo_fast.survival.work_file import WorkFile

CHUNK = 64  # answers that are judged together, and whose scores are written together


class Asked(NamedTuple):
    """One answer that is wanted: to a prompt (by number), asked for a score in a dimension."""

    prompt: int
    dimension: str
    level: float


@dataclass(frozen=True)
class Plan:
    """What is asked of every model: all levels of all dimensions for each prompt, a prompt's together, since they are
    about equally long."""

    prompts: Sequence[Sequence[Mapping[str, Any]]]
    dimensions: tuple[str, ...]
    levels: tuple[float, ...]

    def asked(self) -> list[Asked]:
        return [
            Asked(prompt, dimension, level)
            for prompt in range(len(self.prompts))
            for dimension in self.dimensions
            for level in self.levels
        ]

    def __len__(self) -> int:
        return len(self.prompts) * len(self.dimensions) * len(self.levels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(prompts, dimensions, levels)."""
        return len(self.prompts), len(self.dimensions), len(self.levels)

    @property
    def options(self) -> dict[str, Any]:
        """For a WorkFile."""
        text = json.dumps([list(map(dict, messages)) for messages in self.prompts])
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return {"prompts": f"{len(self.prompts)}, {digest}", "dimensions": list(self.dimensions),
                "levels": list(self.levels)}  # fmt: skip


def scored_dimensions(recipe: Recipe) -> tuple[str, ...]:
    """Those that can be asked for by a score."""
    return tuple(name for name in recipe.dimensions if name != NO_OBJECT)


def check_asked(recipe: Recipe, dimensions: Sequence[str], levels: Sequence[float]) -> None:
    """Raises OptionError for a dimension or a level that the model was not trained with."""
    known = scored_dimensions(recipe)
    for name in dimensions:
        if name not in known:
            raise OptionError(f"the model was not trained to be asked for {name}: choose from {', '.join(known)}",
                              "dimension")  # fmt: skip
    low, high = recipe.score_range
    if sorted(set(levels)) != list(levels) or not levels:
        raise OptionError(f"levels {', '.join(f'{x:g}' for x in levels)}: write each once, from low to high", "levels")
    for level in levels:
        if not low <= level <= high:
            raise OptionError(f"level {level:g} is not in the model's range: choose from {low:g} to {high:g}",
                              "levels")  # fmt: skip


def default_levels(recipe: Recipe) -> tuple[float, ...]:
    """The lowest, the middle and the highest."""
    low, high = recipe.score_range
    return low, (low + high) / 2, high


def distinct(prompts: Sequence[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Each prompt once, so that prompts are independent of each other."""
    return list({json.dumps(messages, sort_keys=True): messages for messages in prompts}.values())


def identity_of(name: str) -> str:
    """A model's name and, of a folder, a digest of its files' names, sizes and times: another model trained into it
    is another one."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    kinds = (".safetensors", ".json", ".jinja")
    files = [path for path in sorted(folder.iterdir()) if path.suffix in kinds and not path.name.startswith("_")]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.name != "eval.json"]
    return f"{name} ({hashlib.blake2b(json.dumps(stats).encode(), digest_size=6).hexdigest()})"


def write_answers(
    work: WorkFile,
    models: Sequence[str],
    plan: Plan,
    load: Callable[[str], TrainedModel],
    sampling: Sampling,
    *,
    batch_size: int,
    done: Callable[[int], None] = nothing,
) -> None:
    """Lines {"model", "prompt", "dimension", "level", "answer"} of every model in turn, those that are there left out.

    load: called for a model that has answers to write. done: called with the number of answers that are there.

    Raises ValueError for what the model's template refuses.
    """
    asked = plan.asked()
    starts = list(range(0, len(asked), batch_size))
    whole, behind = divmod(len(work.lines), len(asked))
    work.keep(whole * len(asked) + behind // batch_size * batch_size)
    done(len(work.lines))
    for number, name in enumerate(models):
        have = len(work.lines) - number * len(asked)
        if have >= len(asked):
            continue
        trained = load(name)
        for begin in (start for start in starts if start >= have):
            batch = asked[begin : begin + batch_size]
            prompts = [trained.prompt(plan.prompts[a.prompt], Target({a.dimension: a.level})) for a in batch]
            answers = generate(
                trained.model, trained.tokenizer, prompts, replace(sampling, seed=sampling.seed + begin),
                batch_size=batch_size,
            )  # fmt: skip
            work.append({"model": name, **a._asdict(), "answer": text} for a, text in zip(batch, answers, strict=True))
            done(len(batch))
        del trained


def _chunks(work: WorkFile, total: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of what a work file lacks."""
    work.keep(min(len(work.lines), total))
    for begin in range(len(work.lines), total, CHUNK):
        yield begin, min(begin + CHUNK, total)


def write_scores(
    work: WorkFile, answers: Sequence[Answer], judge: Judge, dimensions: Sequence[str],
    done: Callable[[int], None] = nothing,
) -> None:  # fmt: skip
    """Lines {"scores": one for each judged dimension, null where there is none}, in the answers' order.

    Raises JudgeError where the judge cannot go on; what it gave before is kept.
    """
    done(min(len(work.lines), len(answers)) * len(dimensions))
    for begin, end in _chunks(work, len(answers)):
        table = judge.scores(answers[begin:end], dimensions, done)
        work.append({"scores": [None if math.isnan(x) else x for x in row]} for row in table.tolist())


def write_wins(
    work: WorkFile, plan: Plan, answers: Sequence[Answer], models: int, comparer: Comparer,
    done: Callable[[int], None] = nothing,
) -> None:  # fmt: skip
    """Lines {"win": of a model's answer over the first model's to the same request, in the asked dimension}, for every
    model but the first, in the plan's order; each pair in both positions.

    Raises JudgeError as `write_scores`.
    """
    asked = plan.asked() * (models - 1)
    done(2 * min(len(work.lines), len(asked)))
    for begin, end in _chunks(work, len(asked)):
        wins = np.full(end - begin, math.nan)
        for name in plan.dimensions:
            here = [index for index in range(begin, end) if asked[index].dimension == name]
            firsts = [answers[len(plan) + index] for index in here]
            seconds = [answers[index % len(plan)] for index in here]
            if here:
                wins[np.array(here) - begin] = both_positions(comparer, firsts, seconds, [name], done)[:, 0]
        work.append({"win": None if math.isnan(x) else x} for x in wins.tolist())


def answers_of(work: WorkFile, plan: Plan) -> list[Answer]:
    """The answers of all models, in the work file's order."""
    return [Answer(tuple(plan.prompts[line["prompt"]]), line["answer"]) for line in work.lines]


def table_of(work: WorkFile, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 of a key's values, null as NaN."""
    return np.array([line[key] for line in work.lines], dtype=np.float64).reshape(shape)
