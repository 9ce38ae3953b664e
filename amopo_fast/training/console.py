"""A trainer as the command line runs it."""

from __future__ import annotations

from transformers import PrinterCallback, ProgressCallback

from amopo_fast.report.console import console_callback
from amopo_fast.training.trainer import AMoPOTrainer


def console_trainer(*args, **kwargs) -> AMoPOTrainer:
    """An AMoPOTrainer that prints one short line per log."""
    trainer = AMoPOTrainer(*args, **kwargs)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(console_callback(bar=not trainer.args.disable_tqdm))
    return trainer
