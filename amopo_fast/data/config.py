"""DataConfig: where the pairs come from and how they become prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from amopo_fast.data.pairs import DEFAULT_DIMENSIONS


@dataclass
class DataConfig:
    """Where the pairs come from and how they become prompts."""

    train_data: list[str] | None = field(
        default=None,
        metadata={"help": "Training pairs: files, folders or Hub names, each with options behind it "
                  "(nvidia/HelpSteer2,split=train,weight=0.5); see docs/data.md."},
    )  # fmt: skip
    eval_data: list[str] | None = field(
        default=None,
        metadata={"help": "Evaluation pairs, as train_data. Several sets are told apart by name=NAME or, in YAML, by "
                  "the keys of a mapping."},
    )  # fmt: skip
    eval_share: float = field(
        default=0.0,
        metadata={"help": "Share of train_data's prompts that is held out for evaluation; no prompt is on both sides."},
    )
    dimensions: list[str] = field(
        default_factory=lambda: list(DEFAULT_DIMENSIONS),
        metadata={"help": "The K dimensions. no_object names all the others and no score."},
    )
    score_min: float | None = field(
        default=None, metadata={"help": "Lowest score that prompts know. Default: the data's format's, else 0."}
    )
    score_max: float | None = field(
        default=None,
        metadata={"help": "Highest score; prompts say `4 out of 5`. Default: the data's format's, else 5."},
    )
    prompt_order: Literal["dimension_first", "dimension_last"] = field(
        default="dimension_first",
        metadata={"help": "dimension_first (paper): instruction, then the user's text. dimension_last: the reverse, "
                  "which lets all dimensions share the user's text."},
    )  # fmt: skip
    prompt_template: str | None = field(default=None, metadata={"help": "YAML file with the instructions' wording."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of prompt and response together."})
    on_bad_record: Literal["error", "skip"] = field(
        default="error", metadata={"help": "error: stop at the first bad record; skip: leave it out."}
    )
    missing_scores: Literal["error", "absent"] = field(
        default="error", metadata={"help": "error, or absent: a missing score leaves that dimension out for its pair."}
    )
    tied_dimensions: Literal["keep", "drop"] = field(
        default="keep",
        metadata={"help": "drop: leave a dimension out of the pairs in which the chosen response does not score "
                  "higher. keep: as published."},
    )  # fmt: skip
    streaming: bool = field(
        default=False,
        metadata={"help": "For data larger than memory: tokens go to files in output_dir as records are read."},
    )
