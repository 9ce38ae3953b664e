"""Merges an adapter into its base model and writes one that transformers and vLLM load without peft."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from amopo_fast import hub
from amopo_fast.models.loading import SHARD_SIZE
from amopo_fast.prompts.tokenizer import load_tokenizer


def merge_adapter(adapter: str | Path, output_dir: str | Path, *, base: str | None = None, dtype: str = "auto") -> None:
    """Write `base` + adapter to `output_dir` in safetensors, with the tokenizer.

    A base that was trained under in 4 bits is loaded unquantised: the sum is made in its own dtype.

    Args:
        adapter: folder of a LoRA adapter (`amopo-fast train --use_peft true`).
        base: folder or Hub name; default: the one that the adapter names.
        dtype: of the result; "auto": the base model's.

    Raises:
        ValueError: not an adapter's folder, or the output folder has a model already.
    """
    from peft import PeftConfig, PeftModel

    adapter, output = Path(adapter), Path(output_dir)
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} has no adapter_config.json: name the folder of an adapter")
    if (output / "config.json").exists():
        raise ValueError(f"{output} holds a model already; name another folder")
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    hub.prefer_cache_if_unreachable(base)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=kind, use_safetensors=True, trust_remote_code=False)
    # float32 adapters are added in float32 and rounded once, instead of a product that is rounded on its way
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(output, max_shard_size=SHARD_SIZE)
    own_tokenizer = (adapter / "tokenizer.json").is_file()
    load_tokenizer(str(adapter) if own_tokenizer else base).save_pretrained(output)
