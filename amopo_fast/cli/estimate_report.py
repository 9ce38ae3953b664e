"""What `amopo-fast estimate` prints for people."""

from __future__ import annotations

from rich.console import Console

from amopo_fast.cli.estimated_run import EVERY_ROW, THIS_RUN
from amopo_fast.memory.gpus import GIB
from amopo_fast.report.tables import NumbersTable


def print_report(report: dict) -> None:
    console = Console()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False)

    gpu, row, rows = report["gpu"], report["row"], report["rows"]
    total = max(entry["trained"] for entry in rows)
    say(f"{report['model']}: {total:,} parameters, {row['tokens']:,} computed tokens in a micro-batch")
    for note in report["notes"]:
        say(note)
    if epoch := report["epoch"]:
        say(f"an epoch (hours, cost): {epoch['pairs']:,} pairs, {epoch['tokens']:,} computed tokens")
    console.print(_table(report))
    say(f"needed: the tensors' peak and {report['reserve'] / GIB:.0f} GiB for CUDA's context and fragmentation; host: "
        "pinned there for each GPU, beside it what a process takes")  # fmt: skip
    memory = f"{gpu['memory'] / GIB:.1f} GiB"
    if report["host_memory"] is not None:
        memory += f" with {report['host_memory'] / GIB:.0f} GiB on the host"
    if rows[0]["optimizer"] == THIS_RUN:
        say(f"This run {'fits' if rows[0]['fits'] else 'does not fit'} into {memory}.")
    if report["advice"]:
        advice = report["advice"]
        slower = f", {advice['slower']:.0%} slower by arithmetic" if advice["slower"] > 0.02 else ""
        say(f"The cheapest change that fits, in {advice['needed'] / GIB:.1f} GiB{slower}: {advice['text']}")
    fitting = [entry for entry in rows if entry["fits"]]
    others = [entry for entry in fitting if entry["optimizer"] != THIS_RUN]
    if others:
        say(f"Fits into {memory}, from the least compromise on:")
    elif not fitting:
        least = min(rows, key=lambda entry: entry["needed"])
        say(f"Nothing of the table fits into {memory}; {least['optimizer']} needs {least['needed'] / GIB:.1f} GiB"
            + ("." if report["advice"] else ", and no change makes it fit: share the model (--gpus)."))  # fmt: skip
    for entry in others:
        where = "" if entry["gpus"] == 1 else f", with FSDP on {entry['gpus']} GPUs"
        say(f"  {entry['optimizer']}: {entry['flags']}{_flags(report)}{where}")
    _print_copies(say, report, fitting)
    if any(entry["tokens_per_second"] for entry in fitting):
        say(f"tokens/s: FLOP at {report['efficiency']:.0%} of the GPU's dense bfloat16 peak; that share is "
            f"{report['efficiency_source']}.")  # fmt: skip
    _print_reference(say, report)


def _table(report: dict) -> NumbersTable:
    rows, epoch = report["rows"], report["epoch"]
    several = any(entry["gpus"] > 1 for entry in rows)
    columns = ["optimizer", *["GPUs"] * several, "weights", "states", "grads", "acts", "work", "needed", "fits", "host",
               "tokens/s", *["hours"] * bool(epoch), *["cost"] * bool(epoch and report["price"])]  # fmt: skip
    cells = []
    for entry in rows:
        parts = entry["parts"]
        sizes = (parts["weights"], parts["optimizer states"], parts["gradients"], parts["activations"],
                 parts["working memory"] + parts["head"], entry["needed"])  # fmt: skip
        host, fits = sum(entry["host_pinned"].values()), entry["fits"]
        shown = fits and entry["tokens_per_second"]
        line = [entry["optimizer"], *[str(entry["gpus"])] * several, *(f"{size / GIB:.1f}" for size in sizes),
                "yes" if fits else "no", f"{host / GIB:.1f}" if host else ""]  # fmt: skip
        speeds = [f"{entry['tokens_per_second']:,.0f}"]
        speeds += [f"{entry['hours']:,.1f}"] if "hours" in entry else []
        speeds += [f"{entry['cost']:,.2f}"] if entry.get("cost") else []
        cells.append(line + (speeds if shown else [""] * (len(columns) - len(line))))
    return NumbersTable("GiB on each GPU", columns, cells)


def _print_copies(say, report: dict, fitting: list[dict]) -> None:
    """Whether what is copied from and to the host hides behind the computation, once for each amount."""
    gpu = report["gpu"]
    source = "measured" if gpu["measured"] else "assumed"
    speeds = f"{gpu['to_device'] / 1e9:.0f} and {gpu['to_host'] / 1e9:.0f} GB/s, {source}"
    for entry in fitting:
        copies = entry["copies"]
        if not copies:
            continue
        slots = f", {copies['slots']} of {copies['layers']} layers on the GPU at once," if copies["slots"] else ""
        text = (f"{entry['optimizer']}{slots} copies {copies['to_device'] / GIB:.1f} GiB to the GPU and "
                f"{copies['to_host'] / GIB:.1f} back in a micro-batch ({speeds})")  # fmt: skip
        if time := copies["seconds"]:
            longest = max(time["to_device"], time["to_host"])
            hidden = "hides" if copies["hide"] else f"{time['exposed']:.1f} s do not hide"
            text += f": {longest:.1f} s, {hidden} behind {time['compute']:.1f} s of computation"
        say(text)


def _print_reference(say, report: dict) -> None:
    found = [row["reference"] for row in report["rows"] if "reference" in row]
    for when, part in {each["when"]: each["share_of_flops"] for each in found}.items():
        how = (f"under an adapter {when} is scored once more without it, {part:.0%} of the FLOP, counted in tokens/s"
               if when == EVERY_ROW else
               f"in full training all pairs are scored {when}, {part:.0%} of an epoch's FLOP; 8 bytes a pair and "
               "dimension on disk")  # fmt: skip
        say(f"{report['objective']}'s reference: {how}. It keeps nothing, so the peak is the same.")


def _flags(report: dict) -> str:
    changes = report["setup"]
    flags = " --gradient_checkpointing true" if changes["checkpointing"] else ""
    if changes["keep_layers"]:
        flags += f" --keep_layers {changes['keep_layers']}"
    if changes["offload"]:
        flags += """ --gradient_checkpointing_kwargs '{"offload": true}'"""
    return flags + ("" if changes["liger"] else " --use_liger_kernel false")
