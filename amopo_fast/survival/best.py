"""The best checkpoint of a run whose evaluations choose one: which it is after a resume, wherever its folder is now."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from amopo_fast.survival.manifest import damage_of

logger = logging.getLogger(__name__)


def best_beside(checkpoint: Path, metric: str | None) -> Path | None:
    """The best checkpoint that a whole checkpoint's state names; None if it names none, or the reason is logged.

    It lies beside that checkpoint, as a run's folder may have been moved, or where the state says.

    Args:
        metric: the one that chooses now; a best that another one chose is none.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    step = state.get("best_global_step")
    if not step:
        return None
    if not _chosen_by(metric, state):
        logger.warning("step %s was the best by another metric than %s: evaluations from here on choose", step, metric)
        return None
    if step == state["global_step"]:
        return checkpoint  # all of whose files `resolve` has just read
    places = [checkpoint.with_name(f"checkpoint-{step}")]
    if state.get("best_model_checkpoint"):
        places.append(Path(state["best_model_checkpoint"]))
    for path in places:
        if path.is_dir():
            problem = damage_of(path)
            if not problem:
                return path
            break
    else:
        path, problem = places[0], "it is not there any more"
    logger.warning(
        "the best checkpoint, %s, cannot be used: %s. Evaluations from here on choose another", path, problem
    )
    return None


def _chosen_by(metric: str | None, state: dict[str, Any]) -> bool:
    """Whether the best value is one of `metric`, as far as the state's log, which is capped, still tells."""
    name = metric if metric is None or metric.startswith("eval_") else f"eval_{metric}"
    lines = [line for line in state["log_history"] if line.get("step") == state["best_global_step"]]
    values = [line for line in lines if any(key.startswith("eval_") for key in line)]
    return not values or any(line.get(name) == state["best_metric"] for line in values)
