"""`amopo-fast estimate`: memory, speed and cost of training a model, before there is a GPU or a weight."""

from __future__ import annotations

import dataclasses
import json

from amopo_fast.cli.numbers import above_zero, share, whole, whole_or_zero


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "estimate",
        help="memory by part, tokens/s and hours of training a model, without a GPU and without its weights",
        description="Predicts peak memory and speed of each optimizer, alone and sharded, and of the very run of a "
        "configuration. Shapes come from the model's configuration; activations and FLOP from running it on tensors "
        "without memory.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Hub name, folder or config.json of a model")
    parser.add_argument("--model_name_or_path", help="the same")
    parser.add_argument("--config", help="YAML file of `amopo-fast train`: the very run, beside the other ways")
    parser.add_argument("--config_overrides", help="num_hidden_layers=8,hidden_size=1024,...")
    parser.add_argument("--gpu", default="h200", help="h200, 4090, a100-80, ..., or GiB, or here (default: h200)")
    parser.add_argument("--gpus", type=whole, default=1, help="GPUs that share the model by FSDP (default: 1)")
    parser.add_argument("--host_memory", type=above_zero, metavar="GIB",
                        help="of the host, for each GPU (default: with --gpu here what is free, else not checked)")
    parser.add_argument("--tokens", type=whole, help="computed tokens of a micro-batch (default: 8192)")
    parser.add_argument("--label_tokens", type=whole, help="tokens that predict a label (default: half of them)")
    parser.add_argument("--max_length", type=whole, default=1024, help="tokens of a sequence (default: 1024)")
    parser.add_argument("--train_data", nargs="+", metavar="FILE",
                        help="pairs: the longest micro-batch is theirs, and an epoch's hours are said")
    parser.add_argument("--pairs", type=whole, help="of an epoch, in the place of data")
    parser.add_argument("--pair_tokens", type=whole, help="computed tokens of a pair, with --pairs")
    parser.add_argument("--price", type=above_zero, help="of a GPU for an hour: says an epoch's cost")
    parser.add_argument("--no_checkpointing", action="store_true", help="keep every layer's activations")
    parser.add_argument("--keep_layers", type=whole_or_zero, default=0, help="checkpoint all but the last N layers")
    parser.add_argument("--offload", action="store_true", help="layer checkpoints in host memory")
    parser.add_argument("--no_liger", action="store_true", help="without liger-kernel's RMSNorm and SwiGLU")
    parser.add_argument("--objective", default="amopo", help="dpo and ipo score a reference too (default: amopo)")
    parser.add_argument("--efficiency", type=share, help="share of the GPU's dense bfloat16 peak that is reached")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, takes_rest=False)


def run(arguments) -> int:
    from amopo_fast.cli.estimate_report import print_report
    from amopo_fast.cli.estimated_run import THIS_RUN, asked_of
    from amopo_fast.memory.advice import OPTIMIZERS, cheapest_change
    from amopo_fast.memory.estimate import RESERVE, estimate
    from amopo_fast.memory.speed import EFFICIENCY, SOURCE

    room = _room(arguments.gpu, arguments.host_memory)
    efficiency = arguments.efficiency or EFFICIENCY
    asked = asked_of(arguments, OPTIMIZERS, room.fits)
    rows, last = [], None
    for optimizer, (setup, flags) in asked.setups.items():
        for gpus in sorted({setup.gpus} if optimizer == THIS_RUN else {1, arguments.gpus}):
            if optimizer != THIS_RUN:
                if gpus > 1 and not setup.shards:
                    continue
                setup = dataclasses.replace(setup, gpus=gpus, reference=asked.has_reference, **asked.changes)
            if setup.host_weights and (not setup.checkpointing or setup.keep_layers):
                continue  # refused by `train`: every layer leaves the GPU behind its forward pass
            last = last or setup
            result = estimate(asked.config, asked.row, setup)
            row = {"optimizer": optimizer, "gpus": gpus, "flags": flags, "parts": result.parts, "peak": result.peak,
                   "needed": result.needed, "host_pinned": result.pinned, "host_needed": result.host_needed,
                   "fits": room.fits(result), "moment": result.moment, "parameters": result.parameters,
                   "trained": result.trained}  # fmt: skip
            row |= _speed(result, asked, room.gpu, gpus, efficiency, arguments.price)
            if asked.has_reference:
                row["reference"] = _reference(setup, result)
            rows.append(row)
    advice = None
    if not rows[0]["fits"] and (rows[0]["optimizer"] == THIS_RUN or not any(row["fits"] for row in rows)):
        change = cheapest_change(asked.config, asked.row, last, room.fits, room.gpu)
        advice = change and {"flags": change.flags, "fewer_pairs": change.fewer_pairs, "text": str(change),
                             "needed": change.prediction.needed, "slower": change.slower}  # fmt: skip
    report = {"model": asked.name, "gpu": dataclasses.asdict(room.gpu), "host_memory": room.host,
              "row": dataclasses.asdict(asked.row), "efficiency": efficiency,
              "efficiency_source": "given" if arguments.efficiency else SOURCE, "reserve": RESERVE,
              "epoch": asked.epoch and dataclasses.asdict(asked.epoch), "price": arguments.price,
              "setup": asked.changes, "objective": asked.objective, "notes": asked.notes, "rows": rows,
              "advice": advice}  # fmt: skip
    print(json.dumps(report, indent=1)) if arguments.json else print_report(report)
    return 0


def _room(gpu: str, host_memory: float | None):
    """What there is: of a card by name or size, or of this machine's."""
    import torch

    from amopo_fast.errors import OptionError
    from amopo_fast.memory.gpus import GIB, gpu_here, parse_gpu
    from amopo_fast.memory.preflight import Room, free_host_memory

    host = None if host_memory is None else int(host_memory * GIB)
    if gpu.lower() != "here":
        return Room(parse_gpu(gpu), host)
    if not torch.cuda.is_available():
        raise OptionError("--gpu here: this machine has no CUDA device; name a card or GiB", "gpu")
    return Room(gpu_here(torch.device("cuda", 0), copies=True), free_host_memory() if host is None else host)


def _speed(result, asked, gpu, gpus: int, efficiency: float, price: float | None) -> dict:
    """Tokens/s, the copies of a micro-batch and whether they hide, and an epoch's hours and cost."""
    from amopo_fast.memory.speed import copied, time_of, tokens_per_second, work_on

    speed, time = tokens_per_second(result, asked.row, gpu, gpus, efficiency), time_of(result, gpu, efficiency)
    found: dict = {"tokens_per_second": speed, "copies": None}
    to_device, to_host = copied(result, gpu)
    if to_device:
        slots = work_on(result, gpu).weight_slots
        found["copies"] = {"to_device": to_device, "to_host": to_host, "slots": slots, "layers": result.work.layers,
                           "seconds": time and dataclasses.asdict(time), "hide": time and time.hides}  # fmt: skip
    if asked.epoch and speed:
        found["hours"] = asked.epoch.tokens / speed / 3600
        found["cost"] = price and found["hours"] * gpus * price
    return found


def _reference(setup, result) -> dict:
    """When the reference model's log-probs are computed, and their share of the FLOP: of a row's under an adapter, of
    an epoch's in full training."""
    from amopo_fast.cli.estimated_run import EVERY_ROW

    when = EVERY_ROW if setup.lora_rank is not None else "once, before the first step"
    return {"when": when, "share_of_flops": result.forward_flops / result.flops}
