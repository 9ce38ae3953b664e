"""A judge behind a server: one request for every answer and dimension, so that no score colours another one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amopo_fast.judges.client import ChatClient
from amopo_fast.judges.judge import Answer, Usage, nothing
from amopo_fast.judges.template import JudgeTemplate, read_score, read_verdict
from amopo_fast.prompts.wording import Wording

_UNREADABLE = "the reply holds no score in the range"
_NO_VERDICT = "the reply names neither answer"


@dataclass
class Server:
    """Scores from `score_range`, or compares, as its template says."""

    client: ChatClient
    template: JudgeTemplate
    wording: Wording
    score_range: tuple[float, float]

    @property
    def usage(self) -> Usage:
        return self.client.usage

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "server", "model": self.client.find_model(), "template": self.template.text,
            "request": dict(self.client.request), "score_range": list(self.score_range),
            "names": self.wording.names, "definitions": self.wording.definitions,
        }  # fmt: skip

    def scores(
        self, answers: Sequence[Answer], dimensions: Sequence[str], done: Callable[[int], None] = nothing
    ) -> np.ndarray:
        prompts = [
            self.template.to_score(answer, name, self.wording, self.score_range)
            for answer in answers
            for name in dimensions
        ]
        return self._read(prompts, lambda reply: read_score(reply, self.score_range), _UNREADABLE, dimensions, done)

    def preferences(
        self,
        firsts: Sequence[Answer],
        seconds: Sequence[Answer],
        dimensions: Sequence[str],
        done: Callable[[int], None] = nothing,
    ) -> np.ndarray:
        prompts = [
            self.template.to_compare(first, second, name, self.wording)
            for first, second in zip(firsts, seconds, strict=True)
            for name in dimensions
        ]
        return self._read(prompts, read_verdict, _NO_VERDICT, dimensions, done)

    def _read(
        self, prompts: list[str], read: Callable[[str], float], reason: str, dimensions: Sequence[str], done
    ) -> np.ndarray:
        values = []
        for reply in self.client.replies(prompts, done):
            values.append(math.nan if reply is None else read(reply))
            if reply is not None and math.isnan(values[-1]):
                self.usage.count_unknown(reason, repr(reply[:200]))
        return np.array(values, dtype=np.float64).reshape(-1, len(dimensions))
