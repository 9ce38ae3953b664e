"""The wording of the instructions, from a template file that users can replace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from amopo_fast.errors import DataError, shown
from amopo_fast.text_files import read_text

DEFAULT_TEMPLATE = Path(__file__).parent / "templates" / "default.yaml"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_SCORE_FIELDS = ("dimension", "definition", "score", "max")
_NO_OBJECT_FIELDS = ("dimensions",)


@dataclass(frozen=True)
class Wording:
    """Text of the two instructions and, by dimension, the readable names and definitions."""

    score: str
    no_object: str
    names: dict[str, str]
    definitions: dict[str, str]

    @classmethod
    def load(cls, path: str | Path | Wording | None = None) -> Wording:
        """Reads a template file; None takes the package's own, a Wording is itself. Raises DataError with the key that
        is wrong."""
        if isinstance(path, Wording):
            return path
        path = Path(path) if path is not None else DEFAULT_TEMPLATE
        source = str(path)
        try:
            content = yaml.safe_load(read_text(path))
        except OSError as error:
            raise DataError(
                "unreadable file", error.strerror or str(error), "check the path of the template", source=source
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            found = " ".join(str(error).split())
            remedy = f"start from a copy of {DEFAULT_TEMPLATE.name}"
            raise DataError("invalid YAML", found, remedy, source=source) from None
        keys: dict[str, type] = {"score": str, "no_object": str, "dimensions": dict}
        _check_keys(content, keys, source, "")
        for key, allowed in (("score", _SCORE_FIELDS), ("no_object", _NO_OBJECT_FIELDS)):
            if key not in content:
                raise DataError("missing field", "nothing", "write the instruction's text", source=source, field=key)
            unknown = set(_PLACEHOLDER.findall(content[key])) - set(allowed)
            if unknown:
                raise DataError(
                    "unknown placeholder",
                    ", ".join(f"{{{name}}}" for name in sorted(unknown)),
                    f"use only {', '.join(f'{{{name}}}' for name in allowed)}",
                    source=source,
                    field=key,
                )
        # Without its score the prompt could not tell one pair's instruction from another's.
        if "score" not in _PLACEHOLDER.findall(content["score"]):
            raise DataError("missing placeholder", "no {score}", "name the score", source=source, field="score")
        names, definitions = {}, {}
        for dimension, entry in content.get("dimensions", {}).items():
            _check_keys(entry, {"name": str, "definition": str}, source, f"dimensions.{dimension}")
            if "name" in entry:
                names[dimension] = entry["name"]
            if "definition" in entry:
                definitions[dimension] = entry["definition"]
        return cls(content["score"], content["no_object"], names, definitions)

    def name(self, dimension: str) -> str:
        return self.names.get(dimension, dimension.replace("_", " "))

    def score_instruction(self, dimension: str, score: float, highest: float) -> str:
        """The instruction of a dimension; what stands around the score, joined by it."""
        return f"{score:g}".join(self.around_the_score(dimension, highest))

    def around_the_score(self, dimension: str, highest: float) -> list[str]:
        """The text of a dimension's instruction before, between and behind its score: two parts or more."""
        values = {
            "dimension": self.name(dimension),
            "definition": self.definitions.get(dimension, self.name(dimension)),
            "max": f"{highest:g}",
        }
        return [_fill(part, values) for part in self.score.split("{score}")]

    def no_object_instruction(self, others: Sequence[str]) -> str:
        """The instruction that names all other dimensions; "" where there are none to name."""
        if not others:
            return ""
        names = [self.name(dimension) for dimension in others]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return _fill(self.no_object, {"dimensions": listed})


def _fill(text: str, values: dict[str, str]) -> str:
    # One pass of a plain substitution: str.format would follow attributes and choke on braces.
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def _check_keys(content: object, keys: dict[str, type], source: str, field: str) -> None:
    allowed = f"use the keys {', '.join(keys)}"
    if not isinstance(content, dict):
        raise DataError("wrong type", shown(content), f"{allowed}, each with its value", source=source, field=field)
    for key, value in content.items():
        name = f"{field}.{key}" if field else str(key)
        if key not in keys:
            raise DataError("unknown key", shown(key), allowed, source=source, field=name)
        if not isinstance(value, keys[key]) or not value:
            kind = "text" if keys[key] is str else "a mapping"
            raise DataError("wrong type", shown(value), f"write {kind} that is not empty", source=source, field=name)
