"""`amopo-fast eval`: what models, adapters or all checkpoints of a run prefer on held-out pairs."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amopo_fast.cli.numbers import numbers, whole
from amopo_fast.cli.outputs import output_file, output_folder
from amopo_fast.errors import OptionError, check_numbers

if TYPE_CHECKING:
    from amopo_fast.prompts.recipe import Recipe
    from amopo_fast.training.objective import AMoPO

_MODEL_FILES = ("config.json", "adapter_config.json")


@dataclass
class EvaluationOptions:
    """Keys of a training run's configuration that its evaluation needs."""

    beta: float = field(default=0.8, metadata={"help": "Scale of the log-probability difference in the margin."})
    gamma: float = field(default=2.0, metadata={"help": "Target margin."})
    seed: int = field(default=42, metadata={"help": "With eval_share: the training run's seed."})

    def __post_init__(self):
        check_numbers(self, positive=["beta"], not_negative=["seed"])


def add_parser(commands) -> None:
    evaluate = commands.add_parser(
        "eval", help="accuracy and margin per dimension of models, adapters or a run's checkpoints", add_help=False
    )
    evaluate.set_defaults(run=run, takes_rest=True)


def _add_arguments(parser) -> None:
    from amopo_fast.models.choice import LAYOUTS

    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or Hub name of a model or adapter, or a run")
    parser.add_argument("--checkpoints", action="store_true", help="every checkpoint of a run, and its final model")
    parser.add_argument("--output_dir", help="folder for eval.json and eval.html (default: the first model's folder)")
    parser.add_argument("--tokens_per_row", type=whole, default=8192, help="computed tokens of a packed row, at most")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto",
                        help="shared prefixes, separate rows, or auto: the first that is exact")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of the weights; auto: the model's own on a GPU, float32 on a CPU")  # fmt: skip
    parser.add_argument("--device", default=None, help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--per_pair", metavar="FILE.jsonl",
                        help="write a line a pair: log-probs, margin and weight by dimension")  # fmt: skip
    parser.add_argument("--levels", type=numbers, metavar="1,3,5",
                        help="also the responses' log-probs under each of these asked scores; each costs one more "
                        "evaluation")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the JSON instead of a table")


def run(arguments) -> int:
    from amopo_fast.cli.options import RUN_CLASSES, parse_options
    from amopo_fast.data.config import DataConfig
    from amopo_fast.evaluation.levels import asked_summary, check_levels
    from amopo_fast.evaluation.preferences import per_pair, score_pairs
    from amopo_fast.evaluation.summary import difference, summary
    from amopo_fast.models.loading import load_trained, tokenizer_folder
    from amopo_fast.prompts.dataset import load_eval_data
    from amopo_fast.prompts.recipe import as_trained, recipe_of
    from amopo_fast.prompts.tokenizer import load_tokenizer

    config, objective, options = parse_options(
        "eval", (DataConfig, EvaluationOptions), arguments.rest, ignore=RUN_CLASSES,
        add_arguments=_add_arguments,
    )  # fmt: skip
    if config.eval_data and "train_data" in options.typed:
        raise OptionError("--train_data has no effect beside eval_data: leave one of them out")
    models = [found for name in options.models for found in find_models(name, options.checkpoints)]
    first_folder = options.models[0] if Path(options.models[0]).is_dir() else "amopo-eval"
    folder = output_folder(options.output_dir or first_folder, "output_dir")
    rows = output_file(options.per_pair, "per_pair") if options.per_pair else None
    recipes = [recipe_of(name) for name in models]
    shared = next((recipe for recipe in recipes if recipe is not None), None)
    sets: dict[str, dict[str, dict[str, Any]]] = {}
    first = {}
    lines: list[str] = []
    for name, own in zip(models, recipes, strict=True):
        recipe = own or shared
        chosen, wording = config, None
        if recipe is not None:
            chosen, wording, notes = as_trained(config, recipe, options.given)
            if own is None:
                notes.insert(0, "no recipe of its own: prompted as the other model was trained")
            for note in notes:
                print(f"{name}: {note}", file=sys.stderr)
        tokenizer = load_tokenizer(tokenizer_folder(name))
        data = load_eval_data(chosen, tokenizer, seed=objective.seed, wording=wording)
        check_levels(options.levels or (), data.score_range)
        model = load_trained(name, dtype=options.dtype, device=options.device)
        trained = trained_objective(objective, recipe, options.given, chosen.dimensions)
        how = {"dimensions": chosen.dimensions, "objective": trained,
               "tokens_per_row": options.tokens_per_row, "layout": options.layout}  # fmt: skip
        under = {
            level: load_eval_data(chosen, tokenizer, seed=objective.seed, wording=wording, asked=level).evals
            for level in options.levels or ()
        }
        for label, pairs in data.evals.items():
            scores = score_pairs(model, pairs, **how)
            print(f"{name}: {scores.layout}", file=sys.stderr)
            if rows is not None:
                place = {"model": name} if len(models) > 1 else {}
                place |= {"set": label} if len(data.evals) > 1 else {}
                lines.extend(json.dumps({**place, **line}) for line in per_pair(scores))
            result = summary(scores)
            result["step"] = step_of(name)
            if under:
                asked = {level: score_pairs(model, evals[label], **how) for level, evals in under.items()}
                result["asked"] = asked_summary(scores, asked)
            if label in first and first[label].dimensions == scores.dimensions:
                result["difference"] = difference(first[label], scores)
            first.setdefault(label, scores)
            sets.setdefault(label, {})[_short(name, models)] = result
        del model
    if rows is not None:
        rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    text = json.dumps({label or "eval": found for label, found in sets.items()}, indent=1, allow_nan=False)
    _write(folder, sets, text)
    if options.json:
        print(text)
    else:
        _print(sets)
        print(f"{folder / 'eval.json'}  {', '.join(str(folder / page) for page in _pages(sets).values())}")
    return 0


def trained_objective(
    options: EvaluationOptions, recipe: Recipe | None, given: Collection[str], dimensions: Sequence[str]
) -> AMoPO:
    """AMoPO with the hyper-parameters that a model was trained with, where the user gave none; its dimensions' own
    weights where the same dimensions are evaluated."""
    from amopo_fast.training.objective import AMoPO

    trained = {} if recipe is None else recipe.objective
    found = {name: trained[name] for name in ("weighting", "tau") if name in trained}
    for name in ("beta", "gamma"):
        found[name] = trained[name] if name in trained and name not in given else getattr(options, name)
    if recipe is not None and trained.get("dimension_weights") and tuple(recipe.dimensions) == tuple(dimensions):
        found["dimension_weights"] = tuple(trained["dimension_weights"])
    return AMoPO(**found)


def find_models(name: str, every: bool) -> list[str]:
    """The model itself, or the checkpoints of a run by step and its final model behind them.

    A folder that holds no model but checkpoints is a run. Raises ValueError for one that holds neither.
    """
    from amopo_fast.survival import checkpoints

    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")):
            raise ValueError(f"{name} is no folder of a model; give a folder with config.json or adapter_config.json")
        return [name]
    whole = _holds_model(folder)
    steps = {checkpoints.step_of(path): path for path in folder.iterdir() if _holds_model(path)}
    found = [steps[step] for step in sorted(steps.keys() - {None})]
    if (every or not whole) and found:
        return [str(path) for path in found] + ([name] if whole else [])
    if not whole:
        raise ValueError(f"{name} holds no model: no config.json, no adapter_config.json and no checkpoint-N folder; "
                         "name the folder of a model, an adapter or a run")  # fmt: skip
    return [name]


def _holds_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _MODEL_FILES)


def step_of(name: str) -> int | None:
    """The optimizer step of a checkpoint folder, or of a run's final model by its last metrics."""
    from amopo_fast.report.runs import read_metrics
    from amopo_fast.survival import checkpoints

    step = checkpoints.step_of(name)
    if step is not None:
        return step
    try:
        return int(read_metrics(name)[-1]["step"])
    except (OSError, ValueError):
        return None


def _short(name: str, models: list[str]) -> str:
    """The shortest end of the path that no other model has."""
    for depth in (1, 2):
        tails = ["/".join(Path(model).parts[-depth:]) for model in models]
        if len(set(tails)) == len(tails):
            return tails[models.index(name)]
    return name


def _pages(sets) -> dict[str, str]:
    return {label: f"eval-{label}.html" if label else "eval.html" for label in sets}


def _write(folder: Path, sets, text: str) -> None:
    from amopo_fast.report.evaluation import evaluation_page
    from amopo_fast.report.page import write

    write(folder / "eval.json", text + "\n")
    for label, page in _pages(sets).items():
        write(folder / page, evaluation_page(f"Evaluation: {label}" if label else "Evaluation", sets[label]))


def _print(sets) -> None:
    from rich.console import Console

    from amopo_fast.report.tables import NumbersTable

    for label, found in sets.items():
        first = next(iter(found.values()))
        title = f"{label or 'held out'}: {first['pairs']} pairs, accuracy in % with half its 95 % interval"
        columns = ["model", "mean", *(name.replace("_", " ") for name in first["dimensions"])]
        rows = [
            [model, *(_interval(part["accuracy"]) for part in (result["mean"], *result["dimensions"].values()))]
            for model, result in found.items()
        ]
        Console().print(NumbersTable(title, columns, rows))


def _interval(value: dict[str, float | None]) -> str:
    share, low, high = value["value"], value["low"], value["high"]
    if share is None:
        return "absent"
    if low is None or high is None:
        return f"{100 * share:.1f}"
    return f"{100 * share:.1f} ±{100 * max(high - share, share - low):.1f}"
