"""What a user says of one set of pairs: a path or Hub name with options, as text or as a mapping.

    pairs.jsonl
    nvidia/HelpSteer2,split=train,weight=0.5
    {path: openbmb/UltraFeedback, pairs: all}
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from amopo_fast.errors import OptionError

_OPTION = re.compile(r",(?=\s*\w+\s*=)")


@dataclass(frozen=True)
class Source:
    """One set of pairs.

    Attributes:
        path: a file (.json, .jsonl, .ndjson, .csv, .parquet; the text ones also .gz), a folder, or a Hub name.
        format: name of a format, or "auto": told by the keys of the first record.
        name: label of an evaluation set.
        split, subset, data_dir: as `datasets.load_dataset` takes them, for folders and Hub names. A record that
            names its own split (HelpSteer2-Preference) is kept where it names this one.
        weight: how often an epoch takes each pair; 0.5 takes every other one, 2 each twice.
        rank_by: the score by which responses are ranked into chosen and rejected; several are joined by +, "mean" is
            the mean over the dimensions. Default: the format's.
        pairs: of more than two responses, "best_worst" makes one pair, "all" every pair of unequal rank.
        scores: where the responses' scores are, if the records hold none (HelpSteer2-Preference); paths joined by ;.
        score_min, score_max: the set's own range of scores. Default: the format's, or the configuration's.
    """

    path: str
    format: str = "auto"
    name: str = ""
    split: str = ""
    subset: str = ""
    data_dir: str = ""
    weight: float = 1.0
    rank_by: str = ""
    pairs: str = "best_worst"
    scores: str = ""
    score_min: float | None = field(default=None)
    score_max: float | None = field(default=None)

    def __post_init__(self):
        if self.name and not re.fullmatch(r"\w[\w. +-]*", self.name):  # it becomes part of file names
            raise OptionError(f"{self.path}: name={self.name!r} may hold letters, digits, spaces and . _ + - only")

    @property
    def is_file(self) -> bool:
        """Whether the path is read as a local file; otherwise as a folder or a Hub name."""
        return Path(self.path).suffix.lower() in _FILE_SUFFIXES or Path(self.path).is_file()

    @property
    def label(self) -> str:
        """Short name for tables and metrics."""
        return self.name or Path(self.path).name.split(".")[0]

    def __str__(self) -> str:
        parts = [self.path, *(part for part in (self.subset, self.data_dir, self.split) if part)]
        return ":".join(parts)

    @classmethod
    def parse(cls, value: Any) -> Source:
        """A Source from a path with ",option=value" behind it, or from a mapping with the key path.

        Raises:
            OptionError: names the option that is unknown or has an impossible value.
        """
        if isinstance(value, Source):
            return value
        if isinstance(value, Path):
            return cls(str(value))
        if isinstance(value, str):
            path, *given = _OPTION.split(value)
            value = {"path": path.strip(), **{k.strip(): v.strip() for k, v in (item.split("=", 1) for item in given)}}
        if not isinstance(value, Mapping):
            raise OptionError(f"{value!r} is no data set: write a path, or a mapping with the key path")
        known = {f.name: f.type for f in fields(cls)}
        for key in value:
            if key not in known:
                meant = did_you_mean(key, known)
                raise OptionError(f"{value.get('path', 'a data set')}: unknown option {key!r}{meant}")
        path = value.get("path")
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise OptionError(f"path must be a file, folder or Hub name, got {path!r}")
        options: dict[str, Any] = {}
        for key, given in value.items():
            if key in ("weight", "score_min", "score_max"):
                options[key] = _number(f"{path}: {key}", given)
            elif isinstance(given, str):
                options[key] = given
            elif key == "scores" and isinstance(given, list) and all(isinstance(item, str) for item in given):
                options[key] = ";".join(given)
            else:
                raise OptionError(f"{path}: {key} must be text, got {given!r}")
        source = cls(**options)
        if source.weight <= 0:
            raise OptionError(f"{path}: weight={source.weight:g} must be positive; leave the data set out instead")
        if source.pairs not in ("best_worst", "all"):
            raise OptionError(f"{path}: pairs={source.pairs!r}; choose best_worst or all")
        if (source.score_min is None) != (source.score_max is None):
            raise OptionError(f"{path}: give both score_min and score_max, or neither")
        if source.score_min is not None and source.score_min >= source.score_max:
            raise OptionError(f"{path}: score_min={source.score_min:g} must be below score_max={source.score_max:g}")
        return source


_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv")
_FILE_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", ".gz")


def parse_sources(value: Any, *, named: bool = True) -> list[Source]:
    """Sources of a configuration key: one, a list of them, or (`named`) a mapping of names to them.

    Raises OptionError as `Source.parse`.
    """
    if value is None:
        return []
    if named and isinstance(value, Mapping) and "path" not in value:
        return [replace(Source.parse(item), name=str(name)) for name, item in value.items()]
    return [Source.parse(item) for item in (value if isinstance(value, (list, tuple)) else [value])]


def did_you_mean(word: object, known) -> str:
    """ "; did you mean 'beta'?" where a known word is close, or the list of known words where there are few."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if len(known) <= 15 else ""


def _number(what: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"{what} must be a number, got {value!r}")
    return number
