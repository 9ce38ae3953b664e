"""Head problems to time: random inputs of a given shape and concentration, and the sliced float64 oracle of them."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

SEQUENCES = 8  # per problem: one pair in four dimensions; the first half are chosen sides
COLUMNS = 8192  # of the vocabulary at a time in the oracle


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    N: int  # label rows
    H: int  # hidden size
    V: int  # vocabulary
    dtype: torch.dtype = torch.bfloat16
    logits: str = "normal"  # or "zipf"


@dataclasses.dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (N, H), requires grad
    weight: Tensor  # (V, H), requires grad
    labels: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (SEQUENCES + 1,) int32
    sequence_gradient: Tensor  # (SEQUENCES,) float32, d loss / d logp_sum
    gradient: Tensor  # (N,) float32, the same number on every row of a sequence


def random_inputs(case: Case, device: str, seed: int) -> Inputs:
    """Logits of standard deviation about 2 ("normal"), or concentrated as a language model's.

    Zipf: labels are drawn from p(rank r) ~ 1 / r. Every weight row has a component log p along one direction that all
    hidden rows share, which makes log p the logits' prior, and hidden rows lean towards their label's row: an entropy
    of a few nats and a label probability of a few tenths on average. A token's rank is its id, as a tokenizer's merges
    roughly order them.
    """
    generator = torch.Generator(device).manual_seed(seed)
    N, H, V = case.N, case.H, case.V

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=case.dtype)

    weight = normal(V, H).mul_(1 / math.sqrt(H))
    if case.logits == "normal":
        hidden = normal(N, H).mul_(2)
        labels = torch.randint(V, (N,), generator=generator, device=device)
    else:
        prior = 1 / torch.arange(1, V + 1, device=device, dtype=torch.float32)
        labels = torch.multinomial(prior, N, replacement=True, generator=generator)
        weight[:, 0] = prior.log().to(case.dtype)  # the shared direction is the first coordinate
        # A row's own lean: between none and enough to put its label above the prior's most frequent tokens.
        lean = 12 * torch.rand(N, 1, generator=generator, device=device)
        hidden = (weight[labels] * lean.to(case.dtype)).add_(normal(N, H))
        hidden[:, 0] = 1
    offsets = torch.linspace(0, N, SEQUENCES + 1).round().int().to(device)
    side = torch.ones(SEQUENCES, device=device)
    side[: SEQUENCES // 2] = -1
    strength = torch.rand(SEQUENCES, generator=generator, device=device) + 0.5
    per_sequence = side * strength * SEQUENCES / N
    gradient = per_sequence.repeat_interleave((offsets[1:] - offsets[:-1]).long())
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), labels, offsets, per_sequence, gradient)


class Oracle:
    """Log-probabilities of all rows in float64, gradients of sampled rows of hidden and sampled rows of weight."""

    def __init__(self, inputs: Inputs, samples: int = 64):
        self._inputs = inputs
        N, V = inputs.labels.numel(), inputs.weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        device = inputs.hidden.device
        self.rows = torch.randperm(N, generator=generator)[:samples].to(device)
        # Half of the columns are labels, so that both terms of dW are judged; the last column is the ragged tile's.
        columns = torch.randint(V, (samples // 2,), generator=generator).to(device)
        last = torch.tensor([V - 1], device=device)
        self.columns = torch.cat([columns, inputs.labels[self.rows[: samples // 2]], last]).unique()
        x = inputs.hidden.detach().double()
        lse = torch.full((N,), -math.inf, dtype=torch.float64, device=device)
        self.largest_logit = 0.0
        for begin in range(0, V, COLUMNS):
            z = x @ inputs.weight.detach()[begin : begin + COLUMNS].double().T
            self.largest_logit = max(self.largest_logit, z.abs().max().item())
            lse = torch.logaddexp(lse, z.logsumexp(1))
        self.lse = lse
        self.logps = (x * inputs.weight.detach()[inputs.labels].double()).sum(1) - lse

    def _row_probabilities(self):
        x = self._inputs.hidden.detach()[self.rows].double()
        for begin in range(0, self._inputs.weight.shape[0], COLUMNS):
            w = self._inputs.weight.detach()[begin : begin + COLUMNS].double()
            yield w, (x @ w.T - self.lse[self.rows, None]).exp()

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(dX of the sampled rows, dW of the sampled columns) for d loss / d logps = gradient (N,)."""
        inputs, g = self._inputs, gradient.double()
        dx = inputs.weight.detach()[inputs.labels[self.rows]].double()
        for w, p in self._row_probabilities():
            dx -= p @ w
        x = inputs.hidden.detach().double()
        p = (x @ inputs.weight.detach()[self.columns].double().T - self.lse[:, None]).exp()
        dz = ((inputs.labels[:, None] == self.columns).double() - p) * g[:, None]
        return dx * g[self.rows, None], dz.T @ x
