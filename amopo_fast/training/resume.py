"""What a run may change when it goes on from a checkpoint (docs/checkpoints.md has the policy), and how it does.

The model, its data and their order are compared by survival/fingerprint.py and may not change. Here are the options
that may, if the user says which value holds, and the schedule of the learning rate, which a longer run continues.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler

from amopo_fast.errors import CheckpointError
from amopo_fast.optim import choose_optimizer
from amopo_fast.survival.manifest import read_marker
from amopo_fast.training.config import HYPER_PARAMETERS
from amopo_fast.training.objectives import objective_of
from amopo_fast.training.provenance import objective_entry

if TYPE_CHECKING:
    from amopo_fast.models.config import ModelConfig
    from amopo_fast.training.config import AMoPOConfig

logger = logging.getLogger(__name__)

OPTIONS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
           "clip_in_backward", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "router_aux_loss_coef",
           *HYPER_PARAMETERS)  # fmt: skip
METHOD = ("objective", "optim", "optim_args", "optim_target_modules", "optim_in_backward")
ADAPTER = ("lora_alpha", "lora_dropout")
ADAPTER_METHOD = {"lora_r": "r", "lora_target_modules": "target_modules", "use_rslora": "use_rslora",
                  "use_dora": "use_dora"}  # fmt: skip


def options_of(args: AMoPOConfig, model: nn.Module) -> dict[str, dict[str, Any]]:
    """{"options": those that `on_changed_option` decides about, "method": those that may not change, "rows": what is
    free to change}, as JSON."""
    adapter = next(iter(getattr(model, "peft_config", {}).values()), None)
    options = {name: getattr(args, name) for name in OPTIONS}
    method = {name: getattr(args, name) for name in METHOD}
    if adapter is not None:
        options |= {name: getattr(adapter, name) for name in ADAPTER}
        method |= {name: getattr(adapter, attribute) for name, attribute in ADAPTER_METHOD.items()}
    rows = {"tokens_per_micro_batch": args.row_tokens}
    return json.loads(json.dumps({"options": options, "method": method, "rows": rows}, default=_plain))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))


def adapter_of(checkpoint: Path, config: ModelConfig) -> ModelConfig:
    """With `on_changed_option keep`, before the model is made: the adapter's options as the checkpoint has them."""
    saved = read_marker(checkpoint)["fingerprint"].get("options", {})
    return dataclasses.replace(config, **{name: saved[name] for name in ADAPTER if name in saved})


def rows_of(checkpoint: Path) -> int | None:
    """Tokens of the checkpoint's micro-batches, which a run that is not told otherwise goes on with: bit for bit."""
    return read_marker(checkpoint)["fingerprint"].get("rows", {}).get("tokens_per_micro_batch")


def keep_options(trainer: Trainer, values: dict[str, Any]) -> None:
    """Go on with a checkpoint's values; before the AMoPOTrainer makes optimizer and schedule.

    Raises:
        CheckpointError: one of them is part of the model, which is there already.
    """
    for name in ADAPTER:
        if name in values:
            raise CheckpointError(f"{name} is part of the model: make its adapter with the checkpoint's {values[name]}")
    args = trainer.args
    for name, value in values.items():
        setattr(args, name, value)
    trainer.routers.coefficient = args.router_aux_loss_coef
    trainer.objective = trainer.compute_loss_func = objective_of(args, trainer.meter.dimensions)
    if trainer.recipe is not None:
        trainer.recipe = dataclasses.replace(trainer.recipe, objective=objective_entry(trainer.objective))
    if trainer.optimizer_cls_and_kwargs is not None:
        trainer.optimizer_cls_and_kwargs = choose_optimizer(args, trainer.model, args.gradient_accumulation_steps)


def values_of_groups(trainer: Trainer) -> tuple[list[dict], list[float]]:
    """What the options gave optimizer and schedule, before a checkpoint is loaded into them."""
    own = trainer.optimizer.param_groups
    groups = [{key: value for key, value in group.items() if key != "params"} for group in own]
    return groups, list(getattr(trainer.lr_scheduler, "base_lrs", []))


def use_values(trainer: Trainer, groups: list[dict], rates: list[float]) -> None:
    """Put them in the place of the checkpoint's; the schedule is at the checkpoint's step."""
    schedule = trainer.lr_scheduler
    for group, values in zip(trainer.optimizer.param_groups, groups, strict=True):
        group.update(values)
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = rates
        for group, rate, scale in zip(schedule.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * scale(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def continue_schedule(schedule, args: AMoPOConfig, ends: Sequence[int]) -> None:
    """Give a schedule of ends[0] steps its further parts (`Checkpointer.begin_schedule`), each with a warm-up of its
    own. Schedules that follow a metric have no end."""
    if len(ends) < 2 or not isinstance(schedule, LambdaLR):
        return
    scales = [schedule.lr_lambdas]
    for begin, end in zip(ends, ends[1:], strict=False):
        part = get_scheduler(
            args.lr_scheduler_type, schedule.optimizer, args.get_warmup_steps(end - begin), end - begin,
            args.lr_scheduler_kwargs and dict(args.lr_scheduler_kwargs),
        )  # fmt: skip
        scales.append(part.lr_lambdas)
    begins = [0, *ends[:-1]]

    def of_group(number: int):
        def scale(step: int) -> float:
            part = max(index for index, begin in enumerate(begins) if step >= begin)
            return scales[part][number](step - begins[part])

        return scale

    schedule.lr_lambdas = [of_group(number) for number in range(len(schedule.lr_lambdas))]
    logger.warning("the learning rate follows the checkpoint's schedule to step %d, then one of %d more steps",
                   ends[-2], ends[-1] - ends[-2])  # fmt: skip
