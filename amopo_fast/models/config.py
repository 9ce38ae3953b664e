"""ModelConfig: which model is trained, and with which adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from amopo_fast.errors import Needs, OptionError, changed_fields, check_numbers

_OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
NEEDS = (
    *(Needs(name, "use_peft") for name in _OF_ADAPTERS),
    *(Needs(name, "load_in_4bit") for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant")),
    Needs("config_overrides", "random_weights"),
)


@dataclass
class ModelConfig:
    """Which model is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub name of a causal LM."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Default: the model's."})
    random_weights: bool = field(
        default=False, metadata={"help": "Initialise from the model's configuration alone, by --seed."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "With --random_weights: hidden_size=64,num_hidden_layers=2,..."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter and leave the model frozen."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter: alpha / r."})
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout in the adapter. Not 0: losses depend on how pairs are packed into rows."},
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules with an adapter; default: all linear layers but the head."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the frozen model in 4 bits (bitsandbytes). Needs use_peft."}
    )
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the 4-bit scales too."})

    def __post_init__(self):
        check_numbers(self, positive=["lora_r", "lora_alpha"], below_one=["lora_dropout"])
        if self.load_in_4bit and not self.use_peft:
            raise OptionError(
                "load_in_4bit needs --use_peft true: only an adapter over 4-bit weights can be trained", "load_in_4bit"
            )
        if self.load_in_4bit and self.random_weights:
            raise OptionError("load_in_4bit quantises trained weights; leave random_weights out", "load_in_4bit")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise OptionError(
                f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r}; choose nf4 or fp4", "bnb_4bit_quant_type"
            )
        changed = changed_fields(self)
        for need in NEEDS:
            need.refuse(self, changed)
        lora_targets(self)


def lora_targets(config: ModelConfig) -> str | list[str]:
    """The adapter's modules as peft takes them: ends of names as a list, one regular expression or all-linear as text.

    Raises:
        OptionError: a regular expression that is none, or one beside other names.
    """
    targets = config.lora_target_modules or ["all-linear"]
    patterns = [each for each in targets if not re.fullmatch(r"[\w.]+", each) and each != "all-linear"]
    if len(targets) > 1 and (patterns or "all-linear" in targets):
        raise OptionError(
            f"lora_target_modules: {(patterns or ['all-linear'])[0]!r} stands alone or not at all: list the names of "
            "modules, such as q_proj, or write one regular expression for their whole paths", "lora_target_modules",
        )  # fmt: skip
    for each in patterns:
        try:
            re.compile(each)
        except re.error as error:
            raise OptionError(f"lora_target_modules: {each!r} is no regular expression: {error}; list the names of "
                              "modules, such as q_proj", "lora_target_modules") from None  # fmt: skip
    return targets[0] if patterns or targets == ["all-linear"] else targets
