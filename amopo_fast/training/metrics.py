"""Training and evaluation metrics from an objective's columns, summed on the device and read once per log line."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from amopo_fast.packing.plan import Plan
from amopo_fast.training.objective import SHARES

TOKENS = ("label", "padded_equivalent")


def added(so_far: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    """A running sum on the device of its newest term: one that a checkpoint restored lies on the CPU."""
    return term if so_far is None else so_far.to(term.device) + term


def total(parts: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """Of the running sums of several ranks; None where no rank has one."""
    found = [part for part in parts if part is not None]
    return torch.stack(found).sum(0) if found else None


class Meter:
    """Sums of tables and counts since the last log line. No host synchronisation before `read`.

    dimensions: names of the K dimensions. columns: names of a table's columns (`Objective.columns`).
    """

    def __init__(self, dimensions: Sequence[str], columns: Sequence[str]):
        self.dimensions, self.columns = tuple(dimensions), tuple(columns)
        self._num_tokens = 0.0  # of separate sequences since the run began, over all ranks: what TRL calls num_tokens
        self.reset()

    def reset(self) -> None:
        self._sums: torch.Tensor | None = None
        self._trained: torch.Tensor | None = None  # pairs, sequences, TOKENS, tokens of separate sequences
        self._computed = 0
        self._since = time.perf_counter()

    def add(self, table: torch.Tensor, plan: Plan) -> None:
        """Of a row; a table that is NaN throughout is of one that only keeps ranks in step."""
        present = ~torch.isnan(table)
        here = present.any(-1)
        sums = torch.stack([table.nan_to_num(0.0).sum(0), present.float().sum(0)])
        tokens = (plan.labels.shape[0], plan.padded_tokens, plan.unshared_tokens)
        row = here.any().double()
        pairs, sequences = here.any(-1).sum().double(), 2 * here.sum().double()
        trained = torch.stack([pairs, sequences, *(row * count for count in tokens)])
        self._sums, self._trained = added(self._sums, sums), added(self._trained, trained)
        self._computed += plan.num_tokens

    def state_dict(self) -> dict:
        """For a checkpoint: the sums since the last log line and the seconds that passed."""
        return {
            "sums": None if self._sums is None else self._sums.cpu(),
            "trained": None if self._trained is None else self._trained.cpu(),
            "computed": self._computed,
            "num_tokens": self._num_tokens,
            "elapsed": time.perf_counter() - self._since,
        }

    def load_state_dict(self, state: dict) -> None:
        self._sums, self._trained = state["sums"], state["trained"]  # `add` moves them to the device of the tables
        self._computed, self._num_tokens = state["computed"], state["num_tokens"]
        self._since = time.perf_counter() - state["elapsed"]

    def combine_states(self, states: list[dict], rank: int) -> dict:
        """Rank 0 takes the sums of all old ranks, the others begin empty."""
        whole = {name: states[0][name] for name in ("num_tokens", "elapsed")}
        if rank:
            return {"sums": None, "trained": None, "computed": 0, **whole}
        sums = {name: total(state[name] for state in states) for name in ("sums", "trained")}
        return {**sums, "computed": sum(state["computed"] for state in states), **whole}

    def read(self, reduce=lambda tensor: tensor) -> dict[str, float]:
        """Metrics since the last call; `reduce` sums a tensor over ranks. Empty if nothing was added."""
        if self._sums is None or self._trained is None:
            return {}
        counts = torch.cat([self._trained, self._trained.new_tensor([self._computed])])
        sums, counts = reduce(self._sums), reduce(counts)
        elapsed = time.perf_counter() - self._since
        logs = table_metrics((sums[0] / sums[1]).tolist(), self.dimensions, self.columns)
        pairs, sequences, *tokens, unshared, computed = counts.tolist()
        self._num_tokens += unshared
        logs["pairs_per_second"] = pairs / elapsed
        logs["sequences_per_second"] = sequences / elapsed
        for name, count in zip(("computed", *TOKENS), (computed, *tokens), strict=True):
            logs[f"tokens_per_second/{name}"] = count / elapsed
        logs["num_tokens"] = self._num_tokens
        logs["memory/peak_gib"] = peak_memory() / 2**30
        self.reset()
        return logs


def table_metrics(means: list[list[float]], dimensions: Sequence[str], columns: Sequence[str]) -> dict[str, float]:
    """{"margin/helpfulness": ..., "accuracy/mean": ...} from means (K, columns); absent dimensions are left out."""
    logs = {}
    for index, name in enumerate(columns):
        values = {d: row[index] for d, row in zip(dimensions, means, strict=True) if row[index] == row[index]}
        logs.update({f"{name}/{dimension}": value for dimension, value in values.items()})
        if values and name not in SHARES:
            logs[f"{name}/mean"] = sum(values.values()) / len(values)
    return logs


def evaluation_metrics(table: np.ndarray, dimensions: Sequence[str], columns: Sequence[str]) -> dict[str, float]:
    """Means over pairs of an evaluation's table (pairs, K, columns), NaN where a dimension is absent.

    "preference_loss" is the mean over pairs of the sum of the column "loss", so that rows of unequal size weigh by
    their pairs.
    """
    table = np.asarray(table, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        means = np.nansum(table, 0) / np.sum(~np.isnan(table), 0)
    losses = np.nansum(table[..., columns.index("loss")], -1)
    return {**table_metrics(means.tolist(), dimensions, columns), "preference_loss": float(losses.mean())}


def peak_memory() -> int:
    """Bytes: the CUDA allocator's peak, or the process's resident peak without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
