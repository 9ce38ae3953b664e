"""patch_verl against a look-alike of the forward that verl 0.9 puts on a model (verl itself needs ray and a server)."""

import pytest
import torch
from models_for_integrations import tiny_model

from amopo_kernels import UnsupportedError
from amopo_kernels.integrations.verl import patch_verl


def as_verl_reads(model, ids, temperature, shift_labels):
    """log_probs and entropy by the model's logits, in the order of verl's actor: scaled, then float32."""
    logits = model(input_ids=ids).logits / temperature
    logps = logits.log_softmax(-1)
    return logps.gather(-1, shift_labels[..., None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("kind", ["tied", "softcap", "divided"])
@pytest.mark.parametrize("packed", [True, False])
def test_log_probs_entropy_and_gradients(kind, packed):
    model, own = tiny_model(kind), tiny_model(kind)
    patch_verl(model)
    ids = torch.randint(3, 512, (1, 14) if packed else (2, 7), generator=torch.Generator().manual_seed(0))
    rolled = torch.roll(ids, -1, -1)
    options = {"shift_labels": rolled} if packed else {}
    output = model(input_ids=ids, temperature=0.8, return_dict=True, use_cache=False, **options)
    expected = as_verl_reads(own, ids, 0.8, rolled)
    upstream = torch.randn(2, *ids.shape)
    for a, b in zip((output.log_probs, output.entropy), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    (upstream[0] * output.log_probs + 0.1 * upstream[1] * output.entropy).sum().backward()
    (upstream[0] * expected[0] + 0.1 * upstream[1] * expected[1]).sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), own.named_parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-4 * b.grad.norm() + 1e-5, name


def test_a_temperature_of_each_row_and_labels_that_are_left_out():
    model, own = tiny_model("tied"), tiny_model("tied")
    patch_verl(model)
    ids = torch.randint(3, 512, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    temperature = torch.tensor([0.5, 2.0])
    found = model(input_ids=ids, labels=labels, temperature=temperature).log_probs
    rolled = torch.roll(ids, -1, -1)
    expected, _ = as_verl_reads(own, ids, temperature[:, None, None], rolled)
    left_out = torch.roll(labels, -1, -1) == -100
    torch.testing.assert_close(found, expected.masked_fill(left_out, 0), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="set return_dict=True"):
        model(input_ids=ids, return_dict=False)
    with pytest.raises(ValueError, match="give input_ids, labels or shift_labels"):
        model(inputs_embeds=torch.randn(1, 4, 32))
