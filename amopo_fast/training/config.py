"""AMoPOConfig: TrainingArguments with AMoPO's own options and the published defaults."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from amopo_fast.errors import OptionError, changed_fields, check_numbers, shown
from amopo_fast.models.attention_backends import BACKENDS as ATTENTION_BACKENDS
from amopo_fast.models.choice import LAYOUTS
from amopo_fast.models.faster_layers import liger_by_default, liger_config
from amopo_fast.models.precision import WEIGHT_PRECISIONS, autocasts_by_default
from amopo_fast.optim import IN_BACKWARD
from amopo_fast.optim.adamw import CLIPPING
from amopo_fast.text_files import read_text
from amopo_fast.training.arguments import refuse_unread, refuse_without_effect, try_names
from amopo_fast.training.launch import check_launch, check_launched_options, is_launched_on_cpu, refuse_other_engine
from amopo_fast.training.objective import WEIGHTINGS
from amopo_fast.training.objectives import OBJECTIVES
from amopo_kernels.dispatch import BACKENDS as KERNEL_BACKENDS

logger = logging.getLogger(__name__)

FULL_LEARNING_RATE, ADAPTER_LEARNING_RATE = 3e-7, 2e-5
CHOICES = {
    "objective": tuple(OBJECTIVES),
    "weighting": WEIGHTINGS,
    "compat": ("paper", "upstream"),
    "weight_precision": WEIGHT_PRECISIONS,
    "optim_in_backward": (None, *IN_BACKWARD),
    "clip_in_backward": CLIPPING,
    "optimizer_states": ("device", "host"),
    "weights": ("device", "host"),
    "kernel_backend": KERNEL_BACKENDS,
    "on_changed_option": (None, "keep", "use"),
    "attention_backend": ("auto", *ATTENTION_BACKENDS),
    "layout": LAYOUTS,
}
HYPER_PARAMETERS = ("beta", "gamma", "weighting", "tau", "dimension_weights", "compat", "sft_coef", "label_smoothing",
                    "cpo_alpha")  # of objectives  # fmt: skip
POSITIVE = (
    "beta", "tau", "pairs_per_step", "tokens_per_micro_batch", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps",
    "save_steps", "eval_steps", "logging_steps", "save_total_limit", "eval_accumulation_steps",
    "torch_empty_cache_steps", "adam_epsilon", "ddp_timeout", "ddp_bucket_cap_mb", "dataloader_prefetch_factor",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "learning_rate", "weight_decay", "max_grad_norm", "sft_coef", "cpo_alpha", "warmup_steps",
    "eval_delay", "dataloader_num_workers", "keep_layers", "router_aux_loss_coef",
)  # fmt: skip
ROW_TOKENS = 8192  # of a micro-batch, by default
BELOW_ONE = ("adam_beta1", "adam_beta2")


@dataclass
class AMoPOConfig(TrainingArguments):
    """TrainingArguments with AMoPO's own hyper-parameters and the published defaults (arXiv 2506.07165).

    An optimizer step always uses `pairs_per_step` pairs over all ranks. `tokens_per_micro_batch` only splits them
    for memory: gradients are equal under any split.
    """

    objective: str = field(
        default="amopo",
        metadata={"help": "amopo, simpo, cpo, orpo, dpo, ipo or sft: the others with TRL's formulas and names, as the "
                  "mean over a pair's dimensions. dpo and ipo compare with the model before its first step."},
    )  # fmt: skip
    beta: float | None = field(
        default=None,
        metadata={"help": "Scale of the rewards. Default: amopo 0.8, simpo 2.0, cpo, orpo, dpo and ipo 0.1."},
    )
    gamma: float | None = field(
        default=None,
        metadata={"help": "Target margin of amopo (default 2.0) and simpo (default 0.5; TRL's simpo_gamma)."},
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Of simpo and cpo: the share of pairs that are taken to be the wrong way round."}
    )
    cpo_alpha: float | None = field(
        default=None,
        metadata={"help": "Of simpo (default 0) and cpo (default 1): weight of the chosen tokens' mean -log p."},
    )
    weighting: str = field(
        default="gaussian",
        metadata={"help": "gaussian (paper; evaluation uses mean), mean, uniform, worst_first (the dimension with the "
                  "lowest margin weighs most) or score_gap (in proportion to the pair's difference of scores)."},
    )  # fmt: skip
    tau: float = field(
        default=1.0, metadata={"help": "Of worst_first: weights are proportional to exp(-margin / tau)."}
    )
    dimension_weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "JSON or a YAML mapping, {\"helpfulness\": 2, \"brevity\": 0.5}: factors of the dimensions' "
                  "weights before they are normalised; 1 where none is given, 0: measured, not trained."},
    )  # fmt: skip
    compat: str = field(default="paper", metadata={"help": "paper, or upstream: the reference code's normalisation."})
    sft_coef: float = field(default=0.0, metadata={"help": "Weight of the chosen response's negative log-likelihood."})
    pairs_per_step: int | None = field(
        default=None,
        metadata={"help": "Pairs per optimizer step over all ranks. Default: per_device_train_batch_size * "
                  "gradient_accumulation_steps * ranks."},
    )  # fmt: skip
    tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={"help": "Computed tokens of a micro-batch, at most. Default: 8192; on a CPU less where that does not "
                  "fit into the memory that is free; with optim_in_backward as many as a step's pairs have."},
    )  # fmt: skip
    kernel_backend: str = field(default="auto", metadata={"help": "amopo_kernels' backend of the head."})
    logits_cache_gib: str = field(
        default="auto",
        metadata={"help": "GPU memory for probabilities that the head keeps for its backward: 2 bytes per label row "
                  "and token of the vocabulary keep all of them and save a quarter of the head's work. auto: all, "
                  "3/4, 1/2, 1/4 or none, whichever the estimate says fits the GPU beside the longest micro-batch, "
                  "and a resume keeps that; or GiB; 0: none. None in any case with backend torch, or where the head "
                  "is frozen."},
    )  # fmt: skip
    attention_backend: str = field(
        default="auto",
        metadata={"help": "flash_attention_4, flash_attention_3, flash_attention_2, varlen (torch's), sdpa (one call "
                  "per segment, any device), or auto: the first of them that is installed and fits the model."},
    )  # fmt: skip
    layout: str = field(
        default="auto",
        metadata={"help": "shared: prefixes that sequences share are computed once; separate: each sequence is a "
                  "padded row; auto: shared where a trial in miniature finds it exact for the model, else separate."},
    )  # fmt: skip
    router_aux_loss_coef: float = field(
        default=0.0,
        metadata={"help": "Of a mixture of experts: weight of the router's load-balancing loss, over the row's tokens "
                  "as often as sequences have them. Models publish 0.001 to 0.02 in config.json."},
    )  # fmt: skip
    use_liger_kernel: bool | None = field(
        default=None,
        metadata={"help": "liger-kernel's RMSNorm, RoPE and SwiGLU in the model's body, never its cross-entropy. "
                  "Default: on a GPU, where liger-kernel is installed."},
    )  # fmt: skip
    compile_layers: bool = field(
        default=False, metadata={"help": "torch.compile the decoder layers, once for all row lengths."}
    )
    weight_precision: str = field(
        default="auto",
        metadata={"help": "fp32: float32 weights, bf16 autocast on GPUs; bf16_stochastic: bfloat16 weights, updates "
                  "rounded stochastically; bf16: rounded to nearest, which loses small updates; auto: fp32 where it "
                  "fits into the GPU, else bf16_stochastic."},
    )  # fmt: skip
    bf16: bool | None = field(
        default=None, metadata={"help": "Autocast to bfloat16. Default: on GPUs that have it."}
    )
    optim_in_backward: str | None = field(
        default=None,
        metadata={"help": "adamw, adamw_8bit or adamw_4bit: step each parameter inside the backward pass and free its "
                  "gradient. One micro-batch per step, one GPU."},
    )  # fmt: skip
    clip_in_backward: str = field(
        default="previous_norm",
        metadata={"help": "With optim_in_backward, clip by the previous_norm (global, of the step before) or "
                  "per_tensor; this step's global norm is not known in time."},
    )  # fmt: skip
    optimizer_states: str = field(
        default="device",
        metadata={"help": "With optim_in_backward: device, or host: AdamW's states live in pinned host memory and "
                  "visit the GPU layer by layer during the backward pass; the weights are bit for bit the same."},
    )  # fmt: skip
    weights: str = field(
        default="device",
        metadata={"help": "With optim_in_backward: device, or host: the decoder layers' weights live in pinned host "
                  "memory and visit slots on the GPU as they compute; the weights are bit for bit the same. "
                  "Switches gradient_checkpointing on."},
    )  # fmt: skip
    keep_layers: int = field(
        default=0,
        metadata={"help": "With gradient_checkpointing: the last N layers keep their activations instead of "
                  "recomputing them."},
    )  # fmt: skip
    memory_check: bool = field(
        default=True,
        metadata={"help": "Before loading: refuse a run that by the estimate does not fit its GPU, or a CPU's memory."},
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Of the final model's file: auto is the base model's own. Checkpoints keep what is trained."},
    )
    on_changed_option: str | None = field(
        default=None,
        metadata={"help": "On a resume with other options than the checkpoint's (learning rate, beta, ...): keep those "
                  "or use the ones given now. Default: refuse, with both values."},
    )  # fmt: skip
    dry_run: bool = field(
        default=False,
        metadata={"help": "Measure one step on the longest micro-batch beside the prediction, save nothing and end."},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"Initial learning rate. Default: {FULL_LEARNING_RATE:g}, with an adapter "
                  f"{ADAPTER_LEARNING_RATE:g}."},
    )  # fmt: skip
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: steps, or a share of all steps below 1."})
    max_grad_norm: float = field(default=3.0, metadata={"help": "Gradient clipping norm; 0: none."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between two lines of metrics."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "True would hide a NaN loss."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained parameter is used, so the search of the graph is left out."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Batches are plans, not columns."})
    hub_strategy: str = field(default="end", metadata={"help": "The final model alone is uploaded, with push_to_hub."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Pairs in an evaluation row."})

    def __post_init__(self):
        changed = changed_fields(self)
        check_numbers(self, positive=POSITIVE, not_negative=NOT_NEGATIVE, below_one=BELOW_ONE)
        self._check_own_numbers()
        refuse_without_effect(self, changed)
        check_launch()
        self.use_cpu = self.use_cpu or is_launched_on_cpu()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and autocasts_by_default()
        if self.use_liger_kernel is None:
            self.use_liger_kernel = not self.use_cpu and liger_by_default()
        if self.fp16 and self.bf16:
            raise OptionError("fp16 and bf16 are both true: choose one of them", "fp16")
        check_launched_options(self)
        if self.weights == "host" and not getattr(self, "activation_checkpointing", self.gradient_checkpointing):
            self.gradient_checkpointing = True
            logger.warning("weights=host: gradient checkpointing is switched on: layers are recomputed in the backward")
        for name in self._VALID_DICT_FIELDS:
            _check_mapping(name, getattr(self, name), file=name in ("fsdp_config", "deepspeed"))
        for name in ("checkpointing", "checkpointing_kwargs"):  # transformers < 5.24 has the former name alone
            old, new = f"gradient_{name}", f"activation_{name}"
            if getattr(self, new, False) is None and getattr(self, old) is not None:
                setattr(self, new, getattr(self, old))
                setattr(self, old, None)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise OptionError("deepspeed is not installed here: pip install deepspeed, or leave it out", "deepspeed")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                named = ", ".join(filter(None, choices))
                raise OptionError(f"{name}={getattr(self, name)!r}; choose one of {named}", name)
        try:
            super().__post_init__()
        except Exception as error:  # TrainingArguments raises whatever its libraries raise
            text = " ".join(str(error).split()) or type(error).__name__
            raise OptionError(text, self._blamed(text, changed)) from error
        if self.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible and this process trains on the first: start one process on each with `accelerate "
                "launch --config_file configs/accelerate/ddp.yaml -m amopo_fast.cli train ...`", self.n_gpu,
            )  # fmt: skip
            self._n_gpu = 1  # more would make Trainer wrap the model in nn.DataParallel, which splits rows of tokens
        refuse_other_engine(self)
        if self.use_liger_kernel:
            self.liger_kernel_config = liger_config(self.liger_kernel_config)
        self._settle_objective()
        if self.pairs_per_step is None:
            self.pairs_per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if self.pairs_per_step < self.world_size:
            raise OptionError(
                f"pairs_per_step={self.pairs_per_step} is less than the {self.world_size} ranks", "pairs_per_step"
            )
        refuse_unread(self, changed)
        try_names(self, changed)
        if self.compat == "upstream" and self.pairs_per_step > 1:
            # The softmax of that mode runs over a call's pairs, so its loss depends on how a step is split.
            self.tokens_per_micro_batch = max(self.row_tokens, 2**31)

    @property
    def row_tokens(self) -> int:
        """`tokens_per_micro_batch`, or its default."""
        return self.tokens_per_micro_batch or ROW_TOKENS

    def settle_learning_rate(self, *, adapter: bool) -> str:
        """Fill in the learning rate's default, which an adapter's presence decides. Returns a line that says so; ""
        where the user chose it."""
        usual = ADAPTER_LEARNING_RATE if adapter else FULL_LEARNING_RATE
        if self.learning_rate is None:
            self.learning_rate = usual
            return f"learning_rate: {usual:g}, the default {'of an adapter' if adapter else 'for all weights'}"
        if adapter and 0 < self.learning_rate < 1e-6:
            logger.warning(
                "learning_rate=%g hardly moves an adapter, which starts from zero: 1e-5 to 1e-4 are usual",
                self.learning_rate,
            )
        return ""

    def _check_own_numbers(self) -> None:
        if self.seed >= 2**32:
            raise OptionError(f"seed={self.seed} must be below 2**32, which numpy's generators take", "seed")
        if self.max_steps < 1 and self.max_steps != -1:
            raise OptionError(f"max_steps={self.max_steps} must be positive; -1 trains num_train_epochs", "max_steps")
        if self.max_steps < 0 and not self.num_train_epochs > 0:
            raise OptionError(f"num_train_epochs={self.num_train_epochs} must be positive", "num_train_epochs")
        if self.warmup_steps >= 1 and self.warmup_steps % 1:
            raise OptionError(f"warmup_steps={self.warmup_steps} must be a whole number of steps, or a share of all "
                              "steps below 1", "warmup_steps")  # fmt: skip

    @property
    def logits_cache_bytes(self) -> int | None:
        """None: to be chosen.

        Raises:
            OptionError: no amount of memory.
        """
        if self.logits_cache_gib == "auto":
            return None
        try:
            gib = float(self.logits_cache_gib)
        except (TypeError, ValueError):
            gib = math.nan
        if not 0 <= gib < 2**20:  # NaN too
            name = "logits_cache_gib"
            raise OptionError(f"{name}={self.logits_cache_gib}: write auto, or GiB, 0 for none", name)
        return int(gib * 2**30)

    def _settle_objective(self) -> None:
        """Fill in the objective's own defaults; refuse what it does not have."""
        self._read_dimension_weights()
        own = {each.name: each.default for each in fields(OBJECTIVES[self.objective])}
        defaults = {each.name: each.default for each in fields(self)}
        for name in HYPER_PARAMETERS:
            value = getattr(self, name)
            if name in own and value is None:
                setattr(self, name, own[name])
            elif name not in own and value != defaults[name]:
                used = ", ".join(kind for kind, each in OBJECTIVES.items() if name in {f.name for f in fields(each)})
                raise OptionError(
                    f"{name}={value} has no effect with objective {self.objective}: it belongs to {used}", name
                )
        if not 0 <= self.label_smoothing < 0.5:
            raise OptionError(f"label_smoothing={self.label_smoothing} must be from 0 to below 0.5", "label_smoothing")

    def _read_dimension_weights(self) -> None:
        name, value = "dimension_weights", self.dimension_weights
        if isinstance(value, str):
            value = _from_json(name, value)
        if value is None:
            return
        if not isinstance(value, dict) or not value:
            raise OptionError(f"{name} must map dimensions to numbers, got {shown(value)}", name)
        for dimension, weight in value.items():
            is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not is_number or not 0 <= weight < math.inf:
                raise OptionError(f"{name}: {dimension} must be a number of at least 0, got {shown(weight)}", name)
        self.dimension_weights = {dimension: float(weight) for dimension, weight in value.items()}

    def _blamed(self, text: str, changed: dict[str, object]) -> str:
        """The option that an error of transformers is about: the one that it names or whose value it quotes, among
        those that are not at their default."""
        named = [name for name in changed if name in text]
        texts = {name: value for name, value in changed.items() if isinstance(value, str)}
        quoted = [name for name, value in texts.items() if repr(value) in text or (value and value in text)]
        empty = [name for name, value in texts.items() if not value]
        return max(named, key=len, default="") or next(iter(quoted + empty), "")


def _from_json(option: str, text: str) -> Any:
    """Raises OptionError for what is not JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(f"{option}: not JSON: {error}; write a JSON object", option) from None


def _check_mapping(option: str, value: Any, *, file: bool) -> None:
    """Raises OptionError for text that is neither a JSON object nor, if `file`, the path of one."""
    if not isinstance(value, str) or not value:
        return
    if not file or value.startswith("{"):
        content = _from_json(option, value)
    else:
        try:
            content = json.loads(read_text(value))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OptionError(f"{option}: {value} cannot be read ({reason}); name a JSON file", option) from None
    if not isinstance(content, dict):
        raise OptionError(f"{option}: {value} holds {shown(content)}; write a JSON object", option)
