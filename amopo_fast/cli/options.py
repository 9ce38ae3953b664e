"""Options of a command from a YAML file and the command line into its dataclasses, with errors a person can act on."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import enum
import functools
import importlib.util
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from transformers import HfArgumentParser

from amopo_fast.cli.numbers import finite, integer, mapping
from amopo_fast.cli.spellings import hint
from amopo_fast.data.sources.spec import parse_sources
from amopo_fast.errors import OptionError, shown
from amopo_fast.text_files import read_text

# Keys whose YAML value may be a mapping or a list of them.
SOURCE_KEYS = ("train_data", "eval_data")
# Ways to say one thing: one on the command line takes the place of the others in the YAML file.
INSTEAD = (("eval_data", "eval_share"), ("pairs_per_step", "per_device_train_batch_size"),
           ("pairs_per_step", "gradient_accumulation_steps"))  # fmt: skip
# In the place of argparse's, which say "invalid int value", take "nan" and make no dict of any text.
_TYPES = {int: integer, float: finite, dict: mapping}
# Whose keys a run's YAML file may hold beside the data's.
RUN_CLASSES = (
    "amopo_fast.models.config:ModelConfig",
    "amopo_fast.training.config:AMoPOConfig",
    "transformers.training_args:TrainingArguments",
)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice instead of taking the last one."""

    def construct_mapping(self, node, deep=False):
        merge = "tag:yaml.org,2002:merge"  # <<, which takes the keys of another mapping
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is there twice, the second time before {node.end_mark}")
        return super().construct_mapping(node, deep)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"command line: {message}; `{self.prog} --help` lists the options")


def parse_options(
    command: str,
    classes: Sequence[type],
    rest: Sequence[str],
    *,
    ignore: Sequence[str] = (),
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """An instance of each dataclass, from the keys of `--config FILE` and, over them, the command line's options; last
    the namespace of the command's own arguments, with `given`, the names of the options that were set, and `typed`,
    those of them on the command line.

    Args:
        command: name for messages and --help.
        ignore: dataclasses, as "module:class", whose keys the YAML file may hold too, so that one file serves several
            commands.
        add_arguments: adds the command's own arguments.
        presets: values by the name that `--preset` takes; they stand over the file's and under the command line's.

    Raises:
        OptionError: an unknown key or option, a value of the wrong type, or one that a dataclass refuses.
    """
    parser = _Parser(list(classes), prog=f"amopo-fast {command}", allow_abbrev=False)
    for action in parser._actions:
        action.type = _TYPES.get(get_origin(action.type) or action.type, action.type)
    keys = {action.dest for action in parser._actions} - {"help"}
    parser.add_argument("--config", help="YAML file of options; --key value overrides its keys")
    if presets:
        parser.add_argument("--preset", choices=presets, help="options by name, over the YAML file's")
    if add_arguments:
        add_arguments(parser)
    types_of = {name: hint for each in classes for name, hint in typing.get_type_hints(each).items()}
    origin: dict[str, str] = {}
    first = _Parser(prog=parser.prog, allow_abbrev=False, add_help=False)
    first.add_argument("--config")
    first.add_argument("--preset", choices=presets)
    chosen = first.parse_known_args(list(rest))[0]
    config = chosen.config
    on_command_line = {token[2:].split("=")[0].replace("-", "_") for token in rest if token.startswith("--")}
    if config:
        values = _from_yaml(config, types_of, keys, ignore)
        for pair in INSTEAD:
            if on_command_line & set(pair):
                values = {key: value for key, value in values.items() if key not in pair}
        origin = {key: f"{config}: {key}" for key in values}
        parser.set_defaults(**values)
    if presets and chosen.preset:
        origin |= {key: f"preset {chosen.preset}: {key}" for key in presets[chosen.preset]}
        parser.set_defaults(**presets[chosen.preset])
    namespace, unknown = parser.parse_known_args(list(rest))
    if unknown:
        flag = unknown[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        positional = [action.dest for action in parser._actions if not action.option_strings]
        meant = hint(flag, known, flags=True, positional=positional)
        if not flag.startswith("-"):
            meant = "; a value stands behind its flag, as --train_data FILE" if "train_data" in keys else ""
        raise OptionError(f"command line: unknown option {flag}{meant}; `{parser.prog} --help` lists the options")
    origin |= {name: f"command line: --{name}" for name in on_command_line}
    for key in SOURCE_KEYS:
        if hasattr(namespace, key):
            try:
                parse_sources(getattr(namespace, key), named=key == "eval_data")
            except ValueError as error:
                raise OptionError(f"{origin.get(key, key)}: {error}") from None
    given = dict(vars(namespace))
    namespace.given, namespace.typed = frozenset(origin), frozenset(on_command_line)
    return (*(_build(each, given, origin) for each in classes), namespace)


@functools.cache
def field_names(place: str) -> frozenset[str]:
    """Names of the fields of a dataclass, "module:class", read from its source: importing TrainingArguments takes
    seconds, as it brings peft and all that peft knows."""
    module, name = place.split(":")
    text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    body = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name).body
    fields = [n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return frozenset(fields)


def _from_yaml(
    config: str, types_of: dict[str, Any], known: set[str], ignore: Sequence[str]
) -> dict[str, Any]:
    try:
        values = yaml.load(read_text(config), _Loader)
    except OSError as error:
        raise OptionError(f"{config}: {error.strerror or error}; check the path of the configuration") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise OptionError(f"{config}: not valid YAML: {' '.join(str(error).split())}; correct it there") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise OptionError(f"{config}: write `key: value` lines, found {shown(values)}")
    checked = {}
    for key, value in values.items():
        if key not in known:
            if any(key in field_names(each) for each in ignore):
                continue
            raise OptionError(f"{config}: unknown key {key!r}{hint(str(key), known)}; write a key that exists")
        if value is None:  # an empty value is the default
            continue
        checked[key] = value if key in SOURCE_KEYS else _typed(f"{config}: {key}", value, types_of[key])
    return checked


def _typed(where: str, value: Any, hint: Any) -> Any:
    """The value as the dataclass's type. YAML 1.1 reads 3e-7 as text, so numbers may come as text."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = [each for each in get_args(hint) if each is not type(None)]
        if len(options) == 1:
            return _typed(where, value, options[0])
        kinds = [get_origin(each) or each for each in options]
        if isinstance(value, (list, dict)) and type(value) not in kinds:
            raise OptionError(f"{where}: write one value, found {shown(value)}")
        if isinstance(value, list):
            return _typed(where, value, options[kinds.index(list)])
        known = tuple(kind for kind in kinds if isinstance(kind, type))
        if value is False and bool not in known and any(issubclass(kind, enum.Enum) for kind in known):
            return "no"  # of eval_strategy and others, which YAML reads as false
        return value if isinstance(value, known) and not isinstance(value, str) else _text(where, value)
    if origin is Literal:
        if value not in get_args(hint):
            raise OptionError(f"{where}: found {shown(value)}; choose one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is list or hint is list:
        items = value if isinstance(value, list) else [value]
        inner = get_args(hint)[0] if get_args(hint) else str
        return [_typed(f"{where}[{index}]", item, inner) for index, item in enumerate(items)]
    if hint is bool:
        if not isinstance(value, bool):
            raise OptionError(f"{where}: write true or false without quotes, found {shown(value)}")
        return value
    if hint in (int, float):
        number = None
        if not isinstance(value, (bool, list, dict)):
            try:
                number = hint(value) if not (hint is int and float(value) % 1) else None
            except (TypeError, ValueError, OverflowError):
                number = None
        if number is None:
            kind = "a whole number" if hint is int else "a number"
            raise OptionError(f"{where}: write {kind}, found {shown(value)}")
        return number
    return _text(where, value) if hint is str else value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, (str, int, float, datetime.date)) or isinstance(value, bool):
        aside = ", in quotes: YAML reads yes, no, on and off as truths" if isinstance(value, bool) else ""
        raise OptionError(f"{where}: write text{aside}, found {shown(value)}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # by an escape
        raise OptionError(f"{where}: write whole characters, found {shown(value)}, half of a surrogate pair") from None
    if "\0" in text:
        raise OptionError(f"{where}: write text without a null character, found {shown(value)}")
    return text


def _build(each: type, given: dict[str, Any], origin: dict[str, str]) -> Any:
    inputs = {f.name: given[f.name] for f in dataclasses.fields(each) if f.init and f.name in given}
    try:
        return each(**inputs)
    except OptionError as error:
        where, text = origin.get(error.option) or error.option or "options", _sentence(error)
        raise OptionError(f"{where}: {text.removeprefix(f'{error.option}: ')}") from None


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:600] + " ..."
