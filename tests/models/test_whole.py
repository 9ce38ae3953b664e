"""A model's folder that lacks a tensor, or has one of another shape, is refused by the tensor's name."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from amopo_fast.cli import main
from amopo_fast.errors import ModelError
from amopo_fast.models.loading import load_adapter, load_trained, load_whole

NAME = "model.layers.1.mlp.up_proj.weight"
SHAPE = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def model(tied=False):
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied))


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_a_missing_tensor_is_named_and_tied_ones_are_not_missing(tmp_path, tied):
    model(tied).save_pretrained(tmp_path)
    assert "lm_head.weight" in load_whole(tmp_path).state_dict()
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.pop(NAME))
    message = rf"cannot be loaded: 1 tensors are missing \({NAME}\); copy all of its .safetensors files"
    for load in (load_whole, load_trained):
        with pytest.raises(ModelError, match=message):
            load(str(tmp_path))


def test_an_untied_head_is_not_taken_from_the_embedding(tmp_path):
    model(tied=False).save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match="lm_head.weight"):
        load_whole(tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path, capsys):
    model().save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda t: t.update({NAME: t[NAME][:-1].contiguous()}))
    with pytest.raises(ModelError, match=f"{NAME} is 23 x 16, and config.json makes it 24 x 16"):
        load_whole(tmp_path)


def test_one_of_several_files_that_is_not_there(tmp_path):
    model().save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if key != NAME}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(next(p for p in tmp_path.glob("*.safetensors") if NAME in load_file(p)), lambda tensors: tensors.pop(NAME))
    with pytest.raises(ModelError, match=NAME):
        load_whole(tmp_path)


def test_an_adapter_that_lacks_a_tensor(tmp_path):
    get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert torch.is_tensor(next(load_adapter(model(), tmp_path).parameters()))
    edit(tmp_path / "adapter_model.safetensors", lambda t: t.pop(next(key for key in t if "layers.1" in key)))
    with pytest.raises(ModelError, match="1 tensors are missing .base_model.model.model.layers.1.self_attn.q_proj"):
        load_adapter(model(), tmp_path)


def test_merge_says_at_once_that_it_cannot_write(tmp_path, capsys):
    get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "in"):
        assert main(["merge", str(tmp_path / "adapter"), str(output)]) == 2
        assert f"{tmp_path / 'file'} is a file; name a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "x"
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "adapter")]) == 1  # which would load as both
    assert "adapter holds an adapter, which would be laid over it already" in capsys.readouterr().err
