"""`amopo-fast train`: options, model, data, trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from amopo_fast.cli.outputs import output_folder
from amopo_fast.errors import OptionError

if TYPE_CHECKING:  # transformers takes seconds to import, which `amopo-fast --help` need not
    from amopo_fast.data.config import DataConfig
    from amopo_fast.models.config import ModelConfig
    from amopo_fast.prompts.dataset import Data
    from amopo_fast.training.config import AMoPOConfig
    from amopo_fast.training.trainer import AMoPOTrainer


STOPPED = 3  # exit code: a signal asked to stop; the message says what to go on from


def add_parser(commands) -> None:
    train = commands.add_parser("train", help="train a model", add_help=False)
    train.set_defaults(run=run, takes_rest=True)


def check_evaluation(data_config: DataConfig, config: AMoPOConfig) -> None:
    """Raises OptionError for evaluation sets that nothing reads, and for a best metric that none of them gives."""
    from amopo_fast.data.sources.spec import parse_sources
    from amopo_fast.prompts.dataset import named_sources
    from amopo_fast.training.arguments import check_best_metric

    if data_config.eval_data and config.eval_strategy == "no" and not config.eval_on_start:
        raise OptionError("eval_data has no effect without eval_strategy: set it to epoch, or to steps with eval_steps",
                          "eval_data")  # fmt: skip
    sets = list(named_sources(parse_sources(data_config.eval_data))) or ([""] if data_config.eval_share else [])
    if config.eval_strategy != "no" and not sets:
        raise OptionError(f"eval_strategy={config.eval_strategy.value} needs eval_data or eval_share", "eval_strategy")
    check_best_metric(config, data_config.dimensions, sets)


def hide_bars() -> None:
    """Of the libraries that load models and data sets; `disable_tqdm` alone is Trainer's."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()


def print_counts(data: Data) -> None:
    """What became of every source's records, and how the bad ones that were skipped are wrong."""
    for name, counts in data.counts.items():
        for example in counts.examples:
            print(f"skipped: {example}", file=sys.stderr)
        rest = sum(counts.skipped.values()) - len(counts.examples)
        if rest:
            print(f"skipped: {rest} more records of {name}", file=sys.stderr)
        print(f"{name}: {counts}")
    if data.shared_prompts:
        print(f"warning: {data.shared_prompts} evaluation prompts are in the training data too", file=sys.stderr)


def as_begun(data_config: DataConfig, resume: Path | None, config: AMoPOConfig) -> DataConfig:
    """The configuration with what a run settled when it was started and keeps on a resume: the date that a chat
    template is shown. The same on every rank; `resume` is rank 0's."""
    from accelerate.utils import broadcast_object_list

    from amopo_fast.prompts.recipe import recipe_of

    date = [data_config.template_date]
    if date[0] is None and resume is not None and (recipe := recipe_of(resume)) is not None:
        date = [recipe.prompt_options.get("template_date")]
    if date[0] is None and config.process_index == 0:
        date = [datetime.date.today().isoformat()]
    if config.world_size > 1:
        broadcast_object_list(date)
    return dataclasses.replace(data_config, template_date=date[0])


@dataclasses.dataclass
class Progress:
    """How far the command has come, for the message of a signal that ends it."""

    text: str = "before anything was loaded: start it again"


def run(arguments) -> int:
    from amopo_fast.survival.signals import Interrupted, Interruptible

    progress = Progress()
    try:
        with Interruptible():
            return _run(arguments, progress)
    except Interrupted as signal:
        print(f"stopped by {signal} {progress.text}", file=sys.stderr)
        return STOPPED


def _run(arguments, progress: Progress) -> int:
    from amopo_fast.cli.options import parse_options
    from amopo_fast.cli.presets import PRESETS
    from amopo_fast.data.config import DataConfig
    from amopo_fast.models.config import ModelConfig
    from amopo_fast.survival.lock import OutputLock
    from amopo_fast.training.config import AMoPOConfig
    from amopo_fast.training.objectives import objective_of

    data_config, model_config, config, _ = parse_options(
        "train", (DataConfig, ModelConfig, AMoPOConfig), arguments.rest, presets=PRESETS
    )
    if not data_config.train_data:
        raise OptionError("train_data is missing: give --train_data FILE, or train_data in the YAML file", "train_data")
    if not model_config.model_name_or_path:
        raise OptionError("model_name_or_path is missing: give a folder or a Hub name", "model_name_or_path")
    objective_of(config, data_config.dimensions)  # refuses weights of other dimensions before anything is loaded
    check_evaluation(data_config, config)
    if config.disable_tqdm:
        hide_bars()
    output_folder(config.output_dir, "output_dir")
    owns = config.process_index == 0 and not config.dry_run
    with OutputLock(config.output_dir) if owns else contextlib.nullcontext():
        return _train(data_config, model_config, config, progress)


def adapter_as_saved(model_config: ModelConfig, resume: Path | None, config: AMoPOConfig) -> ModelConfig:
    """With `on_changed_option keep`, the adapter's options of the checkpoint: they are part of the model. The same on
    every rank; `resume` is rank 0's."""
    from accelerate.utils import broadcast_object_list

    from amopo_fast.training.resume import adapter_of

    if config.on_changed_option != "keep" or not model_config.use_peft:
        return model_config
    chosen = [adapter_of(resume, model_config) if resume is not None else model_config]
    if config.world_size > 1:
        broadcast_object_list(chosen)
    return chosen[0]


def rows_as_begun(config: AMoPOConfig, resume: Path | None) -> None:
    """Set the length of micro-batches that a checkpoint was written with, where the user sets none. The same on every
    rank; `resume` is rank 0's."""
    from accelerate.utils import broadcast_object_list

    from amopo_fast.training.resume import rows_of

    tokens = [config.tokens_per_micro_batch]
    if tokens[0] is None and resume is not None:
        tokens[0] = rows_of(resume)
    if config.world_size > 1:
        broadcast_object_list(tokens)
    config.tokens_per_micro_batch = tokens[0]


def _train(data_config: DataConfig, model_config: ModelConfig, config: AMoPOConfig, progress: Progress) -> int:
    from amopo_fast.models.loading import load_shape, model_errors, peft_config
    from amopo_fast.models.saving import final_dtype
    from amopo_fast.prompts.dataset import load_data
    from amopo_fast.prompts.tokenizer import load_tokenizer
    from amopo_fast.survival import checkpoints
    from amopo_fast.survival.signals import Interrupted
    from amopo_fast.training.console import console_trainer
    from amopo_fast.training.loading import load_for_training

    folder = Path(config.output_dir)
    progress.text = "before training began; what was saved before is as it was"
    # Before the model is loaded, which can take minutes. The trainer asks rank 0 alone.
    resume = checkpoints.resolve(folder, config.resume_from_checkpoint) if config.process_index == 0 else None
    with model_errors(model_config.model_name_or_path):
        shape = load_shape(model_config)  # what is wrong with it is said before the data is read
    tokenizer = load_tokenizer(model_config.tokenizer_name_or_path or model_config.model_name_or_path)
    data_config = as_begun(data_config, resume, config)
    rows_as_begun(config, resume)
    model_config = adapter_as_saved(model_config, resume, config)
    data = load_data(data_config, tokenizer, seed=config.seed, folder=folder / "tokens" / f"rank{config.process_index}")
    if config.process_index == 0:
        print_counts(data)
    with model_errors(model_config.model_name_or_path):
        model = load_for_training(model_config, config, data.train, adapter=model_config.use_peft)
    if config.dry_run:
        return _dry_run(model, config, data_config, model_config, data, tokenizer)
    trainer = console_trainer(
        model,
        config,
        dimensions=data_config.dimensions,
        train_dataset=data.train,
        eval_dataset=data.eval_dataset,
        processing_class=tokenizer,
        recipe=data.recipe,
        peft_config=peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.checkpointer.stopped:
        if trainer.is_world_process_zero():
            name, step = trainer.termination.requested or "a signal to another rank", trainer.state.global_step
            print(f"stopped by {name} after step {step}. {trainer.checkpointer.where_to_resume()}", file=sys.stderr)
        return STOPPED
    progress.text = f"when training was done and the model was not yet saved. {trainer.checkpointer.where_to_resume()}"
    if trainer.termination.requested:  # after the last step
        raise Interrupted(trainer.termination.requested)
    trainer.save_final(final_dtype(config.save_dtype, shape, model_config.random_weights))
    if trainer.is_world_process_zero():
        progress.text = f"when the model was saved, in {folder}; its plot and README.md may be missing"
        _report(trainer, folder)
    return 0


def _report(trainer: AMoPOTrainer, folder: Path) -> None:
    """Plot and model card, which do not end a run whose model is safe."""
    from amopo_fast.models.saving import size_of_weights
    from amopo_fast.report.figure import plot_run

    plot: Path | str = folder / "metrics.png"
    try:
        plot_run(folder, plot)
        trainer.create_model_card()
    except OSError as error:
        plot = "none"
        print(f"warning: {error.filename or folder}: {error.strerror or error}; the model is saved; make room, then "
              f"`amopo-fast plot {folder}` draws the run", file=sys.stderr)  # fmt: skip
    print(f"model: {folder} ({size_of_weights(folder)})  metrics: {folder / 'metrics.jsonl'}  plot: {plot}")


def _dry_run(model, config, data_config, model_config, data, tokenizer) -> int:
    from amopo_fast.models.loading import peft_config
    from amopo_fast.training.console import console_trainer
    from amopo_fast.training.dry_run import dry_run, prepare_dry_run, print_dry_run

    with tempfile.TemporaryDirectory() as folder:
        prepare_dry_run(config, folder)
        trainer = console_trainer(
            model, config, dimensions=data_config.dimensions, train_dataset=data.train, processing_class=tokenizer,
            peft_config=peft_config(model_config),
        )  # fmt: skip
        result = dry_run(trainer)
    if config.process_index == 0:
        print_dry_run(result)
    return 0
