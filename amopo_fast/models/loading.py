"""Models for training, made where they are trained and in the dtype they are trained in: no second copy on the way.

Weights come from safetensors, shard by shard onto the device, without remote code. With --random_weights they are
initialised from the configuration on the device. LoRA and QLoRA use peft and bitsandbytes, with TRL's option names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, set_seed

from amopo_fast import hub
from amopo_fast.errors import ModelError, OptionError, of_a_library, shown
from amopo_fast.models.architecture import UnsupportedModelError, refusal_unloaded
from amopo_fast.models.check import choose_layout
from amopo_fast.models.config import ModelConfig, lora_targets
from amopo_fast.models.depth import depth_of, set_layers
from amopo_fast.models.head import head_of
from amopo_fast.models.placing import created_in, loading_into
from amopo_fast.models.saving import weights_digest
from amopo_fast.models.text_part import auto_class, beside_text, linear_layers
from amopo_fast.prompts.recipe import Recipe, recipe_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig


@contextmanager
def model_errors(name: str | None, what: str = "model_name_or_path") -> Iterator[None]:
    """Turns what the libraries raise while a model loads into a ValueError that names the model and a remedy.

    what: names the option or argument that the model was given by.
    """
    try:
        yield
    except (OptionError, ModelError, UnsupportedModelError):
        raise  # says what to do already
    except ImportError as error:  # names the package: timm of Gemma 3n, FastVLM and PerceptionLM, scipy of Inkling
        text = " ".join(str(error).split()).split(" Please note")[0]
        raise ValueError(f"{what}: {name!r} cannot be loaded: {text}") from error
    except Exception as error:
        text = of_a_library(error)
        text = f"{text} is not known" if isinstance(error, KeyError) else text
        remedy = hub.remedy(str(name)) or (
            f"{text}; give a folder with config.json, tokenizer.json and whole "
            ".safetensors files, or a Hub name"
        )
        raise ValueError(f"{what}: {name!r} cannot be loaded: {remedy}") from error


def load_shape(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration with `config_overrides` applied.

    Raises:
        OptionError: overrides of fields that the configuration does not have, or that no model can be made of.
        UnsupportedModelError: an encoder and a decoder.
    """
    hub.prefer_cache_if_unreachable(config.model_name_or_path)
    shape = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=False)
    if reason := refusal_unloaded(shape):
        raise UnsupportedModelError(f"{config.model_name_or_path} cannot be trained: {reason}")
    if config.config_overrides:
        before = depth_of(shape.get_text_config())
        try:
            shape.update_from_string(config.config_overrides)
            layers = depth_of(shape.get_text_config())
            if layers < 1:
                raise ValueError(f"num_hidden_layers={layers} must be positive")
            set_layers(shape, layers, before)
            with torch.device("meta"):
                auto_class(shape).from_config(shape, trust_remote_code=False)
        except Exception as error:  # whatever a model raises that is built of impossible sizes
            found = " ".join(str(error).split())[:300] or type(error).__name__
            raise OptionError(f"config_overrides: {found}; write NAME=NUMBER,... of the model's config.json that fit "
                              "each other", "config_overrides") from None  # fmt: skip
    return shape


def load_model(
    config: ModelConfig, args: Any, dtype: torch.dtype, homes: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A causal LM in `dtype` on the device of this rank; on the CPU where FSDP, DeepSpeed or streaming will place it.

    Args:
        homes: memory that parameters of these names are loaded straight into.

    Raises:
        OSError: not found.
    """
    placed_later = bool(args.fsdp) or args.deepspeed is not None or args.weights == "host"
    device = torch.device("cpu") if placed_later else args.device
    quantisation = quantisation_config(config, dtype)
    if config.random_weights:
        shape = load_shape(config)

        def create() -> nn.Module:
            set_seed(args.seed)
            return auto_class(shape).from_config(shape, dtype=dtype, trust_remote_code=False)

        with torch.device(device):
            return created_in(homes, create) if homes else create()
    shape = load_shape(config)  # refuses overrides
    placement = {"device_map": {"": device}} if device.type != "cpu" or quantisation is not None else {}
    with loading_into(homes) if homes else nullcontext():
        return load_whole(
            config.model_name_or_path, shape, dtype=dtype, quantization_config=quantisation, **placement
        )


def load_whole(name: str | Path, shape: PretrainedConfig | None = None, **options: Any) -> nn.Module:
    """from_pretrained of the class that the configuration names (default: the folder's), from safetensors, without
    remote code, of a model that lacks nothing: what is missing would be filled with random numbers.

    Raises:
        ModelError: a tensor is missing, or is of another shape than the configuration says; names them.
    """
    shape = shape or AutoConfig.from_pretrained(name, trust_remote_code=False)
    model, report = auto_class(shape).from_pretrained(
        name, use_safetensors=True, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
        **options,
    )  # fmt: skip
    missing = sorted(report["missing_keys"])
    if missing and not _only_the_first_rank_reads():
        raise _not_whole(name, f"{len(missing)} tensors are missing ({', '.join(missing[:3])})")
    for key, found, expected in sorted(report["mismatched_keys"]):
        found, expected = (" x ".join(map(str, shape)) for shape in (found, expected))
        raise _not_whole(name, f"{key} is {found}, and config.json makes it {expected}")
    return model


def load_converted(model: nn.Module, folder: str | Path) -> bool:
    """Load a checkpoint whose tensors have other names or shapes than the model's own, as transformers saves fused
    experts and some multimodal classes; False, and nothing loaded, where they have the same.

    Trainer's resume and its best model compare names with the model's own, and would leave these as they were. Takes
    as much host memory as the model's weights. Raises as `load_whole`.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not isinstance(model, PreTrainedModel) or not files:
        return False
    saved: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            saved |= set(file.keys())
    if saved <= model.state_dict().keys():
        return False
    loaded = load_whole(folder, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
    return True


def base_of(adapter: str | Path) -> str:
    """Folder or Hub name of the model that an adapter lies over. Raises ModelError where its configuration names none.
    """
    from peft import PeftConfig

    name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not isinstance(name, str) or not name:
        raise ModelError(f"{adapter}: base_model_name_or_path in its adapter_config.json is {shown(name)}; write the "
                         "folder or Hub name of its base model there")  # fmt: skip
    return name


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """A model under a saved adapter, which lacks nothing. Raises as `load_whole`."""
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, folder)
    path = Path(folder) / "adapter_model.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            missing = sorted(get_peft_model_state_dict(adapted).keys() - set(file.keys()))
        if missing:
            raise _not_whole(folder, f"{len(missing)} tensors are missing ({', '.join(missing[:3])})")
    return adapted


def _not_whole(name: str | Path, what: str) -> ModelError:
    return ModelError(f"{str(name)!r} cannot be loaded: {what}; copy all of its .safetensors files and its own "
                      "configuration again")  # fmt: skip


def _only_the_first_rank_reads() -> bool:
    """FSDP's cpu_ram_efficient_loading: the others receive what it read."""
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("1", "true")
    return efficient and os.environ.get("LOCAL_RANK", "0") != "0"


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

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(config),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def add_adapter(model: nn.Module, adapter: LoraConfig) -> nn.Module:
    """Freeze a model under a new adapter, whose weights are float32, of its text part alone; "all-linear" lays none on
    what no loss of text leads to (`Choice.frozen` names it).

    Names of parameters among its targets, such as the matrices of fused experts, become PEFT's `target_parameters`.

    Raises:
        OptionError: peft cannot lay the adapter over the model. UnsupportedModelError: as `choose_layout`.
        ValueError: an adapter on the head, which the kernels read as one matrix.
    """
    from peft import get_peft_model

    if adapter.target_modules == "all-linear":
        adapter.target_modules = set(linear_layers(model, choose_layout(model).unreached))
    else:
        beside = "|".join(rf"{re.escape(name)}(\..*)?" for name in beside_text(model))
        adapter.exclude_modules = adapter.exclude_modules or beside or None
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
    linear |= {name.rpartition(".")[2] for name, parameter in parameters.items() if parameter.dim() == 3}
    there = f"the model's linear layers are {', '.join(sorted(linear))}"
    if not isinstance(adapter.target_modules, (str, type(None))):
        for name in adapter.target_modules:  # of several peft leaves out in silence those that it does not find
            if not (_ends(parameters, name) or _ends(modules, name)):
                raise OptionError(f"lora_target_modules: {name!r} is none of the model; {there}", "lora_target_modules")
        of_parameters = {name for name in adapter.target_modules if _ends(parameters, name) > _ends(modules, name)}
        adapter.target_modules = set(adapter.target_modules) - of_parameters
        adapter.target_parameters = sorted({*(adapter.target_parameters or ()), *of_parameters}) or None
    try:
        model = get_peft_model(model, adapter)
    except Exception as error:  # peft raises whatever its layers raise
        text = " ".join(str(error).split()).split(" Please")[0][:300].rstrip(".")
        raise OptionError(f"lora_target_modules: {text}; {there}", "lora_target_modules") from error
    head_of(model)
    return model


def _ends(paths: Iterable[str], name: str) -> bool:
    """Whether one of the paths is `name` or ends in it."""
    return any(f".{path}".endswith(f".{name}") for path in paths)


def tokenizer_folder(name: str) -> str:
    """Where the tokenizer of a model is: its own folder, its run's, or its base model's."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    for place in (folder, folder.parent):
        if (place / "tokenizer.json").is_file():
            return str(place)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return str(json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") or name)
    return name


def check_base(model: nn.Module, recipe: Recipe, name: str) -> None:
    """Refuse a base model that is not the one an adapter was trained over.

    Raises:
        OptionError: names both.
    """
    trained = recipe.base_model.get("weights")
    found = weights_digest(model) if trained else ""
    if trained and found and trained != found:
        own = recipe.base_model.get("name") or "one without a name"
        raise OptionError(
            f"{name} is not the model that the adapter was trained over ({own}): its weights are others; name the "
            "right base", "base",
        )  # fmt: skip


def device_named(name: str | torch.device | None) -> torch.device:
    """Where a model is put; None: CUDA where there is a GPU. Raises OptionError for a device that is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # of a backend: some assert
        found = " ".join(str(error).split())[:200]
        raise OptionError(f"device={str(name)!r} cannot be used: {found}; choose cpu, cuda or cuda:N with the number "
                          "of a GPU that is here", "device") from None  # fmt: skip
    return device


def load_trained(name: str, *, dtype: str = "auto", device: str | torch.device | None = None) -> nn.Module:
    """A causal LM to evaluate or prompt, with its adapter if the folder is one's.

    Args:
        name: folder or Hub name. dtype: of the weights; "auto": the model's own on a GPU, float32 on a CPU.
        device: default: CUDA where there is a GPU.

    Raises:
        ValueError: names the model that cannot be loaded.
    """
    place = device_named(device)
    kind: Any = dtype if dtype != "auto" else ("float32" if place.type == "cpu" else "auto")

    def load(folder: str) -> nn.Module:
        return load_whole(folder, dtype=kind)

    hub.prefer_cache_if_unreachable(name)
    with model_errors(name):
        if not (Path(name) / "adapter_config.json").is_file():
            return load(name).to(place)
        base_name = base_of(name)
    with model_errors(base_name, f"base_model_name_or_path of {name}"):
        base = load(base_name)
    recipe = recipe_of(name)
    if recipe is not None:
        check_base(base, recipe, base_name)
    with model_errors(name):
        return load_adapter(base, name).to(place)
