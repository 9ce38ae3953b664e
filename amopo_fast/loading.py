"""Models for training, made where they are trained and in the dtype they are trained in: no second copy on the way.

Weights come from safetensors, shard by shard onto the device, without remote code. With --random_weights they are
initialised from the configuration on the device. LoRA and QLoRA use peft and bitsandbytes, with TRL's option names.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, set_seed

from amopo_fast.profile_memory import set_layers

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

    from amopo_fast.config import AMoPOConfig, ModelConfig

SHARD_SIZE = "5GB"  # host memory that saving takes at a time


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer. Raises ValueError if no model is named."""
    if not config.model_name_or_path:
        raise ValueError("model_name_or_path is missing: give a folder or a Hub name")
    return AutoTokenizer.from_pretrained(
        config.tokenizer_name_or_path or config.model_name_or_path, trust_remote_code=False
    )


def load_shape(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration with `config_overrides` applied.

    Raises:
        ValueError: overrides of a trained model, or of fields that the configuration does not have.
    """
    if config.config_overrides and not config.random_weights:
        raise ValueError("config_overrides needs --random_weights: trained weights have one shape")
    shape = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=False)
    if config.config_overrides:
        try:
            shape.update_from_string(config.config_overrides)
        except ValueError as error:
            raise ValueError(f"config_overrides: {error}; write NAME=NUMBER,... of the model's config.json") from None
        set_layers(shape, shape.get_text_config().num_hidden_layers)
    return shape


def load_model(config: ModelConfig, args: AMoPOConfig, dtype: torch.dtype) -> nn.Module:
    """A causal LM in `dtype` on the device of this rank; on the CPU where FSDP or DeepSpeed will place it.

    Raises:
        ValueError: a 4-bit model with random weights. OSError: not found.
    """
    engine_places = bool(args.fsdp) or args.deepspeed is not None
    device = torch.device("cpu") if engine_places else args.device
    quantisation = quantisation_config(config, dtype)
    if config.random_weights:
        if quantisation is not None:
            raise ValueError("load_in_4bit quantises trained weights; leave --random_weights out")
        shape = load_shape(config)
        set_seed(args.seed)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=False)
    load_shape(config)  # refuses overrides
    placement = {"device_map": {"": device}} if device.type != "cpu" or quantisation is not None else {}
    return AutoModelForCausalLM.from_pretrained(
        config.model_name_or_path,
        dtype=dtype,
        use_safetensors=True,
        quantization_config=quantisation,
        trust_remote_code=False,
        **placement,
    )


def quantisation_config(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """4-bit weights by bitsandbytes, decoded to `dtype` for each product; None if not asked for."""
    if not config.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
    )


def peft_config(config: ModelConfig) -> LoraConfig | None:
    """The adapter that the options ask for, or None."""
    if not config.use_peft:
        return None
    from peft import LoraConfig

    targets = config.lora_target_modules or ["all-linear"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if len(targets) == 1 else targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def add_adapter(model: nn.Module, adapter: LoraConfig) -> nn.Module:
    """Freeze a model under a new adapter, whose weights are float32.

    Raises:
        ValueError: an adapter on the head, which the kernels read as one matrix.
    """
    from peft import get_peft_model

    from amopo_fast.scoring import head_of

    model = get_peft_model(model, adapter)
    head_of(model)
    return model


def save_in_shards(model: nn.Module) -> None:
    """Let `save_pretrained` copy SHARD_SIZE of weights to the host at a time; Trainer has no option for it."""
    if isinstance(model, PreTrainedModel):  # an adapter is small
        model.save_pretrained = functools.partial(type(model).save_pretrained, model, max_shard_size=SHARD_SIZE)
