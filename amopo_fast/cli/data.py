"""`amopo-fast validate` and `amopo-fast show`: what a data file holds."""

from __future__ import annotations

from rich.console import Console

from amopo_fast.records import DEFAULT_DIMENSIONS, read_pairs


def add_parser(commands) -> None:
    validate = commands.add_parser("validate", help="report on a data file; exit code 1 if a record is bad")
    validate.add_argument("--json", action="store_true", help="print JSON")
    validate.set_defaults(run=run_validate, takes_rest=False)
    show = commands.add_parser("show", help="print one record's sequences with tokens and labels marked")
    show.add_argument("--record", type=int, default=0, help="number of the record, from 0 (default: 0)")
    show.set_defaults(run=run_show, takes_rest=False)
    for command in (validate, show):
        command.add_argument("data", help=".json or .jsonl file of pairs")
        command.add_argument("--dimensions", nargs="+", default=list(DEFAULT_DIMENSIONS))
        command.add_argument("--score_min", type=float, default=0.0)
        command.add_argument("--score_max", type=float, default=5.0)
        command.add_argument("--missing_scores", choices=("error", "absent"), default="error")
        command.add_argument("--tokenizer", help="folder or Hub name; default: the demo's for show, words for validate")
        command.add_argument("--max_length", type=int, default=1024)
        command.add_argument("--prompt_order", choices=("dimension_first", "dimension_last"), default="dimension_first")


def run_validate(arguments) -> int:
    from amopo_fast.inspect_data import validate_file

    report = validate_file(
        arguments.data, builder=_builder(arguments) if arguments.tokenizer else None, **_reading(arguments)
    )
    if arguments.json:
        print(report.to_json())
    else:
        Console().print(report)
    return 0 if report.ok else 1


def run_show(arguments) -> int:
    from amopo_fast.inspect_data import show_record

    pairs, errors = read_pairs(arguments.data, on_bad_record="skip", **_reading(arguments))
    for pair in pairs:
        if pair.record == arguments.record:
            Console().print(show_record(pair, _builder(arguments)))
            return 0
    for error in errors:
        if error.record == arguments.record:
            raise error
    raise ValueError(
        f"{arguments.data} has {len(pairs) + len(errors)} records, numbered from 0; there is no {arguments.record}"
    )


def _tokenizer(name: str | None):
    if name:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    from amopo_fast.demo.model import demo_tokenizer

    return demo_tokenizer()


def _builder(arguments):
    from amopo_fast.prompts import PromptBuilder

    return PromptBuilder(
        _tokenizer(arguments.tokenizer),
        arguments.dimensions,
        score_range=(arguments.score_min, arguments.score_max),
        order=arguments.prompt_order,
        max_length=arguments.max_length,
    )


def _reading(arguments) -> dict:
    return {
        "dimensions": arguments.dimensions,
        "score_range": (arguments.score_min, arguments.score_max),
        "missing_scores": arguments.missing_scores,
    }
