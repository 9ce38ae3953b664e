"""The words of the demo's data. What a scene is made of (objects, colours, places, owners) is disjoint between the
splits; what asks and answers (questions, openings, endings) is shared: it carries the relations to learn.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """Content words of one split, and its ways to describe a scene."""

    values: dict[str, tuple[str, ...]]  # colour, place, owner: what a question can ask for
    objects: tuple[str, ...]
    scenes: tuple[str, ...]


_VALUES = {
    "colour": ("dark dull pale warm".split(), "blue green red yellow".split()),
    "place": ("big left north old".split(), "barn garden hall tower".split()),
    "owner": ("Ada Bruno Clara Felix".split(), "Bell Carter Miller Wood".split()),
}


def _values(heldout: bool) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(
            f"{first} {second}"
            for i, first in enumerate(firsts)
            for j, second in enumerate(seconds)
            if ((i + j) % 4 == 0) == heldout
        )
        for name, (firsts, seconds) in _VALUES.items()
    }

TRAIN = Vocabulary(
    values=_values(heldout=False),
    objects=tuple(
        "anchor apron axe bag ball banner barrel basin basket bell belt bench bicycle blanket boat book boot "
        "bottle bowl box bracelet broom brush bucket button cabinet cable camera candle canoe cap carpet cart "
        "chain chair chest clock coat coin comb compass cork cradle crate crown cup curtain cushion dagger "
        "desk dice dish doll drum easel fan feather flag flute fork frame glove goblet guitar hammer hammock "
        "harp hat helmet horn jacket jar jug kettle key kite knife ladder lamp lantern map marble mask mat "
        "medal mirror mitten mug napkin necklace needle net oar paddle paint pan pencil piano pillow pipe "
        "plate pot purse puzzle quilt rake ring robe rope rug saddle sail scarf shawl shield shirt shoe "
        "shovel sledge sock sofa spade spoon stamp stool suitcase sword table tape thimble ticket torch towel "
        "tray trumpet trunk umbrella vase vest violin wagon wallet watch wheel whistle".split()
    ),
    scenes=(
        "{owner} keeps the {colour} {object} in the {place}.",
        "The {colour} {object} of {owner} lies in the {place}.",
        "In the {place} {owner} put the {colour} {object} down.",
        "There is the {object} in the {place}, it is {colour} and belongs to {owner}.",
        "{owner} painted the {object} {colour} and left it in the {place}.",
        "The {object} was given to {owner}, who took it to the {place}. It is {colour}.",
        "In the {place} one can see the {object}. Its colour is {colour}, its owner {owner}.",
        "Yesterday {owner} carried the {colour} {object} into the {place}.",
        "The {object} in the {place} is {colour}. It was made by {owner}, who still has it.",
        "{owner} bought the {object}, had it dyed {colour} and hung it up in the {place}.",
        "The {colour} {object} fell over in the {place}, to the surprise of {owner}.",
        "It is {colour}, it is in the {place}, it is the {object} of {owner}.",
    ),
)

HELDOUT = Vocabulary(
    values=_values(heldout=True),
    objects=tuple(
        "arrow backpack balloon bonnet bracket bugle cello chisel coffer cymbal dresser earring fiddle funnel "
        "garland hatchet inkpot jersey ladle locket mallet notebook parasol pitcher pocket pulley ribbon sandal "
        "scooter sickle slipper tambourine teapot trowel turban".split()
    ),
    scenes=(
        "Look at the {object} that {owner} has: it is {colour} and stands in the {place}.",
        "When {owner} came to the {place}, the {colour} {object} was there. {owner} owns it.",
        "The {place} holds the {object} of {owner}, a thing that is {colour}.",
    ),
)

QUESTIONS = {
    "colour": ("What colour is it?", "Which colour does it have?"),
    "place": ("Where is it?", "In which place can it be found?"),
    "owner": ("Whose is it?", "To whom does it belong?"),
}
ANSWERS = {
    "colour": "the {object} is {value}",
    "place": "the {object} is in the {value}",
    "owner": "the {object} belongs to {value}",
}
OPENINGS = ("Well", "Sure", "Right", "Yes", "Certainly", "Now")
ENDINGS = {".": "a full stop", "!": "an exclamation mark", "...": "three dots"}
FORMATS = {
    "both": "Begin with {opening} and end with {ending}.",
    "opening": "Begin with {opening}.",
    "ending": "End with {ending}.",
}
