"""failed-step-N.json, which the guard writes when a number goes wrong: what was computed for which record.

The step can be computed again: a resume from the checkpoint before it has the same records, noise and weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amopo_fast.data.pairs import record_of

_COLUMNS = ("logp_chosen", "logp_rejected", "margin", "weight", "prob_std_chosen", "prob_std_rejected")


@dataclass(frozen=True)
class FailedStep:
    content: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> FailedStep:
        """Raises ValueError that names the file where it is not one the guard wrote."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            for pair in content["pairs"]:
                pair["record"], pair["micro_batch_loss"], pair["dimensions"]
            content["step"], content["reason"], content["records"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no report of a failed step ({type(error).__name__}: {error}); give the failed-step-N.json "
                "of a run's output_dir"
            ) from None
        return cls(content)

    @property
    def records(self) -> set[int]:
        """Numbers of the records over all sources of the run, in the order of train_data."""
        return {record_of(number) for number in self.content["records"]}

    def table(self):
        """What a terminal shows of the step before its records."""
        from rich import box
        from rich.console import Group
        from rich.table import Table

        content = self.content
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in (
            "record",
            "rank",
            "micro-batch",
            "its loss",
            "dimension",
            *(c.replace("_", " ") for c in _COLUMNS),
        ):
            table.add_column(column, justify="left" if column == "dimension" else "right")
        for pair in content["pairs"]:
            where = [str(record_of(pair["record"])), str(pair["rank"]), str(pair["micro_batch"])]
            for dimension, values in pair["dimensions"].items():
                numbers = [_short(values.get(column)) for column in _COLUMNS]
                table.add_row(*where, _short(pair["micro_batch_loss"]), dimension, *numbers)
                where = ["", "", ""]
        lines = [f"step {content['step']}: {content['reason']}"]
        for part in ("weights", "gradients"):
            if content.get(part):
                lines.append(f"not finite in the {part} of: {', '.join(content[part])}")
        if content.get("changed_weights"):
            lines.append(f"changed by it before that was known: {', '.join(content['changed_weights'])}")
        lines.append(f"gradient norm {_short(content.get('gradient_norm'))}, learning rate "
                     f"{_short(content.get('learning_rate'))}, seed {content.get('seed')}")  # fmt: skip
        return Group(*lines, table if content["pairs"] else "no records: no step had begun")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
