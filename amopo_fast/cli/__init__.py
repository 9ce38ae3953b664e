"""The command line `amopo-fast`. Exit codes: 0 done, 1 failed or bad data, 2 bad usage (an option that is unknown,
impossible or without effect), 3 stopped by a signal, with a checkpoint of every step that was trained, 4 a NaN or
infinite number, 130 stopped at once by Ctrl-C.

One module per command; each has `add_parser(commands)`, which makes its parser and names the function that runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from amopo_fast import __version__
from amopo_fast.cli import data, demo, estimate, evaluate, generate, merge, plot, score, steer, train
from amopo_fast.cli.spellings import hint
from amopo_fast.errors import CheckpointError, JudgeError, NumbersError, OptionError
from amopo_fast.report.quiet import hold_back

DESCRIPTION = "AMoPO: multi-objective preference optimization of causal language models."
EXAMPLES = """examples:
  amopo-fast demo                                  train a tiny model on the bundled data, in minutes, on a CPU
  amopo-fast validate pairs.json                   what is in a data file and what is wrong with it
  amopo-fast show pairs.json --record 3            one record's sequences, tokens and labels
  amopo-fast eval runs/a --eval_data heldout.json  accuracy and margin per dimension, with intervals
  amopo-fast steer runs/a --prompts heldout.json   do its answers follow what they are asked for? --judge scores them
  amopo-fast score pairs.json --judge http://localhost:8000/v1 --dimensions helpfulness --output_file scored.jsonl
  amopo-fast plot runs/a runs/b                    metrics of runs, compared: PNG, SVG and a page
  amopo-fast generate runs/a --prompt "..." --target helpfulness=5     an answer that is asked for a dimension
  amopo-fast chat runs/a --target helpfulness=5    a conversation with a trained model
  amopo-fast merge runs/lora merged                a LoRA adapter into its base model
  amopo-fast estimate DIR --gpu h200               memory and speed of training a model, by part and optimizer
  amopo-fast train --config run.yaml --beta 1.0    train; any key of the YAML file can be given as --key value
"""
COMMANDS = (demo, train, generate, evaluate, steer, plot, data, score, estimate, merge)


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations: an option that comes later would change what they mean. A mistake is one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` lists the options\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; `argv` without the program's name. Returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # bars and arrows on a terminal that has no UTF-8
        sys.stdout.reconfigure(errors="replace")
    parser = _Parser(
        "amopo-fast", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"amopo-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    # Only commands with the options of a run take what their parser does not know: those of its dataclasses.
    arguments, rest = parser.parse_known_args(argv)
    arguments.rest = rest
    if rest and not arguments.takes_rest:
        command = commands.choices[arguments.command]
        known = [flag for action in command._actions for flag in action.option_strings]
        positional = [action.dest for action in command._actions if not action.option_strings]
        meant = hint(rest[0].split("=")[0], known, flags=True, positional=positional) if rest[0].startswith("-") else ""
        command.error(f"unknown option {' '.join(rest)}{meant}")
    hold_back()
    if not sys.stderr.isatty():  # bars of model loading and saving; their libraries read it when they are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return arguments.run(arguments)
    except OptionError as error:
        return _fail(arguments.command, error, 2)
    except NumbersError as error:
        return _fail(arguments.command, error, 4)
    except BrokenPipeError:  # as of `| head`, which has read enough
        with contextlib.suppress(OSError, ValueError):  # what is in the buffer still has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(arguments.command, _with_path(error), 1)
    except (ValueError, CheckpointError, JudgeError) as error:
        return _fail(arguments.command, error, 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which a command without torch need not import
            raise
        return _fail(arguments.command, f"{error}; {_LESS_MEMORY}", 1)
    except KeyboardInterrupt:
        print(f"amopo-fast {arguments.command}: stopped by SIGINT; what was saved before is whole", file=sys.stderr)
        return 130


_LESS_MEMORY = (
    "lower tokens_per_micro_batch (tokens_per_row, batch_size), set gradient_checkpointing, or ask `amopo-fast "
    "estimate` what fits"
)


def _with_path(error: OSError) -> str:
    """What the system says of a file, without its number and with what to do; libraries' own texts as they are."""
    if error.strerror is None or error.filename is None and error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
        return str(error)
    name = "the output" if error.filename is None else error.filename  # a file of the shell
    return f"{name}: {error.strerror}; check the path, its rights and the room on its disk"


def _fail(command: str, error: object, code: int) -> int:
    from amopo_fast.survival.safety import redact

    if "tqdm" in sys.modules:  # an open bar's line ends before the message
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
    print(redact(f"amopo-fast {command}: error: {error}"), file=sys.stderr)
    return code
