"""A real model whose own forward has other logits than its class in miniature is refused, by what differs."""

import pytest
import torch
import transformers
from packing_cases import FAMILIES, random_pairs, tiny_model
from transformers import Gemma2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM

from amopo_fast.evaluation.preferences import score_pairs
from amopo_fast.models.architecture import UnsupportedModelError
from amopo_fast.models.check import prepare_model
from amopo_fast.models.miniature import HIDDEN, tiny_config
from amopo_fast.models.real_logits import check_real_logits

WIDTH = HIDDEN // 2  # another than the miniature's
SMALL = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, vocab_size=97)  # fmt: skip
PAIRS = random_pairs(0, 2)


class ByWidth(LlamaForCausalLM):
    """Logits that a multiplier of the width scales, as no miniature shows."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.changed(output.logits) if self.config.hidden_size == WIDTH else output.logits
        return output


class Halved(ByWidth):
    def changed(self, logits):
        return logits / 2


class Cut(ByWidth):
    def changed(self, logits):
        return logits[..., :-5]


class Biased(ByWidth):
    def changed(self, logits):
        return logits - self.lm_head.bias


class Shuffled(ByWidth):
    def changed(self, logits):
        return logits.roll(1, -1)


def with_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    return model


@pytest.mark.parametrize(
    "model, what",
    [
        (Halved, r"differ by 1\.0e\+00 from those of lm_head with no softcap and temperature 1.*are 0\.5 times"),
        (Cut, "predicts 92 tokens, its lm_head has rows of 97: compare vocab_size"),
        (Biased, "its own leave lm_head's bias out"),
        (Shuffled, r"the logits of its own forward differ by .* which its miniature has\. Compare"),
    ],
)
def test_what_differs_is_named_and_the_random_state_stays(model, what):
    model = prepare_model(with_bias(model(LlamaConfig(**SMALL, attention_dropout=0.1)))).train()
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match=what):
        check_real_logits(model, PAIRS[0])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UnsupportedModelError, match=what):  # an evaluation begins with it
        score_pairs(model, PAIRS, dimensions=["a", "b", "c"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_that_is_left_out_shows_in_small_logits_too(dtype):
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=30.0)).to(dtype)
    assert model(torch.tensor([[1, 2]])).logits.std() < 0.2
    prepare_model(model)
    check_real_logits(model, PAIRS[0])
    model.config.final_logit_softcapping = None  # its forward asks the configuration
    with pytest.raises(UnsupportedModelError, match="with softcap 30 .*its own are those of lm_head with no softcap"):
        check_real_logits(model, PAIRS[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_passes(family, dtype):
    model = prepare_model(tiny_model(family).to(dtype))
    assert check_real_logits(model, PAIRS[0]) < 2 * torch.finfo(dtype).eps


def test_adapters_and_padded_vocabularies_pass():
    from peft import LoraConfig, get_peft_model
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    assert check_real_logits(prepare_model(get_peft_model(tiny_model("granite"), adapter)), PAIRS[0]) < 1e-6
    if not hasattr(transformers, "Inkling2TextConfig"):
        pytest.skip("no model with a padded vocabulary")
    padded = tiny_config(transformers.Inkling2TextConfig())
    model = prepare_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(padded)](padded))
    assert check_real_logits(model, PAIRS[0]) < 1e-6
