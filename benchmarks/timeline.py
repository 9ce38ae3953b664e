"""A step's timeline with states, or weights and states, in host memory: simulated, not measured.

For each model and card the first way to train that fits by the memory estimate, of 4-bit states on the GPU, states in
host memory, weights there too, and layers' checkpoints there too. Its step is simulated (timeline_simulation.py) at the
rates that were measured on an H100: FLOP/s of whole steps, the optimizer's update, copies of pinned memory. Other cards
are taken to reach the same share of their peak, and PCIe 4 half of what PCIe 5 does. The rows go into docs/memory.md by
tables.py, some of them as a picture.

    PYTHONPATH=.:kernels python benchmarks/timeline.py --out benchmarks/results/timeline-cpu.json
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

import harness
from amopo_fast.memory.estimate import Estimate, Row, Setup, estimate
from amopo_fast.memory.gpus import GPUS, Gpu
from amopo_fast.memory.parameters import parameters_of
from amopo_fast.optim.host_states import SLOTS, parcel_bytes, slot_bytes
from amopo_fast.optim.update import PIECE
from amopo_fast.training.loading import weight_slots
from memory import SHAPES
from timeline_plot import Panel, draw
from timeline_simulation import TO_GPU, TO_HOST, Parcel, Work, simulate

RESULTS = harness.ROOT / "benchmarks" / "results"
PICTURE = RESULTS / "timeline.png"
TOKENS = 8192
ROW = Row(tokens=TOKENS, label_tokens=TOKENS // 2, kv_tokens=2 * TOKENS)  # as `amopo-fast estimate` has it
MODELS: dict[str, PretrainedConfig] = {
    **{name: Qwen2Config(**SHAPES[name]) for name in ("7B", "14B", "32B")},
    # Llama 3 and Mistral Large 2, from their configurations.
    "70B": LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                       num_attention_heads=64, num_key_value_heads=8),
    "123B": MistralConfig(vocab_size=32768, hidden_size=12288, intermediate_size=28672, num_hidden_layers=88,
                          num_attention_heads=96, num_key_value_heads=8, sliding_window=None),
}  # fmt: skip
SMOKE = {"smoke": Qwen2Config(**{**SHAPES["cpu"], "num_hidden_layers": 5})}
CARDS = {"RTX 4090": "4090", "H100 80 GB": "h100", "H200": "h200"}
LANES = {"4": 0.5, "5": 1.0}  # PCIe generation -> its rate in that of generation 5
OWN_PCIE = {"RTX 4090": "4", "H100 80 GB": "5", "H200": "5"}
HIDDEN = 0.95  # of the speed with everything on the GPU
LONGEST = 1 << 16  # tokens, where the search for a row that hides the transfers ends
SLOTS_TOLD = (2, 3, 6, 12, 24)  # of weights, for SLOTS_OF
SLOTS_OF = ("32B", "H100 80 GB")
PICTURED = (("32B", "H100 80 GB"), ("32B", "RTX 4090"), ("70B", "RTX 4090"))
ON_GPU, STATES, BOTH, ALL = (
    "on the GPU", "states in host memory", "weights and states in host memory", "weights, states and checkpoints there"
)  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Of an H100, measured."""

    share_of_peak: float  # FLOP/s over the dense bfloat16 peak
    update: dict[str, float]  # seconds per parameter, by states
    to_gpu: float  # bytes/s
    to_host: float


def measured_rates() -> Rates:
    """From the stored reports. The share of the peak is that of whole steps, less the update's own time."""

    def rows(name: str) -> dict[str, dict]:
        content = json.loads((RESULTS / f"{name}-nvidia-h100-80gb-hbm3.json").read_text())
        return {row["variant"]: row for row in content["rows"]}

    optimizer, machine = rows("optimizer_update"), rows("machine")
    numel = 152064 * 5120  # the case of optimizer_update.py
    update = {states: optimizer[f"ours, {states}"]["median_ms"] / 1e3 / numel for states in ("4bit", "8bit")}
    step = rows("memory_14B")["8-bit, in backward, recomputed"]
    parameters = sum(p.numel for p in parameters_of(MODELS["14B"]))
    seconds = step["median_ms"] / 1e3
    tokens = step["computed_tokens_per_s"] * seconds
    flops = step["flop"] / step["longest_tokens"] * tokens / (seconds - update["8bit"] * parameters)
    to_gpu, to_host = (machine[f"{way}, pinned"]["bytes_per_s"] for way in ("host to device", "device to host"))
    return Rates(flops / GPUS["h100"].flops, update, to_gpu, to_host)


@dataclass(frozen=True)
class Way:
    """How a model is trained on a card, and what that takes."""

    name: str
    setup: Setup
    weight_slots: int  # 0: weights on the GPU
    prediction: Estimate
    needed: int  # bytes of the GPU
    host: int


def layer_bytes(config: PretrainedConfig) -> int:
    """Of one decoder layer's weights in bfloat16."""
    return 2 * sum(p.numel for p in parameters_of(config) if p.place == "layer") // config.num_hidden_layers


def ways(config: PretrainedConfig, states: str, gpu: Gpu):
    """From the least change on. With as many slots as training takes on that card, if it has room for two."""
    for name, on_host, streams, offload in (
        (ON_GPU, False, False, False), (STATES, True, False, False), (BOTH, True, True, False), (ALL, True, True, True),
    ):  # fmt: skip
        setup = Setup(states=states, in_backward=True, host_states=on_host, host_weights=streams, offload=offload,
                      liger=True)  # fmt: skip
        if streams:
            sizes = [layer_bytes(config)] * config.num_hidden_layers
            setup = dataclasses.replace(setup, weight_slots=weight_slots(config, ROW, setup, sizes, gpu.memory))
        prediction = estimate(config, ROW, setup)
        slots = setup.weight_slots if streams else 0
        yield Way(name, setup, slots, prediction, prediction.needed, prediction.host_pinned)


def first_that_fits(config: PretrainedConfig, gpu: Gpu, states: str) -> Way | None:
    return next((way for way in ways(config, states, gpu) if way.needed <= gpu.memory), None)


def pieces(name: str, numel: int, states: str, room: int) -> list[Parcel]:
    """Of a parameter outside of the layers, as optim/host_states.py cuts it."""
    most = numel
    if numel > PIECE and parcel_bytes([numel], states) > room:
        most = max(1, room // parcel_bytes([PIECE], states)) * PIECE
    sizes = [min(most, numel - begin) for begin in range(0, numel, most)]
    return [Parcel((name, place), size, parcel_bytes([size], states)) for place, size in enumerate(sizes)]


def work_of(config: PretrainedConfig, way: Way, gpu: Gpu, rates: Rates, tokens: int = TOKENS) -> Work:
    """The step's operations. All FLOP grow with the tokens of a row, as sequences keep their length."""
    parameters, layers = parameters_of(config), config.num_hidden_layers
    blocks: dict[int | None, list[int]] = {}
    for p in parameters:
        blocks.setdefault(p.block, []).append(p.numel)
    layer_block = next(block for block in blocks.values() if len(block) > 1)
    room = slot_bytes(list(blocks.values()), way.setup.states)
    head, embedding = [], []
    for p in reversed(parameters):
        if p.place != "layer":
            target = embedding if p.place == "embedding" else head
            target += pieces(p.place, p.numel, way.setup.states, room)
    second = gpu.flops * rates.share_of_peak
    product = 2 * ROW.label_tokens * config.vocab_size * config.hidden_size
    forward = (way.prediction.forward_flops - product) / layers
    gradients = (way.prediction.flops - 4 * product) / layers - 2 * forward
    scale = tokens / TOKENS / second
    return Work(
        layers=layers, forward=forward * scale, gradients=gradients * scale, head_forward=product * scale,
        head_backward=3 * product * scale, update=rates.update[way.setup.states], layer_numel=sum(layer_block),
        weight_bytes=layer_bytes(config), head=head, embedding=embedding,
        layer_states=parcel_bytes(layer_block, way.setup.states),
        checkpoint_bytes=2 * tokens * config.hidden_size if way.setup.offload else 0,
        state_slots=SLOTS if way.setup.host_states else 0, weight_slots=way.weight_slots,
    )  # fmt: skip


def on_the_gpu(work: Work) -> Work:
    """The same step with all of it there."""
    return dataclasses.replace(work, checkpoint_bytes=0, state_slots=0, weight_slots=0)


def speed(work: Work, rates: Rates, lanes: float) -> float:
    """Of the speed with everything on the GPU."""
    here, there = (simulate(each, lanes * rates.to_gpu, lanes * rates.to_host) for each in (on_the_gpu(work), work))
    return here.seconds / there.seconds


def hides_from(work_at: Callable[[int], Work], rates: Rates, lanes: float) -> int | None:
    """Tokens of the shortest row, of multiples of 1024, at HIDDEN of the speed."""
    kibitokens = range(1, LONGEST // 1024 + 1)
    place = bisect.bisect_left(kibitokens, HIDDEN, key=lambda each: speed(work_at(1024 * each), rates, lanes))
    return 1024 * kibitokens[place] if place < len(kibitokens) else None


def with_slots(config: PretrainedConfig, gpu: Gpu, states: str, slots: int) -> Way:
    """Weights and states in host memory, with so many layers on the GPU at once."""
    way = next(each for each in ways(config, states, gpu) if each.name == BOTH)
    slots = min(slots, config.num_hidden_layers)
    needed = way.needed - (way.weight_slots - slots) * layer_bytes(config)
    return dataclasses.replace(way, name=f"{BOTH}, {slots} slots", weight_slots=slots, needed=needed)


def row_of(
    model: str, card: str, rates: Rates, config: PretrainedConfig, slots: int = 0
) -> tuple[dict, Panel | None]:
    """`slots`: of weights; 0: the first way that fits, with as many as there is room for."""
    gpu = GPUS[CARDS[card]]
    case = {"case": f"{model}, {card}"}
    way = with_slots(config, gpu, "4bit", slots) if slots else first_that_fits(config, gpu, "4bit")
    if way is None:
        return {**case, "status": "does not fit"}, None
    work = work_of(config, way, gpu, rates)
    lanes = LANES[OWN_PCIE[card]]
    own = simulate(work, lanes * rates.to_gpu, lanes * rates.to_host)
    row = {
        **case, "variant": way.name, "status": "predicted", "slots": way.weight_slots or None,
        "GPU_bytes": way.needed, "host_bytes": way.host,
        "to_GPU_bytes": own.moved(TO_GPU), "back_bytes": own.moved(TO_HOST), "step, s": own.seconds,
        "tokens per s": round(TOKENS / own.seconds),
    }  # fmt: skip
    if way.name != ON_GPU:
        eight = with_slots(config, gpu, "8bit", slots) if slots else next(
            each for each in ways(config, "8bit", gpu) if each.name == way.name
        )
        for generation, share in LANES.items():
            row[f"speed, PCIe {generation}"] = speed(work, rates, share)
            row[f"from tokens, PCIe {generation}"] = hides_from(
                lambda tokens: work_of(config, way, gpu, rates, tokens), rates, share
            )
            row[f"8-bit, PCIe {generation}"] = speed(work_of(config, eight, gpu, rates), rates, share)
    return row, Panel(f"{model} on one {card}: {way.name}, PCIe {OWN_PCIE[card]}", work, own)


def main() -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    arguments.device = "cpu"
    report = harness.Report("timeline", arguments)
    rates = measured_rates()
    panels = {}
    for model, config in (SMOKE if arguments.smoke else MODELS).items():
        for card in CARDS:
            row, panels[model, card] = row_of(model, card, rates, config)
            report.add(**row)
    for slots in SLOTS_TOLD if not arguments.smoke else ():
        row, _ = row_of(*SLOTS_OF, rates, MODELS[SLOTS_OF[0]], slots)
        report.add(**row)
    if not arguments.smoke:
        draw([panels[each] for each in PICTURED], PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
