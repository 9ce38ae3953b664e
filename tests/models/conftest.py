"""Fixtures of the packing tests."""

import pytest
import torch.nn.functional as F


@pytest.fixture
def unpatched(monkeypatch):
    """Liger patches a model's file for the whole process; put everything back afterwards."""
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3

    for module in (modeling_qwen3, modeling_gemma2, modeling_llama):
        for name, value in list(vars(module).items()):
            if name == "apply_rotary_pos_emb" or isinstance(value, type):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(F, "cross_entropy", F.cross_entropy)
