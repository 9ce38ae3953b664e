"""The command line `amopo-fast`. Exit codes: 0 done, 1 failed or bad data, 2 bad usage, 3 stopped by a signal, with a
checkpoint of every step that was trained, 4 a NaN or infinite number, 130 stopped at once by Ctrl-C.

One module per command; each has `add_parser(commands)`, which makes its parser and names the function that runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from amopo_fast import __version__
from amopo_fast.cli import data, demo, estimate, evaluate, generate, merge, plot, train
from amopo_fast.errors import CheckpointError, NumbersError
from amopo_fast.report.quiet import hold_back

DESCRIPTION = "AMoPO: multi-objective preference optimization of causal language models."
EXAMPLES = """examples:
  amopo-fast demo                                  train a tiny model on the bundled data, in minutes, on a CPU
  amopo-fast validate pairs.json                   what is in a data file and what is wrong with it
  amopo-fast show pairs.json --record 3            one record's sequences, tokens and labels
  amopo-fast eval runs/a --eval_data heldout.json  accuracy and margin per dimension, with intervals
  amopo-fast plot runs/a runs/b                    metrics of runs, compared: PNG, SVG and a page
  amopo-fast generate runs/a --prompt "..." --target helpfulness=5     an answer that is asked for a dimension
  amopo-fast chat runs/a --target helpfulness=5    a conversation with a trained model
  amopo-fast merge runs/lora merged                a LoRA adapter into its base model
  amopo-fast estimate --model DIR --gpu h200       memory and speed of training a model, by part and optimizer
  amopo-fast train --config run.yaml --beta 1.0    train; any key of the YAML file can be given as --key value
"""
COMMANDS = (demo, train, generate, evaluate, plot, data, estimate, merge)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; `argv` without the program's name. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "amopo-fast", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"amopo-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    # Only `train` takes options that its parser does not know: those of its dataclasses.
    arguments, rest = parser.parse_known_args(argv)
    arguments.rest = rest
    if arguments.rest and not arguments.takes_rest:
        parser.error(f"unrecognized arguments: {' '.join(arguments.rest)}")
    hold_back()
    if not sys.stderr.isatty():  # bars of model loading and saving; their libraries read it when they are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, CheckpointError, NumbersError) as error:
        from amopo_fast.survival.safety import redact

        print(redact(f"amopo-fast {arguments.command}: error: {error}"), file=sys.stderr)
        return 4 if isinstance(error, NumbersError) else 1
    except KeyboardInterrupt:
        print(f"amopo-fast {arguments.command}: stopped by SIGINT; what was saved before is whole", file=sys.stderr)
        return 130
