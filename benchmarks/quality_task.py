"""A task whose preference dimensions a program can judge, made of a few dozen words.

    prompt     "numbers 4 9 1 : largest , in brackets"
    response   "[ 9 ]"  |  "well , [ 9 ]"  |  "answer : 9 . i hope this helps"

    correctness   the number is the one asked for
    format        it is written in the form asked for, and in that form alone
    brevity       there is nothing besides

Every dimension scores 5 or 1. A pair's chosen response has the higher sum; it may be worse in one dimension, as real
annotations are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from amopo_fast.data.pairs import Message, Pair

DIMENSIONS = ("no_object", "correctness", "format", "brevity")
JUDGED = DIMENSIONS[1:]
TASKS = {"largest": max, "smallest": min, "first": lambda numbers: numbers[0], "last": lambda numbers: numbers[-1]}
FORMS = {"in brackets": "[ {} ]", "with dashes": "- {} -", "named": "answer : {}", "twice": "{} and {}"}
BEFORE = ("well ,", "let me think .", "sure !")
AFTER = (". i hope this helps", ". ask me more", ", i believe")
NUMBERS = range(10)
# The instructions of AMoPO in few words, so that a small model spends its time on the task.
TEMPLATE = """score: "{score} of {max} for {dimension} ."
no_object: "best for {dimensions} ."
"""
_END = "<end>"


@dataclass(frozen=True)
class Question:
    numbers: tuple[int, ...]
    task: str
    form: str

    @property
    def text(self) -> str:
        return f"numbers {' '.join(map(str, self.numbers))} : {self.task} , {self.form}"

    @property
    def answer(self) -> int:
        return TASKS[self.task](self.numbers)


def make_question(rng: random.Random) -> Question:
    return Question(tuple(rng.sample(NUMBERS, 3)), rng.choice(list(TASKS)), rng.choice(list(FORMS)))


def make_response(rng: random.Random, question: Question, right: float, kept: float, brief: float) -> str:
    """A response that is right, keeps the form and is brief with these probabilities, independently."""
    wrong = [number for number in question.numbers if number != question.answer]
    number = question.answer if rng.random() < right else rng.choice(wrong)
    others = [form for form in FORMS if form != question.form]
    form = question.form if rng.random() < kept else rng.choice(others)
    body = FORMS[form].replace("{}", str(number))
    if rng.random() < brief:
        return body
    return f"{rng.choice(BEFORE)} {body}" if rng.random() < 0.5 else f"{body} {rng.choice(AFTER)}"


def judge(question: Question, response: str) -> dict[str, int]:
    """5 or 1 by dimension, from the words alone; a response of any shape has scores."""
    words = response.split()
    digits = [word for word in words if word.isdigit()]
    shapes = {name: _shape(text.replace("{}", "0").split()) for name, text in FORMS.items()}
    found = _shape(words)
    here = [name for name, each in shapes.items() if _contains(found, each)]
    return {
        "correctness": 5 if digits and set(digits) == {str(question.answer)} else 1,
        "format": 5 if here == [question.form] else 1,
        "brevity": 5 if found in shapes.values() else 1,
    }


def _shape(words: list[str]) -> list[str]:
    return ["#" if word.isdigit() else word for word in words]


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))


def make_pairs(rng: random.Random, count: int) -> list[Pair]:
    """Pairs of two flawed responses with unequal sums of scores."""
    pairs: list[Pair] = []
    while len(pairs) < count:
        question = make_question(rng)
        sides = [make_response(rng, question, 0.5, 0.5, 0.5) for _ in range(2)]
        scores = [judge(question, text) for text in sides]
        sums = [sum(each.values()) for each in scores]
        if sums[0] == sums[1]:
            continue
        best = int(sums[1] > sums[0])
        pairs.append(
            Pair(
                len(pairs),
                (Message("user", question.text),),
                sides[best],
                sides[1 - best],
                {name: float(value) for name, value in scores[best].items()},
                {name: float(value) for name, value in scores[1 - best].items()},
                "quality_task",
            )
        )
    return pairs


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    text = " ".join([*TASKS, *FORMS, *FORMS.values(), *BEFORE, *AFTER, *JUDGED, "numbers : , . ! of for best 1 5"])
    words = [*map(str, NUMBERS), *dict.fromkeys(text.replace("{}", " ").replace(",", " , ").split())]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", _END, "<user>", "<model>", *words]))}
    vocabulary.setdefault("<unk>", len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<model>"], padding_side="left",
    )  # fmt: skip
    wrapped.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} {% else %}<model> {{ m.content }} "
        "<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<model> {% endif %}"
    )
    return wrapped


def write_template(folder: Path) -> Path:
    path = folder / "template.yaml"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path
