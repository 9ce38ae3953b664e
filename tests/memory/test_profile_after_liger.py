"""The profile of a model whose file Liger has patched for the process, as a trainer before it leaves it."""

import pytest
from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2

from amopo_fast.memory.profile import profile_body


def test_a_patched_file_changes_nothing(monkeypatch):
    config = Qwen2Config(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    wanted = profile_body(config, tokens=64, kv_tokens=80, liger=True)

    def on_real_tensors_alone(*_, **__):
        pytest.fail("Liger's function met a fake tensor")

    on_real_tensors_alone.__module__ = "liger_kernel.transformers.rope"
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", on_real_tensors_alone)
    assert profile_body(config, tokens=64, kv_tokens=80, liger=True) == wanted
    assert modeling_qwen2.apply_rotary_pos_emb is on_real_tensors_alone
