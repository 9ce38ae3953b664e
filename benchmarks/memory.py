"""Peak memory and speed of whole optimizer steps, beside the estimate's prediction and beside plain transformers.

Every row is a process of its own that goes the way of `amopo-fast train`: the memory check, the model made on the
device with random weights in Qwen2.5's shapes, AMoPOTrainer, its optimizer and its loop, on pairs with the lengths of
real ones. Two steps warm up and create the optimizer's states, the ones behind them are measured: one peak, and the
time from one step's beginning to the next. `plain` rows train the same pairs with transformers and torch alone: padded
sequences, one pair a step, float32 weights with bfloat16 autocast, full logits, fused AdamW. The prediction is made
before the row is run. On a CPU (--smoke) the bytes of tensors are counted as they are made.

    PYTHONPATH=.:kernels python benchmarks/memory.py --out memory.json --model 32B
    PYTHONPATH=.:kernels python benchmarks/memory.py --out memory.json --model 32B --layers 16 --only "4-bit"

The second shows in a minute whether the backward pass hides the transfers of states in host memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PrinterCallback, ProgressCallback, Qwen2Config, TrainerCallback

import harness
from step import SHAPES, Step, Technique
from step_data import DIMENSIONS, lengths, random_pairs

if TYPE_CHECKING:
    from amopo_fast.memory.estimate import Estimate

SHAPES = SHAPES | {
    "32B": dict(num_hidden_layers=64, hidden_size=5120, intermediate_size=27648, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False),
    "smoke": SHAPES["smoke"] | {"num_hidden_layers": 4},
}  # fmt: skip
WARMUP = 2
PREDICTED = "h100"  # the card of --predict
BF16 = {"weight_precision": "bf16_stochastic"}
RECOMPUTED = {"gradient_checkpointing": True}
IN_BACKWARD_8, IN_BACKWARD_4 = {**BF16, "optim_in_backward": "adamw_8bit"}, {**BF16, "optim_in_backward": "adamw_4bit"}
HOST = {"optimizer_states": "host"}
BOTH = HOST | {"weights": "host"}
# (shape, variant, options of AMoPOConfig, adapters and slots of layers, computed tokens of a micro-batch), most telling
# first. Weights on the host are in as many slots as a run chooses on that card, where no number is given.
ROWS = [
    ("32B", "4-bit, in backward", IN_BACKWARD_4 | RECOMPUTED, 8192),
    ("32B", "8-bit, in backward", IN_BACKWARD_8 | RECOMPUTED, 8192),
    ("32B", "4-bit on the host", IN_BACKWARD_4 | RECOMPUTED | HOST, 8192),
    ("32B", "4-bit, weights on the host too, 2 slots", IN_BACKWARD_4 | RECOMPUTED | BOTH | {"slots": 2}, 8192),
    ("32B", "8-bit on the host", IN_BACKWARD_8 | RECOMPUTED | HOST, 8192),
    ("32B", "4-bit, weights on the host too", IN_BACKWARD_4 | RECOMPUTED | BOTH, 8192),
    ("32B", "4-bit, weights on the host too, 5 slots", IN_BACKWARD_4 | RECOMPUTED | BOTH | {"slots": 5}, 8192),
    ("32B", "LoRA", {"use_peft": True, **RECOMPUTED}, 8192),
    ("32B", "QLoRA", {"use_peft": True, "load_in_4bit": True, **RECOMPUTED}, 8192),
    ("32B", "4-bit, in backward, 8 layers kept", IN_BACKWARD_4 | RECOMPUTED | {"keep_layers": 8}, 8192),
    ("7B", "8-bit, in backward", IN_BACKWARD_8, 8192),
    ("7B", "8-bit, in backward, recomputed", IN_BACKWARD_8 | RECOMPUTED, 8192),
    ("7B", "8-bit, in backward, recomputed, full_determinism",
     IN_BACKWARD_8 | RECOMPUTED | {"full_determinism": True}, 8192),
    ("7B", "fp32, recomputed", {"weight_precision": "fp32", **RECOMPUTED}, 8192),
    ("7B", "LoRA", {"use_peft": True}, 8192),
    ("7B", "plain", {}, 0),
    ("14B", "8-bit, in backward, recomputed", IN_BACKWARD_8 | RECOMPUTED, 8192),
    ("14B", "4-bit, in backward, recomputed", IN_BACKWARD_4 | RECOMPUTED, 16384),
    ("14B", "8-bit on the host", IN_BACKWARD_8 | RECOMPUTED | HOST, 8192),
    ("14B", "8-bit, weights on the host too, 2 slots", IN_BACKWARD_8 | RECOMPUTED | BOTH | {"slots": 2}, 8192),
    ("14B", "8-bit, weights on the host too", IN_BACKWARD_8 | RECOMPUTED | BOTH, 8192),
    ("14B", "plain", {}, 0),
    ("0.5B", "fp32", {"weight_precision": "fp32"}, 8192),
    ("0.5B", "fp32, in backward", {"weight_precision": "fp32", "optim_in_backward": "adamw"}, 8192),
    ("0.5B", "plain", {}, 0),
    ("32B", "plain", {}, 0),
]  # fmt: skip
SMOKE_ROWS = [
    ("smoke", "8-bit, weights on the host too", IN_BACKWARD_8 | RECOMPUTED | BOTH, 2048),
    ("smoke", "8-bit, weights on the host too, 3 slots", IN_BACKWARD_8 | RECOMPUTED | BOTH | {"slots": 3}, 2048),
    ("smoke", "fp32, in backward", {"weight_precision": "fp32", "optim_in_backward": "adamw", **RECOMPUTED}, 2048),
    ("smoke", "plain", {}, 0),
]


class Window(TrainerCallback):
    """Times the steps after the warm-up and takes the peak over all of them."""

    def __init__(self, cuda: bool, live, steps: int):
        self.cuda, self.live, self.steps = cuda, live, steps
        self.begins: list[float] = []
        self.peak = 0

    def mark(self, step: int) -> None:
        """At the beginning of step number `step`, from 0, and once after the last."""
        if step < WARMUP:
            return
        if self.cuda:
            torch.cuda.synchronize()
        if step == WARMUP:
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                self.live.peak = self.live.live
        self.begins.append(time.perf_counter())

    def close(self) -> None:
        self.mark(WARMUP + self.steps)
        self.peak = torch.cuda.max_memory_allocated() if self.cuda else self.live.peak

    def on_step_begin(self, args, state, control, **kwargs):
        self.mark(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def row(self, tokens: dict[str, int]) -> dict:
        """`tokens`: of all measured steps, by kind."""
        milliseconds = [1e3 * (b - a) for a, b in zip(self.begins, self.begins[1:], strict=False)]
        seconds = self.begins[-1] - self.begins[0]
        rates = {f"{kind}_tokens_per_s": count / seconds for kind, count in tokens.items()}
        reserved = torch.cuda.max_memory_reserved() if self.cuda else None
        return {"peak_bytes": self.peak, "reserved_bytes": reserved, **rates, **harness.summary(milliseconds)}


def fitting_pairs(shape: str, budget: int) -> tuple[list, int]:
    """(pairs with real lengths, how many of them always fit into one row of `budget` computed tokens).

    Pairs above 4096 tokens, or above the budget, are left out: a step is one micro-batch, and all are about as long.
    """
    from amopo_fast.packing.schedule import PairSizes

    count = 40 if shape == "smoke" else None
    pairs = random_pairs(lengths("qa"), "dimension_first", SHAPES[shape]["vocab_size"], count)
    per_step = max(1, budget // 4096)
    sizes = PairSizes.of(pairs).computed
    return [pair for pair, size in zip(pairs, sizes, strict=True) if size <= budget // per_step], per_step


def train(shape: str, options: dict, budget: int, device: str, steps: int) -> dict:
    """One row through this package's own path."""
    from amopo_fast.memory.profile import LiveBytes
    from amopo_fast.models.config import ModelConfig
    from amopo_fast.models.loading import peft_config
    from amopo_fast.models.streaming import stream_weights
    from amopo_fast.packing.schedule import PairSizes
    from amopo_fast.training.config import AMoPOConfig
    from amopo_fast.training.loading import load_for_training, longest_row, room_for, setup_of, slots_in
    from amopo_fast.training.trainer import AMoPOTrainer

    cuda = device.startswith("cuda")
    options = dict(options)
    adapter, four_bits = options.pop("use_peft", False), options.pop("load_in_4bit", False)
    slots = options.pop("slots", None)
    pairs, per_step = fitting_pairs(shape, budget)
    sizes = PairSizes.of(pairs)
    with tempfile.TemporaryDirectory() as folder:
        Qwen2Config(**SHAPES[shape], max_position_embeddings=8192).save_pretrained(folder)
        config = ModelConfig(folder, random_weights=True, use_peft=adapter)
        args = AMoPOConfig(
            output_dir=folder, max_steps=WARMUP + steps, tokens_per_micro_batch=budget, use_cpu=not cuda,
            pairs_per_step=per_step, save_strategy="no", logging_steps=5,
            disable_tqdm=True, report_to=[], bf16=True, **options,
        )  # fmt: skip
        row, _ = longest_row(pairs, sizes, args)
        live = None if cuda else LiveBytes()
        window = Window(cuda, live, steps)
        with live or contextlib.nullcontext():
            # Random weights are made on the device, in seconds, and moved to the host.
            room, resident = room_for(args), copy.copy(args)
            resident.weights = "device"
            model = load_for_training(config, resident, pairs, adapter=adapter)
            if four_bits:
                quantise(model)
            setup = setup_of(
                args, model.lm_head.weight.dtype, lora_rank=config.lora_r if adapter else None, quantised=four_bits,
                nested=False, accumulates=False,
            )  # fmt: skip
            predicted = predict(model.config, row, setup, slots, lambda prediction: slots_in(prediction, room))
            streamed = None
            if args.weights == "host":
                streamed = stream_weights(model, args.device, slots=predicted["slots"])
                predicted["slots"] = streamed.slots
            trainer = AMoPOTrainer(
                model, args, dimensions=DIMENSIONS, train_dataset=pairs, callbacks=[window],
                peft_config=peft_config(config),
            )  # fmt: skip
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            trainer.train()
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            on_host = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.numel() > 1
                          and t.device.type == "cpu") if cuda else 0  # fmt: skip
            if streamed:
                on_host += streamed.nbytes
        batches = trainer._batches.epoch.batches[WARMUP : WARMUP + steps]
        used = [i for batch in batches for i in batch.pairs]
        tokens = {kind: int(getattr(sizes, kind)[used].sum()) for kind in ("computed", "padded", "labels")}
    return {"pairs_per_step": args.pairs_per_step, "host_bytes": on_host,
            "longest_tokens": row.tokens, **predicted, **window.row(tokens),
            "prediction_over_peak": predicted["predicted_bytes"] / window.peak}  # fmt: skip


def quantise(model: torch.nn.Module) -> None:
    """Random weights to nf4, layer by layer, as transformers does with weights from a file."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(model.get_decoder().modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is torch.nn.Linear:
                weight, bias = linear.weight, linear.bias
                four = Linear4bit(weight.shape[1], weight.shape[0], bias is not None, compute_dtype=weight.dtype,
                                  quant_type="nf4", device="meta")  # fmt: skip
                four.weight = Params4bit(weight.data, requires_grad=False, quant_type="nf4", module=four)
                four.bias = bias
                setattr(module, name, four.to(weight.device))
    model.is_loaded_in_4bit = True


def predict(config, row, setup, slots: int | None, chosen: Callable[[Estimate], int]) -> dict:
    """slots: of the layers' weights on the host; None: those that are `chosen`."""
    from amopo_fast.memory.estimate import estimate

    prediction = estimate(config, row, setup)
    placed = {}
    if setup.host_weights:
        placed["slots"] = slots or chosen(prediction)
        prediction = estimate(config, row, replace(setup, weight_slots=placed["slots"]))
    return {**placed, "predicted_bytes": prediction.peak, "predicted_parts": prediction.parts,
            "predicted_host_bytes": prediction.host_pinned, "flop": prediction.flops}  # fmt: skip


def predict_only(shape: str, options: dict, budget: int) -> dict:
    """What a GPU with liger-kernel is predicted to need, with the slots that a run chooses on PREDICTED; runs
    anywhere."""
    from amopo_fast.memory.gpus import GPUS
    from amopo_fast.models.config import ModelConfig
    from amopo_fast.packing.schedule import PairSizes
    from amopo_fast.training.config import AMoPOConfig
    from amopo_fast.training.loading import longest_row, setup_of

    options = dict(options)
    rank = ModelConfig.lora_r if options.pop("use_peft", False) else None
    four_bits, slots = options.pop("load_in_4bit", False), options.pop("slots", None)
    pairs, per_step = fitting_pairs(shape, budget)
    with tempfile.TemporaryDirectory() as folder:
        args = AMoPOConfig(
            output_dir=folder, tokens_per_micro_batch=budget, pairs_per_step=per_step, use_cpu=True, report_to=[],
            **options,
        )  # fmt: skip
    row, accumulates = longest_row(pairs, PairSizes.of(pairs), args)
    dtype = torch.float32 if options.get("weight_precision") == "fp32" else torch.bfloat16
    setup = setup_of(args, dtype, lora_rank=rank, quantised=four_bits, nested=False, accumulates=accumulates)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=8192)
    setup, memory = replace(setup, liger=True, autocast=True), GPUS[PREDICTED].memory
    return {"longest_tokens": row.tokens, **predict(config, row, setup, slots, lambda found: found.slots_on(memory))}


def plain(shape: str, device: str, steps: int) -> dict:
    """The same pairs with transformers and torch alone; its attention is flash-attn's where that is installed."""
    from amopo_fast.memory.profile import LiveBytes
    from amopo_fast.packing.schedule import PairSizes

    cuda = device.startswith("cuda")
    pairs = random_pairs(lengths("qa"), "dimension_first", SHAPES[shape]["vocab_size"], count=WARMUP + steps)
    sizes = PairSizes.of(pairs)
    live = None if cuda else LiveBytes()
    window = Window(cuda, live, steps)
    from transformers import Qwen2ForCausalLM

    from step import choose_attention

    with live or contextlib.nullcontext():
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[shape], max_position_embeddings=8192)).train()
        technique = Technique("reference", packed=False, share=False, fused_head=False)
        attention = choose_attention(technique, model, device)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-7, fused=True)
        for number, pair in enumerate(pairs):
            window.mark(number)
            step = Step(model, technique, [pair], device)
            batches = step.batches(argparse.Namespace(size=1))
            with torch.autocast(device.split(":")[0], torch.bfloat16):
                step.run(batches)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
        window.close()
    measured = slice(WARMUP, WARMUP + steps)
    tokens = {"padded": int(sizes.padded[measured].sum()), "labels": int(sizes.labels[measured].sum())}
    return {"pairs_per_step": 1, "attention": attention, **window.row(tokens)}


def cut(shape: str, layers: int | None) -> None:
    if layers:
        SHAPES[shape] = SHAPES[shape] | {"num_hidden_layers": layers}


def child(case: dict) -> int:
    """Run one row and write it to `case["out"]`."""
    cut(case["shape"], case["layers"])
    try:
        if case["variant"] == "plain":
            result = plain(case["shape"], case["device"], case["steps"])
        else:
            result = train(case["shape"], case["options"], case["tokens"], case["device"], case["steps"])
        result["status"] = "ok"
    except torch.OutOfMemoryError as error:
        result = {"status": f"not run: out of memory: {str(error).splitlines()[0][:200]}"}
    except ValueError as error:
        if type(error).__name__ != "DoesNotFit":
            raise
        result = {"status": f"not run: {str(error)[:300]}"}
    Path(case["out"]).write_text(json.dumps(result))
    return 0


def main() -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[name for name in SHAPES if name not in ("cpu", "smoke")])
    parser.add_argument("--predict", action="store_true", help="write the predictions alone, for GPUs, and run nothing")
    parser.add_argument("--layers", type=int, help="of every model, in place of its own number")
    parser.add_argument("--only", default="", help="rows whose variant has this in its name")
    parser.add_argument("--steps", type=int, default=10, help="measured, behind two that warm up")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    if "--child" in sys.argv:
        return child(json.loads(sys.argv[sys.argv.index("--child") + 1]))
    arguments = parser.parse_args()
    report = harness.Report("memory", arguments)
    deadline = harness.Deadline(arguments.minutes)
    for shape, variant, options, tokens in SMOKE_ROWS if arguments.smoke else ROWS:
        if arguments.model and not arguments.smoke and shape != arguments.model or arguments.only not in variant:
            continue
        depth = f", {arguments.layers} layers" if arguments.layers else ""
        head = {"case": f"{shape}{depth}, {tokens or 'one pair'}", "shape": shape, "variant": variant, "tokens": tokens}
        if arguments.predict:
            cut(shape, arguments.layers)
            if variant != "plain":
                report.add(**head, status="not run: predicted", **predict_only(shape, options, tokens))
            continue
        if deadline.seconds_left() < 20:
            report.add(**head, status="not run: no time left")
            continue
        with tempfile.TemporaryDirectory() as folder:
            case = {"shape": shape, "layers": arguments.layers, "variant": variant,
                    "options": options, "tokens": tokens, "steps": arguments.steps,
                    "device": arguments.device, "out": str(Path(folder) / "row.json")}  # fmt: skip
            if arguments.smoke:  # which counts the bytes of tensors and needs no process of its own
                child(case)
                report.add(**head, **json.loads(Path(case["out"]).read_text()))
                continue
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "--child", json.dumps(case)], timeout=deadline.seconds_left() + 15,
                    stderr=subprocess.PIPE, text=True,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                report.add(**head, status="not run: no time left")
                continue
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                report.add(**head, status=f"not run: exit status {done.returncode}: {last[:300]}")
                continue
            report.add(**head, **json.loads(Path(case["out"]).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
