"""The command line `amopo-fast`: demo, train, validate, show. Exit codes: 0 done, 1 failed or bad data, 2 bad usage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from amopo_fast.config import AMoPOConfig, DataConfig, ModelConfig
from amopo_fast.records import read_pairs

DESCRIPTION = "AMoPO: multi-objective preference optimization of causal language models."
EXAMPLES = """examples:
  amopo-fast demo                                  train a tiny model on the bundled data, in minutes, on a CPU
  amopo-fast validate pairs.json                   what is in a data file and what is wrong with it
  amopo-fast show pairs.json --record 3            one record's sequences, tokens and labels
  amopo-fast train --config run.yaml --beta 1.0    train; any key of the YAML file can be given as --key value
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; `argv` without the program's name. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "amopo-fast", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a tiny model on the bundled data and plot what it learned")
    demo.add_argument("--output_dir", default="amopo-demo", help="where the run goes (default: amopo-demo)")
    demo.add_argument("--seed", type=int, default=0)
    train = commands.add_parser("train", help="train a model", add_help=False)
    train.add_argument("--config", help="YAML file of options")
    validate = commands.add_parser("validate", help="report on a data file; exit code 1 if a record is bad")
    validate.add_argument("--json", action="store_true", help="print JSON")
    show = commands.add_parser("show", help="print one record's sequences with tokens and labels marked")
    show.add_argument("--record", type=int, default=0, help="number of the record, from 0 (default: 0)")
    for command in (validate, show):
        command.add_argument("data", help=".json or .jsonl file of pairs")
        command.add_argument("--dimensions", nargs="+", default=DataConfig().dimensions)
        command.add_argument("--score_min", type=float, default=0.0)
        command.add_argument("--score_max", type=float, default=5.0)
        command.add_argument("--missing_scores", choices=("error", "absent"), default="error")
        command.add_argument("--tokenizer", help="folder or Hub name; default: the demo's for show, words for validate")
        command.add_argument("--max_length", type=int, default=1024)
        command.add_argument("--prompt_order", choices=("dimension_first", "dimension_last"), default="dimension_first")
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    run = {"demo": _demo, "train": _train, "validate": _validate, "show": _show}[arguments.command]
    try:
        return run(arguments, rest)
    except (ValueError, OSError) as error:
        print(f"amopo-fast {arguments.command}: error: {error}", file=sys.stderr)
        return 1


def _parse_train(config: str | None, rest: list[str]) -> tuple[DataConfig, ModelConfig, AMoPOConfig]:
    from transformers import HfArgumentParser

    parser = HfArgumentParser((DataConfig, ModelConfig, AMoPOConfig), prog="amopo-fast train")
    if config:
        try:
            options = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{config} is not valid YAML: {error}") from None
        if not isinstance(options, dict):
            raise ValueError(f"{config} must hold `key: value` lines, found a {type(options).__name__}")
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"{config}: unknown key {unknown[0]!r}; `amopo-fast train --help` lists the keys")
        parser.set_defaults(**options)
    return parser.parse_args_into_dataclasses(rest)


def build_model(config: ModelConfig, seed: int):
    """(model, tokenizer) of a ModelConfig: safetensors without remote code, or random weights from a configuration.

    Raises:
        ValueError: no model named, or overrides that the configuration does not take. OSError: not found.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    if not config.model_name_or_path:
        raise ValueError("model_name_or_path is missing: give a folder or a Hub name")
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path or config.model_name_or_path)
    if not config.random_weights:
        if config.config_overrides:
            raise ValueError("config_overrides needs --random_weights: trained weights have one shape")
        return AutoModelForCausalLM.from_pretrained(config.model_name_or_path, use_safetensors=True), tokenizer
    shape = AutoConfig.from_pretrained(config.model_name_or_path)
    if config.config_overrides:
        shape.update_from_string(config.config_overrides)
    set_seed(seed)
    return AutoModelForCausalLM.from_config(shape), tokenizer


def tokenized(path: str, data: DataConfig, tokenizer):
    """Tokenized pairs of a file, after reading, checking and (with on_bad_record skip) leaving out bad records."""
    from amopo_fast.prompts import PromptBuilder

    score_range = (data.score_min, data.score_max)
    pairs, bad = read_pairs(
        path,
        dimensions=data.dimensions,
        score_range=score_range,
        on_bad_record=data.on_bad_record,
        missing_scores=data.missing_scores,
    )
    builder = PromptBuilder(
        tokenizer,
        data.dimensions,
        score_range=score_range,
        order=data.prompt_order,
        max_length=data.max_length,
        template=data.prompt_template,
    )
    tokens, unusable = builder.tokenize(pairs, data.on_bad_record)
    for error in [*bad, *unusable]:
        print(f"skipped: {error}", file=sys.stderr)
    shortened = sum(pair.truncated for pair in tokens)
    skipped = len(bad) + len(unusable)
    print(f"{path}: {len(tokens)} pairs, {skipped} skipped, {shortened} shortened to {data.max_length}")
    return tokens


def console_trainer(*args, **kwargs):
    """An AMoPOTrainer that prints one short line per log."""
    from transformers import PrinterCallback, ProgressCallback

    from amopo_fast.report import ConsoleProgress
    from amopo_fast.trainer import AMoPOTrainer

    trainer = AMoPOTrainer(*args, **kwargs)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ConsoleProgress())
    return trainer


def _train(arguments, rest) -> int:
    from transformers.trainer_utils import get_last_checkpoint

    from amopo_fast.report import plot_run

    data, model_config, config = _parse_train(arguments.config, rest)
    if not data.train_file:
        raise ValueError("train_file is missing: give --train_file, or train_file in the YAML file")
    resume = config.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "last"):
        resume = get_last_checkpoint(config.output_dir)
        if resume is None:
            raise ValueError(f"{config.output_dir} has no checkpoint to resume from; leave resume_from_checkpoint out")
    model, tokenizer = build_model(model_config, config.seed)
    trainer = console_trainer(
        model,
        config,
        dimensions=data.dimensions,
        train_dataset=tokenized(data.train_file, data, tokenizer),
        eval_dataset=tokenized(data.eval_file, data, tokenizer) if data.eval_file else None,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model: {config.output_dir}  metrics: {Path(config.output_dir) / 'metrics.jsonl'}  "
              f"plot: {plot_run(config.output_dir, Path(config.output_dir) / 'metrics.png')}")  # fmt: skip
    return 0


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


def _validate(arguments, rest) -> int:
    from amopo_fast.inspect_data import validate_file

    report = validate_file(
        arguments.data, builder=_builder(arguments) if arguments.tokenizer else None, **_reading(arguments)
    )
    if arguments.json:
        print(report.to_json())
    else:
        Console().print(report)
    return 0 if report.ok else 1


def _show(arguments, rest) -> int:
    from amopo_fast.inspect_data import show_record

    pairs, errors = read_pairs(arguments.data, on_bad_record="skip", **_reading(arguments))
    for pair in pairs:
        if pair.record == arguments.record:
            Console().print(show_record(pair, _builder(arguments)))
            return 0
    for error in errors:
        if error.record == arguments.record:
            raise error
    records = len(pairs) + len(errors)
    raise ValueError(f"{arguments.data} has {records} records, numbered from 0; there is no {arguments.record}")


def _demo(arguments, rest) -> int:
    from amopo_fast.demo.run import run_demo

    return run_demo(arguments.output_dir, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
