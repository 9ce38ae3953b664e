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
from amopo_fast.memory import speed  # noqa: E402
from amopo_fast.memory.timeline import TO_GPU, TO_HOST, simulate  # noqa: E402

CONFIG = Qwen2Config(vocab_size=3000, hidden_size=64, intermediate_size=160, num_hidden_layers=5,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
FULL = timeline.Gpu("full", 0, 1e15, 5e10, 5e10)
RATE, UPDATE = 5e14, 1.5e-11


def way_of(name, states="8bit", slots=2):
    return next(each for each in timeline.ways(CONFIG, states, FULL, slots) if each.name == name)


def work(name, states="8bit", slots=2):
    return way_of(name, states, slots).prediction.work


def simulated(work, to_gpu, to_host):
    return simulate(work, RATE, UPDATE, to_gpu, to_host)


def copies(result, kind):
    """(link, bytes) of the last step in the order in which they were issued."""
    return [(each.link, each.nbytes) for each in result.operations[result.first :] if each.kind == kind]


@pytest.fixture
def model(monkeypatch):
    """Its embedding and head are several pieces."""
    monkeypatch.setattr(host_states, "PIECE", 4096)
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
    result = simulated(work(name, states), 50e9, 40e9)
    expected = [(each.kind, each.link, each.nbytes) for each in result.operations[result.first :] if each.link]
    assert [each[:2] for each in made] == [each[:2] for each in expected]
    assert len([each for each in made if each[0] == "states"]) > 2 * (5 + 2 * 2)  # head and embedding are pieces
    # Pieces are copied without the bytes that align their arrays, and layers' weights with them.
    assert [size for *_, size in made] == pytest.approx([size for *_, size in expected], rel=0.02)


def test_a_step_takes_what_its_computation_or_its_busiest_link_takes():
    here = work(timeline.ON_GPU)
    alone = simulated(here, 1e9, 1e9).seconds
    prediction = way_of(timeline.ON_GPU).prediction
    assert alone == pytest.approx(prediction.flops / RATE + UPDATE * prediction.trained)
    for name in (timeline.STATES, timeline.BOTH, timeline.ALL):
        there = work(name)
        assert simulated(there, 1e18, 1e18).seconds == pytest.approx(alone)
        slow = simulated(there, 1e6, 1e7)
        assert slow.seconds >= max(slow.moved(TO_GPU) / 1e6, slow.moved(TO_HOST) / 1e7) > 100 * alone
        assert slow.moved(TO_GPU) >= slow.moved(TO_HOST) > 0
        between = simulated(there, 1e9, 1e9).seconds
        assert alone < between < slow.seconds


def test_every_operation_waits_for_what_it_needs_and_a_link_carries_one_copy_at_a_time():
    result = simulated(work(timeline.ALL), 2e9, 1e9)
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
    result = simulated(there, 50e9, 40e9)
    states = [0, 0]
    for link, nbytes in copies(result, "states"):
        states[link == TO_HOST] += nbytes
    pinned = way_of(timeline.STATES).prediction.host_pinned
    assert states[0] == states[1] == pytest.approx(pinned, rel=0.01)
    moved = copies(result, "weights")
    count = CONFIG.num_hidden_layers
    assert moved.count((TO_GPU, there.weight_bytes)) == 2 * (count - 2)
    assert moved.count((TO_HOST, there.weight_bytes)) == count and len(moved) == 3 * count - 4


@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_bytes_of_a_step_are_those_that_are_copied(slots):
    for name in (timeline.STATES, timeline.BOTH, timeline.ALL):
        there = work(name, slots=slots)
        result = simulated(there, 50e9, 40e9)
        assert (result.moved(TO_GPU), result.moved(TO_HOST)) == pytest.approx((there.to_device, there.to_host)), name


def test_the_estimate_takes_the_measured_rates():
    """speed.py's are those of the stored reports, so that its verdict is the table's."""
    rates = timeline.measured_rates()
    assert pytest.approx(rates.share_of_peak, rel=0.02) == speed.EFFICIENCY
    assert {states: pytest.approx(seconds, rel=0.01) for states, seconds in rates.update.items()}.items() <= (
        speed.UPDATE.items())  # fmt: skip
    gpu = timeline.GPUS["h100"]
    there, rate = work(timeline.BOTH, slots=5), gpu.flops * speed.EFFICIENCY
    found = speed.time_of(way_of(timeline.BOTH).prediction, gpu)
    assert found.total == pytest.approx(simulate(
        there, rate, speed.UPDATE["8bit"], gpu.to_device, gpu.to_host).seconds)  # fmt: skip


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["timeline.py", "--smoke", "--out", str(tmp_path / "report.json")])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "benchmarks" / "timeline.py"), run_name="__main__")
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["predicted"] * 3 and all(row["step, s"] > 0 for row in rows)
