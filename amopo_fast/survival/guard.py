"""Stops a run whose loss, gradients or weights are NaN or infinite before the weights change; flags loss spikes.

One host synchronisation and, on several ranks, one all-reduce of a few numbers per optimizer step, right before the
optimizer. transformers' logging_nan_inf_filter only changes what is logged; this reads the losses themselves.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from amopo_fast.errors import NumbersError
from amopo_fast.optim import applied_in_backward
from amopo_fast.survival import durable

logger = logging.getLogger(__name__)

SPIKES_FILE = "spikes.jsonl"
WINDOW = 64  # steps that a spike is judged against
MIN_STEPS = 16  # before that nothing is called a spike
SPIKE = 8.0  # robust standard deviations above the median: about one false alarm in 1e15 steps of a normal loss


class Guard(TrainerCallback):
    """Watches the numbers of an AMoPOTrainer.

    Args:
        trainer: read when training begins, so it may be half built here.
        termination: its `requested` flag takes part in the step's all-reduce; `stop_requested` is the ranks' answer.
    """

    def __init__(self, trainer, termination):
        self.trainer, self.termination = trainer, termination
        self.grad_norm: torch.Tensor | float | None = None
        self.spikes_since_log = 0
        self._stop = False
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._micro_batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def stop_requested(self) -> bool:
        """Whether any rank had received a signal before the last optimizer step."""
        return self._stop

    def read_spikes(self) -> int:
        """Loss spikes since the last call."""
        count, self.spikes_since_log = self.spikes_since_log, 0
        return count

    def add(self, loss: torch.Tensor, table: torch.Tensor, records: torch.Tensor) -> None:
        """Remember a micro-batch until its optimizer step: 0-d loss, (P, K, metrics) table, (P,) record numbers."""
        self._micro_batches.append((loss.detach(), table, records))

    def require_finite_loss(self) -> None:
        """To be called before the backward pass where that pass changes the weights (the optimizer step inside the
        backward, DeepSpeed). Synchronises the host and the ranks.

        Raises:
            NumbersError: the loss of the micro-batches since the last step is not finite on some rank.
        """
        total = self._total_loss()
        if not math.isfinite(self.trainer.accelerator.reduce(total, "sum").item()):
            self._fail("the loss is not finite")

    def check_weights(self, when: str) -> None:
        """Raises NumbersError if any weight, frozen ones included, is NaN or infinite since the last step. Synchronises
        once."""
        if self.trainer.streamed is not None:
            self.trainer.streamed.settle()
        largest = _largest(self.trainer.model.parameters(), self.trainer.args.device)
        if not math.isfinite(self.trainer.accelerator.reduce(largest, "sum").item()):
            self._fail(f"a weight is not finite {when}", self.trainer.state.global_step)

    def on_train_begin(self, args, state, control, **kwargs):
        self._stop, self.spikes_since_log = False, 0
        self._losses.clear()
        self.check_weights("before training begins")
        if state.is_world_process_zero:
            _forget_spikes_after(state.global_step, Path(args.output_dir) / SPIKES_FILE)

    def on_step_begin(self, args, state, control, **kwargs):
        self._micro_batches.clear()
        self.grad_norm = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        norm = self.grad_norm if self.grad_norm is not None else 0.0
        norm = torch.as_tensor(norm, dtype=torch.float32, device=args.device).detach()
        if trainer.accelerator.scaler is not None:
            norm = torch.zeros_like(norm)  # fp16: the loss scaler skips a step whose gradients overflowed
        flag = torch.full((), float(bool(self.termination.requested)), device=args.device)  # no copy from the host
        numbers = torch.stack([self._total_loss(), norm, _largest(self._trained(), args.device), flag])
        loss, norm, largest, stop = trainer.accelerator.reduce(numbers, "sum").tolist()
        self._stop = stop > 0
        for value, what in ((loss, "the loss"), (largest, "a weight"), (norm, "the gradient")):
            if not math.isfinite(value):
                self._fail(f"{what} is not finite")
        self._watch(loss / args.world_size, args, state)

    def _trained(self) -> Iterator[torch.Tensor]:
        """Trained weights; of layers that stream, and lie in host memory by now, how large they were on the device."""
        trained = (parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad)
        streamed = self.trainer.streamed
        if streamed is None:
            return trained
        return chain((parameter for parameter in trained if parameter not in streamed.parameters), streamed.largest())

    def _total_loss(self) -> torch.Tensor:
        return torch.stack([loss for loss, _, _ in self._micro_batches]).sum().float()

    def _watch(self, loss: float, args, state) -> None:
        if len(self._losses) >= MIN_STEPS:
            median = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
            high = median + SPIKE * max(spread, 1e-3 * abs(median))
            # Near its end a loss is small and skewed: only what exceeds every recent one by far is a spike.
            if loss > high and loss > 2 * max(self._losses):
                self.spikes_since_log += 1
                self._report_spike(loss, median, args, state)
        self._losses.append(loss)

    def _report_spike(self, loss: float, median: float, args, state) -> None:
        records = self._gathered([record for _, _, records in self._micro_batches for record in records.tolist()])
        if state.is_world_process_zero:
            step = state.global_step + 1
            entry = {"step": step, "loss": loss, "median": median, "records": sorted(set(sum(records, [])))}
            path = Path(args.output_dir) / SPIKES_FILE
            where = f"records in {path}"
            try:
                durable.append(path, (json.dumps(entry) + "\n").encode())
            except OSError as error:
                where = f"records {entry['records']} ({path} cannot be written: {error.strerror}; free some room)"
            logger.warning("step %d: the loss %.4g is far above its median %.4g; %s", step, loss, median, where)

    def _gathered(self, value) -> list:
        """`value` of every rank."""
        if self.trainer.args.world_size == 1:
            return [value]
        everyone = [None] * self.trainer.args.world_size
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def _fail(self, what: str, step: int | None = None) -> None:
        """Write the step's records and statistics to failed-step-N.json and raise. Every rank comes here.

        step: the one that is over; default: the one that was not finished.
        """
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        over, step = step is not None, state.global_step + 1 if step is None else step
        everyone = self._gathered(self._statistics(stepping=not over))
        # Each rank sees its own shards of a sharded model. From the loss on: the first gradient is where it went wrong.
        names = reversed([name for name, _ in trainer.model.named_parameters()])
        place = {name: number for number, name in enumerate(names)}
        named = {part: sorted(set().union(*(rank[part] for rank in everyone)), key=place.__getitem__)
                 for part in ("weights", "gradients", "changed_weights")}  # fmt: skip
        path = Path(args.output_dir) / f"failed-step-{step}.json"
        problem = ""
        if trainer.is_world_process_zero():
            pairs = [pair for rank in everyone for pair in rank["pairs"]]
            report = {
                "step": step,
                "epoch": state.epoch,
                "reason": what,
                "learning_rate": trainer._get_learning_rate() if trainer.lr_scheduler is not None else None,
                "seed": args.seed,
                "gradient_norm": _plain(self.grad_norm),
                **named,
                "records": sorted({pair["record"] for pair in pairs}),
                "pairs": pairs,
            }
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                durable.write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
            except OSError as error:
                problem = f"; it could not be written: {error.strerror or error}"
        names = named["weights"] or (named["gradients"] if what.startswith("the gradient") else [])
        where = f" ({_list(names)})" if names else ""
        raise NumbersError(
            f"step {step}: {what}{where}. {self._effect(what, over, named)}. The step's records and "
            f"statistics are in {path}{problem}; look at them with `amopo-fast show DATA --failed_step {path}`. "
            f"{trainer.checkpointer.where_to_resume()}"
        )

    def _effect(self, what: str, over: bool, named: dict[str, list[str]]) -> str:
        """What became of the weights, in a sentence."""
        changed = named["changed_weights"]
        if over:
            done = self.trainer.state.global_step
            return "Nothing was saved" if done else "No step was done"
        if not (what.startswith("the gradient") and self.trainer._steps_in_backward()):
            done = self.trainer.state.global_step
            if named["weights"] and done and not self.trainer._steps_in_backward():
                # Every step looks at them before its update.
                return f"The weights were finite before the update of step {done}; this step did not change them"
            return "The weights were not changed"
        if applied_in_backward(self.trainer.optimizer) is None:
            return "The weights were changed by it (the optimizer steps in the backward pass)"
        count = f"{len(changed)} weights, whose gradients came before, were changed by it ({_list(changed)})"
        return f"{count if changed else 'No weight was changed by it'}, that one and those after it were not"

    def _statistics(self, stepping: bool) -> dict:
        trainer = self.trainer
        if trainer.streamed is not None:
            trainer.streamed.settle()
        pairs = []
        for number, (loss, table, records) in enumerate(self._micro_batches):
            for record, rows in zip(records.tolist(), table.tolist(), strict=True):
                entry = {"record": record, "rank": trainer.args.process_index, "micro_batch": number,
                         "micro_batch_loss": _plain(loss), "dimensions": {}}  # fmt: skip
                for dimension, row in zip(trainer.meter.dimensions, rows, strict=True):
                    if not all(math.isnan(value) for value in row):  # an absent dimension
                        entry["dimensions"][dimension] = dict(
                            zip(trainer.meter.columns, [_plain(value) for value in row], strict=True)
                        )
                pairs.append(entry)
        gradients = [name for name, p in trainer.model.named_parameters() if p.grad is not None and _bad(p.grad)]
        applied = (applied_in_backward(trainer.optimizer) if stepping else None) or {}
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        not_applied = [names[id(parameter)] for parameter, done in applied.items() if not done]
        return {
            "pairs": pairs,
            "weights": [name for name, parameter in trainer.model.named_parameters() if _bad(parameter)],
            "gradients": not_applied[:1] if applied else gradients,
            "changed_weights": [names[id(parameter)] for parameter, done in applied.items() if done],
        }

    def state_dict(self) -> dict:
        """The losses that spikes are judged against."""
        return {"losses": list(self._losses), "spikes_since_log": self.spikes_since_log}

    def load_state_dict(self, state: dict) -> None:
        self._losses.extend(state["losses"])
        self.spikes_since_log = state["spikes_since_log"]

    def combine_states(self, states: list[dict], rank: int) -> dict:
        """The losses are means over ranks: the same on each."""
        return states[0]


def _forget_spikes_after(step: int, path: Path) -> None:
    """A resumed run finds them again, if they are there. A line that is cut off goes; a full disk ends no run."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of_spike(line) <= step]
        if lines and kept:
            durable.write_text(path, "\n".join(kept) + "\n")
        elif lines:
            path.unlink()
    except OSError as error:
        logger.warning("%s cannot be written (%s): it may list spikes after step %d twice; free some room", path,
                       error.strerror, step)  # fmt: skip


def _step_of_spike(line: str) -> float:
    """Infinite where the line says none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _largest(parameters, device: torch.device) -> torch.Tensor:
    """0-d float32: the largest magnitude, NaN if there is one; this rank's shards only. Quantised weights are left
    out: integers are always finite."""
    local = [_local(parameter) for parameter in parameters]
    local = [tensor for tensor in local if tensor.is_floating_point() and tensor.numel()]
    return nn.utils.get_total_norm(local, float("inf")).float().to(device) if local else torch.zeros((), device=device)


def _bad(tensor: torch.Tensor) -> bool:
    tensor = _local(tensor)
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


def _list(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _plain(value) -> float | str | None:
    """A number for strict JSON: NaN and infinities as strings."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return value if value is None or math.isfinite(value) else str(value)
