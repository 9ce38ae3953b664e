"""`amopo-fast train`: options, model, data, trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from amopo_fast.records import read_pairs

if TYPE_CHECKING:  # transformers takes seconds to import, which `amopo-fast --help` need not
    from amopo_fast.config import AMoPOConfig, DataConfig, ModelConfig


def add_parser(commands) -> None:
    train = commands.add_parser("train", help="train a model", add_help=False)
    train.add_argument("--config", help="YAML file of options")
    train.set_defaults(run=run, takes_rest=True)


def parse_options(config: str | None, rest: list[str]) -> tuple[DataConfig, ModelConfig, AMoPOConfig]:
    from transformers import HfArgumentParser

    from amopo_fast.config import AMoPOConfig, DataConfig, ModelConfig

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
    print(f"{path}: {len(tokens)} pairs, {skipped} skipped, {shortened} shortened to {data.max_length} tokens")
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


def run(arguments) -> int:
    from transformers.trainer_utils import get_last_checkpoint

    from amopo_fast.report import plot_run

    data, model_config, config = parse_options(arguments.config, arguments.rest)
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
