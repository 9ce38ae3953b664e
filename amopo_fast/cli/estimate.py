"""`amopo-fast estimate`: memory and speed of training a model, before there is a GPU or a weight."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from amopo_fast.cli.numbers import share, whole, whole_or_zero
from amopo_fast.errors import OptionError

DEFAULT_TOKENS = 8192
EVERY_ROW = "every row"


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "estimate",
        help="memory by part and tokens/s of training a model, without a GPU and without its weights",
        description="Predicts peak memory and speed of each optimizer, alone and sharded. Shapes come from the model's "
        "configuration; activations and FLOP from running it on tensors without memory.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Hub name, folder or config.json of a model")
    parser.add_argument("--model_name_or_path", help="the same")
    parser.add_argument("--config_overrides", help="num_hidden_layers=8,hidden_size=1024,...")
    parser.add_argument("--gpu", default="h200", help="h200, h100, a100-80, ... or GiB of memory (default: h200)")
    parser.add_argument("--gpus", type=whole, default=1, help="GPUs that share the model by FSDP (default: 1)")
    parser.add_argument("--tokens", type=whole, default=DEFAULT_TOKENS,
                        help=f"computed tokens of a micro-batch (default: {DEFAULT_TOKENS})")  # fmt: skip
    parser.add_argument("--label_tokens", type=whole, help="tokens that predict a label (default: half of them)")
    parser.add_argument("--max_length", type=whole, default=1024, help="tokens of a sequence (default: 1024)")
    parser.add_argument("--no_checkpointing", action="store_true", help="keep every layer's activations")
    parser.add_argument("--keep_layers", type=whole_or_zero, default=0, help="checkpoint all but the last N layers")
    parser.add_argument("--offload", action="store_true", help="layer checkpoints in host memory")
    parser.add_argument("--no_liger", action="store_true", help="without liger-kernel's RMSNorm and SwiGLU")
    parser.add_argument("--objective", default="amopo", help="dpo and ipo score a reference too (default: amopo)")
    parser.add_argument("--efficiency", type=share, help="share of the GPU's dense bfloat16 peak that is reached")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, takes_rest=False)


def load_config(name: str, overrides: str | None = None):
    """A causal LM's configuration from a Hub name, a folder or a config.json."""
    from amopo_fast.models.config import ModelConfig
    from amopo_fast.models.loading import load_shape

    path = Path(name)
    return load_shape(ModelConfig(str(path.parent) if path.is_file() else name, random_weights=True,
                                  config_overrides=overrides))  # fmt: skip


def run(arguments) -> int:
    from amopo_fast.memory import estimate as prediction
    from amopo_fast.memory.advice import OPTIMIZERS
    from amopo_fast.models.loading import model_errors
    from amopo_fast.training.objectives import OBJECTIVES

    name = arguments.model or arguments.model_name_or_path
    if not name or (arguments.model and arguments.model_name_or_path):
        raise OptionError("name one model: amopo-fast estimate MODEL", "model_name_or_path")
    gpu = prediction.parse_gpu(arguments.gpu)
    if arguments.objective not in OBJECTIVES:
        raise OptionError(f"objective={arguments.objective!r}; choose one of {', '.join(OBJECTIVES)}", "objective")
    has_reference = OBJECTIVES[arguments.objective].needs_reference
    with model_errors(name):
        config = load_config(name, arguments.config_overrides)
    row = prediction.Row(
        arguments.tokens, arguments.label_tokens or arguments.tokens // 2, 2 * arguments.tokens, arguments.max_length
    )
    efficiency = arguments.efficiency or prediction.EFFICIENCY
    changes = {
        "checkpointing": not arguments.no_checkpointing,
        "keep_layers": arguments.keep_layers,
        "offload": arguments.offload,
        "liger": not arguments.no_liger,
    }
    rows = []
    for optimizer, (setup, flags) in OPTIMIZERS.items():
        for gpus in sorted({1, arguments.gpus}):
            if gpus > 1 and not setup.shards:
                continue
            setup_here = dataclasses.replace(setup, gpus=gpus, reference=has_reference, **changes)
            result = prediction.estimate(config, row, setup_here)
            speed = prediction.tokens_per_second(result, row, gpu, gpus, efficiency)
            rows.append({"optimizer": optimizer, "gpus": gpus, "flags": flags, "parts": result.parts,
                         "peak": result.peak, "needed": result.needed, "fits": result.needed <= gpu.memory,
                         "moment": result.moment, "parameters": result.parameters, "trained": result.trained,
                         "tokens_per_second": speed,
                         **({"reference": _reference(setup_here, result)} if has_reference else {})})  # fmt: skip
    report = {"model": name, "gpu": dataclasses.asdict(gpu), "row": dataclasses.asdict(row),
              "efficiency": efficiency, "efficiency_source": "given" if arguments.efficiency else "assumed",
              "reserve": prediction.RESERVE, "setup": changes, "objective": arguments.objective,
              "rows": rows}  # fmt: skip
    print(json.dumps(report, indent=1)) if arguments.json else _print(report)
    return 0


def _reference(setup, result) -> dict:
    """When the reference model's log-probs are computed, and their share of the FLOP: of a row's under an adapter, of
    an epoch's in full training."""
    when = EVERY_ROW if setup.lora_rank is not None else "once, before the first step"
    return {"when": when, "share_of_flops": result.forward_flops / result.flops}


def _print(report: dict) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from amopo_fast.memory.estimate import GIB

    gpu, row, rows = report["gpu"], report["row"], report["rows"]
    console = Console()
    total = next(r["parameters"] for r in rows if r["trained"] == r["parameters"])
    console.print(
        f"{report['model']}: {total:,} parameters, {row['tokens']:,} computed tokens in a micro-batch", soft_wrap=True
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title="GiB on each GPU",
        caption=f"needed: the tensors' peak and {report['reserve'] / GIB:.0f} GiB for CUDA's context and fragmentation",
    )
    table.add_column("optimizer", no_wrap=True)
    for column in ("GPUs", "weights", "states", "grads", "acts", "work", "needed", "tokens/s"):
        table.add_column(column, justify="right")
    for entry in rows:
        parts = entry["parts"]
        cells = (parts["weights"], parts["optimizer states"], parts["gradients"], parts["activations"],
                 parts["working memory"] + parts["head"])  # fmt: skip
        speed = f"{entry['tokens_per_second']:,.0f}" if entry["fits"] and entry["tokens_per_second"] else "-"
        table.add_row(
            entry["optimizer"], str(entry["gpus"]), *(f"{cell / GIB:.1f}" for cell in cells),
            f"{entry['needed'] / GIB:.1f}", speed, style="" if entry["fits"] else "dim",
        )  # fmt: skip
    console.print(table)
    fitting = [entry for entry in rows if entry["fits"]]
    memory = f"{gpu['memory'] / GIB:.1f} GiB"
    if not fitting:
        least = min(rows, key=lambda entry: entry["needed"])
        console.print(
            f"Nothing fits into {memory}; {least['optimizer']} needs {least['needed'] / GIB:.1f} GiB. "
            "Lower --tokens, offload the checkpoints (--offload), or share the model (--gpus).", soft_wrap=True,
        )  # fmt: skip
        return
    best = fitting[0]
    console.print(f"Fits into {memory}, from the least compromise on:", soft_wrap=True)
    for entry in fitting:
        where = "" if entry["gpus"] == 1 else f", with FSDP on {entry['gpus']} GPUs"
        console.print(f"  {entry['optimizer']}: {entry['flags']}{_flags(report)}{where}", soft_wrap=True)
    if best["tokens_per_second"]:
        console.print(
            f"tokens/s: FLOP at {report['efficiency']:.0%} of the GPU's dense bfloat16 peak; that share is "
            f"{report['efficiency_source']}, not measured.", soft_wrap=True,
        )  # fmt: skip
    _print_reference(console, report)


def _print_reference(console, report: dict) -> None:
    found = [row["reference"] for row in report["rows"] if "reference" in row]
    for when, part in {each["when"]: each["share_of_flops"] for each in found}.items():
        how = (f"under an adapter {when} is scored once more without it, {part:.0%} of the FLOP, counted in tokens/s"
               if when == EVERY_ROW else
               f"in full training all pairs are scored {when}, {part:.0%} of an epoch's FLOP; 8 bytes a pair and "
               "dimension on disk")  # fmt: skip
        console.print(f"{report['objective']}'s reference: {how}. It keeps nothing, so the peak is the same.",
                      soft_wrap=True)  # fmt: skip


def _flags(report: dict) -> str:
    changes = report["setup"]
    flags = " --gradient_checkpointing true" if changes["checkpointing"] else ""
    if changes["keep_layers"]:
        flags += f" --keep_layers {changes['keep_layers']}"
    if changes["offload"]:
        flags += """ --gradient_checkpointing_kwargs '{"offload": true}'"""
    return flags + ("" if changes["liger"] else " --use_liger_kernel false")
