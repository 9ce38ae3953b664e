"""The interface of every judge: scores of answers by dimension, or which of two answers is better.

A judge is a class with `identity`, `usage` and `scores`; one that compares has `preferences`. program.py, server.py and
reward_model.py hold the three kinds, choose.py makes one from what a user wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Answer:
    """What is judged: a conversation up to an answer, as messages with role and content, and the answer."""

    messages: tuple[Mapping[str, Any], ...]
    text: str


@dataclass
class Usage:
    """What a judge has taken and could not do so far; a caller shows it beside its progress.

    Attributes:
        requests: answered by a server. cached: answered from the cache, which cost nothing.
        prompt_tokens, completion_tokens: as a server counts them; of a reward model what it read.
        unknown: scores that are NaN, by reason. examples: for each reason the first one's own words.
    """

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unknown: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def count_unknown(self, reason: str, example: str = "") -> None:
        self.unknown[reason] = self.unknown.get(reason, 0) + 1
        self.examples.setdefault(reason, example)

    def cost(self, prices: tuple[float, float]) -> float:
        """prices: of a million tokens read, and of a million written."""
        return (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6

    def notes(self) -> list[str]:
        """A line for each reason why a score is missing."""
        return [
            f"{count} scores are missing: {reason}" + (f"; the first: {example}" if example else "")
            for reason, count in self.unknown.items()
            for example in (self.examples[reason],)
        ]

    def __str__(self) -> str:
        parts = [f"{self.prompt_tokens:,} tokens read"] if self.prompt_tokens else []
        parts += [f"{self.completion_tokens:,} written"] if self.completion_tokens else []
        parts += [f"{self.cached:,} from the cache"] if self.cached else []
        return ", ".join(parts)


def nothing(count: int) -> None:
    """Takes a count for nobody."""


class Judge(Protocol):
    """Scores answers.

    Attributes:
        identity: what its scores depend on, ready for JSON: work that is taken up again must find the same.
        usage: what it took.
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def usage(self) -> Usage: ...

    def scores(
        self, answers: Sequence[Answer], dimensions: Sequence[str], done: Callable[[int], None] = nothing
    ) -> np.ndarray:
        """(answers, dimensions) float64; NaN where there is no score, which `usage` counts by reason.

        done: called with the number of scores that have come.

        Raises JudgeError where the judge cannot go on.
        """
        ...


class Comparer(Protocol):
    """Says which of two answers to the same conversation is better."""

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def usage(self) -> Usage: ...

    def preferences(
        self,
        firsts: Sequence[Answer],
        seconds: Sequence[Answer],
        dimensions: Sequence[str],
        done: Callable[[int], None] = nothing,
    ) -> np.ndarray:
        """(pairs, dimensions) float64: 1 where the first is better, 0 where the second is, 0.5 for a tie, NaN where
        there is no verdict. Raises JudgeError as `Judge.scores`."""
        ...


@dataclass
class ByScores:
    """Compares by the scores of a judge: the higher one wins."""

    judge: Judge

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "by scores", "judge": self.judge.identity}

    @property
    def usage(self) -> Usage:
        return self.judge.usage

    def preferences(self, firsts, seconds, dimensions, done=nothing) -> np.ndarray:
        both = self.judge.scores([*firsts, *seconds], dimensions)
        first, second = both[: len(firsts)], both[len(firsts) :]
        done(first.size)
        return np.where(np.isnan(first) | np.isnan(second), np.nan, 0.5 + 0.5 * np.sign(first - second))


def both_positions(
    comparer: Comparer,
    firsts: Sequence[Answer],
    seconds: Sequence[Answer],
    dimensions: Sequence[str],
    done: Callable[[int], None] = nothing,
) -> np.ndarray:
    """(pairs, dimensions) float64 wins of `firsts`, each pair asked in both positions: 1 or 0 where the verdicts agree,
    0.5 where they contradict each other or tie, 0.75 or 0.25 where one of them ties, NaN where one is missing.

    A comparer that favours a position (Zheng et al. 2023, arXiv 2306.05685, section 3.3) gives 0.5 by that alone.
    """
    forward = comparer.preferences(firsts, seconds, dimensions, done)
    backward = comparer.preferences(seconds, firsts, dimensions, done)
    return (forward + 1 - backward) / 2


def as_answer(messages: Sequence[Any], text: str) -> Answer:
    """An Answer from messages of any kind: mappings, or `data.pair.Message`."""
    return Answer(tuple(m if isinstance(m, Mapping) else m.as_dict() for m in messages), text)
