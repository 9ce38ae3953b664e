"""AdamW inside the backward pass: equal to the ordinary step bit for bit, resumed exactly, gradients freed at once."""

import io

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from amopo_fast.optim import AdamW


def language_model(tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)  # fmt: skip
    return Qwen2ForCausalLM(config).to(dtype)


def groups(model):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "norm" not in name and "bias" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in named if "norm" in name or "bias" in name], "weight_decay": 0.0, "lr": 3e-3},
    ]


def train(model, optimizer, steps, first=0, schedule=None):
    """Losses of `steps` steps on data that depends on the step's number only."""
    losses = []
    for step in range(first, first + steps):
        ids = torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_torchs_fused_adamw_bit_for_bit(tied, checkpointing):
    ordinary, inside = language_model(tied), language_model(tied)
    for model in (ordinary, inside):
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    reference = torch.optim.AdamW(groups(ordinary), lr=1e-2, fused=True)
    optimizer = AdamW(groups(inside), lr=1e-2, in_backward=True)
    expected = train(ordinary, reference, 6, schedule=cosine(reference))
    assert train(inside, optimizer, 6, schedule=cosine(optimizer)) == expected
    assert equal(ordinary, inside) and not equal(inside, language_model(tied))


@pytest.mark.parametrize("states", ["fp32", "8bit", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_and_outside_of_the_backward_pass_are_one(states, dtype):
    models = [language_model(True, dtype) for _ in range(2)]
    runs = [
        train(model, optimizer, 4, schedule=cosine(optimizer))
        for model, in_backward in zip(models, (False, True), strict=True)
        for optimizer in [AdamW(groups(model), lr=1e-2, states=states, in_backward=in_backward)]
    ]
    assert runs[0] == runs[1] and equal(*models) and not equal(models[0], language_model(True, dtype))


@pytest.mark.parametrize("states", ["fp32", "8bit", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit(states, dtype):
    def new(model):
        optimizer = AdamW(groups(model), lr=1e-2, states=states, in_backward=True, max_grad_norm=0.5, seed=5)
        return optimizer, cosine(optimizer)

    whole = language_model(dtype=dtype)
    optimizer, schedule = new(whole)
    expected = train(whole, optimizer, 3, schedule=schedule)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "model": whole.state_dict()},
               file)  # fmt: skip
    expected += train(whole, optimizer, 3, 3, schedule)

    file.seek(0)
    saved = torch.load(file, weights_only=True)  # plain tensors: nothing has to be trusted
    torch.manual_seed(99)  # the rounding needs no random state from outside
    resumed = language_model(dtype=dtype)
    optimizer, schedule = new(resumed)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    torch.manual_seed(7)
    assert train(resumed, optimizer, 3, 3, schedule) == expected[3:]
    assert equal(whole, resumed)


def test_a_checkpoint_of_other_states_is_refused():
    model = language_model()
    optimizer = AdamW(groups(model), states="4bit")
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="resume with the optimizer and the model of the checkpoint"):
        AdamW(groups(model), states="8bit").load_state_dict(saved)


@pytest.mark.parametrize("tied", [False, True])
def test_holds_one_gradient_and_the_unfinished_ones(tied):
    model = language_model(tied)
    optimizer = AdamW(groups(model), lr=1e-3, in_backward=True)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    held = []
    update = optimizer._update

    def watch(parameter, grad, scale):
        held.append(grad.numel() + sum(p.grad.numel() for p in model.parameters() if p.grad is not None))
        update(parameter, grad, scale)

    optimizer._update = watch
    train(model, optimizer, 2)
    assert len(held) == 2 * len(sizes) and max(held) == max(sizes.values())
    assert all(p.grad is None for p in model.parameters())


def test_clips_by_the_previous_norm_or_per_tensor():
    def one_step(clipping, gradients):
        weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
        optimizer = AdamW(weights, in_backward=True, max_grad_norm=1.0, clipping=clipping)
        norms = []
        for pair in gradients:
            sum((w * g).sum() for w, g in zip(weights, pair, strict=True)).backward()
            norms.append(optimizer.grad_norm().item())
            optimizer.step()
        # exp_avg after the first step is 0.1 g, after the second 0.09 g1 + 0.1 g2
        return norms, [optimizer.state[w]["exp_avg"] for w in weights]

    first = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0])]
    second = [torch.tensor([0.0, 10.0, 0.0]), torch.tensor([0.5, 0.0])]
    norms, averages = one_step("previous_norm", [first, second])
    assert norms == pytest.approx([5.0, (100 + 0.25) ** 0.5])
    # the first step clips each tensor to 1, the second scales by 1 / 5
    torch.testing.assert_close(averages[0], torch.tensor([0.09, 0.1 * 2.0, 0.0]))
    torch.testing.assert_close(averages[1], torch.tensor([0.1 * 0.1, 0.09]))
    _, averages = one_step("per_tensor", [first, second])
    torch.testing.assert_close(averages[0], torch.tensor([0.09, 0.1 * 1.0, 0.0]))
    torch.testing.assert_close(averages[1], torch.tensor([0.1 * 0.5, 0.09]))


def test_gradients_cannot_be_accumulated():
    model = language_model()
    optimizer = AdamW(groups(model), in_backward=True)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match="do not accumulate gradients"):
        model(input_ids=ids, labels=ids).loss.backward()
    assert optimizer.grad_norm() > 0


def test_the_newest_optimizer_steps_a_parameter():
    weight = nn.Parameter(torch.zeros(4))
    old = AdamW([weight], in_backward=True)
    new = AdamW([weight], in_backward=True)
    weight.sum().backward()
    assert old.grad_norm() is None and new.grad_norm().item() == 2.0
    del new
    weight.sum().backward()
    assert weight.grad is not None  # an optimizer that is gone steps nothing


def test_bad_options_are_named():
    weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="states='2bit'"):
        AdamW([weight], states="2bit")
    with pytest.raises(ValueError, match="clipping='global'"):
        AdamW([weight], clipping="global")
    with pytest.raises(ValueError, match="float16"):
        AdamW([nn.Parameter(torch.zeros(4, dtype=torch.float16))])
    with pytest.raises(ValueError, match="no closure to call"):
        AdamW([weight], in_backward=True).step(lambda: None)


def test_rounding_to_nearest_loses_small_updates_and_stochastic_rounding_keeps_them():
    """lr 1e-5 at weights near 1: an update of 1e-5 against a bfloat16 step of 2^-7."""
    moved = {}
    for stochastic in (False, True):
        weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = AdamW([weight], lr=1e-5, weight_decay=0.0, stochastic_rounding=stochastic, in_backward=True)
        for _ in range(50):
            weight.sum().backward()
            optimizer.step()
        moved[stochastic] = 1 - weight.detach().float().mean().item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(50e-5, rel=0.3)
