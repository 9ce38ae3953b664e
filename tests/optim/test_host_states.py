"""States in host memory give bit for bit what states on the device give, with slots that hold NaN when nobody is there.

On a CPU host and slots are different buffers, so a stale or lost transfer shows in the weights.
"""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from amopo_fast.optim import AdamW, host_states, update
from amopo_fast.optim.host_states import HostStates, blocks_of, parcel_bytes, slot_bytes
from amopo_fast.optim.states import moment_bytes

VOCABULARY = 1280  # 64 columns: more elements than a layer has, so the embedding travels in pieces
SMALL = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
MIXTURE = dict(SMALL, num_hidden_layers=3, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=64, head_dim=32)


@pytest.fixture(autouse=True)
def small_pieces_and_poisoned_slots(monkeypatch):
    evict = HostStates._evict

    def poisoned(self, parcel):
        slot = self._resident[parcel]
        evict(self, parcel)
        slot.memory.fill_(255)  # NaN in float32; codes of the largest values
        slot.memory[4:].fill_(127)

    monkeypatch.setattr(update, "PIECE", 4096)
    monkeypatch.setattr(host_states, "PIECE", 4096)
    monkeypatch.setattr(HostStates, "_evict", poisoned)


def language_model(tied=False, dtype=torch.bfloat16, kind="dense"):
    torch.manual_seed(0)
    if kind == "experts":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE, tie_word_embeddings=tied)).to(dtype)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, num_hidden_layers=4, tie_word_embeddings=tied)).to(dtype)


def optimizer_of(model, host, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    small = [p for p in trained if p.dim() < 2]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1}, {"params": small, "lr": 3e-3}]
    blocks = blocks_of(model) if host else ()
    return AdamW(groups, lr=1e-2, in_backward=True, max_grad_norm=0.5, host_blocks=blocks, **options)


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        ids = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    pairs = [(state, b["state"][number]) for number, state in a["state"].items()]
    return bool(pairs) and all(torch.equal(value, y[name]) for x, y in pairs for name, value in x.items())


@pytest.mark.parametrize(
    "states, dtype, tied",
    [("fp32", torch.float32, True), ("fp32", torch.bfloat16, False), ("8bit", torch.float32, False),
     ("8bit", torch.bfloat16, True), ("4bit", torch.bfloat16, False)],
)  # fmt: skip
def test_equals_states_on_the_device_bit_for_bit(states, dtype, tied):
    models = [language_model(tied, dtype) for _ in range(2)]
    for model in models:
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    device, host = (optimizer_of(model, at, states=states) for model, at in zip(models, (False, True), strict=True))
    assert train(models[0], device, 3) == train(models[1], host, 3)
    assert weights_equal(*models) and states_equal(device, host)
    assert not weights_equal(models[1], language_model(tied, dtype))


@pytest.mark.parametrize("order", ["as it comes", "predicted wrongly", "two slots"])
def test_layers_that_get_no_gradient_and_wrong_guesses_change_nothing(order, monkeypatch):
    """Experts that no token chose, frozen in one of three steps too: their layers never complete."""
    if order == "two slots":
        monkeypatch.setattr(host_states, "SLOTS", 2)
    models = [language_model(kind="experts") for _ in range(2)]
    optimizers = [optimizer_of(model, at, states="8bit") for model, at in zip(models, (False, True), strict=True)]
    for step in range(3):
        if order == "predicted wrongly":
            parcels = list(optimizers[1]._host._next)
            optimizers[1]._host._next = dict(zip(parcels, reversed(parcels), strict=True))
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not (step == 1 and "layers.1.mlp" in name))
        assert train(models[0], optimizers[0], 1, step) == train(models[1], optimizers[1], 1, step)
    assert weights_equal(*models) and states_equal(*optimizers)


@pytest.mark.parametrize("states, to_host", [("fp32", True), ("4bit", False)])
def test_a_checkpoint_resumes_exactly_wherever_the_states_are(states, to_host):
    whole, resumed = language_model(), language_model()
    optimizer = optimizer_of(whole, not to_host, states=states)
    train(whole, optimizer, 2)
    resumed.load_state_dict(whole.state_dict())
    other = optimizer_of(resumed, to_host, states=states)
    train(resumed, other, 1)  # its own states have to go
    resumed.load_state_dict(whole.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert train(whole, optimizer, 3, 2) == train(resumed, other, 3, 2)
    assert weights_equal(whole, resumed) and states_equal(optimizer, other)


def test_after_an_exception_in_the_backward_pass_the_host_has_every_update():
    models = [language_model() for _ in range(2)]
    optimizers = [optimizer_of(model, at, states="8bit") for model, at in zip(models, (False, True), strict=True)]

    def fail(grad):
        raise ArithmeticError("no gradient here")

    for model, optimizer in zip(models, optimizers, strict=True):
        model.model.layers[1].self_attn.v_proj.weight.register_hook(fail)
        with pytest.raises(ArithmeticError):
            train(model, optimizer, 1)
    assert states_equal(*optimizers) and weights_equal(*models)


def test_a_gradient_that_is_not_finite_changes_nothing_from_there_on():
    model = language_model()
    optimizer = optimizer_of(model, True, states="8bit")
    train(model, optimizer, 1)
    layer = model.model.layers[0]
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    moments = {p: [t.clone() for t in optimizer.state[p].values()][1:] for p in layer.parameters()}
    model.model.layers[2].mlp.down_proj.weight.register_hook(lambda grad: grad * float("nan"))
    train(model, optimizer, 1, 1)
    optimizer.state_dict()  # settles
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
    for parameter, kept in moments.items():
        assert all(torch.equal(a, b) for a, b in zip(list(optimizer.state[parameter].values())[1:], kept, strict=True))


def test_a_state_dict_that_never_began_holds_no_states_and_loads_as_zeros():
    """accelerate moves an optimizer's states to the device when it wraps it: with 32B, more than there is room for."""
    model, twin = language_model(), language_model()
    optimizer = optimizer_of(model, True, states="8bit")
    fresh = optimizer.state_dict()
    assert fresh["state"] == {}
    train(model, optimizer, 2)
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    model.load_state_dict(twin.state_dict())
    optimizer.load_state_dict(fresh)
    assert train(model, optimizer, 3) == train(twin, optimizer_of(twin, True, states="8bit"), 3)


def test_a_layer_travels_once_each_way_while_the_one_above_is_stepped(monkeypatch):
    model = language_model()
    optimizer = optimizer_of(model, True, states="8bit")
    host, events, names = optimizer._host, [], {}
    for name, parameter in model.named_parameters():
        names[parameter] = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
    fetch, evict, visit = host._fetch, host._evict, host.visit

    def told(what, call):
        def wrapped(parcel):
            events.append((what, names[next(iter(parcel.places))]))
            return call(parcel)

        return wrapped

    def told_visit(parameter):
        for piece in visit(parameter):
            events.append(("use", names[parameter]))
            yield piece

    host._fetch, host._evict, host.visit = told("fetch", fetch), told("evict", evict), told_visit
    host._next = {}  # what follows what is learnt in the first step
    for step in range(2):
        events.clear()
        train(model, optimizer, 1, step)
        assert [name for what, name in events if what == "fetch"].count("2") == 1
        assert [name for what, name in events if what == "evict"].count("2") == 1
        for above, layer in (("3", "2"), ("2", "1"), ("1", "0")):
            assert events.index(("evict", above)) < events.index(("use", layer))
            assert step == 0 or events.index(("fetch", layer)) < events.index(("use", above))
    assert sum(what == "fetch" for what, _ in events) == len(set(map(id, sum(host._parcels.values(), []))))


def test_slots_are_those_of_a_layer_and_large_parameters_travel_in_pieces():
    model = language_model()
    blocks = [[p.numel() for p in block] for block in blocks_of(model)]
    assert [len(block) for block in blocks] == [1, 12, 12, 12, 12, 1, 1]  # embedding, layers, norm, head
    layer = parcel_bytes(blocks[1], "4bit")
    assert sum(moment_bytes(n, "4bit") for n in blocks[1]) <= layer == slot_bytes(blocks, "4bit")
    host = optimizer_of(model, True, states="4bit")._host
    assert len(host._vacant) == host_states.SLOTS and all(len(slot.memory) == layer for slot in host._vacant)
    assert host.nbytes == sum(moment_bytes(p.numel(), "4bit") for p in model.parameters())
    head = host._parcels[model.lm_head.weight]
    assert [place[:2] for parcel in head for place in parcel.places.values()] == [(0, 57344), (57344, 81920)]
    alone = HostStates([[nn.Parameter(torch.zeros(VOCABULARY, 64))]], "4bit")
    (parcels,) = alone._parcels.values()
    assert [place[:2] for parcel in parcels for place in parcel.places.values()] == [
        (begin, begin + 4096) for begin in range(0, 81920, 4096)
    ]


def test_states_are_made_for_the_device_that_is_named():
    """Of weights that lie in host memory between their updates."""
    weight, meta = nn.Parameter(torch.zeros(64, 64)), torch.device("meta")
    for blocks in ((), [[weight]]):
        optimizer = AdamW([weight], states="8bit", in_backward=True, host_blocks=blocks, device=meta)
        assert optimizer.state[weight]["exp_avg_codes"].is_meta == (not blocks)
    assert all(slot.memory.is_meta for slot in optimizer._host._vacant)


def test_what_cannot_work_is_refused():
    weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="host_blocks need in_backward"):
        AdamW([weight], host_blocks=[[weight]])
    double = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="float32 at most"):
        AdamW([double], host_blocks=[[double]], in_backward=True)
    with pytest.raises(ValueError, match=r"on one device, found \['cpu', 'meta'\]"):
        HostStates([[weight, nn.Parameter(torch.zeros(4, device="meta"))]], "fp32")


def test_memory_that_cannot_be_had_is_told_with_numbers():
    huge = nn.Parameter(torch.empty(1 << 56, device="meta"))
    with pytest.raises(RuntimeError, match=r"need 536870912.0 GiB of pinned host memory, and after 0.0 GiB"):
        HostStates([[huge]], "fp32")
