"""The simulated step issues the copies that training makes, in their order, and its time obeys the arithmetic."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from amopo_fast.models.streaming import stream_weights
from amopo_fast.optim import AdamW, host_states
from amopo_fast.optim.host_states import blocks_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import timeline  # noqa: E402
from timeline_simulation import TO_GPU, TO_HOST, simulate  # noqa: E402

CONFIG = Qwen2Config(vocab_size=3000, hidden_size=64, intermediate_size=160, num_hidden_layers=5,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
TWO_SLOTS = timeline.Gpu("full", 0, 1e15, 5e10, 5e10)
RATES = timeline.Rates(0.5, {"4bit": 1e-11, "8bit": 1.5e-11}, 50e9, 40e9)


def work(name, states="8bit", tokens=timeline.TOKENS):
    way = next(each for each in timeline.ways(CONFIG, states, TWO_SLOTS) if each.name == name)
    return timeline.work_of(CONFIG, way, timeline.GPUS["h100"], RATES, tokens)


def copies(result, kind):
    """(link, bytes) of the last step in the order in which they were issued."""
    return [(each.link, each.nbytes) for each in result.operations[result.first :] if each.kind == kind]


@pytest.fixture
def model(monkeypatch):
    """Its embedding and head are several pieces."""
    for module in (host_states, timeline):
        monkeypatch.setattr(module, "PIECE", 4096)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(CONFIG).to(torch.bfloat16).train()


class Copies(list):
    """(kind, link, bytes) of what an object fetches and evicts, in the order in which it is issued."""

    def record(self, monkeypatch, kind, mover, size):
        for name, link in (("_fetch", TO_GPU), ("_evict", TO_HOST)):
            monkeypatch.setattr(mover, name, self._recorded(kind, link, getattr(mover, name), size))

    def _recorded(self, kind, link, method, size):
        def call(what, **options):
            moves = link == TO_GPU or getattr(what, "changed", True)
            result = method(what, **options)
            if moves:
                self.append((kind, link, size(what)))
            return result

        return call


@pytest.mark.parametrize("states, name", [("4bit", timeline.STATES), ("8bit", timeline.BOTH)])
def test_copies_are_those_that_training_makes(model, monkeypatch, states, name):
    made, device = Copies(), torch.device("cpu")
    if name == timeline.BOTH:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        made.record(monkeypatch, "weights", stream_weights(model, device), lambda layer: layer.block.nbytes)
    optimizer = AdamW(model.parameters(), lr=1e-3, states=states, in_backward=True, host_blocks=blocks_of(model))
    made.record(monkeypatch, "states", optimizer._host, lambda parcel: sum(host.nbytes for host, _ in parcel.copies))
    for step in range(3):
        made.clear()
        ids = torch.randint(0, 3000, (1, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result = simulate(work(name, states), 50e9, 40e9)
    expected = [(each.kind, each.link, each.nbytes) for each in result.operations[result.first :] if each.link]
    assert [each[:2] for each in made] == [each[:2] for each in expected]
    assert len([each for each in made if each[0] == "states"]) > 2 * (5 + 2 * 2)  # head and embedding are pieces
    # Pieces are copied without the bytes that align their arrays, and layers' weights with them.
    assert [size for *_, size in made] == pytest.approx([size for *_, size in expected], rel=0.02)


def test_a_step_takes_what_its_computation_or_its_busiest_link_takes():
    here = work(timeline.ON_GPU)
    alone = simulate(here, 1e9, 1e9).seconds
    layers = here.layers * (2 * here.forward + here.gradients)
    update = here.update * sum(p.numel for p in timeline.parameters_of(CONFIG))
    assert alone == pytest.approx(layers + here.head_forward + here.head_backward + update)
    for name in (timeline.STATES, timeline.BOTH, timeline.ALL):
        there = work(name)
        assert simulate(there, 1e18, 1e18).seconds == pytest.approx(alone)
        slow = simulate(there, 1e6, 1e7)
        assert slow.seconds >= max(slow.moved(TO_GPU) / 1e6, slow.moved(TO_HOST) / 1e7) > 100 * alone
        assert slow.moved(TO_GPU) >= slow.moved(TO_HOST) > 0
        between = simulate(there, 1e9, 1e9).seconds
        assert alone < between < slow.seconds


def test_every_operation_waits_for_what_it_needs_and_a_link_carries_one_copy_at_a_time():
    result = simulate(work(timeline.ALL), 2e9, 1e9)
    for operation in result.operations:
        assert all(each.end <= operation.begin + 1e-12 for each in operation.after)
    for name in ("stream", "link"):
        lanes = {}
        for operation in sorted(result.operations, key=lambda each: (each.begin, each.end)):
            lane = getattr(operation, name)
            assert lane is None or lanes.get(lane, -1e9) <= operation.begin + 1e-12
            lanes[lane] = operation.end


def test_all_of_the_states_move_once_and_weights_twice_but_for_where_the_passes_turn():
    there = work(timeline.BOTH)
    result = simulate(there, 50e9, 40e9)
    states = [0, 0]
    for link, nbytes in copies(result, "states"):
        states[link == TO_HOST] += nbytes
    way = next(each for each in timeline.ways(CONFIG, "8bit", TWO_SLOTS) if each.name == timeline.STATES)
    assert states[0] == states[1] == pytest.approx(way.prediction.host_pinned, rel=0.01)
    moved = copies(result, "weights")
    count = CONFIG.num_hidden_layers
    assert moved.count((TO_GPU, there.weight_bytes)) == 2 * (count - 2)
    assert moved.count((TO_HOST, there.weight_bytes)) == count and len(moved) == 3 * count - 4


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["timeline.py", "--smoke", "--out", str(tmp_path / "report.json")])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "benchmarks" / "timeline.py"), run_name="__main__")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["predicted"] * 3 and all(row["step, s"] > 0 for row in rows)
