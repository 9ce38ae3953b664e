"""Events put every copy of streamed weights and states in order with what it must not meet, seen without a GPU."""

import copy

import pytest
import torch
from packing_cases import FAMILIES
from stream_races import Actor, Race, Races
from transformers import Qwen2ForCausalLM

from amopo_fast.models.miniature import tiny_config
from amopo_fast.models.streaming import stream_weights
from amopo_fast.optim import AdamW, host_states
from amopo_fast.optim.host_memory import Transfers
from amopo_fast.optim.host_states import blocks_of

CPU = torch.device("cpu")


def loss_of(model, step):
    ids = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def fail(grad):
    raise ArithmeticError("no gradient here")


def train_everything_in_host_memory(monkeypatch, slots=2):
    """Evaluation between steps, an exception in a backward pass, a save and a load."""
    monkeypatch.setattr(host_states, "PIECE", 1024)
    config = tiny_config(FAMILIES["qwen2"], range(4))
    model = Qwen2ForCausalLM(config).bfloat16().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    races = Races(monkeypatch)
    streamed = stream_weights(model, CPU, slots=slots)
    optimizer = AdamW(model.parameters(), in_backward=True, device=CPU, host_blocks=blocks_of(model))
    watch(races, streamed, optimizer._host)

    def step(number):
        loss_of(model, number).backward()
        optimizer.step()

    def evaluate():
        with torch.no_grad():
            loss_of(model.eval(), 9)
        model.train()

    with races:
        step(0)
        evaluate()
        hook = model.model.layers[2].self_attn.v_proj.weight.register_hook(fail)
        with pytest.raises(ArithmeticError):
            step(1)
        hook.remove()
        optimizer.step()
        step(2)
        saved = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
        evaluate()
        optimizer.load_state_dict(saved[0])
        model.load_state_dict(saved[1])
        step(3)
    assert races.accesses > 1000


def step_few_states(monkeypatch):
    """A slot more than there are parcels: one that comes back finds a slot that nobody has to leave."""
    *weights, unused = (torch.nn.Parameter(torch.randn(64, 64)) for _ in range(3))
    races = Races(monkeypatch)
    optimizer = AdamW(weights, in_backward=True, host_blocks=[[each] for each in (*weights, unused)])
    watch(races, optimizer._host)
    with races:
        for _ in range(3):
            sum(weight.square().sum() for weight in weights).backward()
            optimizer.step()


def watch(races, *owners):
    slots, blocks = {}, {}
    for owner in owners:
        name = type(owner).__name__
        slots.update({f"slot {i} of {name}": slot.memory for i, slot in enumerate(owner._vacant)})
        blocks.update({f"block {i} of {name}": block for i, block in enumerate(owner._memory.blocks)})
    races.watch(slots, blocks)


@pytest.mark.parametrize("slots", [2, 4])
def test_nothing_that_streams_share_is_without_order(monkeypatch, slots):
    train_everything_in_host_memory(monkeypatch, slots)


def test_nor_where_slots_are_many(monkeypatch):
    step_few_states(monkeypatch)


def without(monkeypatch, name, lost):
    """Transfers whose fetch or write-back does not wait for the event at a place of `after`."""
    copy = getattr(Transfers, name)
    monkeypatch.setattr(Transfers, name, lambda self, pairs, after: copy(self, pairs, [
        event for place, event in enumerate(after) if place != lost]))  # fmt: skip


MISSING = {
    "the computation does not wait for a fetch": lambda m: m.setattr(Transfers, "wait_for", lambda self, event: None),
    "a fetch does not wait until its slot is free": lambda m: without(m, "fetch", 0),
    "a fetch does not wait until the host has what is newest": lambda m: without(m, "fetch", 1),
    "a write-back does not wait for the computation": lambda m: without(m, "write_back", 1),
    "slots are fetched into while they are zeroed": lambda m: m.setattr(Actor, "wait_stream", lambda *_: None),
    "the host does not wait for copies": lambda m: m.setattr(Transfers, "settle", lambda self: None),
}


@pytest.mark.parametrize("what", MISSING)
def test_one_event_less_is_seen(monkeypatch, what):
    MISSING[what](monkeypatch)
    with pytest.raises(Race):
        step_few_states(monkeypatch) if "newest" in what else train_everything_in_host_memory(monkeypatch)
