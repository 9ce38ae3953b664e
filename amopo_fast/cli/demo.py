"""`amopo-fast demo`."""

from __future__ import annotations

from amopo_fast.cli.numbers import seed
from amopo_fast.cli.outputs import output_folder


def add_parser(commands) -> None:
    demo = commands.add_parser("demo", help="train a tiny model on the bundled data and plot what it learned")
    demo.add_argument("--output_dir", default="amopo-demo", help="where the run goes (default: amopo-demo)")
    demo.add_argument("--seed", type=seed, default=0)
    demo.set_defaults(run=run, takes_rest=False)


def run(arguments) -> int:
    from amopo_fast.demo.run import run_demo

    return run_demo(str(output_folder(arguments.output_dir, "output_dir")), arguments.seed)
