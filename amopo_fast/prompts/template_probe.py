"""Renders a chat template once in a child process with limits, before this process renders it thousands of times.

A template is a program from a model's folder. Jinja's sandbox keeps it from files and from Python, not from looping for
ever or from making a text larger than the memory. What depends on the data is not found here; `chat` bounds the length
of every rendering.
"""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
from pathlib import Path

import jinja2

logger = logging.getLogger(__name__)

CPU_SECONDS = 5
MEMORY_BYTES = 512 << 20
LENGTH = 1 << 20  # characters of a rendering of a few words; the longest default system prompts have some thousands
_WALL_SECONDS = 60  # of a machine that is busy

# As transformers sets it up: what a template does with memory and time does not depend on the filters' details.
_CHILD = """
import json, sys
given = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))
    resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"]))
except (ImportError, ValueError):
    pass  # the parent's own limit on the time remains
import jinja2, jinja2.ext, jinja2.sandbox

class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_whole"), [], [], body).set_lineno(line)

    def _whole(self, caller):
        return caller()

def refuse(message):
    raise jinja2.TemplateError(message)

environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False)
environment.globals |= {"raise_exception": refuse, "strftime_now": lambda format: format}
length = 0
try:
    for part in environment.from_string(given["source"]).generate(**given["values"]):
        length += len(part)
        if length > given["length"]:
            break
except MemoryError:
    length = -1
except Exception:
    pass  # the parent meets it too, and says which record it was
print(length)
"""


def check_template(source: str, values: dict) -> None:
    """Raises ValueError where rendering `source` with `values` (JSON) takes more than `CPU_SECONDS` or `MEMORY_BYTES`,
    or makes a text of more than `LENGTH` characters."""
    limits = {"seconds": CPU_SECONDS, "memory": MEMORY_BYTES, "length": LENGTH}
    _check(json.dumps({"source": source, "values": values, **limits}))


@functools.lru_cache(maxsize=64)
def _check(text: str) -> None:
    found = f"more than {CPU_SECONDS} s of computing time"
    try:
        # In jinja2's own folder the child finds it however this process did.
        done = subprocess.run(
            [sys.executable, "-c", _CHILD], input=text, capture_output=True, text=True, timeout=_WALL_SECONDS,
            cwd=Path(jinja2.__file__).parents[1], check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pass
    except OSError as error:
        logger.warning("the chat template is not tried in a process with limits: %s", error)
        return
    else:
        lines = done.stdout.split()
        if done.returncode == 0 and lines and 0 <= int(lines[-1]) <= LENGTH:
            return
        if done.returncode == 0 and lines:
            found = f"more than {LENGTH} characters" if int(lines[-1]) > 0 else f"more than {MEMORY_BYTES >> 20} MiB"
        elif done.returncode > 0:
            found = f"more than {MEMORY_BYTES >> 20} MiB"  # memory for the interpreter itself ran out
    raise ValueError(
        f"the chat template takes {found} for a question and an answer of a few words: it loops or explodes; "
        "set another chat_template on the tokenizer"
    )
