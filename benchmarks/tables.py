"""Write the benchmark tables of the documentation, and their plots, from the JSON under results/.

    python benchmarks/tables.py                          every block in README.md, docs/*.md and benchmarks/*.md
    python benchmarks/tables.py --add DIR/suite.json     first file the reports of gpu_suite.py (or one report) there
    python benchmarks/tables.py --check                  change nothing; exit status 1 where a block is out of date

A block is what stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is "head A", "head B", "newest head A"
(of the GPU that was measured last), "head cpu", "sweeps", "floors", "quality", "real model", or the name of a suite's
entry for a plain table of its rows. Without a result the table says "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from floors import PATHS
from harness import ROOT
from head import CASES as HEAD_CASES
from table_plots import plot_optimizers, plot_sweeps

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w. ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "not measured"
# Targets of the head on an H200, bf16, milliseconds, a tenth above the floors of floors.py. Mode -> target.
TARGETS = {
    "A": {"forward+backward": 35, "cached": 27, "frozen head": 18},
    "B": {"forward+backward": 7, "cached": 5.5, "frozen head": 3.7},
}  # of case C there is none: a larger A
PLOTTED = ROOT / "benchmarks" / "results" / "head_sweeps.png"
PLOTTED_OPTIMIZERS = ROOT / "benchmarks" / "results" / "optimizers.png"
APART = (", graph", ", direct")  # of head_host.py, which the tables of the head leave out
# Not shown in a plain table: they only refine or repeat another column.
HIDDEN = ("p20_ms", "p80_ms", "min_ms", "runs", "dtype", "options", "losses", "shape", "tokens", "predicted_parts",
          "flop", "reserved_bytes", "heldout_accuracy", "loss_at_end")  # fmt: skip


# ----- results -----


def add(path: Path) -> list[Path]:
    """File a suite's reports, or one report, under results/ by entry and device; smoke runs are refused."""
    content = json.loads(path.read_text())
    if "entries" in content:
        reports = {name: entry["report"] for name, entry in content["entries"].items() if entry["report"]}
    else:
        reports = {content["benchmark"]: content}
    written = []
    for name, report in reports.items():
        if report["arguments"].get("smoke"):
            raise ValueError(f"{path} holds a smoke run, whose times mean nothing; run without --smoke")
        target = RESULTS / f"{name}-{_device_slug(report)}.json"
        RESULTS.mkdir(exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n")
        written.append(target)
    return written


def _device_slug(report: dict) -> str:
    name = report["environment"].get("gpu") or "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results(entry: str, device: str) -> list[dict]:
    """The stored reports of a suite's entry, of GPUs or of the CPU."""
    paths = sorted(RESULTS.glob(f"{entry}-*.json"))
    return [json.loads(path.read_text()) for path in paths if (path.stem == f"{entry}-cpu") == (device == "cpu")]


def caption(report: dict) -> str:
    """Where and with what it was measured."""
    e = report["environment"]
    machine = e.get("gpu") or f"{e['cpu']}, {e['threads']} threads"
    names = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "transformers")
    versions = [f"{name} {e['versions'][name]}" for name in names if name in e["versions"]]
    driver = f"driver {e['driver']}" if e.get("driver") else ""
    commit = f"commit {(e['commit'] or 'unknown')[:9]}"
    return ", ".join(filter(None, [machine, driver, *versions, commit, e["date"]])) + "."


# ----- formatting -----


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def timing(row: dict | None) -> str:
    if row is None:
        return NOT_MEASURED
    if "median_ms" not in row:
        return "not run" if row["status"].startswith("not run") else row["status"]
    spread = f"{milliseconds(row['p20_ms'])} to {milliseconds(row['p80_ms'])}"
    return f"{milliseconds(row['median_ms'])} ({spread})"


def mebibytes(value: int | None) -> str:
    return NOT_MEASURED if value is None else f"{value / 2**20:,.0f}"


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def cell(name: str, value) -> str:
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ----- blocks -----


def head_table(case: str, newest: bool = False) -> str:
    """Variants by mode: median milliseconds and 20 to 80 % of the runs; memory and errors of forward+backward. What was
    measured again, of some variants, replaces what stood there. newest: of the GPU that was measured last."""
    by_gpu: dict[str, list[dict]] = {}
    for entry in (f"head_{case}", "head_host", "head"):
        for report in results(entry, "cuda"):
            if any(row["case"] == case for row in report["rows"]):
                by_gpu.setdefault(report["environment"]["gpu"], []).append(report)
    if not by_gpu:
        return _targets_only(case)
    tables = sorted(by_gpu.values(), key=lambda reports: max(map(_date, reports)), reverse=True)
    return "\n\n".join(_head_table(case, reports) for reports in tables[: 1 if newest else None])


def _date(report: dict) -> str:
    return report["environment"]["date"]


def _targets_only(case: str) -> str:
    targets = TARGETS.get(case, {"forward+backward": ""})
    rows = [[mode, f"{target} ms" if target else "", NOT_MEASURED] for mode, target in targets.items()]
    return markdown(["mode", "target, H200", "ours and peers"], rows)


def _head_table(case: str, reports: list[dict]) -> str:
    found: dict[tuple[str, str], dict] = {}
    for report in reports:
        for row in report["rows"]:
            key = row["variant"], row["mode"]
            if row["case"] == case and not row["variant"].endswith(APART):
                found[key] = found.get(key, {}) | row  # errors and memory of a first report stay where a later has none
    rows = list(found.values())
    heading = ["variant", "forward+backward, ms", "forward, ms", "frozen head, ms", "extra memory, MiB",
               "logp error", "dX error", "dW error"]  # fmt: skip
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        modes = {row["mode"]: row for row in rows if row["variant"] == variant}
        main = modes.get("forward+backward") or modes.get("cached")
        if main is None:
            continue
        table.append(
            [variant, timing(main), *(timing(modes[m]) if m in modes else "" for m in ("forward", "frozen head")),
             mebibytes(main.get("extra_memory_bytes")),
             *(error(main.get(f"{name}_error")) for name in ("logps", "dx", "dw"))]
        )  # fmt: skip
    parts = [markdown(heading, table)]
    if case in TARGETS:
        parts.append(
            "Targets on an H200: " + ", ".join(f"{mode} {ms} ms" for mode, ms in TARGETS[case].items()) + "."
        )  # fmt: skip
    reasons = {f"{row['variant']}: {row['status']}" for row in rows if row["status"].startswith("not run")}
    parts += [text if text.endswith(".") else f"{text}." for text in sorted(reasons)]
    parts += [_measured_again(case, report) for report in reports[1:]]
    return "\n\n".join([*parts, caption(reports[0])])


def _measured_again(case: str, report: dict) -> str:
    modes: dict[str, list[str]] = {}
    for row in report["rows"]:
        if row["case"] == case and not row["variant"].endswith(APART):
            modes.setdefault(row["mode"], []).append(row["variant"])
    commit = (report["environment"]["commit"] or "unknown")[:9]
    return f"At commit {commit}: " + "; ".join(f"{mode} of {', '.join(names)}" for mode, names in modes.items()) + "."


def head_cpu_table() -> str:
    """Minima of interleaved runs, and what they and the extra memory are of those of plain logits."""
    parts = []
    for report in results("head", "cpu"):
        rows = [row for row in report["rows"] if row["mode"] == "forward+backward" and "min_ms" in row]
        table = []
        for row in rows:
            plain = next((x for x in rows if x["case"] == row["case"] and x["variant"] == "plain logits"), None)
            table.append([
                f"{row['case']}: {row['N']}, {row['H']}, {row['V']}", row["variant"],
                *(milliseconds(row[name]) if name in row else "" for name in ("min_ms", "min_cpu_ms")),
                *(ratio(row, plain, name) for name in ("min_ms", "min_cpu_ms")), mebibytes(row["extra_memory_bytes"]),
                ratio(row, plain, "extra_memory_bytes"), error(row["dx_error"]),
            ])  # fmt: skip
        heading = ["case: N, H, V", "variant", "forward+backward, ms", "CPU time, ms", "time / plain",
                   "CPU time / plain", "extra memory, MiB", "memory / plain", "dX error"]  # fmt: skip
        parts.append(markdown(heading, table) + "\n\n" + caption(report))
    return "\n\n".join(parts) or _targets_only("cpu")


def ratio(row: dict, plain: dict | None, name: str) -> str:
    return f"{row[name] / plain[name]:.2f}" if plain and row.get(name) is not None and plain.get(name) else ""


def sweeps_table() -> str:
    reports = results("head_sweeps", "cuda")
    if not reports:
        return markdown(["N, H, V", "variants"], [["one sweep per axis", NOT_MEASURED]])
    parts = []
    for report in reports:
        cases = list(dict.fromkeys(row["case"] for row in report["rows"]))
        times = {(row["case"], row["variant"]): row for row in report["rows"]}
        variants = list(dict.fromkeys(row["variant"] for row in report["rows"]))
        table = [[variant, *(timing(times.get((case, variant))) for case in cases)] for variant in variants]
        parts.append(markdown(["forward+backward, ms", *cases], table) + "\n\n" + caption(report))
    return "\n\n".join(parts) + f"\n\n![rate by axis](results/{PLOTTED.name})"


def floors_table() -> str:
    """FLOP, bytes, floor and predicted time of every path for the GPU's cases, and what was measured."""
    entries = [*(f"head_{case.name}" for case in HEAD_CASES["cuda"]), "head_host", "head"]
    reports = sorted((report for entry in entries for report in results(entry, "cuda")), key=_date)
    measured = {(row["case"], row["variant"], row["mode"]): row for report in reports for row in report["rows"]}
    rows = []
    for case in HEAD_CASES["cuda"]:
        for path in PATHS:
            name, _, mode = path.name.partition(", ")
            mode = "forward+backward" if mode in ("", "exact") else mode
            variant = name if name == "plain logits" else f"ours, {name}" + (", cached" if mode == "cached" else "")
            rows.append([
                case.name, path.name, f"{2e-12 * path.matmuls * case.N * case.H * case.V:.1f}",
                f"{path.bytes(case) / 1e9:.1f}", f"{path.floor_ms(case):.1f}", f"{path.memory_ms(case):.1f}",
                f"{path.predicted_ms(case):.1f}", timing(measured.get((case.name, variant, mode))),
            ])  # fmt: skip
    heading = ["case", "path", "TFLOP", "GB", "floor, ms", "memory, ms", "predicted, ms", "measured, ms"]
    return markdown(heading, rows)


def plain_table(entry: str) -> str:
    """Every row of every report, with the columns that its rows have."""
    reports = results(entry, "cuda") + results(entry, "cpu")
    if not reports:
        return markdown(["case", "variant", "result"], [["all", "all", NOT_MEASURED]])
    parts = []
    for report in reports:
        names = dict.fromkeys(name for row in report["rows"] for name in row if name not in HIDDEN)
        rows = [[cell(name, row.get(name)) for name in names] for row in report["rows"]]
        heading = [name.removesuffix("_bytes").replace("_", " ").replace(" ms", ", ms") for name in names]
        parts.append(markdown(heading, rows) + "\n\n" + caption(report))
    return "\n\n".join(parts)


def quality_table() -> str:
    """Share of good responses by method and dimension, and win rates against SimPO, over seeds."""
    parts = []
    for report in [*results("quality", "cuda"), *results("quality", "cpu")]:
        summary = report["rows"][-1]
        if summary["case"] != "summary" or summary["status"] != "ok":
            continue
        rates, steps = summary["rates"], {row["case"]: row["steps"] for row in report["rows"] if "steps" in row}
        names = list(next(iter(rates.values())))
        table = [[method, str(steps[method]), *(share(found[name]) for name in names)]
                 for method, found in rates.items()]  # fmt: skip
        parts.append(markdown(["good responses, %", "steps", *names], table))
        for against, key in (("SimPO", "win_rates"), ("SimPO, as many steps", "win_rates_as_many_steps")):
            names = list(next(iter(summary[key].values())))
            table = [[method, *(share(found[name]) for name in names)] for method, found in summary[key].items()]
            parts.append(markdown([f"win rate against {against}, %", *names], table))
        parts.append(f"{summary['seeds']} seeds, 95 % intervals. " + caption(report))
    return "\n\n".join(parts) or markdown(["method", "good responses"], [["all", NOT_MEASURED]])


def real_model_table() -> str:
    """Held-out accuracy of every method by dimension, what training did to the margins, and paired differences."""
    parts = []
    for report in [*results("real_model", "cuda"), *results("real_model", "cpu")]:
        summary = report["rows"][-1]
        if summary["case"] != "summary" or summary["status"] != "ok":
            continue
        methods, gained = summary["methods"], summary["against before training"]
        names = list(next(iter(methods.values()))["accuracy"])
        table = [
            [method, str(found.get("steps", [""])[0]), *(share(found["accuracy"][name]) for name in names),
             share(found["reward_accuracy"]["mean"]) if method in gained else "",
             interval(found["logp_chosen"]["mean"])]
            for method, found in methods.items()
        ]  # fmt: skip
        heading = ["held-out accuracy, %", "steps", *names, "reward accuracy, %", "l_chosen, nats a token"]
        parts.append(markdown(heading, table))
        for baseline in ("before training", "SimPO"):
            found = summary.get(f"against {baseline}", {})
            table = [[method, *(interval(each["accuracy"][name], 100, 1) for name in names),
                      interval(each["difference"]["mean"], decimals=3)] for method, each in found.items()]  # fmt: skip
            heading = [f"accuracy against {baseline}, points", *names, "margin, nats a token"]
            parts.append(markdown(heading, table))
        counts = f"{summary['pairs']} held-out pairs, seeds: {summary['seeds']}, 95 % intervals. "
        parts.append(counts + caption(report))
    return "\n\n".join(parts) or markdown(["method", "held-out accuracy"], [["all", NOT_MEASURED]])


def real_settings_table() -> str:
    """What every trial changed in the held-out pairs, after each epoch where it has several."""
    heading = ["trained", "rate", "beta", "gamma", "steps", "margin, nats a token", "moved the right way, %",
               "l_chosen, nats a token", "held-out loss at beta 5, gamma 1"]  # fmt: skip
    parts = []
    for report in results("real_settings", "cpu"):
        table = []
        for row in (row for row in report["rows"] if "heldout" in row):
            for number, found in enumerate(row["heldout"], 1):
                own = [row["trained"], *(f"{row[name]:g}" for name in ("learning_rate", "beta", "gamma"))]
                loss = "{:.3f} to {:.3f}".format(*found["loss_at_beta_5_gamma_1"])
                table.append([*own, str(row["steps"] * number // len(row["heldout"])),
                              interval(found["difference"], decimals=3), f"{100 * found['moved_right']:.1f}",
                              interval(found["logp_chosen"], decimals=3), loss])  # fmt: skip
        parts.append(markdown(heading, table))
        parts.append(f"{len(report['rows'][1]['judged'])} held-out pairs, one seed, 95 % intervals. {caption(report)}")
    return "\n\n".join(parts) or markdown(heading[:2], [["all", NOT_MEASURED]])


def interval(value: dict, scale: float = 1, decimals: int = 2) -> str:
    """With its sign."""
    value, low, high = (f"{scale * value[name]:+.{decimals}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def share(value: dict) -> str:
    low, high = max(value["low"], 0.0), min(value["high"], 1.0)  # Student's t knows nothing of a share's bounds
    return f"{100 * value['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def block(name: str) -> str:
    match name.split():
        case ["quality"]:
            return quality_table()
        case ["real", "model"]:
            return real_model_table()
        case ["real", "settings"]:
            return real_settings_table()
        case ["head", "cpu"]:
            return head_cpu_table()
        case ["head", case_name]:
            return head_table(case_name)
        case ["newest", "head", case_name]:
            return head_table(case_name, newest=True)
        case ["sweeps"]:
            return sweeps_table()
        case ["floors"]:
            return floors_table()
        case _:
            return plain_table(name)


def fill(text: str) -> str:
    """The text with every block written anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{block(match['name'])}\n{match[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", type=Path, action="append", default=[])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    for path in arguments.add:
        for written in add(path):
            print(f"wrote {written.relative_to(ROOT)}")
    stale = [page for page in PAGES if page.exists() and fill(page.read_text()) != page.read_text()]
    for page in stale:
        if not arguments.check:
            page.write_text(fill(page.read_text()))
        print(f"{'out of date' if arguments.check else 'wrote'}: {page.relative_to(ROOT)}")
    if not arguments.check:
        for plot, path, reports in (
            (plot_sweeps, PLOTTED, results("head_sweeps", "cuda")),
            (plot_optimizers, PLOTTED_OPTIMIZERS, results("optimizers", "cuda") + results("optimizers", "cpu")),
        ):
            if reports:
                plot(reports, path)
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
