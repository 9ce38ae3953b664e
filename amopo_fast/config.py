"""What a user can set: DataConfig, ModelConfig and AMoPOConfig, each a dataclass that HfArgumentParser reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from amopo_fast.attention_backends import BACKENDS as ATTENTION_BACKENDS
from amopo_fast.body import liger_by_default, liger_config
from amopo_fast.optim import IN_BACKWARD
from amopo_fast.optim.adamw import CLIPPING
from amopo_fast.precision import WEIGHT_PRECISIONS, autocasts_by_default
from amopo_fast.records import DEFAULT_DIMENSIONS


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
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("load_in_4bit needs --use_peft true: only an adapter over 4-bit weights can be trained")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r}; choose nf4 or fp4")


@dataclass
class AMoPOConfig(TrainingArguments):
    """TrainingArguments with AMoPO's own hyper-parameters and the published defaults (arXiv 2506.07165).

    An optimizer step always uses `pairs_per_step` pairs over all ranks. `tokens_per_micro_batch` only splits them
    for memory: gradients are equal under any split.
    """

    beta: float = field(default=0.8, metadata={"help": "Scale of the log-probability difference in the margin."})
    gamma: float = field(default=2.0, metadata={"help": "Target margin."})
    weighting: str = field(
        default="gaussian", metadata={"help": "gaussian (paper), mean or uniform. Evaluation uses mean."}
    )
    compat: str = field(default="paper", metadata={"help": "paper, or upstream: the reference code's normalisation."})
    sft_coef: float = field(default=0.0, metadata={"help": "Weight of the chosen response's negative log-likelihood."})
    pairs_per_step: int | None = field(
        default=None,
        metadata={"help": "Pairs per optimizer step over all ranks. Default: per_device_train_batch_size * "
                  "gradient_accumulation_steps * ranks."},
    )  # fmt: skip
    tokens_per_micro_batch: int = field(default=8192, metadata={"help": "Computed tokens of a micro-batch, at most."})
    kernel_backend: str = field(default="auto", metadata={"help": "amopo_kernels' backend of the head."})
    logits_cache_gib: float = field(
        default=0.0,
        metadata={"help": "GPU memory for probabilities that the head keeps for its backward: 2 bytes per label row "
                  "and token of the vocabulary keep all of them and save a quarter of the head's work. Not with "
                  "backend torch; unused where the head is frozen."},
    )  # fmt: skip
    attention_backend: str = field(
        default="auto",
        metadata={"help": "flash_attention_4, flash_attention_3, flash_attention_2, varlen (torch's), sdpa (one call "
                  "per segment, any device), or auto: the first of them that is installed and fits the model."},
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
    keep_layers: int = field(
        default=0,
        metadata={"help": "With gradient_checkpointing: the last N layers keep their activations instead of "
                  "recomputing them."},
    )  # fmt: skip
    memory_check: bool = field(
        default=True, metadata={"help": "Before loading: refuse a run that the estimate says does not fit the GPU."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Measure one step on the longest micro-batch beside the prediction, save nothing and end."},
    )
    learning_rate: float = field(default=3e-7, metadata={"help": "Initial learning rate."})
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
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Pairs in an evaluation row."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and autocasts_by_default()
        if self.use_liger_kernel is None:
            self.use_liger_kernel = not self.use_cpu and liger_by_default()
        super().__post_init__()
        if self.use_cpu and (self.fsdp or self.deepspeed):
            raise ValueError("use_cpu with fsdp or deepspeed: accelerate would silently run DDP; leave one of them out")
        if self.use_liger_kernel:
            self.liger_kernel_config = liger_config(self.liger_kernel_config)
        if self.torch_compile:
            raise ValueError("torch_compile compiles the whole model, for every row anew; use compile_layers")
        for name, choices in (
            ("weighting", ("gaussian", "mean", "uniform")),
            ("compat", ("paper", "upstream")),
            ("weight_precision", WEIGHT_PRECISIONS),
            ("optim_in_backward", (None, *IN_BACKWARD)),
            ("clip_in_backward", CLIPPING),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {', '.join(filter(None, choices))}")
        if self.attention_backend not in ("auto", *ATTENTION_BACKENDS):
            names = ", ".join(("auto", *ATTENTION_BACKENDS))
            raise ValueError(f"attention_backend={self.attention_backend!r}; choose one of {names}")
        positive = ["beta", "tokens_per_micro_batch", "per_device_train_batch_size", "per_device_eval_batch_size",
                    "gradient_accumulation_steps"]  # fmt: skip
        for name in positive if self.max_steps > 0 else [*positive, "num_train_epochs"]:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        not_negative = ("seed", "learning_rate", "sft_coef", "max_grad_norm", "dataloader_num_workers",
                        "logits_cache_gib")  # fmt: skip
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.pairs_per_step is None:
            self.pairs_per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if self.pairs_per_step < self.world_size:
            raise ValueError(f"pairs_per_step={self.pairs_per_step} is less than the {self.world_size} ranks")
        if self.compat == "upstream" and self.pairs_per_step > 1:
            # The softmax of that mode runs over a call's pairs, so its loss depends on how a step is split.
            self.tokens_per_micro_batch = max(self.tokens_per_micro_batch, 2**31)
