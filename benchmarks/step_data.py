"""Pairs for step.py: token ids are random, lengths and shared beginnings are those of a data set.

    qa      step_lengths.json: 394 real pairs, long-form question answering with passages
    short   drawn here: a chat's short prompts and longer answers
    long    drawn here: documents as prompts

step_lengths.json holds lengths alone. It was made from pairs in the reference code's format by

    PYTHONPATH=.:kernels python benchmarks/step_data.py pairs.json > benchmarks/step_lengths.json

with `approximate_tokens` in the place of a model's vocabulary, ChatML around the turns and this package's wording.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amopo_fast.prompts.tokens import PairTokens

LENGTHS = Path(__file__).with_name("step_lengths.json")
DIMENSIONS = ("no_object", "helpfulness", "correctness", "instruction_following")
TURN_START, TURN_END, SEPARATOR = 3, 5, 1  # <|im_start|>user\n; <|im_end|>\n<|im_start|>assistant\n; \n\n
_PIECE = re.compile(r"[^\W\d_]+|\d|[^\w\s]+|_")
_LETTERS = 8


def approximate_tokens(text: str) -> list[str]:
    """Pieces that a large BPE vocabulary would make of English: a word is one token for every 8 letters begun, a digit
    one, a run of punctuation one; blanks belong to the next word."""
    return [
        piece[i : i + _LETTERS] for piece in _PIECE.findall(text) for i in range(0, len(piece), _LETTERS)
    ]


def _common(a: list[str], b: list[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def lengths_of(path: str) -> dict:
    """The content of step_lengths.json for a file of pairs."""
    from amopo_fast.data.pairs import read_pairs
    from amopo_fast.demo.tokenizer import demo_tokenizer
    from amopo_fast.prompts.builder import PromptBuilder

    pairs, _ = read_pairs(path, dimensions=DIMENSIONS)
    builder = PromptBuilder(demo_tokenizer(), DIMENSIONS, score_range=(0, 5))
    instructions = [approximate_tokens(builder.instruction(pairs[0], dimension)) for dimension in DIMENSIONS]
    shared = [0, *(_common(a, b) for a, b in zip(instructions, instructions[1:], strict=False))]
    rows = []
    for pair in pairs:
        user, chosen, rejected = (
            approximate_tokens(text) for text in (pair.messages[-1].content, pair.chosen, pair.rejected)
        )
        rows.append([len(user), len(chosen) + 1, len(rejected) + 1, _common(chosen, rejected)])
    return {
        "tokens": "benchmarks/step_data.py: approximate_tokens",
        "instructions": [len(tokens) for tokens in instructions],
        "instruction_shares_with_the_one_before": shared,
        "pairs_user_chosen_rejected_common": rows,
    }


@dataclass(frozen=True)
class Lengths:
    """Tokens: (pairs, 4) user's text, chosen, rejected (end tokens included), common beginning of the responses."""

    pairs: np.ndarray
    instructions: list[int]
    instruction_shares: list[int]
    max_length: int


def lengths(name: str) -> Lengths:
    """A data set of this module by name."""
    stored = json.loads(LENGTHS.read_text())
    words = stored["instructions"], stored["instruction_shares_with_the_one_before"]
    if name == "qa":
        return Lengths(np.array(stored["pairs_user_chosen_rejected_common"]), *words, 1024)
    rng = np.random.default_rng(0)

    def draw(median: float, spread: float, low: int, high: int) -> np.ndarray:
        return np.exp(rng.normal(np.log(median), spread, 400)).round().clip(low, high).astype(int)

    if name == "short":
        columns = draw(40, 0.8, 5, 400), draw(180, 0.6, 8, 600), draw(160, 0.6, 8, 600), np.full(400, 2)
        return Lengths(np.stack(columns, 1), *words, 1024)
    if name == "long":
        columns = draw(2200, 0.35, 500, 3400), draw(250, 0.5, 20, 500), draw(230, 0.5, 20, 500), np.full(400, 2)
        return Lengths(np.stack(columns, 1), *words, 4096)
    raise ValueError(f"data {name!r}; choose one of qa, short, long")


def random_pairs(
    lengths: Lengths, order: str, vocabulary: int, count: int | None = None, max_length: int | None = None
) -> list[PairTokens]:
    """The first `count` pairs with random tokens. A user's text beyond `max_length` is cut, as in training."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return rng.integers(3, vocabulary, n)

    limit = max_length or lengths.max_length
    start, end, separator = draw(TURN_START), draw(TURN_END), draw(SEPARATOR)
    instructions: list[np.ndarray] = []
    for length, shared in zip(lengths.instructions, lengths.instruction_shares, strict=True):
        beginning = instructions[-1][:shared] if shared else draw(0)
        instructions.append(np.concatenate([beginning, draw(length - shared)]))
    fixed = TURN_START + SEPARATOR + TURN_END + max(lengths.instructions)
    pairs = []
    for record, (user, chosen, rejected, common) in enumerate(lengths.pairs[:count].tolist()):
        room = limit - fixed
        chosen, rejected = min(chosen, room - 2), min(rejected, room - 2)
        user_tokens = draw(max(1, min(user, room - max(chosen, rejected))))
        opening = draw(min(common, chosen - 1, rejected - 1))
        responses = [np.concatenate([opening, draw(n - len(opening))]) for n in (chosen, rejected)]
        prompts = []
        for instruction in instructions:
            parts = (instruction, separator, user_tokens)
            prompts.append(np.concatenate([start, *(parts if order == "dimension_first" else parts[::-1]), end]))
        pairs.append(PairTokens(record, tuple(prompts), *responses, truncated=False))
    return pairs


if __name__ == "__main__":
    content = lengths_of(sys.argv[1])
    rows = content.pop("pairs_user_chosen_rejected_common")
    text = json.dumps(content, indent=1)[:-2] + ',\n "pairs_user_chosen_rejected_common": [\n'
    print(text + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]\n}")
