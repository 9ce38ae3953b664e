"""The trainer hands packing's options on."""

import pytest
from run_training import trainer

from amopo_fast.models.attention import is_switched
from amopo_fast.training import trainer as trainer_module


def test_an_attention_backend_that_cannot_run_here_is_named(tmp_path):
    with pytest.raises(ValueError, match="attention_backend='flash_attention_3' cannot be used"):
        trainer(tmp_path, attention_backend="flash_attention_3")
    with pytest.raises(ValueError, match="attention_backend='flash'; choose one of auto, flash_attention_4"):
        trainer(tmp_path, attention_backend="flash")


def test_layers_are_compiled_before_anything_wraps_them(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(trainer_module, "compile_layers", compiled.append)
    run = trainer(tmp_path, compile_layers=True)
    assert compiled == [run.model] and is_switched(run.model)
    trainer(tmp_path)
    assert len(compiled) == 1


def test_the_cost_of_the_data_is_printed_before_training(tmp_path, capsys):
    trainer(tmp_path, max_steps=1).train()
    text = capsys.readouterr().out
    assert "14 pairs an epoch: " in text and "4 optimizer steps an epoch" in text and "attention: sdpa" in text
