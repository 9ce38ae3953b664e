"""One record's sequences for a terminal, with their labels marked: the library behind `amopo-fast show`."""

from __future__ import annotations

import numpy as np
from rich.console import Group
from rich.text import Text

from amopo_fast.data.pairs import Pair
from amopo_fast.prompts.builder import PromptBuilder


def show_record(pair: Pair, builder: PromptBuilder, *, prompt_tokens: int | None = 200) -> Group:
    """The sequences of one pair for a terminal: tokens parted by "|", label tokens in brackets and in colour.

    Args:
        prompt_tokens: shows as many tokens of a prompt, leaving out its middle; None shows all.

    Raises:
        DataError: as `PromptBuilder.tokens`.
    """
    tokens = builder.tokens(pair)
    prompts = [ids for ids in tokens.prompts if ids is not None]
    labels = len(tokens.chosen) + len(tokens.rejected)
    separate = sum(2 * len(ids) for ids in prompts) + len(prompts) * labels
    shared = sum(len(ids) for ids in prompts) + len(prompts) * labels
    parts = [
        Text.assemble(
            (f"record {pair.record}", "bold"),
            f" of {pair.source}: {2 * len(prompts)} sequences, {separate} tokens, {len(prompts) * labels} labels; "
            f"{shared} tokens to compute with each prompt shared by its two responses"
            + (f"; shortened to {builder.max_length} tokens" if tokens.truncated else ""),
        )
    ]
    for name, prompt in zip(builder.dimensions, tokens.prompts, strict=True):
        if prompt is None:
            parts.append(Text(f"\n{name}: absent, the chosen response has no score", "yellow"))
            continue
        for side, response in (("chosen", tokens.chosen), ("rejected", tokens.rejected)):
            score = getattr(pair, f"{side}_scores").get(name)
            scored = "" if score is None else f", score {score:g}"
            sizes = f"{len(prompt)} prompt + {len(response)} label tokens = {len(prompt) + len(response)}"
            parts.append(Text(f"\n{name}, {side}{scored}: {sizes}", "bold"))
            parts.append(_sequence(prompt, response, builder, prompt_tokens))
    return Group(*parts)


def _sequence(prompt: np.ndarray, response: np.ndarray, builder: PromptBuilder, prompt_tokens: int | None) -> Text:
    text = Text()
    hidden = 0 if prompt_tokens is None else max(len(prompt) - prompt_tokens, 0)
    head = (len(prompt) - hidden + 1) // 2 if hidden else len(prompt)
    for index, token in enumerate(prompt):
        if index == head and hidden:
            text.append(f" … {hidden} tokens … ", "yellow")
        if head <= index < head + hidden:
            continue
        text.append(_visible(builder, token))
        text.append("|", "dim")
    for token in response:
        text.append(f"[{_visible(builder, token)}]", "bold green")
    return text


def _visible(builder: PromptBuilder, token: int) -> str:
    text = builder.tokenizer.decode([int(token)])
    if "\ufffd" in text:  # a part of a character
        text = builder.tokenizer.convert_ids_to_tokens(int(token))
    # A control character of the data must not reach the terminal.
    return "".join(char if char.isprintable() else "↵\n" if char == "\n" else repr(char)[1:-1] for char in text)
