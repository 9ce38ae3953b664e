"""What a model needs to be saved and served as it was trained: its shards, its generation config, its base's digest."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from amopo_fast.errors import OptionError
from amopo_fast.models.architecture import causal_lm
from amopo_fast.models.text_part import copy_processor, processor_files
from amopo_fast.survival import durable

SHARD_SIZE = "5GB"  # host memory that saving takes at a time
SAMPLED = 1024  # elements of a tensor that enter a digest: all of 32B's weights would take minutes


def prepare_saving(model: nn.Module) -> None:
    """Let `save_pretrained` copy SHARD_SIZE of weights to the host at a time, which Trainer has no option for, and the
    processor's files of a multimodal checkpoint; declare tied weights, which no checkpoint holds twice, so that Trainer
    does not miss them on a resume."""
    if isinstance(model, PreTrainedModel):  # an adapter is small
        files = processor_files(model.config._name_or_path, model.config)
        model.save_pretrained = functools.partial(_save_whole, model, files)
        first: dict[int, str] = {}
        named = model.named_parameters(remove_duplicate=False)
        again = {name for name, parameter in named if first.setdefault(id(parameter), name) != name}
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *again}


def _save_whole(model: PreTrainedModel, processor: list[Path], folder: str | Path, **options) -> None:
    type(model).save_pretrained(model, folder, max_shard_size=SHARD_SIZE, **options)
    copy_processor(processor, folder)


def prepare_generation(model: nn.Module, end_token_id: int) -> list[str]:
    """Make a model's generation config such that it stops at the trained end token and can be saved; what was changed,
    in words. Sampling fields stay the base model's.

    Raises:
        OptionError: transformers would refuse to save it, after training.
    """
    config = getattr(causal_lm(model), "generation_config", None)
    if config is None:
        return []
    changed = []
    ends = config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    if end_token_id not in ends:
        config.eos_token_id = [*ends, end_token_id] if ends else end_token_id
        changed.append(f"generation stops at token {end_token_id} too, which ends the trained responses")
    try:
        config.validate(strict=True)
    except ValueError as error:
        if config.do_sample:
            raise _cannot_be_saved(error) from None
        config.do_sample = True  # its sampling fields say so, and alone they cannot be saved
        try:
            config.validate(strict=True)
        except ValueError as still:
            raise _cannot_be_saved(still) from None
        changed.append("generation_config has sampling fields without do_sample, which cannot be saved: set to true")
    return changed


def _cannot_be_saved(error: ValueError) -> OptionError:
    text = " ".join(str(error).split())[:400]
    return OptionError(f"the model's generation_config could not be saved after training: {text}; correct the file")


_PROBE = "It isn't 1,234.5 metres;\n\n\tdon't say  'naïve' or \u2160\u00bd: 中文, 😀 <|x|> {\"a\": [1]}\n  end.  "


def check_tokenizer_reloads(tokenizer, model: nn.Module, texts: Sequence[str] = ()) -> None:
    """Refuse a tokenizer that would make other tokens once it is loaded again from the model's folder: transformers
    chooses its class, and with it its pre-tokenisation, by the model's type.

    Args:
        texts: that are compared besides one of mixed kinds.

    Raises:
        OptionError: shows a text and its tokens on both sides.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        causal_lm(model).config.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str():
        return
    for text in (_PROBE, *texts):
        ours, theirs = (each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, loaded))
        if ours != theirs:
            kind = causal_lm(model).config.model_type
            raise OptionError(
                f"the tokenizer makes other tokens when it is loaded again beside a {kind} model, as a "
                f"{type(loaded).__name__}: {tokenizer.convert_ids_to_tokens(ours)[:12]} here, "
                f"{loaded.convert_ids_to_tokens(theirs)[:12]} there, of {text[:60]!r}; train with the tokenizer that "
                "AutoTokenizer gives for the model's folder", "tokenizer_name_or_path",
            )  # fmt: skip


def weights_digest(model: nn.Module) -> str:
    """Hex digest of a base model's weights, whatever adapter lies over it: names, shapes and SAMPLED elements of each,
    rounded to bfloat16, so that it does not depend on the dtype they were loaded in. "" where parts are quantised,
    sharded or on no device.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(causal_lm(model).state_dict().items()):
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if ".lora_" in name or ".modules_to_save." in name or not isinstance(tensor, Tensor):
            continue
        if type(tensor) is not Tensor or tensor.is_meta or not tensor.is_floating_point():
            return ""
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def final_dtype(save_dtype: str, base: PretrainedConfig, random_weights: bool) -> torch.dtype | None:
    """The dtype of the final model's file; "auto" is the base model's own. None: the one that is trained, also where
    config.json names a dtype that holds no weights without scales (int8, float8)."""
    if save_dtype != "auto":
        return getattr(torch, save_dtype)
    own = getattr(torch, base.dtype) if isinstance(base.dtype, str) else base.dtype
    return None if random_weights or own is None or not own.is_floating_point or own.itemsize < 2 else own


def size_of_weights(folder: str | Path) -> str:
    """ "BF16, 1.92 GiB": what the safetensors files of a folder hold."""
    from safetensors import safe_open

    names, size = set(), 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        size += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            names |= {str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    amount = f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
    return f"{', '.join(sorted(names))}, {amount}"


def in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict in host memory with its floating-point tensors in `dtype`; tied tensors stay one."""
    made: dict[int, Tensor] = {}
    return {
        name: made.setdefault(id(value), value.cpu().to(dtype) if value.is_floating_point() else value.cpu())
        for name, value in state.items()
    }


def declare_dtype(folder: str | Path, dtype: torch.dtype) -> None:
    """Write into a saved model's config.json that its weights are in `dtype`."""
    path = Path(folder) / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["dtype"] = str(dtype).removeprefix("torch.")
    durable.write_text(path, json.dumps(content, indent=2) + "\n")
