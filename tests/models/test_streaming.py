"""A model whose layers stream is bit for bit a resident one, with slots that hold NaN when nobody is there.

On a CPU host memory and slots are different buffers, so a stale read or a lost update shows in losses and weights.
"""

import gc
import weakref

import pytest
import torch
from packing_cases import FAMILIES
from torch.utils.checkpoint import checkpoint
from transformers import FalconH1Config, Gemma3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from amopo_fast.errors import OptionError
from amopo_fast.models.miniature import tiny_config
from amopo_fast.models.streaming import StreamedWeights, host_bytes, stream_weights, streamed_layers
from amopo_fast.optim import AdamW
from amopo_fast.optim.host_states import blocks_of

V = 64
CONFIGS = {"hybrid": FalconH1Config(), "multimodal": Gemma3Config()}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_slots(monkeypatch):
    evict = StreamedWeights._evict

    def poisoned(self, layer):
        slot = layer.slot
        evict(self, layer)
        slot.memory.fill_(255)  # NaN in every float dtype

    monkeypatch.setattr(StreamedWeights, "_evict", poisoned)


def made(family, dtype=torch.bfloat16, depth=4):
    """More layers than slots."""
    config = tiny_config(CONFIGS.get(family) or FAMILIES[family], range(depth))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mapping = MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) not in mapping:
            mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        model = mapping[type(config)](config).to(dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def optimizer_of(model, host=False, states="8bit"):
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdamW(trained, lr=1e-2, states=states, in_backward=True, max_grad_norm=0.5, device=CPU,
                 host_blocks=blocks_of(model) if host else ())  # fmt: skip


def loss_of(model, step):
    ids = torch.randint(1, V, (2, 12), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    "family, dtype, host, states, slots",
    [
        ("llama", torch.float32, False, "fp32", 3), ("qwen2", torch.bfloat16, False, "8bit", 2),  # the latter is tied
        ("gemma2", torch.bfloat16, True, "4bit", 3), ("qwen3_moe", torch.float32, True, "8bit", 2),
        ("hybrid", torch.bfloat16, True, "8bit", 3), ("multimodal", torch.bfloat16, False, "4bit", 9),
    ],
)  # fmt: skip
def test_equals_a_resident_model_bit_for_bit(family, dtype, host, states, slots):
    resident, streamed = made(family, dtype), made(family, dtype)
    for model in (resident, streamed):
        layers = streamed_layers(model)
        layers[1][2][0].requires_grad_(False)
    stream_weights(streamed, CPU, slots=slots)
    first = resident.get_input_embeddings().weight.detach().clone()
    a, b = optimizer_of(resident, states=states), optimizer_of(streamed, host, states)
    assert train(resident, a, 3) == train(streamed, b, 3)
    assert weights_equal(resident, streamed)
    assert not torch.equal(first, streamed.get_input_embeddings().weight)
    with torch.no_grad():
        assert torch.equal(loss_of(resident.eval(), 9), loss_of(streamed.eval(), 9))


def test_goes_with_checkpoints_of_layers_in_host_memory():
    """As transformers' `offload` does it, which without a GPU cannot pin."""

    def offloaded(function, *args):
        with torch.autograd.graph.save_on_cpu():
            return checkpoint(function, *args, use_reentrant=False)

    models = [made("qwen2"), made("qwen2")]
    for layer in models[1].model.layers:
        layer._gradient_checkpointing_func = offloaded
    stream_weights(models[1], CPU)
    assert train(models[0], optimizer_of(models[0]), 2) == train(models[1], optimizer_of(models[1]), 2)
    assert weights_equal(*models)


def test_what_layers_share_stays_on_the_device():
    models = [made("qwen2"), made("qwen2")]
    for model in models:
        model.model.layers[3].mlp.up_proj = model.model.layers[0].mlp.up_proj
    streamed = stream_weights(models[1], CPU)
    assert models[1].model.layers[0].mlp.up_proj.weight not in streamed.parameters
    assert train(models[0], optimizer_of(models[0]), 2) == train(models[1], optimizer_of(models[1], True), 2)
    assert weights_equal(*models)


def test_experts_without_gradients_and_frozen_layers_change_nothing():
    models = [made("qwen3_moe"), made("qwen3_moe")]
    stream_weights(models[1], CPU)
    optimizers = [optimizer_of(models[0]), optimizer_of(models[1], True)]
    for step in range(3):
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(step != 1 or not ("layers.1.mlp" in name or "layers.3" in name))
        assert train(models[0], optimizers[0], 1, step) == train(models[1], optimizers[1], 1, step)
    assert weights_equal(*models)


@pytest.mark.parametrize("slots", [2, 3])
def test_after_an_exception_in_the_backward_pass_every_update_is_kept_and_training_goes_on(slots):
    models = [made("qwen2"), made("qwen2")]
    streamed = stream_weights(models[1], CPU, slots=slots)
    optimizers = [optimizer_of(models[0]), optimizer_of(models[1], True)]

    def fail(grad):
        raise ArithmeticError("no gradient here")

    for model, optimizer in zip(models, optimizers, strict=True):
        hook = model.model.layers[1].self_attn.v_proj.weight.register_hook(fail)
        with pytest.raises(ArithmeticError):
            train(model, optimizer, 1)
        hook.remove()
        optimizer.step()
    assert weights_equal(*models) and len(streamed._vacant) == slots
    assert train(models[0], optimizers[0], 2, 1) == train(models[1], optimizers[1], 2, 1)
    assert weights_equal(*models)


def test_a_checkpoint_resumes_exactly_and_streamed_and_resident_exchange_theirs():
    whole, resumed = made("qwen2"), made("qwen2")
    stream_weights(whole, CPU, slots=3)
    stream_weights(resumed, CPU)
    optimizer, other = optimizer_of(whole), optimizer_of(resumed, True)
    train(whole, optimizer, 2)
    train(resumed, other, 1)
    with torch.no_grad():
        loss_of(resumed, 5)  # layers that nobody changed are in the slots, and have to go
    saved = {name: value.clone() for name, value in whole.state_dict().items()}
    resumed.load_state_dict(saved)
    other.load_state_dict(optimizer.state_dict())
    resident = made("qwen2")
    resident.load_state_dict(saved)
    third = optimizer_of(resident)
    third.load_state_dict(optimizer.state_dict())
    losses = train(whole, optimizer, 2, 2)
    assert losses == train(resumed, other, 2, 2) == train(resident, third, 2, 2)
    assert weights_equal(whole, resumed) and weights_equal(whole, resident)


@pytest.mark.parametrize("slots", range(2, 8))
def test_each_pass_fetches_what_is_not_in_slots_ahead_of_its_use(monkeypatch, slots):
    depth = 6
    model = made("qwen3", depth=depth)
    streamed = stream_weights(model, CPU, slots=slots)
    slots = min(slots, depth)
    assert len(streamed._vacant) == streamed.slots == slots
    optimizer, events = optimizer_of(model), []
    fetch, evict, copy = streamed._fetch, streamed._evict, streamed._transfers.write_back
    numbers = {layer: number for number, layer in enumerate(streamed._layers)}
    streamed._fetch = lambda layer: (events.append(("fetch", numbers[layer])), fetch(layer))[1]
    streamed._evict = lambda layer: (events.append(("leave", numbers[layer])), evict(layer))[1]
    streamed._transfers.write_back = lambda *a: (events.append(("write", None)), copy(*a))[1]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: events.append(("use", number)))
    upwards, downwards = list(range(slots, depth)), list(range(depth - slots - 1, -1, -1))
    for step in range(3):
        events.clear()
        train(model, optimizer, 1, step)
        fetched = [number for what, number in events if what == "fetch"]
        assert fetched == (list(range(slots)) if step == 0 else []) + upwards + downwards
        assert [number for what, number in events if what == "leave"] == downwards[::-1] + upwards[::-1]
        # What the passes changed is written once; what they left in slots in a later step, or never.
        written = len(upwards) + (sum(number < slots for number in downwards) if step else 0)
        assert sum(what == "write" for what, _ in events) == written
        for number in upwards:  # as soon as the layer that many below has been used
            above = events.index(("fetch", number))
            assert events.index(("use", number - slots)) < above < events.index(("use", number - slots + 1))
    streamed.settle()
    assert len(streamed._vacant) == slots and not streamed._resident


def test_a_pass_without_a_backward_pass_fetches_ahead_too():
    model = made("qwen3", depth=5)
    streamed = stream_weights(model, CPU, slots=3)
    fetched, fetch = [], streamed._fetch
    streamed._fetch = lambda layer: (fetched.append(layer.number), fetch(layer))[1]
    with torch.no_grad():
        for _ in range(2):
            loss_of(model, 0)
    assert fetched == [0, 1, 2, 3, 4] + [0, 1, 3, 4]  # 2 is there still


def test_host_memory_holds_the_layers_and_saving_sees_tensors_of_their_own():
    model = made("qwen2")
    sizes = host_bytes(made("qwen2").to("meta"))
    streamed = stream_weights(model, CPU)
    assert streamed.nbytes == sum(sizes) and {len(slot.memory) for slot in streamed._vacant} == {max(sizes)}
    layer = model.model.layers[2]
    assert sum(p.nbytes for p in layer.parameters()) <= sizes[2]
    state = model.state_dict()
    values = [value for name, value in state.items() if ".layers." in name]
    assert len({value.untyped_storage().data_ptr() for value in values}) == len(values)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in values)


def test_host_memory_goes_with_the_model_and_the_optimizer():
    """Pinned, it would be lost to the process, and to every other one."""
    model = made("qwen2")
    streamed = stream_weights(model, CPU)
    optimizer = optimizer_of(model, host=True)
    train(model, optimizer, 1)
    held = [weakref.ref(streamed._memory), weakref.ref(optimizer._host._memory)]
    del model, streamed, optimizer
    gc.collect()
    assert [each() for each in held] == [None, None]


def test_moving_a_model_leaves_its_layers_and_moves_the_rest():
    model = made("qwen2")
    streamed = stream_weights(model, CPU)
    model.to("meta")
    assert model.get_input_embeddings().weight.is_meta
    assert not any(parameter.is_meta for parameter in streamed.parameters)
    with pytest.raises(RuntimeError, match="the dtype of streamed weights"):
        model.to(torch.float64)


def test_what_would_differentiate_with_other_weights_is_refused():
    model = made("qwen2")
    streamed = stream_weights(model, CPU)
    with pytest.raises(RuntimeError, match=r"model.layers.0 is not checkpointed.*model.train\(\)"):
        loss_of(model.eval(), 0)
    model.train()
    model.model.layers[2].gradient_checkpointing = False
    with pytest.raises(RuntimeError, match=r"model.layers.2 is not checkpointed"):
        loss_of(model, 0)
    streamed.settle()
    with pytest.raises(RuntimeError, match=r"a part of model.layers.3 is called without the layer"):
        model.model.layers[3].mlp(torch.zeros(1, 1, model.config.hidden_size, dtype=torch.bfloat16))


def test_a_model_without_layers_that_are_recomputed_is_refused(monkeypatch):
    monkeypatch.setattr("amopo_fast.models.streaming.GradientCheckpointingLayer", type(None))
    with pytest.raises(OptionError, match="weights=host streams layers.*Qwen2ForCausalLM has no"):
        stream_weights(made("qwen2"), CPU)


def test_weights_that_are_not_finite_show_in_the_largest():
    model = made("qwen2")
    streamed = stream_weights(model, CPU)
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    expected = [max(float(p.detach().abs().max()) for p in layer.parameters()) for layer in model.model.layers]
    assert [float(value) for value in streamed.largest()] == expected
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf  # it may be in a slot or not
    train(model, optimizer, 1)
    assert not torch.stack(streamed.largest()).isfinite().all()
