"""`amopo-fast validate` and `amopo-fast show`: what the data of a run holds."""

from __future__ import annotations

import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

from amopo_fast.cli.numbers import whole_or_zero
from amopo_fast.data.sources.candidate import NO_OBJECT
from amopo_fast.errors import OptionError, changed_fields


def add_parser(commands) -> None:
    validate = commands.add_parser(
        "validate", help="report on data files; exit code 1 if a record is bad", add_help=False
    )
    validate.set_defaults(run=run_validate, takes_rest=True)
    show = commands.add_parser("show", help="print one record's sequences, tokens and labels marked", add_help=False)
    show.set_defaults(run=run_show, takes_rest=True)


def _parse(command: str, rest, add_arguments):
    """(DataConfig, ModelConfig, namespace). Files without a flag are training data; the keys of a training run are
    allowed."""
    from amopo_fast.cli.options import RUN_CLASSES, parse_options
    from amopo_fast.data.config import DataConfig
    from amopo_fast.models.config import ModelConfig

    def add(parser) -> None:
        parser.add_argument("data", nargs="*", help="files, folders or Hub names; the same as --train_data")
        add_arguments(parser)

    classes = (DataConfig, ModelConfig)
    config, model, arguments = parse_options(command, classes, rest, ignore=RUN_CLASSES, add_arguments=add)
    unread = {each.name for each in fields(ModelConfig)} - {"model_name_or_path", "tokenizer_name_or_path"}
    for name in sorted(unread & arguments.typed):
        raise OptionError(f"--{name} has no effect on {command}, which loads no model: leave it out")
    if arguments.data:
        config = replace(config, train_data=arguments.data)
    if not config.train_data:
        raise OptionError(f"name the data: amopo-fast {command} FILE, or --config with train_data in it")
    return config, model, arguments


def _as_trained(config, model, given):
    """(DataConfig, wording, tokenizer or None) of the model that the options name: with its recipe, if it has one."""
    from amopo_fast.prompts.recipe import as_trained, recipe_of
    from amopo_fast.prompts.tokenizer import load_tokenizer
    from amopo_fast.prompts.wording import Wording

    name = model.tokenizer_name_or_path or model.model_name_or_path
    if not name:
        return config, Wording.load(config.prompt_template), None  # a file that cannot be read is said in any case
    recipe, wording = recipe_of(model.model_name_or_path or name), None
    if recipe is not None:
        config, wording, notes = as_trained(config, recipe, given)
        for note in notes:
            print(note, file=sys.stderr)
    return config, wording, load_tokenizer(name)


def run_validate(arguments) -> int:
    from rich.console import Console

    from amopo_fast.data.pairs import NO_SCORES
    from amopo_fast.data.sources.spec import parse_sources
    from amopo_fast.prompts.inspect import validate_data

    config, model, options = _parse(
        "validate", arguments.rest, lambda parser: parser.add_argument("--json", action="store_true", help="print JSON")
    )
    config, wording, tokenizer = _as_trained(config, model, options.given)
    report = validate_data(config, tokenizer, wording=wording)
    if options.json:
        print(report.to_json())
    else:
        Console().print(report)
    for source, each in zip(parse_sources(config.train_data), report.training, strict=True):
        if NO_SCORES in each.bad_by_kind:
            _say_how_to_score(source, config, sys.stderr if options.json else sys.stdout)
    return 0 if report.ok else 1


def _say_how_to_score(source, config, out) -> None:
    """The command that scores a source, ready to run."""
    options = [f"{name}={value}" for name, value in changed_fields(source).items() if name not in ("path", "name")]
    target = Path(source.path).name.split(".")[0] + ".scored.jsonl"
    names = [name for name in config.dimensions if name != NO_OBJECT]
    words = ["amopo-fast", "score", ",".join([source.path, *options]), "--output_file", target, "--dimensions"]
    print("These pairs have no scores. A judge behind a server (or a program, or a reward model) gives them:", file=out)
    print(f"  {shlex.join([*words, *names, '--judge', 'http://localhost:8000/v1'])}", file=out)
    print("Where the preference is all that is known, one dimension of two levels:", file=out)
    print(f"  {shlex.join([*words, names[0], '--scores', 'preference'])}", file=out)


def run_show(arguments) -> int:
    from rich.console import Console

    from amopo_fast.data.pairs import Reading, iter_records
    from amopo_fast.data.sources.candidate import Dropped
    from amopo_fast.data.sources.formats import open_source
    from amopo_fast.data.sources.spec import parse_sources
    from amopo_fast.prompts.dataset import common_score_range, prompt_builder
    from amopo_fast.prompts.show import show_record
    from amopo_fast.survival.failed_step import FailedStep

    def add_arguments(parser) -> None:
        parser.add_argument("--record", type=whole_or_zero, default=0, help="number of the record, from 0")
        parser.add_argument("--failed_step", help="failed-step-N.json of a run: shows that step's numbers and records")

    config, model, options = _parse("show", arguments.rest, add_arguments)
    config, wording, tokenizer = _as_trained(config, model, options.given)
    if tokenizer is None:
        from amopo_fast.demo.tokenizer import demo_tokenizer

        print("no --model_name_or_path is given: tokens are those of the demo's tokenizer", file=sys.stderr)
        tokenizer = demo_tokenizer()
    sources = parse_sources(config.train_data)
    if options.failed_step:
        report = FailedStep.read(options.failed_step)
        Console().print(report.table())
        wanted = report.records
        if not wanted:  # weights that were bad before a step began
            return 0
    else:
        sources, wanted = sources[:1], {options.record}
    opened = [open_source(source) for source in sources]
    score_range = common_score_range(config, opened)
    reading = Reading(config.dimensions, score_range, config.missing_scores, config.tied_dimensions)
    builder = prompt_builder(config, tokenizer, score_range, wording)
    shown = False
    base = 0  # a run numbers the records of its second source behind the first one's
    for source in opened:
        last = -1
        for item in iter_records(source, reading):
            last = max(last, item.record)
            if base + item.record not in wanted:
                if shown and len(wanted) == 1:
                    break
                continue
            if isinstance(item, Dropped):
                raise ValueError(f"{source.source}, record {item.record} makes no pair: it is {item.reason}")
            if isinstance(item, Exception):
                raise item
            Console().print(show_record(item, builder))
            shown = True
        base += last + 1
    if not shown:
        names = ", ".join(str(source.source) for source in opened)
        raise ValueError(f"{names} has {base} records, numbered from 0; there is no {min(wanted)}")
    return 0
