"""load_best_model_at_end, of runs that are stopped and resumed: the best checkpoint is whole, and the newest stays."""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from amopo_fast.errors import CheckpointError
from amopo_fast.models.loading import load_converted
from amopo_fast.survival.manifest import damage_of

logger = logging.getLogger(__name__)


class LoadsTheBest(Trainer):
    """What AMoPOTrainer overrides of Trainer around the best model."""

    def _finalize_training(self, *args, **kwargs) -> TrainOutput:
        """Trainer's, which loads the best model. A run that was stopped goes on and needs none; and with
        save_total_limit 1 Trainer would delete the newest checkpoint, which is what a run goes on from."""
        given = self.args.load_best_model_at_end, self.args.save_total_limit
        self.args.save_total_limit = None
        if self.checkpointer.stopped:
            self.args.load_best_model_at_end = False
        elif given[0] and self.state.best_model_checkpoint is None:
            logger.warning("no checkpoint is the best: the model is that of the last step")
        try:
            result = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.load_best_model_at_end, self.args.save_total_limit = given
        self.checkpointer.clear_up()
        return result

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        problem = [damage_of(folder) if self.is_world_process_zero() else ""]
        if self.args.world_size > 1:
            broadcast_object_list(problem)
        if problem[0]:
            raise CheckpointError(f"{folder}, the best checkpoint, cannot be loaded: {problem[0]}. "
                                  f"{self.checkpointer.where_to_resume()}, which saves the last step's")  # fmt: skip
        if self.is_fsdp_enabled or not load_converted(self.model, folder):
            super()._load_best_model()
