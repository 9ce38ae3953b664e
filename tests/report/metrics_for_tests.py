"""Metrics files as a trainer leaves them."""

import json
import math

DIMENSIONS = ("no_object", "<b>odd & name</b>")


def write_run(folder, steps=40, *, names=DIMENSIONS, shift=0.0, sets=("eval_",), not_finite=()):
    """A run that learns, evaluated every quarter; loss and gradient norm are NaN and infinite at `not_finite`."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        noise = 0.05 * math.sin(17.0 * step)
        learned = 1 - math.exp(-3 * step / steps)
        loss, norm = (math.nan, math.inf) if step in not_finite else (1.2 - learned + noise + shift, 1 + noise)
        line = {"step": step, "epoch": step / steps, "loss": loss, "grad_norm": norm}
        line |= {"learning_rate": 3e-7 * step / steps}
        line |= {"tokens_per_second/computed": 1e4 * (1 + noise), "memory/peak_gib": 61.0 + shift}
        lines.append(line | _by_dimension("", names, 4 * learned + shift, noise))
        if step % max(steps // 4, 1) == 0:
            for prefix in sets:
                held_out = _by_dimension(prefix, names, 3 * learned + shift, 0.0)
                lines.append({"step": step, f"{prefix}loss": 1.4 - learned + shift} | held_out)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _by_dimension(prefix, names, margin, noise):
    found = {}
    for index, name in enumerate(names):
        own = margin - 0.3 * index + noise
        found |= {
            f"margin/{name}": own,
            f"accuracy/{name}": 1 / (1 + math.exp(-own)),
            f"weight/{name}": (1 + 0.01 * (index - (len(names) - 1) / 2)) / len(names),
        }
    found |= {"margin/mean": margin, "accuracy/mean": 1 / (1 + math.exp(-margin))}
    found |= {"prob_mean_chosen/mean": 0.004 + 1e-4 * noise, "prob_mean_rejected/mean": 0.003 + 1e-4 * noise}
    return {prefix + key: value for key, value in found.items()}
