"""The AMoPO reference code's format:

    {"prompt": str, "chosen": {"response": str, "helpfulness": int, ...}, "rejected": {...}}
"""

from __future__ import annotations

from collections.abc import Sequence

from amopo_fast.errors import DataError, shown
from amopo_fast.sources.candidate import MISSING, Candidate, RawRecord


def candidate(raw: RawRecord, dimensions: Sequence[str], source: str) -> Candidate:
    """Parts of one record; keys other than the configured dimensions are left alone.

    Raises DataError where the record or one of its sides is no object, so that there are no parts to look at.
    """
    if not isinstance(raw.value, dict):
        raise DataError(
            "wrong type",
            shown(raw.value),
            "write an object with the keys prompt, chosen and rejected",
            source=source,
            record=raw.record,
            line=raw.line,
        )
    for side in ("chosen", "rejected"):
        if side in raw.value and not isinstance(raw.value[side], dict):
            raise DataError(
                "wrong type",
                shown(raw.value[side]),
                "write an object with the key response and one score per dimension",
                source=source,
                record=raw.record,
                line=raw.line,
                field=side,
            )
    chosen, rejected = (raw.value.get(side, {}) for side in ("chosen", "rejected"))
    return Candidate(
        record=raw.record,
        line=raw.line,
        prompt=raw.value.get("prompt", MISSING),
        chosen=chosen.get("response", MISSING),
        rejected=rejected.get("response", MISSING),
        chosen_scores={name: chosen[name] for name in dimensions if name in chosen},
        rejected_scores={name: rejected[name] for name in dimensions if name in rejected},
        names={"chosen": "chosen.response", "rejected": "rejected.response"},
    )


def score_names(raw: RawRecord) -> set[str]:
    """Keys of the chosen side that look like scores, to tell a user which dimensions the data has."""
    chosen = raw.value.get("chosen") if isinstance(raw.value, dict) else None
    if not isinstance(chosen, dict):
        return set()
    return {
        name for name, value in chosen.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
