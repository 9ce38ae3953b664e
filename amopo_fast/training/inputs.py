"""Batches on their way to the device."""

from __future__ import annotations

from typing import Any


class MovesWithoutWaiting:
    """Of a Trainer, whose own `_prepare_inputs` waits for the device at each tensor of a batch; and DeepSpeed's would
    round noise and weights to the model's dtype."""

    args: Any

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Tensors and plans, in the order of the stream: the loader has pinned them."""
        return {name: value.to(self.args.device, non_blocking=True) for name, value in inputs.items()}
