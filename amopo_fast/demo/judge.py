"""A program that judges answers to the demo's prompts: `--judge amopo_fast.demo.judge:score`.

It reads the scene, the question and the form from the prompt and gives the scores that the demo's data were made with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from amopo_fast.demo import words
from amopo_fast.demo.generate import Answer, Form, Scene, Task, scores

_VALUES = {name: (*words.TRAIN.values[name], *words.HELDOUT.values[name]) for name in words.QUESTIONS}
_OBJECTS = (*words.TRAIN.objects, *words.HELDOUT.objects)
_OPENING = re.compile(r"Begin with (\w+)")
_ENDINGS = {text: ending for ending, text in words.ENDINGS.items()}
_ENDING = re.compile(rf"end with ({'|'.join(_ENDINGS)})", re.IGNORECASE)
_BODIES = {"place": "is in the", "owner": "belongs to", "colour": "is"}  # in the order in which they are tried
_ANSWER = re.compile(r"(?:(?P<opening>\w+), )?(?P<body>.*?)(?P<ending>\.\.\.|[.!])?$", re.DOTALL)


def score(messages: Sequence[Mapping[str, Any]], answer: str, dimension: str) -> float | None:
    """0 to 5, as the demo's data score; None for a prompt that is none of the demo's, or another dimension. An answer
    that states nothing of the scene has 0 in helpfulness and correctness."""
    task = _task(str(messages[-1]["content"]))
    if task is None or dimension not in ("helpfulness", "correctness", "instruction_following"):
        return None
    said = _said(answer.strip(), task)
    if said.value:
        return float(max(scores(task, said)[dimension], 0))
    return float(scores(task, said)[dimension]) if dimension == "instruction_following" else 0.0


def _task(prompt: str) -> Task | None:
    attribute = next((name for name, asked in words.QUESTIONS.items() if any(text in prompt for text in asked)), None)
    found = {name: next((value for value in values if value in prompt), None) for name, values in _VALUES.items()}
    thing = next((each for each in _OBJECTS if re.search(rf"\b{each}\b", prompt)), None)
    opening, ending = _OPENING.search(prompt), _ENDING.search(prompt)
    if attribute is None or thing is None or None in found.values() or not (opening or ending):
        return None
    form = Form(opening[1] if opening else None, _ENDINGS[ending[1].lower()] if ending else None)
    return Task(Scene(thing, {name: str(value) for name, value in found.items()}), attribute, form)


def _said(answer: str, task: Task) -> Answer:
    parts = _ANSWER.match(answer)
    assert parts is not None  # every part of the pattern may be empty
    body = parts["body"]
    for attribute, verb in _BODIES.items():
        stated = re.search(rf"^(the \w+|it) {verb} (.+)$", body, re.IGNORECASE)
        if stated:
            named = stated[1].lower() == f"the {task.scene.object}"
            return Answer(task.scene.object, attribute, stated[2], named, Form(parts["opening"], parts["ending"]))
    return Answer(task.scene.object, task.attribute, "", False, Form(parts["opening"], parts["ending"]))
