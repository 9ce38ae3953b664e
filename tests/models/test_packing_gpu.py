"""On a GPU: the chosen backend, Liger's kernels and compiled layers against the CPU's float32."""

import pytest
import torch
from packing_cases import expected, largest_error, loss_and_gradients, random_pairs, tiny_model

from amopo_fast.errors import OptionError
from amopo_fast.models.check import prepare_model
from amopo_fast.models.faster_layers import COMPILES_LIGER, LIGER_BODY, compile_layers
from amopo_fast.models.scoring import score
from amopo_fast.packing.plan import build_plan
from amopo_kernels import SequenceStats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
# float32 matmuls of both devices, and bfloat16 weights of the tiny models, whose logits reach 10.
FLOAT32, BFLOAT16 = 1e-4, 0.1


def on_gpu(family, dtype):
    return prepare_model(tiny_model(family)).to("cuda", dtype)


def run(model, backend="auto"):
    """Loss and gradients of three pairs, the loss computed on the CPU, whose noise the expected one has."""
    plan = build_plan(random_pairs(3, 3), min_node_tokens=4).to("cuda")
    stats = SequenceStats(*(field.cpu() for field in score(model, plan, attention_backend=backend)))
    loss, gradients = loss_and_gradients(model, stats)
    return loss, {name: gradient.float().cpu() for name, gradient in gradients.items()}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3"])
def test_float32_equals_the_separate_sequences(family):
    assert largest_error(run(on_gpu(family, torch.float32)), expected(family, 3, 3)) < FLOAT32


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3"])
def test_bfloat16_on_the_chosen_backend(family):
    model = on_gpu(family, torch.bfloat16)
    first = run(model)
    assert first[0] == pytest.approx(expected(family, 3, 3)[0], rel=BFLOAT16)
    assert first[0] == pytest.approx(run(model, "sdpa")[0], rel=BFLOAT16)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_liger_body_and_compiled_layers(family, unpatched):
    pytest.importorskip("liger_kernel")
    from transformers.integrations.liger import apply_liger_kernel

    wanted = expected(family, 3, 3)  # before Liger's layers replace the CPU's, too
    model = on_gpu(family, torch.float32)
    apply_liger_kernel(model, LIGER_BODY)
    assert largest_error(run(model), wanted) < FLOAT32
    if COMPILES_LIGER:
        compile_layers(model)
        assert largest_error(run(model), wanted) < FLOAT32
    else:
        with pytest.raises(OptionError, match="use_liger_kernel"):
            compile_layers(model)
    prepare_model(on_gpu(family, torch.float32))  # the check of the next model runs on the GPU
