"""Writes the demo's data: `python -m amopo_fast.demo.generate` rewrites train.jsonl and heldout.jsonl beside it.

A prompt describes a scene, asks for one of its facts and asks for a form of the answer. A response can fail in three
ways, each the matter of one dimension, and the scores are computed from what failed:

    correctness             it states a fact that the scene does not have
    helpfulness             it answers another question than the one asked
    instruction_following   its opening or ending is not the one asked for

Pairs come in twins. The prompts of twins differ in the aspects under test and each response answers one of them:
what is chosen for one prompt is rejected for the other. So nothing about a response alone, be it its words or its
length, says which side it is on: any scorer that does not read the prompt is right for exactly half of the pairs.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from amopo_fast.demo import words

FOLDER = Path(__file__).parent
TRAIN_PAIRS, HELDOUT_PAIRS = 2400, 240
_ATTRIBUTES = tuple(words.QUESTIONS)
# What the twins differ in, and its weight in the draw.
_ASPECTS = {
    ("fact",): 12,
    ("question",): 4,
    ("form",): 4,
    ("fact", "question"): 1,
    ("fact", "form"): 1,
    ("question", "form"): 1,
    ("fact", "question", "form"): 1,
}
_FLAW_RATE = 0.2  # pairs whose two responses share a flaw: a low score on the chosen side, a tie


@dataclass(frozen=True)
class Form:
    """The opening word and the ending of a response; None where a prompt does not ask for it."""

    opening: str | None
    ending: str | None


@dataclass(frozen=True)
class Scene:
    object: str
    values: dict[str, str]  # by attribute


@dataclass(frozen=True)
class Task:
    """What a prompt says and asks for."""

    scene: Scene
    attribute: str
    form: Form


@dataclass(frozen=True)
class Answer:
    """What a response says."""

    object: str
    attribute: str
    value: str
    named: bool  # the object by its name, or as "it"
    form: Form

    def text(self) -> str:
        body = words.ANSWERS[self.attribute].format(object=self.object, value=self.value)
        if not self.named:
            body = body.replace(f"the {self.object}", "it", 1)
        body = f"{self.form.opening}, {body}" if self.form.opening else body[0].upper() + body[1:]
        return body + (self.form.ending or ".")


def scores(task: Task, answer: Answer) -> dict[str, int]:
    """Scores from 0 to 5 of a response to a prompt, by what it gets wrong."""
    is_true = answer.value == task.scene.values[answer.attribute]
    helpfulness = (4 if answer.attribute == task.attribute else 1) + answer.named - (not is_true)
    requests = [
        (asked, given)
        for asked, given in ((task.form.opening, answer.form.opening), (task.form.ending, answer.form.ending))
        if asked is not None
    ]
    kept = sum(asked == given for asked, given in requests) / len(requests)
    return {
        "helpfulness": helpfulness,
        "correctness": 5 if is_true else 1,
        "instruction_following": round(1 + 4 * kept),
    }


def _prompt(task: Task, vocabulary: words.Vocabulary, rng: random.Random) -> str:
    scene = rng.choice(vocabulary.scenes).format(object=task.scene.object, **task.scene.values)
    question = rng.choice(words.QUESTIONS[task.attribute])
    asked = "both" if task.form.opening and task.form.ending else "opening" if task.form.opening else "ending"
    form = words.FORMATS[asked].format(opening=task.form.opening, ending=words.ENDINGS.get(task.form.ending))
    return f"{scene} {question} {form}"


def _other(rng: random.Random, choices, *taken):
    return rng.choice([choice for choice in choices if choice not in taken])


def _other_form(rng: random.Random, form: Form) -> Form:
    """Asks for the same parts, all of them different."""
    return Form(
        form.opening and _other(rng, words.OPENINGS, form.opening),
        form.ending and _other(rng, words.ENDINGS, form.ending),
    )


def _other_values(rng: random.Random, vocabulary: words.Vocabulary, values: dict[str, str]) -> dict[str, str]:
    return {
        name: rng.choice([v for v in vocabulary.values[name] if not set(v.split()) & set(values[name].split())])
        for name in _ATTRIBUTES
    }


def _twins(rng: random.Random, vocabulary: words.Vocabulary) -> list[dict]:
    aspects = rng.choices(list(_ASPECTS), weights=list(_ASPECTS.values()))[0]
    asked = rng.choice(("both", "opening", "ending"))
    form = Form(
        rng.choice(words.OPENINGS) if asked != "ending" else None,
        rng.choice(list(words.ENDINGS)) if asked != "opening" else None,
    )
    scene = Scene(
        rng.choice(vocabulary.objects), {name: rng.choice(vocabulary.values[name]) for name in _ATTRIBUTES}
    )
    task = Task(scene, rng.choice(_ATTRIBUTES), form)
    twin = Task(
        replace(scene, values=_other_values(rng, vocabulary, scene.values)) if "fact" in aspects else scene,
        _other(rng, _ATTRIBUTES, task.attribute) if "question" in aspects else task.attribute,
        _other_form(rng, form) if "form" in aspects else form,
    )
    named = rng.random() < 0.7
    answers = [
        Answer(each.scene.object, each.attribute, each.scene.values[each.attribute], named, each.form)
        for each in (task, twin)
    ]
    sound = [aspect for aspect in ("fact", "question", "form") if aspect not in aspects]
    if sound and rng.random() < _FLAW_RATE:
        answers = _flawed(rng, vocabulary, rng.choice(sound), (task, twin), answers)
    texts = [answer.text() for answer in answers]
    records = []
    for index, each in enumerate((task, twin)):
        sides = {
            side: {"response": texts[which], **scores(each, answers[which])}
            for side, which in (("chosen", index), ("rejected", 1 - index))
        }
        records.append({"prompt": _prompt(each, vocabulary, rng), **sides})
    return records


def _flawed(
    rng: random.Random, vocabulary: words.Vocabulary, aspect: str, tasks: tuple[Task, Task], answers: list[Answer]
) -> list[Answer]:
    """Both answers with the same flaw, in an aspect in which the tasks agree."""
    if aspect == "form":
        form = _other_form(rng, answers[0].form)
        return [replace(answer, form=form) for answer in answers]
    if aspect == "question":
        attribute = _other(rng, _ATTRIBUTES, answers[0].attribute)
        return [
            replace(answer, attribute=attribute, value=task.scene.values[attribute])
            for task, answer in zip(tasks, answers, strict=True)
        ]
    values = _other_values(rng, vocabulary, tasks[0].scene.values)
    return [replace(answer, value=values[answer.attribute]) for answer in answers]


def generate(vocabulary: words.Vocabulary, num_pairs: int, seed: int) -> list[dict]:
    """`num_pairs` records in the reference code's format, twins apart from each other, no prompt twice."""
    rng = random.Random(seed)
    records, prompts = [], set()
    while len(records) < num_pairs:
        twins = _twins(rng, vocabulary)
        own = {record["prompt"] for record in twins}
        if len(own) == 2 and not own & prompts:
            prompts |= own
            records += twins
    rng.shuffle(records)
    return records


def to_jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def splits() -> dict[str, str]:
    """Text of the bundled files, by file name."""
    return {
        "train.jsonl": to_jsonl(generate(words.TRAIN, TRAIN_PAIRS, seed=1)),
        "heldout.jsonl": to_jsonl(generate(words.HELDOUT, HELDOUT_PAIRS, seed=2)),
    }


if __name__ == "__main__":
    for name, text in splits().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{FOLDER / name}: {text.count(chr(10))} pairs")
