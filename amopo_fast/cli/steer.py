"""`amopo-fast steer`: does asking a model for a level of a dimension change its answers?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from amopo_fast.cli.numbers import numbers, whole
from amopo_fast.cli.outputs import output_folder
from amopo_fast.errors import OptionError


def add_parser(commands) -> None:
    from amopo_fast.cli.generate import add_sampling
    from amopo_fast.cli.judging import JUDGE, add_judge_arguments

    steer = commands.add_parser(
        "steer", help="answers at several asked levels, scored by a judge: does asking change them?",
        description="Writes answers.jsonl, scores.jsonl, steer.json, steer.html and steer.png. Stopped, it goes on "
        "where it was with the same command.",
    )  # fmt: skip
    steer.add_argument("models", nargs="+", metavar="MODEL",
                       help="folder or Hub name; the first is what the others are compared with")
    steer.add_argument("--prompts", required=True, help="records with `prompt` or `messages`; pairs do too")
    steer.add_argument("--max_prompts", type=whole, default=None, help="the first so many")
    steer.add_argument("--dimension", nargs="+", default=None,
                       help="what is asked for (default: every dimension with scores)")  # fmt: skip
    steer.add_argument("--levels", type=numbers, default=None, metavar="1,3,5",
                       help="scores that are asked for (default: lowest, middle, highest)")  # fmt: skip
    steer.add_argument("--judge", help=JUDGE)
    steer.add_argument("--judge_dimensions", nargs="+", default=None, metavar="DIMENSION",
                       help="what is judged of every answer (default: the model's dimensions)")  # fmt: skip
    steer.add_argument("--pairwise_judge", metavar="JUDGE",
                       help="who says which of two models' answers is better, asked in both positions")  # fmt: skip
    steer.add_argument("--pairwise_template", default="", metavar="FILE", help="text of its request")
    steer.add_argument("--output_dir", default="amopo-steer", help="default: amopo-steer")
    steer.add_argument("--batch_size", type=whole, default=16, help="prompts at a time (default: 16)")
    steer.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    steer.add_argument("--device", default=None, help="default: cuda where there is a GPU, else cpu")
    add_sampling(steer)
    add_judge_arguments(steer)
    steer.set_defaults(run=run, takes_rest=False)


def run(arguments) -> int:
    import dataclasses

    import numpy as np

    from amopo_fast.cli.generate import sampling_of
    from amopo_fast.cli.judging import judge_options, progress
    from amopo_fast.data.sources.prompts import read_prompts
    from amopo_fast.evaluation import steer
    from amopo_fast.evaluation.generation import TrainedModel
    from amopo_fast.evaluation.steer_summary import steer_summary
    from amopo_fast.judges.choose import check_read, load_comparer, load_judge
    from amopo_fast.prompts.recipe import RECIPE_FILE, recipe_of
    from amopo_fast.survival.work_file import WorkFile

    models = list(dict.fromkeys(arguments.models))
    recipe = next(filter(None, map(recipe_of, models)), None)
    if recipe is None:
        raise ValueError(f"none of {', '.join(models)} has an {RECIPE_FILE}: nothing says how they are asked; name a "
                         "folder that `amopo-fast train` wrote")  # fmt: skip
    folder = output_folder(arguments.output_dir, "output_dir")
    options, sampling = judge_options(arguments), sampling_of(arguments)
    if arguments.pairwise_judge and len(models) < 2:
        raise OptionError("--pairwise_judge compares models: name two or more", "pairwise_judge")
    dimensions = tuple(arguments.dimension or steer.scored_dimensions(recipe))
    levels = arguments.levels or steer.default_levels(recipe)
    steer.check_asked(recipe, dimensions, levels)
    judged = tuple(arguments.judge_dimensions or steer.scored_dimensions(recipe)) if arguments.judge else ()
    found = read_prompts(arguments.prompts)
    prompts = steer.distinct(found)[: arguments.max_prompts]
    plan = steer.Plan(prompts, dimensions, levels)
    folder.mkdir(parents=True, exist_ok=True)
    total = len(plan) * len(models)
    print(f"{len(prompts)} prompts, {total} answers: {folder}", file=sys.stderr)

    # A judge that cannot be used is known before hours of answers.
    shared = {"wording": recipe.wording, "score_range": recipe.score_range, "device": arguments.device,
              "cache": folder / "replies.jsonl"}  # fmt: skip
    check_read([spec for spec in (arguments.judge, arguments.pairwise_judge) if spec], options)
    judge = load_judge(arguments.judge, options, **shared) if arguments.judge else None
    comparer = None
    if arguments.pairwise_judge:
        own = dataclasses.replace(options, template=arguments.pairwise_template)
        comparer = load_comparer(arguments.pairwise_judge, own, **shared)

    def load(name: str) -> TrainedModel:
        return TrainedModel.load(name, dtype=arguments.dtype, device=arguments.device, recipe=recipe)

    made = {"models": [steer.identity_of(name) for name in models], **plan.options, **dataclasses.asdict(sampling),
            "batch_size": arguments.batch_size, "dtype": arguments.dtype}  # fmt: skip
    with WorkFile(folder / "answers.jsonl", made) as work:
        from tqdm import tqdm

        with tqdm(total=total, desc="answers", unit="answer", disable=not sys.stderr.isatty()) as bar:
            steer.write_answers(work, models, plan, load, sampling, batch_size=arguments.batch_size, done=bar.update)
        answers = steer.answers_of(work, plan)
    shape = (len(models), *plan.shape)
    received = wins = None
    if judge is not None:
        scored = {"judge": judge.identity, "judged": list(judged), "answers": made}
        with (
            WorkFile(folder / "scores.jsonl", scored) as work,
            progress(total * len(judged), "scores", judge.usage, arguments.judge_prices) as done,
        ):
            steer.write_scores(work, answers, judge, judged, done)
            received = steer.table_of(work, "scores", (*shape, len(judged)))
    if comparer is not None:
        compared = {"judge": comparer.identity, "answers": made}
        count = 2 * len(plan) * (len(models) - 1)
        with (
            WorkFile(folder / "wins.jsonl", compared) as work,
            progress(count, "comparisons", comparer.usage, arguments.judge_prices) as done,
        ):
            steer.write_wins(work, plan, answers, len(models), comparer, done)
            wins = steer.table_of(work, "win", (len(models) - 1, *plan.shape))
    words = np.array([len(answer.text.split()) for answer in answers], dtype=np.float64).reshape(shape)
    summary = steer_summary(plan, models, recipe.score_range, words, judged=judged, received=received, wins=wins)
    _report(folder, summary, arguments.judge or "")
    return 0


def _report(folder: Path, summary, judge: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from amopo_fast.report.figure import draw
    from amopo_fast.report.page import write
    from amopo_fast.report.steering import lines_of, steering_page, steering_rows

    write(folder / "steer.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write(folder / "steer.html", steering_page(summary, judge))
    title = "Asked level and received score" if judge else "Asked level and length of the answer"
    draw(steering_rows(summary), folder / "steer.png", title, f"{summary['prompts']} prompts, judge: {judge or 'none'}")
    what = "mean score at each asked level" if judge else "mean words at each asked level"
    table = Table(title=f"{what}, {summary['prompts']} prompts", title_justify="left", box=box.SIMPLE_HEAD,
                  pad_edge=False)  # fmt: skip
    for name in ("model", "asked for", *(f"{level:g}" for level in summary["levels"]), "change"):
        table.add_column(name, justify="left" if name in ("model", "asked for") else "right", overflow="fold")
    for row in lines_of(summary):
        table.add_row(*row)
    Console().print(table)
    print(f"{folder / 'steer.json'}  {folder / 'steer.html'}  {folder / 'steer.png'}")
