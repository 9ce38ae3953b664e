"""What a trainer is given, before anything is computed with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from accelerate.utils import AutocastKwargs
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from amopo_fast.models.architecture import positions_of, vocabulary_of
from amopo_fast.models.real_logits import check_real_logits
from amopo_fast.models.scoring import check_lengths
from amopo_fast.prompts.model_limits import check_pairs, check_vocabulary
from amopo_fast.prompts.tokens import PairTokens


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
