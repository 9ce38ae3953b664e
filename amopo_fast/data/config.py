"""DataConfig: where the pairs come from and how they become prompts."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Literal

from amopo_fast.data.pair import DEFAULT_DIMENSIONS, check_dimensions, template_kwargs
from amopo_fast.errors import OptionError, check_numbers


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
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Variables for the model's chat template, as {enable_thinking: false} or, on the command "
                  "line, its JSON. A record's own chat_template_kwargs override them."},
    )  # fmt: skip
    template_date: str | None = field(
        default=None,
        metadata={"help": "The date (2025-01-31) that a chat template which reads the clock is shown, so that prompts "
                  "do not change from day to day. Default: the day on which the run was started."},
    )  # fmt: skip
    reasoning: Literal["refuse", "close"] = field(
        default="refuse",
        metadata={"help": "Where the generation prompt opens <think> and a response holds no reasoning. refuse: such a "
                  "record is bad. close: </think> is put before the answer, which the model learns to write."},
    )  # fmt: skip
    max_length: int = field(default=1024, metadata={"help": "Tokens of prompt and response together."})
    truncated_responses: Literal["drop", "keep_end", "no_end"] = field(
        default="no_end",
        metadata={"help": "A response that does not fit max_length. no_end: it is cut and has no end token, so that "
                  "the model does not learn to end there. keep_end: it is cut and ended. drop: its pair is left out."},
    )  # fmt: skip
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

    def __post_init__(self):
        check_numbers(self, positive=["max_length"], below_one=["eval_share"])
        if self.eval_data and self.eval_share:
            raise OptionError("eval_share holds out a part of train_data: leave it out where there is eval_data",
                              "eval_share")  # fmt: skip
        try:
            check_dimensions(self.dimensions, (0, 1))
        except ValueError as error:
            raise OptionError(str(error), "dimensions") from None
        if (self.score_min is None) != (self.score_max is None):
            raise OptionError("give both score_min and score_max, or neither", "score_min")
        if self.score_min is not None and self.score_min >= self.score_max:
            found = f"score_min={self.score_min:g} must be below score_max={self.score_max:g}"
            raise OptionError(found, "score_min")
        try:
            self.chat_template_kwargs = template_kwargs(self.chat_template_kwargs) or None
        except ValueError as error:
            raise OptionError(f"chat_template_kwargs: {error}", "chat_template_kwargs") from None
        if self.template_date is not None:
            try:
                self.template_date = datetime.date.fromisoformat(str(self.template_date)).isoformat()
            except ValueError:
                found = f"template_date={self.template_date!r} is no date; write it as 2025-01-31"
                raise OptionError(found, "template_date") from None
