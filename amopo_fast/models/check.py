"""Which layout trains a model exactly: a trial that runs the model's own architecture in miniature.

A shared row is exact if its tokens meet each other in the attention interface and in recurrent states only, and there
as the plan says; padded rows, if a token sees nothing behind it. A model class promises neither, so `choose_layout`
tries them: the same class and configuration flags with small sizes and random weights, in training mode, on the CPU, in
float64; log-probs and all gradients against those of its sequences one by one. It takes a fraction of a second and
nothing of the model itself is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from amopo_fast.models.architecture import (
    UnsupportedModelError,
    decoder_of,
    language_model_of,
    noise_of_routers,
    refusal,
)
from amopo_fast.models.attention import is_switched, switch_attention
from amopo_fast.models.causality import not_causal
from amopo_fast.models.choice import LAYOUTS, Choice
from amopo_fast.models.double import Double
from amopo_fast.models.head import check_head, head_errors, head_forms, text_only
from amopo_fast.models.miniature import TOKENS, miniature
from amopo_fast.models.plain import plain_functions
from amopo_fast.models.recurrent import recurrent_classes, switch_recurrent
from amopo_fast.models.scoring import score
from amopo_fast.models.text_part import freeze_beside_text, name_whole_layers, place_of
from amopo_fast.packing.plan import Layout, build_plan
from amopo_fast.prompts.tokens import PairTokens

_TOLERANCE = 1e-6  # relative; float64's rounding stays under 1e-9, a wrong key, state or position is above 1e-2
# A recurrent layer runs once a batch of nodes, and ZeRO-3 gathers the weights of what is in it each time.
_ZERO3 = (
    "DeepSpeed ZeRO-3 does not run recurrent layers through states, as ranks would wait for weights that others do not "
    "ask for; ZeRO-2 and FSDP do"
)


def check_prompt_learning(model: nn.Module) -> None:
    """Refuse PEFT methods that put virtual tokens before the prompt: a plan has no place for them."""
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            raise UnsupportedModelError(
                f"PEFT's {config.peft_type.value} adds virtual tokens, which plans do not carry; use LoRA"
            )


def prepare_model(model: nn.Module, layout: str = "auto") -> nn.Module:
    """Find the layout that trains a causal LM exactly and make the model take it, in place: see `choice_of`.

    Padded batches and generate() of the same object keep running as before. Of a multimodal class the text part is
    trained: the rest is frozen.

    Args:
        layout: "auto", or one of LAYOUTS to try no other.

    Raises:
        UnsupportedModelError: `choose_layout`.
    """
    check_prompt_learning(model)
    base = language_model_of(model)
    choice = choose_layout(base, layout)
    check_head(base, choice.head)
    if choice.layout is not Layout.SEPARATE:
        switch_attention(base)
        switch_recurrent(base, choice.recurrent)
    frozen = freeze_beside_text(model, choice.unreached)
    base.amopo_choice = replace(choice, frozen=frozen, noise=noise_of_routers(base.config))
    name_whole_layers(model)
    return model


def choose_layout(model: nn.Module, requested: str = "auto") -> Choice:
    """The first layout that trains a causal LM exactly: shared, through states where it has any, then separate.

    Args:
        requested: one of LAYOUTS.

    Raises:
        UnsupportedModelError: with the reason: the configuration's own (`refusal`), a miniature that cannot be built or
            run, a forward that is not causal (`not_causal`), or log-probs or gradients that differ from those of
            separate sequences.
        ValueError: not a layout.
    """
    if requested not in LAYOUTS:
        raise ValueError(f"layout={requested!r}; choose one of {', '.join(LAYOUTS)}")
    model = language_model_of(model)
    name = type(model).__name__
    reason = refusal(model.config)
    if reason:
        raise UnsupportedModelError(f"{name} cannot be trained: {reason}")
    with _alone():
        torch.manual_seed(0)
        try:
            trial = Trial(model)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name} cannot be trained: {error}") from error
        reasons = []
        for layout in [Layout.STATES if trial.recurrent else Layout.SHARED, Layout.SEPARATE]:
            if requested not in ("auto", layout.value.split()[0]):
                continue
            if layout is Layout.STATES and is_deepspeed_zero3_enabled():
                reasons.append(_ZERO3)
                continue
            try:
                trial.check(layout)
                head = None if trial.head is None else head_forms(model.config)[trial.head]
                return Choice(layout, trial.recurrent, head, "; ".join(reasons), unreached=trial.unreached)
            except UnsupportedModelError as error:
                reasons.append(str(error))
        why = not_causal(trial.tiny) or "; ".join(reasons)
    raise UnsupportedModelError(f"{name} cannot be trained: {why}")


@contextmanager
def _alone() -> Iterator[None]:
    """One thread, as operations this small only wait for each other's; the run's random state and autocast stay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def check_pairs() -> list[PairTokens]:
    """Two pairs, three dimensions: shared prompts and response prefixes, a branch inside the window, one token."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return rng.integers(1, TOKENS, count)

    head, opening = draw(9), draw(6)
    # Sequences of four lengths in all: those of one length are a batch of the trial's truth.
    prompts = (head, np.concatenate([head, draw(11)]), np.concatenate([head[:5], draw(4)]))
    chosen, rejected = np.concatenate([opening, draw(12)]), np.concatenate([opening, draw(3)])
    other = np.concatenate([head[:7], draw(5)])
    return [
        PairTokens(0, prompts, chosen, opening[:1], False),
        PairTokens(1, (None, other, None), chosen[3:], rejected, False),
    ]


class Trial:
    """A model's miniature, and the log-probs and gradients of its sequences one by one."""

    def __init__(self, model: nn.Module):
        self.pairs = check_pairs()
        with Double():
            try:
                self.tiny = miniature(model)
            except Exception as error:
                raise UnsupportedModelError(
                    f"it cannot be tried in miniature ({type(error).__name__}: {error})"
                ) from error
        failed = None
        with Double(), plain_functions(self.tiny):
            self.recurrent = self._recurrent()
            try:
                logps = self._separately()
                self.logps, self.gradients = logps.detach(), self._gradients(logps)
                errors = head_errors(self.tiny)
            except Exception as error:
                failed = error
        if failed is not None:
            text = f"its own forward does not run on text alone ({type(failed).__name__}: {failed})"
            raise UnsupportedModelError(not_causal(self.tiny) or text) from failed
        best = None if errors is None else min(range(len(errors)), key=errors.__getitem__)
        self.head = best if best is not None and errors[best] < _TOLERANCE else None

    def _separately(self) -> torch.Tensor:
        """(S,) sums of label log-probs from the model's own forward, sequences of one length in a batch."""
        sequences = [
            (len(prompt), torch.from_numpy(np.concatenate([prompt, response])))
            for pair in self.pairs
            for prompt in pair.prompts
            if prompt is not None
            for response in (pair.chosen, pair.rejected)
        ]
        result: dict[int, torch.Tensor] = {}
        for length in {len(ids) for _, ids in sequences}:
            batch = [number for number, (_, ids) in enumerate(sequences) if len(ids) == length]
            ids = torch.stack([sequences[number][1] for number in batch])
            logits = self.tiny(input_ids=ids, use_cache=False, **text_only(self.tiny, ids)).logits[:, :-1]
            logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            result.update({number: logps[row, sequences[number][0] - 1 :].sum() for row, number in enumerate(batch)})
        return torch.stack([result[number] for number in range(len(sequences))])

    def _recurrent(self) -> frozenset[type[nn.Module]]:
        ids = torch.from_numpy(np.concatenate([self.pairs[0].prompts[1], self.pairs[0].chosen]))[None]
        try:
            return recurrent_classes(decoder_of(self.tiny), ids)
        except Exception:
            return frozenset()  # it has no cache of transformers', and so no state in one

    def _gradients(self, logps: torch.Tensor) -> dict[str, torch.Tensor]:
        self.tiny.zero_grad()
        weights = torch.linspace(-1.0, 1.0, 5)[torch.arange(len(logps)) % 5]
        (logps * weights).sum().backward()
        return {key: p.grad.clone() for key, p in self.tiny.named_parameters() if p.grad is not None}

    @property
    def unreached(self) -> frozenset[str]:
        """Places of the parameters that have no gradient in any layer."""
        places = {place_of(key) for key, p in self.tiny.named_parameters() if p.requires_grad}
        return frozenset(places - {place_of(key) for key in self.gradients})

    def check(self, layout: Layout) -> None:
        """Raises UnsupportedModelError where a layout differs from the sequences one by one."""
        try:
            if layout is not Layout.SEPARATE:
                switch_attention(self.tiny)
                switch_recurrent(self.tiny, self.recurrent)
            head = None if self.head is None else head_forms(self.tiny.config)[self.head]
            self.tiny.amopo_choice = Choice(layout, self.recurrent, head)
            plan = build_plan(self.pairs, layout, min_node_tokens=3)
            with Double(), plain_functions(self.tiny):
                logps = score(self.tiny, plan, attention_backend="sdpa", backend="torch").logp_sum
                logps = logps[plan.cu_seqlens.diff() > 0]
                error = float(((logps - self.logps).abs() / self.logps.abs()).max().detach())
                gradients = self._gradients(logps) if error < _TOLERANCE else {}  # half of the time
        except Exception as error:
            raise UnsupportedModelError(
                f"its miniature does not run in the layout {layout.value} ({type(error).__name__}: {error})"
            ) from error
        finally:
            if is_switched(self.tiny):
                self.tiny.set_attn_implementation("eager")
        if not error < _TOLERANCE:
            raise UnsupportedModelError(
                f"log-probs in the layout {layout.value} differ from those of separate sequences by {error:.1e} in its "
                "miniature"
            )
        # Some gradients are zero but for rounding (a key's bias), so a floor keeps their noise out.
        floor = 1e-3 * max(value.norm() for value in self.gradients.values())
        for key, value in self.gradients.items():
            other = gradients.get(key, torch.zeros_like(value))
            error = max(error, float((other - value).norm() / value.norm().clamp(min=floor)))
            if not error < _TOLERANCE:
                raise UnsupportedModelError(
                    f"the gradient of {key} in the layout {layout.value} differs from that of separate sequences by "
                    f"{error:.1e} in its miniature"
                )
        self.error = error
