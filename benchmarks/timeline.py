"""A step's timeline with states, or weights and states, in host memory: simulated, not measured.

For each model and card the first way to train that fits by the memory estimate, of 4-bit states on the GPU, states in
host memory, weights there too, and layers' checkpoints there too. Its step is simulated (amopo_fast/memory/timeline.py)
at the rates that were measured on an H100: FLOP/s of whole steps, the optimizer's update, copies of pinned memory.
Other cards are taken to reach the same share of their peak, and PCIe 4 half of what PCIe 5 does. The rows go into
docs/memory.md by tables.py, some of them as a picture.

    PYTHONPATH=.:kernels python benchmarks/timeline.py --out benchmarks/results/timeline-cpu.json
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import sys
from dataclasses import dataclass

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

import harness
from amopo_fast.memory.estimate import Estimate, Row, Setup, estimate
from amopo_fast.memory.gpus import GPUS, Gpu
from amopo_fast.memory.parameters import parameters_of
from amopo_fast.memory.timeline import TO_GPU, TO_HOST, Timeline, simulate
from amopo_fast.memory.work import Work
from memory import SHAPES
from timeline_plot import Panel, draw

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
    states: str
    prediction: Estimate

    @property
    def slots(self) -> int | None:
        """Layers on the GPU at once; None: their weights stay there."""
        return self.prediction.work.weight_slots or None


def ways(config: PretrainedConfig, states: str, gpu: Gpu, slots: int | None = None):
    """From the least change on. slots: of weights; default: as many as training takes on that card, two at least."""
    for name, on_host, streams, offload in (
        (ON_GPU, False, False, False), (STATES, True, False, False), (BOTH, True, True, False), (ALL, True, True, True),
    ):  # fmt: skip
        setup = Setup(states=states, in_backward=True, host_states=on_host, host_weights=streams, offload=offload,
                      liger=True)  # fmt: skip
        prediction = estimate(config, ROW, setup)
        if streams:
            most = min(slots or prediction.slots_on(gpu.memory), config.num_hidden_layers)
            prediction = estimate(config, ROW, dataclasses.replace(setup, weight_slots=most))
        yield Way(name, states, prediction)


def first_that_fits(config: PretrainedConfig, gpu: Gpu, states: str) -> Way | None:
    return next((way for way in ways(config, states, gpu) if way.prediction.needed <= gpu.memory), None)


def of_tokens(work: Work, tokens: int) -> Work:
    """The step of a row of so many tokens. All FLOP grow with them, as sequences keep their length."""
    grows = ("forward", "recomputation", "gradients", "head_forward", "head_backward", "checkpoint_bytes")
    return dataclasses.replace(work, **{name: getattr(work, name) * tokens / TOKENS for name in grows})


def on_the_gpu(work: Work) -> Work:
    """The same step with all of it there."""
    return dataclasses.replace(work, checkpoint_bytes=0, state_slots=0, weight_slots=0)


def simulated(work: Work, gpu: Gpu, rates: Rates, lanes: float) -> Timeline:
    """lanes: of the links, over those of the measured ones."""
    rate, update = gpu.flops * rates.share_of_peak, rates.update[work.states]
    return simulate(work, rate, update, lanes * rates.to_gpu, lanes * rates.to_host)


def speed(work: Work, gpu: Gpu, rates: Rates, lanes: float) -> float:
    """Of the speed with everything on the GPU."""
    here, there = (simulated(each, gpu, rates, lanes) for each in (on_the_gpu(work), work))
    return here.seconds / there.seconds


def hides_from(work: Work, gpu: Gpu, rates: Rates, lanes: float) -> int | None:
    """Tokens of the shortest row, of multiples of 1024, at HIDDEN of the speed."""
    kibitokens = range(1, LONGEST // 1024 + 1)
    place = bisect.bisect_left(
        kibitokens, HIDDEN, key=lambda each: speed(of_tokens(work, 1024 * each), gpu, rates, lanes)
    )
    return 1024 * kibitokens[place] if place < len(kibitokens) else None


def with_slots(config: PretrainedConfig, gpu: Gpu, states: str, slots: int) -> Way:
    """Weights and states in host memory, with so many layers on the GPU at once."""
    way = next(each for each in ways(config, states, gpu, slots) if each.name == BOTH)
    return dataclasses.replace(way, name=f"{BOTH}, {way.slots} slots")


def row_of(
    model: str, card: str, rates: Rates, config: PretrainedConfig, slots: int = 0
) -> tuple[dict, Panel | None]:
    """`slots`: of weights; 0: the first way that fits, with as many as there is room for."""
    gpu = GPUS[CARDS[card]]
    case = {"case": f"{model}, {card}"}
    way = with_slots(config, gpu, "4bit", slots) if slots else first_that_fits(config, gpu, "4bit")
    if way is None:
        return {**case, "status": "does not fit"}, None
    work = way.prediction.work
    own = simulated(work, gpu, rates, LANES[OWN_PCIE[card]])
    row = {
        **case, "variant": way.name, "status": "predicted", "slots": way.slots,
        "GPU_bytes": way.prediction.needed, "host_bytes": way.prediction.host_pinned,
        "to_GPU_bytes": round(own.moved(TO_GPU)), "back_bytes": round(own.moved(TO_HOST)), "step, s": own.seconds,
        "tokens per s": round(TOKENS / own.seconds),
    }  # fmt: skip
    if way.name != ON_GPU:
        eight = with_slots(config, gpu, "8bit", slots) if slots else next(
            each for each in ways(config, "8bit", gpu) if each.name == way.name
        )
        for generation, share in LANES.items():
            row[f"speed, PCIe {generation}"] = speed(work, gpu, rates, share)
            row[f"from tokens, PCIe {generation}"] = hides_from(work, gpu, rates, share)
            row[f"8-bit, PCIe {generation}"] = speed(eight.prediction.work, gpu, rates, share)
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
