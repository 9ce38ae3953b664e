"""Weights are loaded straight into host memory: where they lie, what they are, and what a process takes meanwhile."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from children import child_environment, run
from kinds_of_models import model_of
from test_streaming import made
from transformers import AutoModelForCausalLM, Qwen2Config

from amopo_fast.models.config import ModelConfig
from amopo_fast.models.loading import load_model, load_shape
from amopo_fast.models.streaming import homes_in, host_bytes, memory_for, stream_weights, streamed_layers
from amopo_fast.models.text_part import auto_class

CPU = torch.device("cpu")
ARGS = SimpleNamespace(fsdp="", deepspeed=None, weights="host", device=CPU, seed=3)
MODELS = {"tied": lambda: made("qwen2"), "sharded": lambda: made("llama", torch.float32),
          "fused experts": lambda: model_of("moe"), "multimodal": lambda: model_of("multimodal")}  # fmt: skip


def loaded(config, dtype):
    """(the model in host memory, the addresses of its blocks)"""
    shape = load_shape(config)
    with torch.device("meta"):
        empty = auto_class(shape).from_config(shape, dtype=dtype)
    memory = memory_for(host_bytes(empty), CPU)
    blocks = [range(block.data_ptr(), block.data_ptr() + block.nbytes) for block in memory.blocks]
    model = load_model(config, ARGS, dtype, homes_in(memory, empty))
    return model, memory, blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_files_are_read_into_the_layers_homes(tmp_path, name, dtype):
    MODELS[name]().save_pretrained(tmp_path, max_shard_size="20KB" if name == "sharded" else "50GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (name == "sharded")
    config = ModelConfig(str(tmp_path))
    plain = load_model(config, ARGS, dtype).state_dict()
    model, memory, blocks = loaded(config, dtype)
    before = {key: p.data_ptr() for key, p in model.named_parameters()}
    streamed = stream_weights(model, CPU, memory)
    for key, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in block for block in blocks) == (parameter in streamed.parameters), key
        assert parameter.data_ptr() == before[key]  # nothing was copied
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())


def test_random_weights_are_initialised_in_their_homes(tmp_path):
    made("qwen2").config.save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), random_weights=True)
    plain = load_model(config, ARGS, torch.bfloat16).state_dict()
    model, memory, blocks = loaded(config, torch.bfloat16)
    layers = [p for _, _, parameters in streamed_layers(model) for p in parameters]
    assert layers and all(any(p.data_ptr() in block for block in blocks) for p in layers)
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())


CHILD = """
import json, sys, torch
from types import SimpleNamespace
from pathlib import Path
from amopo_fast.memory.profile import meta_model
from amopo_fast.models.config import ModelConfig
from amopo_fast.models.loading import load_model, load_shape
from amopo_fast.models.streaming import homes_in, host_bytes, memory_for
args = SimpleNamespace(fsdp="", deepspeed=None, weights="host", device=torch.device("cpu"), seed=0)

def field(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

def taken(config, dtype):
    empty = meta_model(load_shape(config), dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = field("VmRSS")
    memory = memory_for(host_bytes(empty), args.device)
    model = load_model(config, args, dtype, homes_in(memory, empty))
    return (field("VmHWM") - before) / sum(p.nbytes for p in model.parameters())

taken(ModelConfig(sys.argv[2]), torch.bfloat16)  # imports what loading needs
print(json.dumps({
    "from files": taken(ModelConfig(sys.argv[1]), torch.bfloat16),
    "converted": taken(ModelConfig(sys.argv[1]), torch.float32),
    "random": taken(ModelConfig(sys.argv[1], random_weights=True), torch.bfloat16),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak")
def test_loading_takes_the_weights_once(tmp_path):
    """Peaks of a process of its own, mapped pages included, over the weights' bytes: a second copy made it 1.5 to 2. Of
    a model of 80 MiB what malloc keeps is a tenth; one of 512 takes 1.01 to 1.08."""
    config = Qwen2Config(vocab_size=4096, hidden_size=512, intermediate_size=2560, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    made("qwen2").save_pretrained(tmp_path / "small")
    (tmp_path / "child.py").write_text(CHILD)
    done = run(str(tmp_path / "child.py"), str(tmp_path), str(tmp_path / "small"), environment=child_environment(),
               timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, taken in json.loads(done.stdout).items():
        assert 0.5 < taken < 1.3, (name, taken)  # less: of what an earlier one gave back
