"""LinearLogps and model_logps against the logits of transformers' own models."""

import pytest
import torch
from models_for_integrations import KINDS, add_lora, tiny_model
from torch import nn

from amopo_kernels import UnsupportedError
from amopo_kernels.integrations import hf
from amopo_kernels.integrations.hf import LinearLogps, model_logps


def inputs(model, rows=3, length=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 512, (rows, length), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, -3:] = 0
    completion = attention.clone()
    completion[:, :3] = 0
    return ids, attention, completion


def own_logps(model, ids, attention, completion, temperature=1.0):
    """(logps, entropy) by the model's own logits."""
    scores = model(input_ids=ids, attention_mask=attention).logits[:, :-1] / temperature
    logps = scores.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    scored = completion[:, 1:].bool()
    chosen = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return chosen.masked_fill(~scored, 0), entropy.masked_fill(~scored, 0)


def compare(model, own=None, temperature=1.0, tolerance=1e-5, **options):
    """model_logps and its gradients in all parameters; `own` is the same model for its own logits."""
    ids, attention, completion = inputs(model)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(2, ids.shape[0], ids.shape[1] - 1, generator=generator)
    results = []
    for ours in (False, True):
        which = model if ours or own is None else own
        which.zero_grad()
        if ours:
            found = model_logps(model, ids, completion_mask=completion, attention_mask=attention,
                                temperature=temperature, outputs=("entropy",), **options)  # fmt: skip
        else:
            found = own_logps(which, ids, attention, completion, temperature if isinstance(temperature, float)
                              else temperature.expand(ids[:, 1:].shape)[..., None])  # fmt: skip
        (upstream[0] * found[0] + 0.1 * upstream[1] * found[1]).sum().backward()
        results.append((found, {n: x.grad for n, x in which.named_parameters() if x.grad is not None}))
    (expected, wanted), (found, gradients) = results
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == wanted.keys() and wanted
    largest = max(x.norm() for x in wanted.values())
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() < 3 * tolerance * max(gradient.norm(), 0.01 * largest), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_is_that_of_its_model(kind):
    compare(tiny_model(kind), temperature=0.7)


@pytest.mark.parametrize("kind", ["tied", "softcap"])
def test_gradient_checkpointing_and_a_temperature_of_each_token(kind):
    model = tiny_model(kind).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    temperature = torch.rand(3, 8, generator=torch.Generator().manual_seed(4)) + 0.5
    compare(model, temperature=temperature)
    compare(model, temperature=temperature[:, :1])


@pytest.mark.parametrize("options", [{"modules": ("q_proj", "v_proj")}, {"modules": ("lm_head",)},
                                     {"modules": ("lm_head", "q_proj"), "lora_bias": True},
                                     {"modules": ("q_proj",), "modules_to_save": ["lm_head"]}], ids=str)  # fmt: skip
def test_lora(options):
    options = dict(options)
    model = add_lora(tiny_model("untied"), *options.pop("modules"), **options)
    compare(model)
    with torch.no_grad(), model.disable_adapter():
        ids, attention, completion = inputs(model)
        found = model_logps(model, ids, completion_mask=completion, attention_mask=attention)
        torch.testing.assert_close(found, own_logps(model, ids, attention, completion)[0], rtol=1e-5, atol=1e-5)


def test_lora_on_the_head_in_double_precision_is_exact():
    model = add_lora(tiny_model("untied"), "lm_head").double()
    compare(model, tolerance=1e-10)


def test_what_is_no_plain_lora_is_refused():
    ids = inputs(None)[0]
    with pytest.raises(UnsupportedError, match="adapter 'default' on the head is a Dora.*, no plain LoRA"):
        model_logps(add_lora(tiny_model("untied"), "lm_head", use_dora=True), ids)
    model = tiny_model("untied")

    class Quantised(nn.Linear):
        pass

    model.lm_head.__class__ = Quantised
    with pytest.raises(UnsupportedError, match="the head is a Quantised, not nn.Linear"):
        LinearLogps.from_model(model)


@pytest.mark.parametrize("kind", ["scaled", "softcap", "multiplied"])
def test_what_a_model_does_to_its_logits_is_never_missed(kind, monkeypatch):
    """A scale under a name that is not known here."""
    for names in ("FACTORS", "DIVISORS", "SOFTCAPS"):
        monkeypatch.setattr(hf, names, ())
    with pytest.raises(UnsupportedError, match="the logits of .*ForCausalLM differ by .* it does something to them"):
        LinearLogps.from_model(tiny_model(kind))


def test_bfloat16():
    model = tiny_model("softcap").bfloat16()
    ids, attention, completion = inputs(model)
    found = model_logps(model, ids, completion_mask=completion, attention_mask=attention)
    own, _ = own_logps(model, ids, attention, completion)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, own.float(), rtol=0, atol=0.05)


def test_labels_or_a_mask():
    model = tiny_model("tied")
    ids, _, completion = inputs(model)
    by_mask = model_logps(model, ids, completion_mask=completion)
    by_labels = model_logps(model, ids, ids.masked_fill(completion == 0, -100))
    everything = model_logps(model, ids)
    assert torch.equal(by_mask, by_labels) and by_mask.shape == (3, 8)
    torch.testing.assert_close(by_mask, everything * completion[:, 1:])
    with pytest.raises(ValueError, match="labels and completion_mask say the same"):
        model_logps(model, ids, ids, completion_mask=completion)
    with pytest.raises(ValueError, match=r"labels must be \(3, 9\) as input_ids, got \(3, 8\)"):
        model_logps(model, ids, ids[:, 1:])


def test_the_models_own_forward_and_generation_stay():
    model = tiny_model("tied")
    ids, attention, _ = inputs(model)
    before = model(input_ids=ids, attention_mask=attention).logits
    tokens = model.generate(ids[:1], max_new_tokens=3, do_sample=False)
    model_logps(model, ids)
    assert torch.equal(model(input_ids=ids, attention_mask=attention).logits, before)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=3, do_sample=False), tokens)


def test_under_accelerate_the_order_matters_and_is_said(monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # another test's has a precision already
    model = tiny_model("tied")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    ids = inputs(model)[0]
    with pytest.raises(UnsupportedError, match="the forward of this Qwen2ForCausalLM was replaced already"):
        model_logps(prepared, ids)
    model = tiny_model("tied")
    hf.install(model)
    found = model_logps(accelerator.prepare_model(model), ids)
    expected = model_logps(tiny_model("tied"), ids)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)  # bfloat16 products, as accelerate wants
    torch.testing.assert_close(found, expected, rtol=0, atol=0.3)


def test_a_head_by_hand():
    head = nn.Linear(16, 50)
    hidden, labels = torch.randn(4, 16), torch.tensor([3, -100, 49, 0])
    found, top1 = LinearLogps(head, softcap=2.0, temperature=0.5)(hidden, labels, temperature=2.0, outputs=("top1",))
    logits = 2 * torch.tanh(head(hidden) / 2)
    expected = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels == -100, 0)
    torch.testing.assert_close(found, expected)
    assert torch.equal(top1, logits.argmax(1).masked_fill(labels == -100, 0))
