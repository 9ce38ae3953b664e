"""NaN and infinities in every kind of place and run: each stops its step, is named, and reaches no file."""

import pytest
import torch
from kill_runs import trainer_of
from safetensors.torch import load_file
from transformers import TrainerCallback

from amopo_fast.errors import NumbersError
from amopo_fast.survival.checkpoints import complete_checkpoints

pytestmark = pytest.mark.slow

PLACES = {
    "an embedding": "embed_tokens.weight",
    "attention": "layers.0.self_attn.q_proj",
    "a norm": "layers.1.post_attention_layernorm.weight",
    "the head": "lm_head.weight",
}
VALUES = ("nan", "inf", "-inf")
WEIGHTS = [(variant, place, VALUES[number % 3])
           for number, (variant, place) in enumerate(
               (variant, place) for variant in ("full", "8-bit in backward", "4-bit in backward", "LoRA", "DoRA")
               for place in PLACES)]  # fmt: skip
GRADIENTS = [(variant, part, value) for variant in ("full", "one micro-batch", "LoRA")
             for part in ("q_proj", "down_proj") for value in VALUES]  # fmt: skip


class Break(TrainerCallback):
    """Puts `value` into one element of a parameter, or of its next gradient, when step 4 begins."""

    def __init__(self, part, value, gradient):
        self.part, self.value, self.gradient = part, float(value), gradient

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step != 3:
            return
        parameters = {name: p for name, p in model.named_parameters() if self.part in name}
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self.name, parameter = next(iter((trained or parameters).items()))
        if self.gradient:
            self.handle = parameter.register_hook(self._spoil)
        else:
            with torch.no_grad():
                parameter.view(-1)[-1] = self.value

    def _spoil(self, gradient):
        self.handle.remove()
        gradient = gradient.clone()
        gradient.view(-1)[-1] = self.value
        return gradient


def stopped(tmp_path, variant, part, value, gradient):
    run, fault = trainer_of(variant, tmp_path, "cpu"), Break(part, value, gradient)
    run.add_callback(fault)
    with pytest.raises(NumbersError) as caught:
        run.train()
    message = str(caught.value)
    assert message.startswith("step 4: ") and f"last complete checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert (tmp_path / "failed-step-4.json").is_file()
    assert [each.step for each in complete_checkpoints(tmp_path)] == [2]
    for path in tmp_path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    return message, fault.name


@pytest.mark.parametrize("variant, place, value", WEIGHTS)
def test_a_weight(tmp_path, variant, place, value):
    message, name = stopped(tmp_path, variant, PLACES[place], value, gradient=False)
    assert name in message


@pytest.mark.parametrize("variant, part, value", GRADIENTS)
def test_a_gradient(tmp_path, variant, part, value):
    message, name = stopped(tmp_path, variant, part, value, gradient=True)
    assert message.startswith("step 4: the gradient is not finite")
    assert name in message
