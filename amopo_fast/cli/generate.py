"""`amopo-fast generate` and `amopo-fast chat`: answers of a trained model, asked for a dimension."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import fields

from amopo_fast.cli.numbers import boolean, finite, seed, whole, whole_or_zero
from amopo_fast.cli.outputs import output_file
from amopo_fast.errors import OptionError

_HELP_OF_SAMPLING = {
    "max_new_tokens": "tokens of an answer, at most", "do_sample": "draw tokens instead of taking the likeliest",
    "temperature": "of the draw; 0 takes the likeliest", "top_p": "draw from the likeliest tokens of this mass",
    "top_k": "draw from this many", "repetition_penalty": "above 1 makes repeated tokens less likely",
    "seed": "of the draw",
}  # fmt: skip


def add_parser(commands) -> None:
    generate = commands.add_parser(
        "generate", help="answers of a model, an adapter or a run, asked for a dimension",
        description="Without --target the model is asked as without arguments to its chat template: for all dimensions "
        "it was trained with.",
    )  # fmt: skip
    _add_model_and_target(generate)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="text of a user message; may be given several times")
    source.add_argument("--data", help="file of prompts: records with `prompt` (text or messages) or `messages`")
    generate.add_argument("--compare", metavar="BASE", help="a second model's answers to the same prompts")
    generate.add_argument("--output_file", help="JSONL file for the answers; default: printed")
    generate.add_argument("--batch_size", type=whole, default=8, help="prompts at a time (default: 8)")
    add_sampling(generate)
    generate.set_defaults(run=run_generate, takes_rest=False)
    chat = commands.add_parser("chat", help="talk to a trained model; /target helpfulness=1 changes what is asked for")
    _add_model_and_target(chat)
    chat.add_argument("--system", help="system message of the conversation")
    add_sampling(chat)
    chat.set_defaults(run=run_chat, takes_rest=False)


def _add_model_and_target(parser) -> None:
    parser.add_argument("model", help="folder of a trained model, an adapter or a run, or a Hub name")
    parser.add_argument("--target", action="append", default=[], metavar="DIMENSION=SCORE",
                        help="what is asked for; several ask for several; `none` asks for nothing")  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default=None, help="default: cuda where there is a GPU, else cpu")


def add_sampling(parser) -> None:
    for name, text in _HELP_OF_SAMPLING.items():
        kind = {"max_new_tokens": whole, "top_k": whole_or_zero, "seed": seed, "do_sample": boolean}.get(name, finite)
        parser.add_argument(f"--{name}", type=kind, default=None, help=text)


def sampling_of(arguments):
    from amopo_fast.evaluation.generation import Sampling

    given = {field.name: getattr(arguments, field.name) for field in fields(Sampling)}
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _target(arguments):
    """What is asked for, refused before a model is loaded if it cannot be."""
    from amopo_fast.evaluation.generation import Target
    from amopo_fast.prompts.recipe import recipe_of

    target = Target.parse(arguments.target)
    recipe = recipe_of(arguments.model)
    if recipe is not None:
        target.require(recipe)
    return target


def run_generate(arguments) -> int:
    from tqdm import tqdm

    from amopo_fast.evaluation.generation import TrainedModel, generate

    target, sampling = _target(arguments), sampling_of(arguments)
    conversations = _conversations(arguments)
    out = output_file(arguments.output_file, "output_file") if arguments.output_file else None
    names = [arguments.model, *([arguments.compare] if arguments.compare else [])]
    answers = []
    recipe = None
    for name in names:
        trained = TrainedModel.load(name, dtype=arguments.dtype, device=arguments.device, recipe=recipe)
        recipe = recipe or trained.recipe
        prompts = [trained.prompt(conversation, target) for conversation in conversations]
        with tqdm(total=len(prompts), desc=name, unit="answer", disable=not sys.stderr.isatty()) as bar:
            answers.append(
                generate(trained.model, trained.tokenizer, prompts, sampling,
                         batch_size=arguments.batch_size, done=bar.update)
            )  # fmt: skip
        del trained
    records = [
        {"record": number, "messages": conversation, "target": str(target),
         "answers": {name: answers[index][number] for index, name in enumerate(names)}}
        for number, conversation in enumerate(conversations)
    ]  # fmt: skip
    if out is not None:
        out.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        print(f"{len(records)} answers: {out}")
    else:
        _print(records, names)
    return 0


def _conversations(arguments) -> list[list[dict]]:
    if arguments.prompt:
        return [[{"role": "user", "content": text}] for text in arguments.prompt]
    from amopo_fast.data.sources.prompts import read_prompts

    return read_prompts(arguments.data)


def _print(records: list[dict], names: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for record in records:
        console.rule(f"record {record['record']}, {record['target']}", align="left")
        console.print(Text(record["messages"][-1]["content"], style="dim"))
        for name in names:
            if len(names) > 1:
                console.print(Text(f"{name}:", style="bold"))
            console.print(Text(record["answers"][name]))


def run_chat(arguments) -> int:
    from transformers import TextStreamer

    from amopo_fast.evaluation.generation import Target, TrainedModel, generate

    target, sampling = _target(arguments), sampling_of(arguments)
    trained = TrainedModel.load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    if sys.stdin is None:
        raise OptionError("chat reads what you write, and its input is closed: give generate --prompt TEXT instead")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(opening)
    trained.prompt([*messages, {"role": "user", "content": "Hello"}], target)  # what it cannot be asked for is said now
    print(f"asked for: {target}. /target DIMENSION=SCORE ... changes it, /new begins again, /exit ends.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line == "/exit":
            return 0
        if line == "/new":
            messages = list(opening)
        elif line.startswith("/target"):
            try:
                asked = Target.parse(line.split()[1:])
                trained.prompt([*messages, {"role": "user", "content": "Hello"}], asked)
            except ValueError as error:
                print(error)
                continue
            target = asked
            print(f"asked for: {target}")
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}: /target DIMENSION=SCORE ..., /new or /exit")
        elif line:
            try:
                prompt = trained.prompt([*messages, {"role": "user", "content": line}], target)
            except ValueError as error:
                print(error)
                continue
            messages.append({"role": "user", "content": line})
            streamer = TextStreamer(trained.tokenizer, skip_prompt=True, skip_special_tokens=True)
            [answer] = generate(trained.model, trained.tokenizer, [prompt], sampling, streamer=streamer)
            messages.append({"role": "assistant", "content": answer})
