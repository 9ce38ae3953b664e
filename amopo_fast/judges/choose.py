"""A judge from what a user wrote: an address, module:function, or a reward model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amopo_fast.errors import OptionError, changed_fields, check_numbers
from amopo_fast.judges.cache import ReplyCache
from amopo_fast.judges.client import ChatClient
from amopo_fast.judges.judge import ByScores, Comparer, Judge
from amopo_fast.judges.program import Program, load_function
from amopo_fast.judges.server import Server
from amopo_fast.judges.template import JudgeTemplate, Kind
from amopo_fast.prompts.wording import Wording

KEY = "JUDGE_API_KEY"
_PROGRAM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class JudgeOptions:
    """How a judge is asked. Only a server reads model to prices, only a reward model outputs and batch_size.

    Attributes:
        model: name on the server; "" takes the only one there. template: file of a request's text.
        key_env: environment variable with the key.
        concurrency: requests at a time. timeout: seconds. retries: further tries of a request that failed.
        request: further fields of a request's body, null removes one.
        outputs: a reward model's outputs by dimension. batch_size: answers that it scores at a time.

    Raises OptionError for a number out of its range.
    """

    model: str = ""
    template: str = ""
    key_env: str = KEY
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    request: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, int] = field(default_factory=dict)
    batch_size: int = 16

    def __post_init__(self):
        check_numbers(self, positive=["concurrency", "timeout", "batch_size"], not_negative=["retries"])


_READ_BY: dict[str, frozenset[str]] = {
    "server": frozenset({"model", "template", "key_env", "concurrency", "timeout", "retries", "request"}),
    "program": frozenset(),
    "reward model": frozenset({"outputs", "batch_size"}),
}


def check_read(specs: Sequence[str], options: JudgeOptions) -> None:
    """Raises OptionError for an option that none of the judges of a command reads."""
    read = frozenset().union(*(_READ_BY[kind_of(spec)] for spec in specs))
    for name in changed_fields(options):
        if name not in read:
            who = " and ".join(f"{spec}, a {kind_of(spec)}" for spec in specs)
            found = f"judge_{name} has no effect " + (f"with {who}" if who else "without a judge")
            raise OptionError(f"{found}: leave it out", f"judge_{name}")


def kind_of(spec: str) -> str:
    """ "server", "program" or "reward model". Raises OptionError for what is neither."""
    if spec.startswith(("http://", "https://")):
        return "server"
    if _PROGRAM.fullmatch(spec):
        return "program"
    if ":" in spec and not Path(spec).exists():
        raise OptionError(
            f"judge {spec!r}: write an address as http://localhost:8000/v1, a program as module:function, a reward "
            "model as its folder or Hub name", "judge",
        )  # fmt: skip
    return "reward model"


def load_judge(
    spec: str,
    options: JudgeOptions,
    *,
    wording: Wording,
    score_range: tuple[float, float],
    cache: str | Path | None = None,
    device: str | None = None,
) -> Judge:
    """
    Args:
        spec: an address, "module:function", or a reward model's folder or Hub name.
        options: those of another kind of judge are not read; `check_read` refuses them.
        wording: names and definitions of the dimensions, for a server. score_range: what a server is asked for.
        cache: file of a server's replies. device: a reward model's.

    Raises:
        OptionError: an option that cannot be used.
        JudgeError: a server does not answer. DataError: the template's file is bad.
    """
    return _load(spec, options, "score", wording, score_range, cache, device)


def load_comparer(
    spec: str,
    options: JudgeOptions,
    *,
    wording: Wording,
    score_range: tuple[float, float],
    cache: str | Path | None = None,
    device: str | None = None,
) -> Comparer:
    """As `load_judge`; a reward model compares by its scores."""
    found = _load(spec, options, "compare", wording, score_range, cache, device)
    return ByScores(found) if kind_of(spec) == "reward model" else found


def _load(spec: str, options: JudgeOptions, use: Kind, wording, score_range, cache, device) -> Any:
    kind = kind_of(spec)
    if kind == "program":
        return Program(spec, load_function(spec))
    if kind == "reward model":
        from amopo_fast.judges.reward_model import RewardModel  # it takes seconds

        return RewardModel.load(spec, outputs=options.outputs, device=device, batch_size=options.batch_size)
    template = JudgeTemplate.load(use, options.template or None)  # before a server is waited for
    client = ChatClient(
        spec, options.model, os.environ.get(options.key_env, "").strip(), options.key_env, options.concurrency,
        options.timeout, options.retries, options.request, ReplyCache(cache),
    )  # fmt: skip
    client.find_model()
    return Server(client, template, wording, score_range)
