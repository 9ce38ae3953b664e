"""`amopo-fast score`: pairs without scores become pairs with scores."""

from __future__ import annotations

import os
import shlex
import sys

from amopo_fast.cli.numbers import finite
from amopo_fast.cli.outputs import output_file
from amopo_fast.errors import OptionError


def add_parser(commands) -> None:
    from amopo_fast.cli.judging import JUDGE, add_judge_arguments

    score = commands.add_parser(
        "score", help="scores per dimension for pairs that have none, by a judge or from the preference alone",
        description="Reads pairs in any format and writes them in TRL's with scores. Stopped, it goes on where it was "
        "with the same command.",
    )  # fmt: skip
    score.add_argument("data", help="file, folder or Hub name, with options behind it as for train_data")
    score.add_argument("--output_file", required=True, help="JSONL file for the scored pairs")
    score.add_argument("--dimensions", nargs="+", required=True, help="what is scored")
    scores = score.add_mutually_exclusive_group(required=True)
    scores.add_argument("--judge", help=JUDGE)
    scores.add_argument("--scores", choices=("preference",),
                        help="without a judge: chosen has the highest score, rejected the lowest")  # fmt: skip
    score.add_argument("--score_min", type=finite, default=0.0, help="lowest score (default: 0)")
    score.add_argument("--score_max", type=finite, default=5.0, help="highest score (default: 5)")
    score.add_argument("--rescale", type=finite, metavar="STEP",
                       help="map the judge's own scale to the range in steps of this size")  # fmt: skip
    score.add_argument("--keep", nargs="+", default=[], metavar="DIMENSION",
                       help="scores of the source that are carried over")  # fmt: skip
    score.add_argument("--on_bad_record", choices=("error", "skip"), default="error")
    score.add_argument("--prompt_template", help="YAML file with names and definitions of the dimensions")
    score.add_argument("--device", default=None, help="of a reward model; default: cuda where there is a GPU, else cpu")
    add_judge_arguments(score)
    score.set_defaults(run=run, takes_rest=False)


def run(arguments) -> int:
    from amopo_fast.cli.judging import judge_options, progress
    from amopo_fast.data.pair import check_dimensions
    from amopo_fast.data.sources.candidate import NO_OBJECT
    from amopo_fast.data.sources.spec import Source
    from amopo_fast.judges.choose import check_read, load_judge
    from amopo_fast.judges.scored_pairs import PairFile, count_pairs, score_names, score_pairs, score_preferences
    from amopo_fast.prompts.wording import Wording

    options = judge_options(arguments)
    check_read([arguments.judge] if arguments.judge else [], options)
    score_range = (arguments.score_min, arguments.score_max)
    if score_range[0] >= score_range[1]:
        raise OptionError(f"score_min={score_range[0]:g} must be below score_max={score_range[1]:g}", "score_min")
    try:
        check_dimensions([*arguments.dimensions, *arguments.keep], score_range)
    except ValueError as error:
        raise OptionError(str(error)) from None
    if NO_OBJECT in arguments.dimensions:
        raise OptionError(f"{NO_OBJECT} has no scores: leave it out of --dimensions", "dimensions")
    if arguments.rescale is not None and not 0 < arguments.rescale <= score_range[1] - score_range[0]:
        raise OptionError(f"rescale={arguments.rescale:g} must be above 0 and within the range of scores", "rescale")
    output = output_file(arguments.output_file, "output_file")
    if output.suffix != ".jsonl":
        raise OptionError(f"output_file: {output} is written as JSON lines; name a .jsonl file", "output_file")
    source = Source.parse(arguments.data)
    if source.is_file and os.path.realpath(source.path) == os.path.realpath(output):
        raise OptionError("--output_file is the data itself: name another file", "output_file")
    file = PairFile(source, tuple(arguments.keep), score_range, arguments.on_bad_record == "skip")
    left = [name for name in score_names(source) if name not in (*arguments.dimensions, *arguments.keep)]
    if left:
        print(f"{source}: scores of {', '.join(left)} are not carried over; name them with --keep", file=sys.stderr)
    if arguments.scores:
        if arguments.rescale is not None or len(arguments.dimensions) > 1:
            raise OptionError("--scores preference knows one thing of a pair, so it fills one dimension, with the ends "
                              "of the range: give one name to --dimensions and no --rescale", "scores")  # fmt: skip
        found = score_preferences(file, arguments.dimensions[0], output)
        print(f"every chosen response has {arguments.dimensions[0]}={score_range[1]:g} and every rejected one "
              f"{score_range[0]:g}: that one was preferred is all that these scores know, so a model that is asked for "
              "a level in between learns nothing from them")  # fmt: skip
    else:
        total = count_pairs(file)
        judge = load_judge(
            arguments.judge, options, wording=Wording.load(arguments.prompt_template),
            score_range=score_range, cache=output.with_name(output.name + ".replies"), device=arguments.device,
        )  # fmt: skip
        with progress(2 * total * len(arguments.dimensions), "scores", judge.usage, arguments.judge_prices) as done:
            found = score_pairs(
                file, judge, arguments.dimensions, output, rescale=arguments.rescale, total=total, done=done
            )
    _print(found, arguments.dimensions)
    print(f"{found.pairs} pairs: {output}")
    names = [NO_OBJECT, *arguments.dimensions, *arguments.keep]
    words = ["amopo-fast", "validate", str(output), "--dimensions", *names]
    if score_range != (0.0, 5.0):
        words += ["--score_min", f"{score_range[0]:g}", "--score_max", f"{score_range[1]:g}"]
    if found.missing or arguments.keep:
        words += ["--missing_scores", "absent"]
    print(f"look at it: {shlex.join(words)}")
    return 0


def _print(found, dimensions) -> None:
    from rich.console import Console

    from amopo_fast.report.tables import NumbersTable

    counts = (found.higher, found.tied, found.lower, found.missing)
    rows = [[name, *(str(count.get(name, 0)) for count in counts)] for name in dimensions]
    columns = ("dimension", "chosen higher", "tied", "rejected higher", "without a score")
    Console().print(NumbersTable("Pairs by the scores of their responses", columns, rows))
    if found.skipped or found.dropped:
        Console().print(f"{found.skipped} bad records and {found.dropped} without a preference are left out")
