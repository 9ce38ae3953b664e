"""Which layers recompute their activations in the backward pass instead of keeping them."""

from __future__ import annotations

from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer


def keep_last_layers(model: nn.Module, count: int) -> None:
    """Switch gradient checkpointing off in the last `count` layers of a model that has it on.

    The last layers, because their activations are the first that the backward pass frees: they are gone before the
    other layers are recomputed.

    Raises:
        ValueError: the model has no `count` checkpointed layers.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    if count > len(layers):
        raise ValueError(
            f"keep_layers={count}, but {len(layers)} layers are checkpointed; give at most that, or leave "
            "gradient_checkpointing out to keep all of them"
        )
    for layer in layers[len(layers) - count :]:
        layer.gradient_checkpointing = False


class KeepLayers(TrainerCallback):
    """`keep_last_layers` once Trainer has switched checkpointing on, which it does at every start of training."""

    def __init__(self, count: int):
        self.count = count

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        keep_last_layers(model, self.count)
