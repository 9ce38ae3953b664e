"""What must be the same for a run to go on from a checkpoint: the model's shape, its frozen weights, data and order."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from amopo_fast.prompts.recipe import Recipe
from amopo_fast.prompts.tokens import PairTokens

SAMPLED = 1024  # elements of a frozen tensor that enter the digest: all of 32B's weights would take minutes

# Set by the trainer or by loading, not by the model's author.
_VOLATILE = ("_name_or_path", "transformers_version", "use_cache", "dtype", "attn_implementation")


def data_digests(pairs: Iterable[PairTokens]) -> dict[str, str]:
    """{"tokens", "scores"}: hex digests of all token ids in order, and of the differences of scores, of which the
    tokens show the chosen side's alone. 1 GB of ids takes about 2 s."""
    digest, scores = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for pair in pairs:
        scores.update(np.ascontiguousarray(pair.gaps(), dtype="<f8").tobytes())
        digest.update(struct.pack("<q", pair.record))
        for part in (*pair.prompts, pair.chosen, pair.rejected):
            digest.update(struct.pack("<q", -1 if part is None else len(part)))
            if part is not None:
                digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    return {"tokens": digest.hexdigest(), "scores": scores.hexdigest()}


def model_digests(model: nn.Module) -> dict[str, str]:
    """{"configuration", "parameters", "frozen weights"}: hex digests of an unwrapped model.

    `parameters` covers names, shapes, dtypes and what is trained. `frozen weights` covers `SAMPLED` elements of every
    frozen tensor, because a checkpoint of adapters does not hold them; sharded and meta tensors are left out.
    """
    names, frozen = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed ZeRO-3 leaves an empty tensor
        names.update(f"{name} {tuple(shape)} {parameter.dtype} {parameter.requires_grad}\n".encode())
        data = parameter.data
        if not parameter.requires_grad and type(data) is torch.Tensor and not data.is_meta and data.numel():
            flat = data.reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLED)].contiguous().cpu()
            frozen.update(sample.view(torch.uint8).numpy().tobytes())
    config = getattr(model, "config", None)
    options = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    options = {key: value for key, value in options.items() if key not in _VOLATILE and not key.endswith("_token_id")}
    text = json.dumps(options, sort_keys=True, default=str)
    return {
        "configuration": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "parameters": names.hexdigest(),
        "frozen weights": frozen.hexdigest(),
    }


def run_fingerprint(
    model: nn.Module, pairs, *, dimensions, seed: int, pairs_per_step: int, recipe: Recipe | None, options: dict
) -> dict:
    """JSON-serialisable. World size, micro-batches and the run's length are free to change.

    options: {"options": values that the user may decide about, "method": those that may not change, "rows": those that
    a run only remembers}.
    """
    return {
        "model": model_digests(model),
        "data": {"pairs": len(pairs), **data_digests(pairs)},
        "order": {"dimensions": list(dimensions), "seed": seed, "pairs per step": pairs_per_step},
        "recipe": {} if recipe is None else _prompts_of(recipe),
        **options,
    }


def _prompts_of(recipe: Recipe) -> dict:
    content = {name: getattr(recipe, name) for name in ("prompt_order", "score_range", "max_length", "end_token")}
    content |= {"wording": vars(recipe.wording), **recipe.prompt_options}
    return json.loads(json.dumps(content, default=list))


def differences(saved: dict, now: dict) -> list[str]:
    """One line per entry that differs, in words for an error message; what "options" and "rows" hold aside."""
    same_tokens = saved.get("data", {}).get("tokens") == now["data"]["tokens"]
    lines = []
    for part, entries in now.items():
        if part in ("options", "rows"):
            continue
        for key, value in entries.items():
            before = saved.get(part, {}).get(key)
            if before == value or key == "template_date" and same_tokens:  # a template need not show it
                continue
            digest = part in ("model", "data") and isinstance(value, str)
            lines.append(f"{part}: {key} changed" + ("" if digest else f" from {_brief(before)} to {_brief(value)}"))
    return lines


def changed_options(saved: dict, now: dict) -> dict[str, tuple]:
    """{name: (the checkpoint's value, the run's)} of what differs in "options"."""
    before, after = saved.get("options", {}), now["options"]
    names = sorted(before.keys() | after.keys())
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _brief(value) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
