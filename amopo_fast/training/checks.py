"""What a trainer is given, before anything is computed with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from accelerate.utils import AutocastKwargs
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from amopo_fast.errors import OptionError, shown
from amopo_fast.models.architecture import language_model_of, positions_of, vocabulary_of
from amopo_fast.models.real_logits import check_real_logits
from amopo_fast.models.scoring import check_lengths
from amopo_fast.prompts.model_limits import check_pairs, check_vocabulary
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.launch import engine_asked_for

logger = logging.getLogger(__name__)


# What Trainer takes and this trainer makes itself.
OWN = {
    "data_collator": "batches are plans, made by packing.schedule.Collator",
    "compute_metrics": "an evaluation's metrics are those of the objective; compute others from the saved model",
    "compute_loss_func": "the loss is that of args.objective",
    "preprocess_logits_for_metrics": "no logits are kept",
    "model_init": "give the model",
}


def given_sets(
    args: AMoPOConfig,
    model: str | nn.Module,
    dimensions: Sequence[str],
    train_dataset: Sequence[PairTokens] | None,
    eval_dataset: Sequence[PairTokens] | dict[str, Sequence[PairTokens]] | None,
    others: Mapping[str, Any],
) -> dict[str, Sequence[PairTokens]]:
    """The evaluation sets by name, "" for a single one. Raises ValueError where what a program gave is of another kind,
    such as transformers' TrainingArguments or a data set of texts.

    others: what else it gave for Trainer."""
    for name in OWN.keys() & others.keys():
        raise ValueError(f"{name} is refused: {OWN[name]}")
    if not isinstance(args, AMoPOConfig):
        raise ValueError(f"args is {shown(args)}: give an AMoPOConfig, which takes TrainingArguments' options too")
    if not (isinstance(model, str) or isinstance(model, nn.Module) and hasattr(model, "config")):
        raise ValueError(f"model is {shown(model)}: give the name or folder of a causal LM as text, or its module")
    if isinstance(dimensions, str):
        raise ValueError(f"dimensions is {shown(dimensions)}: give a list of names")
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"": () if eval_dataset is None else eval_dataset}
    sets = [("train_dataset", () if train_dataset is None else train_dataset)]
    for what, pairs in [*sets, *(("eval_dataset", each) for each in evals.values())]:
        if not (hasattr(pairs, "__len__") and hasattr(pairs, "__getitem__")):
            raise ValueError(f"{what} is {shown(pairs)}: give a list, or what has a length and items by number")
        if len(pairs) and not isinstance(pairs[0], PairTokens):
            raise ValueError(
                f"{what} holds {shown(pairs[0])}: give tokenised pairs, as load_data(DataConfig(train_data=[...]), "
                "tokenizer).train holds them"
            )
    return evals


def require_pairs(train_dataset: Any) -> None:
    """Raises ValueError where a program trains without data."""
    if train_dataset is None:
        raise ValueError("train_dataset is missing: give tokenised pairs when the trainer is made")


def check_engine(model: nn.Module, args: AMoPOConfig) -> None:
    """Raises OptionError where a model is about to be trained without the sharding that was asked for."""
    engine = engine_asked_for(args)
    if not engine.startswith("FSDP"):
        return
    kinds = (FSDPModule,) if engine == "FSDP2" else (FSDPModule, FullyShardedDataParallel)
    if not any(isinstance(module, kinds) for module in model.modules()):
        raise OptionError(
            f"{engine} was asked for and is not in effect: start with `accelerate launch --config_file "
            "configs/accelerate/fsdp2.yaml`, or leave fsdp out", "fsdp",
        )  # fmt: skip
    if engine == "FSDP2" and (left := in_the_root_unit(model)):
        logger.warning(
            "FSDP2 shards the %s in one unit with what is left of the model: gathered and reduced in one piece, which "
            "takes more memory. accelerate 1.15 or later gives each its own", " and the ".join(left),
        )  # fmt: skip


def in_the_root_unit(model: nn.Module) -> list[str]:
    """Which of "embeddings" and "head" FSDP2 left to the unit of the model itself.

    A unit's gradients are reduced in one piece: both matrices of 248,320 x 5,120 in float32 are 9.5 GiB. accelerate
    gives each its own unit from 1.14 on, and tied ones one from 1.15 (fsdp_utils.fsdp2_prepare_model).
    """
    text = language_model_of(model)
    if not isinstance(text, PreTrainedModel):
        return []
    matrices = {"embeddings": text.get_input_embeddings(), "head": text.get_output_embeddings()}
    return [name for name, module in matrices.items() if module is not None and not isinstance(module, FSDPModule)]


def check_data(
    sets: Sequence[Sequence[PairTokens]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    dimensions: Sequence[str],
) -> None:
    """Raises ValueError where a pair has another number of dimensions, or tokens or a length that the model has not."""
    for pair in chain(*sets):
        if len(pair.prompts) != len(dimensions):
            raise ValueError(
                f"record {pair.record} has {len(pair.prompts)} dimensions, the trainer {len(dimensions)}: "
                f"tokenize with dimensions={list(dimensions)}"
            )
    check_lengths(model, chain(*sets))
    vocabulary, positions = vocabulary_of(model), positions_of(model)
    if tokenizer is not None:
        check_vocabulary(tokenizer, vocabulary)
    check_pairs(chain(*sets), vocabulary=vocabulary, positions=positions)


class RealLogits(TrainerCallback):
    """Compares the model's own logits with those that are trained when training begins: sharded or not, all ranks do.

    Args:
        trainer: an AMoPOTrainer; read when training begins.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        accelerator, wrapped = self.trainer.accelerator, self.trainer.model_wrapped
        wrapped.train()  # on a CPU, 4-bit weights that run outside of training are laid out anew, for good
        with accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            check_real_logits(accelerator.unwrap_model(wrapped), self.trainer.train_dataset.pairs[0], wrapped)
