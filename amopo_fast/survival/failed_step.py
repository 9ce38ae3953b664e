"""failed-step-N.json, which the guard writes when a number goes wrong: what was computed for which record.

The step can be computed again: a resume from the checkpoint before it has the same records, noise and weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amopo_fast.data.pairs import record_of
from amopo_fast.text_files import read_text

_COLUMNS = ("logp_chosen", "logp_rejected", "margin", "weight", "prob_std_chosen", "prob_std_rejected")

_WHOLE = {"type": "integer", "minimum": 0}
_NAMES = {"type": ["array", "null"], "items": {"type": "string"}}
_PAIR: dict[str, Any] = {
    "type": "object",
    "required": ["record", "rank", "micro_batch", "micro_batch_loss", "dimensions"],
    "properties": {
        "record": _WHOLE,
        "rank": _WHOLE,
        "micro_batch": _WHOLE,
        "dimensions": {"type": "object", "additionalProperties": {"type": "object"}},
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["step", "reason", "records", "pairs"],
    "properties": {
        "step": _WHOLE,
        "reason": {"type": "string"},
        "records": {"type": "array", "items": _WHOLE},
        "pairs": {"type": "array", "items": _PAIR},
        "weights": _NAMES,
        "gradients": _NAMES,
        "changed_weights": _NAMES,
    },
}


@dataclass(frozen=True)
class FailedStep:
    content: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> FailedStep:
        """Raises ValueError that names the file where it is not one the guard wrote."""
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match

        try:
            content = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise _not_one(path, error) from None
        wrong = best_match(Draft202012Validator(SCHEMA).iter_errors(content))
        if wrong is not None:
            place = ".".join(map(str, wrong.absolute_path))
            raise _not_one(path, f"{place}: {wrong.message[:120]}" if place else wrong.message[:120])
        return cls(content)

    @property
    def records(self) -> set[int]:
        """Numbers of the records over all sources of the run, in the order of train_data."""
        return {record_of(number) for number in self.content["records"]}

    def table(self):
        """What a terminal shows of the step before its records."""
        from rich.console import Group

        from amopo_fast.report.tables import NumbersTable

        content, rows = self.content, []
        for pair in content["pairs"]:
            where = [str(pair["rank"]), str(pair["micro_batch"]), _short(pair["micro_batch_loss"])]
            for dimension, values in pair["dimensions"].items():
                numbers = [_short(values.get(column)) for column in _COLUMNS]
                rows.append([str(record_of(pair["record"])), dimension, *where, *numbers])
        columns = ["record", "dimension", "rank", "micro-batch", "its loss", *(c.replace("_", " ") for c in _COLUMNS)]
        table = NumbersTable("What was computed", columns, rows, keys=2)
        lines = [f"step {content['step']}: {content['reason']}"]
        for part in ("weights", "gradients"):
            if content.get(part):
                lines.append(f"not finite in the {part} of: {_names(content[part])}")
        if content.get("changed_weights"):
            lines.append(f"changed by it before that was known: {_names(content['changed_weights'])}")
        lines.append(f"gradient norm {_short(content.get('gradient_norm'))}, learning rate "
                     f"{_short(content.get('learning_rate'))}, seed {content.get('seed')}")  # fmt: skip
        return Group(*lines, table if rows else "no records: no step had begun")


def _not_one(path: str | Path, reason: object) -> ValueError:
    return ValueError(
        f"{path} is no report of a failed step ({reason}); give the failed-step-N.json of a run's output_dir"
    )


def _names(names: list[str]) -> str:
    """The first of them: a NaN inside the model is in the gradients of all weights below it."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
