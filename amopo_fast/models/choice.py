"""What was found out about a model before its first row, kept on the model by `check.prepare_model`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from amopo_fast.models.architecture import language_model_of
from amopo_fast.models.head import HeadForm
from amopo_fast.packing.plan import Layout

LAYOUTS = ("auto", "shared", "separate")  # what may be asked for


@dataclass(frozen=True)
class Choice:
    """A layout that the trial found exact, and why it is not an earlier one."""

    layout: Layout
    recurrent: frozenset[type[nn.Module]]  # classes that carry a state along a sequence
    head: HeadForm | None  # None: logits are computed by the model's own forward
    reason: str = ""
    # `text_part.place_of` the parameters to which no loss of text leads.
    unreached: frozenset[str] = field(default=frozenset(), repr=False)
    frozen: str = ""  # what is not trained because no loss of text leads to it, in words
    noise: str = ""  # what routers draw in training, in words

    def describe(self, share: float) -> str:
        """In a line, or two; `share` of the separate sequences' tokens is computed."""
        how = {
            Layout.SHARED: "shared, every prefix once",
            Layout.STATES: f"shared, every prefix once, through the states of "
            f"{', '.join(sorted(kind.__name__ for kind in self.recurrent))}",
            Layout.SEPARATE: "separate, each sequence a padded row",
        }[self.layout]
        why = f"; {self.reason}" if self.reason else ""
        frozen = f"\nnot trained, as no loss of text leads to it: {self.frozen}" if self.frozen else ""
        noise = f"\nrandom in training: {self.noise}: log-probs depend on how pairs are packed; 0 in config.json makes "
        noise = f"{noise}routing that of inference" if self.noise else ""
        return f"layout: {how}: {share:.0%} of the separate sequences' tokens computed{why}{frozen}{noise}"


def choice_of(model: nn.Module) -> Choice:
    """What `prepare_model` found.

    Raises:
        ValueError: the model was not prepared.
    """
    choice = getattr(language_model_of(model), "amopo_choice", None)
    if choice is None:
        raise ValueError(f"{type(model).__name__} was not tried: call prepare_model(model) first")
    return choice
