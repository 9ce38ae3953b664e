"""Writes docs/configuration.md from the configuration's dataclasses: `python docs/make_configuration.py`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from amopo_fast.data.config import DataConfig
from amopo_fast.models.config import ModelConfig
from amopo_fast.training.config import AMoPOConfig

PAGE = Path(__file__).with_name("configuration.md")
_HEAD = """# Configuration

<!-- Written by docs/make_configuration.py from the dataclasses in amopo_fast/config.py; a test holds it to them. -->

`amopo-fast train --config run.yaml --beta 1.0` takes every key below, and every key of
[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments).
A YAML file holds `key: value` lines; the command line overrides it. A key that does not exist, or a value of the wrong
type, ends with its name and what to write. `train --preset paper` puts the published hyper-parameters over the file's.
`validate`, `show` and `eval` read the data's keys from the same file.

"""


def page() -> str:
    """The page's text."""
    parts = [_HEAD]
    for title, each in (("Data", DataConfig), ("Model", ModelConfig), ("Training", AMoPOConfig)):
        own = vars(each)["__annotations__"]
        lines = [f"## {title}", "", _sentence(each), "", "| key | type | default | meaning |", "|---|---|---|---|"]
        fields = {field.name: field for field in dataclasses.fields(each)}
        for name, annotation in own.items():
            lines.append(f"| `{name}` | {_kind(annotation)} | {_default(fields[name])} | {_text(fields[name])} |")
        parts.append("\n".join(lines) + "\n\n")
    return "".join(parts).rstrip() + "\n"


def _sentence(each: type) -> str:
    return " ".join((each.__doc__ or "").split("\n\n")[0].split())


def _kind(annotation: object) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    text = text.replace(" | None", "")
    choices = re.findall(r"['\"](\w+)['\"]", text)
    if choices:
        return " or ".join(f"`{choice}`" for choice in choices)
    return {"list[str]": "list of text", "str": "text", "int": "whole number", "float": "number"}.get(
        text, "true or false" if text == "bool" else text
    )


def _default(field: dataclasses.Field) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _text(field: dataclasses.Field) -> str:
    return " ".join(field.metadata.get("help", "").split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
