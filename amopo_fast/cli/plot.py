"""`amopo-fast plot`: the metrics of one run, or of several beside each other."""

from __future__ import annotations

from amopo_fast.cli.outputs import output_folder

FORMATS = ("png", "svg", "html")


def add_parser(commands) -> None:
    plot = commands.add_parser("plot", help="draw the metrics of training runs as PNG, SVG and a page")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training run")
    plot.add_argument("--output_dir", help="folder for metrics.png, metrics.svg and report.html (default: first run's)")
    plot.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    plot.add_argument("--trade_off", nargs=2, metavar="DIMENSION", default=(),
                      help="of several runs: accuracies and margins in two dimensions against each other")  # fmt: skip
    plot.set_defaults(run=run, takes_rest=False)


def run(arguments) -> int:
    from amopo_fast.report.figure import draw_runs
    from amopo_fast.report.page import page, pictures, table, write
    from amopo_fast.report.runs import read_runs
    from amopo_fast.report.training import describe, reading, run_rows

    runs = read_runs(arguments.runs)
    folder = output_folder(arguments.output_dir or arguments.runs[0], "output_dir")
    for kind in arguments.formats:
        if kind == "html":
            title, lead = describe(runs)
            body = table(*_summary(runs)) + pictures(run_rows(runs, arguments.trade_off))
            path = write(folder / "report.html", page(title, lead, body, reading(runs)))
        else:
            path = draw_runs(runs, folder / f"metrics.{kind}", arguments.trade_off)
        print(path)
    return 0


def _summary(runs) -> tuple[list[str], list[list[str]]]:
    """The last value of what a reader asks for first."""
    keys = {
        "steps": "step",
        "loss": "loss",
        "accuracy": "accuracy/mean",
        "margin": "margin/mean",
        "held-out accuracy": "eval_accuracy/mean",
        "computed tokens/s": "tokens_per_second/computed",
        "peak GiB": "memory/peak_gib",
    }
    prefixes = {prefix for run in runs for prefix in run.eval_sets if prefix != "eval_"}
    for prefix in sorted(prefixes):
        keys[f"accuracy on {prefix[5:-1]}"] = f"{prefix}accuracy/mean"
    rows = []
    for run in runs:
        row = [run.name]
        for key in keys.values():
            points = run.points(key)
            last = points[-1][1] if points else None
            row.append("" if last is None else f"{last:,.0f}" if abs(last) >= 1000 or key == "step" else f"{last:.4g}")
        rows.append(row)
    used = [i for i in range(1, len(keys) + 1) if any(row[i] for row in rows)]
    columns = ["run", *keys]
    return [columns[i] for i in [0, *used]], [[row[i] for i in [0, *used]] for row in rows]
