"""Log-probs of the reference model without a second model in memory.

Under an adapter the reference is the model with the adapter switched off, scored beside every row (by the trainer). In
full training it is the model before its first step: all pairs are scored once when training begins, by the same packed
rows, and the sums are kept in output_dir/reference, named by the base model's and the data's digests, so that a resume
finds them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from amopo_fast.errors import CheckpointError
from amopo_fast.packing.plan import Plan, build_plan
from amopo_fast.packing.schedule import PairDataset, PairSizes, best_fit
from amopo_fast.survival.fingerprint import data_digests
from amopo_kernels import SequenceStats

logger = logging.getLogger(__name__)

FOLDER = "reference"


class ReferenceLogps(TrainerCallback):
    """Gives the trainer's data sets their `references` when training begins.

    Args:
        trainer: an AMoPOTrainer; read when training begins.
        base: digest of the model before its first step.
        score: a plan on the trainer's device to statistics, through whatever wraps the model.
    """

    def __init__(self, trainer, base: str, score: Callable[[Plan], SequenceStats]):
        self.trainer, self.base, self.score = trainer, base, score

    def on_train_begin(self, args, state, control, **kwargs):
        evals = self.trainer.eval_dataset
        sets = {"train": self.trainer.train_dataset}
        sets |= {f"eval-{name}": each for name, each in evals.items()} if isinstance(evals, dict) else {"eval": evals}
        for name, dataset in sets.items():
            if dataset is not None and dataset.references is None:
                dataset.references = self._references(name, dataset, args, fresh=state.global_step == 0)

    def _references(self, name: str, dataset: PairDataset, args, fresh: bool) -> np.ndarray:
        of = f"{self.base} {data_digests(dataset.pairs)['tokens']}"
        digest = hashlib.blake2b(of.encode(), digest_size=16).hexdigest()
        path = Path(args.output_dir) / FOLDER / f"{name}-{digest}.npy"
        if path.is_file():
            found = np.load(path, allow_pickle=False)
            if len(found) == len(dataset):
                return found
        if not fresh:
            raise CheckpointError(
                f"the log-probs of the reference model are not in {path.parent}: the weights have changed since the "
                "run began, so they cannot be computed again; bring the folder back, or start a new run"
            )
        begin = time.perf_counter()
        found = self._compute(dataset, args)
        if args.process_index == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.tmp")
            with partial.open("wb") as file:
                np.save(file, found)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            logger.warning(
                "log-probs of the reference model for %d pairs (%s): %.1f s", len(dataset), name,
                time.perf_counter() - begin,
            )  # fmt: skip
        return found

    def _compute(self, dataset: PairDataset, args) -> np.ndarray:
        pairs = dataset.pairs
        layout = self.trainer.data_collator.layout
        rows = best_fit(range(len(pairs)), PairSizes.of(pairs, layout), args.row_tokens)
        dimensions = len(pairs[0].prompts)
        found = np.zeros((len(pairs), dimensions, 2), dtype=np.float32)
        model = self.trainer.model
        was_training = model.training
        model.eval()
        own: dict[int, np.ndarray] = {}
        try:
            with torch.no_grad():
                # Every rank runs as many rows: sharded models gather their weights together.
                for turn in range(-(-len(rows) // args.world_size)):
                    self.trainer.stop_between_rows()
                    number = turn * args.world_size + args.process_index
                    row = rows[min(number, len(rows) - 1)]
                    stats = self.score(build_plan([pairs[index] for index in row], layout).to(args.device))
                    own[number] = stats.logp_sum.float().cpu().numpy().reshape(len(row), dimensions, 2)
        finally:
            model.train(was_training)
        everyone = [own]
        if args.world_size > 1:
            everyone = [{} for _ in range(args.world_size)]
            torch.distributed.all_gather_object(everyone, own)
        for part in everyone:
            for number, sums in part.items():
                if number < len(rows):
                    found[rows[number]] = sums
        return found


def references_of(model: nn.Module, inputs: Mapping[str, Any], score: Callable[[], SequenceStats]) -> torch.Tensor:
    """(P * K * 2,) float32 of a batch: those that were computed when training began, or an adapter's model without it.

    Raises:
        ValueError: neither is there.
    """
    if "reference_logps" in inputs:
        return inputs["reference_logps"]
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            "the objective compares with the model before its first step: evaluate once train() has begun, or train an "
            "adapter"
        )
    with torch.no_grad(), model.disable_adapter():
        return score().logp_sum
