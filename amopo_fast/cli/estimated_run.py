"""What `amopo-fast estimate` is asked about: a model and a micro-batch, or the very run of a configuration and data."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from amopo_fast.cli.options import parse_options
from amopo_fast.data.config import DataConfig
from amopo_fast.errors import OptionError
from amopo_fast.memory.estimate import Row, Setup, estimate
from amopo_fast.memory.parameters import tried
from amopo_fast.models.config import ModelConfig
from amopo_fast.models.loading import load_shape, model_errors
from amopo_fast.packing.schedule import PairSizes
from amopo_fast.prompts.dataset import load_data
from amopo_fast.prompts.tokenizer import load_tokenizer
from amopo_fast.training.config import ROW_TOKENS, AMoPOConfig
from amopo_fast.training.loading import longest_row, setup_of
from amopo_fast.training.objectives import OBJECTIVES


@dataclass(frozen=True)
class Epoch:
    pairs: int
    tokens: int  # computed


@dataclass(frozen=True)
class Asked:
    """name: of the model. row: the longest micro-batch. setups: that are compared, by name, with their options.
    changes: of every setup but the run's own."""

    name: str
    config: PretrainedConfig
    row: Row
    setups: dict[str, tuple[Setup, str]]
    changes: dict
    objective: str
    epoch: Epoch | None = None
    notes: tuple[str, ...] = ()

    @property
    def has_reference(self) -> bool:
        return OBJECTIVES[self.objective].needs_reference


THIS_RUN, EVERY_ROW = "this run", "every row"


def asked_of(arguments: argparse.Namespace, setups: dict[str, tuple[Setup, str]], fits) -> Asked:
    """fits: of an estimate, whether there is memory for it; `weight_precision: auto` asks.

    Raises:
        OptionError: options that contradict each other or lack something. DataError, ConfigError: as `train` does.
    """
    name = arguments.model or arguments.model_name_or_path
    if arguments.model and arguments.model_name_or_path:
        raise OptionError("name one model: amopo-fast estimate MODEL", "model_name_or_path")
    if arguments.pair_tokens and not arguments.pairs:
        raise OptionError("pair_tokens has no effect without --pairs, the pairs of an epoch", "pair_tokens")
    if arguments.pairs and (arguments.train_data or not (arguments.pair_tokens or arguments.config)):
        reason = "stands beside --train_data: give one of them" if arguments.train_data else "needs --pair_tokens too"
        raise OptionError(f"--pairs {reason}", "pairs")
    if arguments.config or arguments.train_data:
        return _of_run(arguments, name, setups, fits)
    if not name:
        raise OptionError("name one model: amopo-fast estimate MODEL, or a run with --config", "model_name_or_path")
    if arguments.objective not in OBJECTIVES:
        raise OptionError(f"objective={arguments.objective!r}; choose one of {', '.join(OBJECTIVES)}", "objective")
    path = Path(name)
    with model_errors(name):
        config = load_shape(ModelConfig(str(path.parent) if path.is_file() else name, random_weights=True,
                                        config_overrides=arguments.config_overrides))  # fmt: skip
    epoch = Epoch(arguments.pairs, arguments.pairs * arguments.pair_tokens) if arguments.pairs else None
    tokens = arguments.tokens or ROW_TOKENS
    return Asked(name, config, _row(arguments, tokens), setups, changes_of(arguments), arguments.objective, epoch)


def changes_of(arguments: argparse.Namespace) -> dict:
    return {
        "checkpointing": not arguments.no_checkpointing,
        "keep_layers": arguments.keep_layers,
        "offload": arguments.offload,
        "liger": not arguments.no_liger,
    }


def _row(arguments: argparse.Namespace, tokens: int) -> Row:
    return Row(tokens, arguments.label_tokens or tokens // 2, 2 * tokens, arguments.max_length)


def _of_run(arguments: argparse.Namespace, name: str | None, setups: dict, fits) -> Asked:
    given = {"config": arguments.config, "model_name_or_path": name, "config_overrides": arguments.config_overrides}
    rest = [part for option, value in given.items() if value for part in (f"--{option}", str(value))]
    rest += ["--train_data", *arguments.train_data] if arguments.train_data else []
    rest += ["--tokens_per_micro_batch", str(arguments.tokens)] if arguments.tokens else []
    rest += ["--random_weights", "true"] if arguments.config_overrides else []
    rest += [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    data_config, model_config, args, own = parse_options("estimate", (DataConfig, ModelConfig, AMoPOConfig), rest)
    name = model_config.model_name_or_path
    if not name:
        raise OptionError("name a model: amopo-fast estimate MODEL, or model_name_or_path in the file",
                          "model_name_or_path")  # fmt: skip
    with model_errors(name):
        config = load_shape(model_config)
    row, accumulates, epoch, notes = _row(arguments, args.row_tokens), False, None, ()
    if arguments.pairs:
        tokens = arguments.pair_tokens or args.row_tokens // max(args.pairs_per_step, 1)
        epoch = Epoch(arguments.pairs, arguments.pairs * tokens)
    elif data_config.train_data:
        try:
            row, accumulates, epoch = _of_data(data_config, model_config, args, config)
        except (ValueError, OSError) as error:  # of a file, a record or a tokenizer
            if arguments.train_data:
                raise
            notes = (f"the data of {arguments.config} cannot be read here ({error}): a micro-batch is taken to have "
                     f"{row.tokens:,} computed tokens; --pairs and --pair_tokens give an epoch",)  # fmt: skip
    changes = changes_of(arguments) | {"accumulates": accumulates}
    if accumulates:
        notes = (f"a step of {args.pairs_per_step} pairs has several micro-batches; the ways that step in the backward "
                 "pass take one: lower pairs_per_step",)  # fmt: skip
    if arguments.config:
        changes["liger"] = not arguments.no_liger and (args.use_liger_kernel or "use_liger_kernel" not in own.given)
        setup = _setup(args, model_config, config, row, accumulates, arguments, fits)
        setups = {THIS_RUN: (dataclasses.replace(setup, liger=changes["liger"]), "")} | setups
    return Asked(name, config, row, setups, changes, args.objective, epoch, notes)


def _of_data(data_config, model_config, args, config) -> tuple[Row, bool, Epoch]:
    """(longest micro-batch, whether a step has several, an epoch) of the data, tokenised as `train` does."""
    tokenizer = load_tokenizer(model_config.tokenizer_name_or_path or model_config.model_name_or_path)
    pairs = load_data(data_config, tokenizer, seed=args.seed).train
    layout = tried(config, args.layout).choice.layout
    sizes = PairSizes.of(pairs, layout)
    row, accumulates = longest_row(pairs, sizes, args, layout)
    return row, accumulates, Epoch(len(pairs), int(sizes.computed.sum()))


def _setup(args, model_config, config, row, accumulates, arguments, fits) -> Setup:
    """The run's on a GPU, whatever is here."""

    def of(dtype: torch.dtype) -> Setup:
        setup = setup_of(
            args, dtype, lora_rank=model_config.lora_r if model_config.use_peft else None,
            quantised=model_config.load_in_4bit, nested=model_config.use_bnb_nested_quant, accumulates=accumulates,
        )  # fmt: skip
        return dataclasses.replace(
            setup, gpus=arguments.gpus if args.fsdp else 1, autocast=True, head_slice=None,
            reference=OBJECTIVES[args.objective].needs_reference,
        )  # fmt: skip

    if args.weight_precision != "auto":
        return of(torch.float32 if args.weight_precision == "fp32" else torch.bfloat16)
    whole = of(torch.float32)
    return of(torch.bfloat16) if model_config.use_peft or not fits(estimate(config, row, whole)) else whole
