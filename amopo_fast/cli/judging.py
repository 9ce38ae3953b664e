"""What the commands that ask a judge have in common: its options, and a progress bar that says what it costs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from amopo_fast.cli.numbers import above_zero, finite, whole, whole_or_zero
from amopo_fast.judges.choose import JudgeOptions

JUDGE = (
    "who scores: an address (http://localhost:8000/v1), a program as module:function, or the folder or Hub name of a "
    "reward model"
)


def add_judge_arguments(parser) -> None:
    default = JudgeOptions()
    group = parser.add_argument_group("the judge")
    group.add_argument("--judge_model", default="", metavar="NAME",
                       help="model on the server (default: the only one it has)")  # fmt: skip
    group.add_argument("--judge_template", default="", metavar="FILE", help="text of a request; see docs/evaluation.md")
    group.add_argument("--judge_key_env", default=default.key_env, metavar="NAME",
                       help=f"environment variable with the server's key (default: {default.key_env})")  # fmt: skip
    group.add_argument("--judge_concurrency", type=whole, default=default.concurrency, help="requests at a time")
    group.add_argument("--judge_timeout", type=above_zero, default=default.timeout, help="seconds for a reply")
    group.add_argument("--judge_retries", type=whole_or_zero, default=default.retries,
                       help="further tries of a request that failed")  # fmt: skip
    group.add_argument("--judge_request", type=_json_object, default={}, metavar="JSON",
                       help='further fields of a request, null removes one: {"max_tokens": 16}')  # fmt: skip
    group.add_argument("--judge_prices", type=_two_numbers, default=None, metavar="IN,OUT",
                       help="of a million tokens read and written; the progress bar shows the cost")  # fmt: skip
    group.add_argument("--judge_outputs", nargs="+", type=_output, default=[], metavar="DIMENSION=NUMBER",
                       help="which output of a reward model is which dimension")  # fmt: skip
    group.add_argument("--judge_batch_size", type=whole, default=default.batch_size,
                       help="answers that a reward model scores at a time")  # fmt: skip


def judge_options(arguments) -> JudgeOptions:
    """Raises OptionError as JudgeOptions."""
    return JudgeOptions(
        model=arguments.judge_model, template=arguments.judge_template, key_env=arguments.judge_key_env,
        concurrency=arguments.judge_concurrency, timeout=arguments.judge_timeout, retries=arguments.judge_retries,
        request=arguments.judge_request, outputs=dict(arguments.judge_outputs), batch_size=arguments.judge_batch_size,
    )  # fmt: skip


@contextmanager
def progress(total: int, what: str, usage, prices: tuple[float, float] | None) -> Iterator[Any]:
    """A bar of `total` scores with rate, tokens and cost; yields the function that counts them. What was taken is said
    at the end, also where no bar is shown."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="score", disable=not sys.stderr.isatty()) as bar:

        def done(count: int) -> None:
            bar.set_postfix_str(_taken(usage, prices), refresh=False)
            bar.update(count)

        yield done
    for line in (_taken(usage, prices), *usage.notes()):
        if line:
            print(f"{what}: {line}", file=sys.stderr)


def _taken(usage, prices: tuple[float, float] | None) -> str:
    return str(usage) + (f", cost {usage.cost(prices):.4g}" if prices else "")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"write a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"write a JSON object, found {text!r}")
    return value


def _two_numbers(text: str) -> tuple[float, float]:
    parts = [finite(part) for part in text.split(",")]
    if len(parts) != 2 or min(parts) < 0:
        raise argparse.ArgumentTypeError(f"write two prices as 0.15,0.6, found {text!r}")
    return parts[0], parts[1]


def _output(text: str) -> tuple[str, int]:
    name, separator, number = text.rpartition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"write DIMENSION=NUMBER, found {text!r}")
    return name, whole_or_zero(number)
