"""Which layout every model type of transformers takes, and how long the check is: docs/models.md is made of its report.

A row a type of both mappings: the layout that the trial in miniature chose, the share of the separate sequences' tokens
that is computed in it (of the trial's pairs), the largest relative error of log-probs and gradients in float64,
seconds, and whether `amopo-fast estimate` predicts its memory. A type that does not build without a package that
is not here, or is refused, says so in `reason`.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
import transformers

import harness
from amopo_fast.memory.estimate import Row, Setup, estimate
from amopo_fast.memory.gpus import GIB
from amopo_fast.memory.parameters import parameters_of
from amopo_fast.memory.profile import meta_model
from amopo_fast.models.architecture import UnsupportedModelError, language_model_of, refusal_unloaded
from amopo_fast.models.check import Trial, check_pairs, choose_layout
from amopo_fast.packing.schedule import PairSizes
from model_types import KINDS, config_of, empty_model, type_names

SMOKE = ("llama", "qwen3_5", "bert", "gemma3")
ROW = Row(tokens=4096, label_tokens=2048, kv_tokens=8192)


def try_type(kind: str, name: str, estimates: bool) -> dict[str, Any]:
    """The row of one type."""
    row: dict[str, Any] = {"kind": kind, "case": name, "status": "ok", "layout": "refused"}
    if reason := refusal_unloaded(config_of(name)):
        return row | {"reason": reason}
    try:
        model = empty_model(kind, name)
    except Exception as error:
        return row | {"layout": "does not build", "reason": _short(error)}
    row["class"] = type(model).__name__
    begin, wall = time.process_time(), time.perf_counter()
    try:
        choice = choose_layout(model)
    except UnsupportedModelError as error:
        return row | {"reason": _short(error).partition(" cannot be trained: ")[2]}
    row["cpu_ms"], elapsed = 1e3 * (time.process_time() - begin), 1e3 * (time.perf_counter() - wall)
    meta_model(config_of(name))  # the auto classes find it too
    row |= dict.fromkeys(("p20_ms", "median_ms", "p80_ms"), elapsed)  # one run: a sweep of hundreds
    torch.manual_seed(0)
    trial = Trial(language_model_of(model))
    trial.check(choice.layout)
    row |= {
        "layout": choice.layout.value,
        "states": sorted(each.__name__ for each in choice.recurrent),
        "share": PairSizes.of(check_pairs(), choice.layout).share,
        "error": trial.error,
        "unreached": sorted(choice.unreached),
        "head": "own" if choice.head is None else "fused",
        "reason": choice.reason,
    }
    if estimates:
        row |= _estimate(config_of(name))
    return row


def _estimate(config) -> dict[str, Any]:
    """What `amopo-fast estimate` finds for full fine-tuning, in GiB, and whether PEFT adapts the type; "Llama" where
    a model's code needs values and a Llama of its widths stands for it."""
    warned: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = warned.append  # type: ignore[method-assign]
    logger = logging.getLogger("amopo_fast.memory.estimate")
    logger.addHandler(handler)
    begin = time.process_time()
    try:
        needed = estimate(config, ROW, Setup()).needed
        adapted = sum(p.numel for p in parameters_of(config, lora_rank=16) if p.trained)
    except Exception as error:
        return {"estimate": _short(error)}
    finally:
        logger.removeHandler(handler)
    return {"estimate": "Llama" if warned else "own", "GiB": needed / GIB, "LoRA parameters": adapted,
            "estimate_seconds": time.process_time() - begin}  # fmt: skip


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400].removeprefix("UnsupportedModelError: ")


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--estimates", action="store_true", help="predict the memory of each type too")
    parser.add_argument("--part", default="0/1", help="N/M: of M processes' shares the one of this process")
    parser.add_argument("--only", nargs="*", help="types, of all")
    arguments = parser.parse_args()
    arguments.device = "cpu"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    report = harness.Report("models", arguments)
    part, parts = map(int, arguments.part.split("/"))
    only = SMOKE if arguments.smoke else arguments.only
    names = [(kind, name) for kind in KINDS for name in type_names(kind) if not only or name in only]
    for kind, name in names[part::parts]:
        report.add(**try_type(kind, name, arguments.estimates))


if __name__ == "__main__":
    main()
