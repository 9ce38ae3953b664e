"""Merges an adapter into its base model and writes one that transformers and vLLM load without peft."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from amopo_fast import hub
from amopo_fast.models.architecture import vocabulary_of
from amopo_fast.models.loading import base_of, check_base, load_adapter, load_whole, model_errors
from amopo_fast.models.saving import SHARD_SIZE, prepare_generation
from amopo_fast.models.text_part import copy_processor, processor_files
from amopo_fast.prompts.recipe import Recipe
from amopo_fast.prompts.template import change_templates
from amopo_fast.prompts.tokenizer import load_tokenizer

_TEXT = "The quick brown fox jumps over the lazy dog. How many legs do the two of them have together? Eight, of course."


def merge_adapter(adapter: str | Path, output_dir: str | Path, *, base: str | None = None, dtype: str = "auto") -> None:
    """Write `base` + adapter to `output_dir` in safetensors, with tokenizer, chat template and recipe.

    A base that was trained under in 4 bits is loaded unquantised: the sum is made in its own dtype. Where embedding and
    head share one weight and the adapter changes either, the merged model has two. What was written is read back, and
    the log-probs of a text are compared before and after.

    Args:
        adapter: folder of a LoRA adapter (`amopo-fast train --use_peft true`).
        base: folder or Hub name; default: the one that the adapter names.
        dtype: of the result; "auto": the base model's.

    Raises:
        ValueError: not an adapter's folder, the output folder is none or has a model already, the base is not the one
            that was trained over, or the merged model differs by more than rounding.
    """
    adapter, output = Path(adapter), Path(output_dir)
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} has no adapter_config.json: name the folder of an adapter")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; name a folder to write the merged model to")
    try:  # before minutes of loading
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(f"{output} cannot be written ({error.strerror}); name another folder") from None
    for name, what in (("config.json", "a model"), ("adapter_config.json", "an adapter, which would be laid over it")):
        if (output / name).exists():
            raise ValueError(f"{output} holds {what} already; name another folder")
    recipe = Recipe.read(adapter)
    with model_errors(str(adapter), "adapter"):
        base = base or base_of(adapter)
    hub.prefer_cache_if_unreachable(base)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with model_errors(base, "base"):
        model = load_whole(base, dtype=kind)
    if recipe is not None:
        check_base(model, recipe, base)
    with model_errors(str(adapter), "adapter"):
        if _changes_a_tied_weight(model, adapter):
            _untie(model)
        adapted = load_adapter(model, adapter)
    tokenizer = load_tokenizer(str(adapter) if (adapter / "tokenizer.json").is_file() else base)
    known = [i for i in tokenizer(_TEXT)["input_ids"] if i < vocabulary_of(model)]
    ids = torch.tensor([known])
    before = _logps(adapted, ids)
    # float32 adapters are added in float32 and rounded once, instead of a product that is rounded on its way
    merged = adapted.merge_and_unload(safe_merge=True)
    if recipe is not None:
        prepare_generation(merged, recipe.end_token["id"])
        tokenizer = change_templates(tokenizer, recipe.served)
    merged.save_pretrained(output, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(output)
    copy_processor(processor_files(base, model.config), output)
    if recipe is not None:
        recipe.write(output)
    written = load_whole(output, dtype="auto")
    difference = float((_logps(written, ids) - before).abs().mean())
    if not difference <= _rounding(written.dtype):
        raise ValueError(
            f"{output}: the merged model's log-probs differ from those of base and adapter by {difference:.2g} on "
            f"average, {_rounding(written.dtype):.1g} would be rounding; do not use it, and report the adapter's "
            "configuration"
        )


def _changes_a_tied_weight(model: nn.Module, adapter: Path) -> bool:
    """Whether embedding and head are one weight that the adapter's file has a change of."""
    from safetensors import safe_open

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    names = {id(module): name for name, module in model.named_modules()}
    own = [names[id(module)] for module in (head, embedding)]
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        return any(f".{name}." in f".{key}" for key in file.keys() for name in own)  # noqa: SIM118


def _untie(model: nn.Module) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


@torch.no_grad()
def _logps(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(T - 1,) float32 log-probs of a text's tokens."""
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def _rounding(dtype: torch.dtype) -> float:
    """Mean difference of log-probs that rounding the merged weights can make."""
    return max(16 * torch.finfo(dtype).eps, 1e-4)
