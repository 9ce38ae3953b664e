"""From a Pair to token ids: the prompt x_k = f(x, d_k) of every dimension, and the two responses.

A sequence is the concatenation of two token lists that are tokenised apart, so that no token straddles the split:

    prompt     the chat template's text up to and with the assistant header
    response   the response as the template writes it, ending in one end-of-turn token

Both texts together are what the template makes of the whole conversation, without what it puts after the end of turn.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import jinja2
import numpy as np

from amopo_fast.data.pairs import NO_OBJECT, Message, Pair, check_dimensions
from amopo_fast.errors import DataError
from amopo_fast.prompts.template import chatml_of
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.prompts.wording import Wording

logger = logging.getLogger(__name__)

Order = Literal["dimension_first", "dimension_last"]

_PROBE = "Xq7"  # a response that no template holds by itself
_BATCH = 64  # pairs per call of the tokenizer; bounds the texts alive, not the result


@dataclass(frozen=True)
class _Texts:
    prompts: tuple[str | None, ...]
    chosen: str  # without the end-of-turn token
    rejected: str


class PromptBuilder:
    """Makes the token ids of pairs with a tokenizer's chat template.

    Args:
        tokenizer: a fast tokenizer of transformers. Without a chat template it gets ChatML, and its eos token ends
            the response where the vocabulary has no <|im_end|>.
        dimensions: K names; `no_object` needs no score.
        score_range: lowest and highest score; instructions name the score as "4 out of 5".
        order: "dimension_first" puts the instruction before the user's text in the last user message (the paper's);
            "dimension_last" puts it after, so that all dimensions share the user's text as a prefix.
        max_length: most tokens of a sequence, prompt and response.
        template: the wording, or a YAML file that holds it; None takes the package's own.

    Raises:
        ValueError: an argument makes no sense, or the tokenizer is slow or has no token to end a response with.
        DataError: the template file is bad.
    """

    def __init__(
        self,
        tokenizer,
        dimensions: Sequence[str],
        *,
        score_range: tuple[float, float] = (0, 5),
        order: Order = "dimension_first",
        max_length: int = 1024,
        template: str | Path | Wording | None = None,
    ):
        check_dimensions(dimensions, score_range)
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length must be a positive whole number of tokens, got {max_length!r}")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is a slow tokenizer, whose tokens have no place in the text; "
                "save it as a fast one (tokenizer.json)"
            )
        self.tokenizer, self.dimensions = tokenizer, tuple(dimensions)
        self.score_range, self.order, self.max_length = tuple(score_range), order, max_length
        self.wording = template if isinstance(template, Wording) else Wording.load(template)
        self._template = None if tokenizer.chat_template is not None else chatml_of(tokenizer)
        special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = set(special) | set(tokenizer.all_special_ids)
        self._special = _any_of({*special.values(), *tokenizer.all_special_tokens})
        if not len(self._encode([_PROBE])[0]):
            raise ValueError(
                f"the tokenizer makes no tokens of {_PROBE!r}: its vocabulary is empty, as where a model folder has no "
                "tokenizer.json; save the tokenizer beside the model, or name it with tokenizer_name_or_path"
            )
        self.end_id, self._closing, self._before_end = self._end_of_turn()

    # Text

    def instruction(self, pair: Pair, dimension: str) -> str:
        """The instruction of one dimension; always with the chosen side's score.

        Raises ValueError where the pair has no score for the dimension.
        """
        if dimension == NO_OBJECT:
            return self.wording.no_object_instruction([name for name in self.dimensions if name != NO_OBJECT])
        if dimension not in pair.chosen_scores:
            raise ValueError(f"record {pair.record} has no score for {dimension!r}: the dimension is absent")
        return self.wording.score_instruction(dimension, pair.chosen_scores[dimension], self.score_range[1])

    def messages(self, pair: Pair, dimension: str) -> list[dict[str, str]]:
        """f(x, d_k) as chat messages: the pair's, with the instruction in the last one, which is the user's."""
        instruction, user = self.instruction(pair, dimension), pair.messages[-1].content
        parts = [instruction, user] if self.order == "dimension_first" else [user, instruction]
        content = "\n\n".join(part for part in parts if part)
        messages = [*pair.messages[:-1], Message(pair.messages[-1].role, content)]
        return [message._asdict() for message in messages]

    def unlimited(self) -> PromptBuilder:
        """The same builder without a limit on the length, to learn how long pairs are before they are shortened."""
        builder = copy.copy(self)
        builder.max_length = sys.maxsize
        return builder

    def present(self, pair: Pair) -> list[bool]:
        """Which of the K dimensions the pair has."""
        return [name == NO_OBJECT or name in pair.chosen_scores for name in self.dimensions]

    # Tokens

    def tokens(self, pair: Pair) -> PairTokens:
        """Token ids of one pair.

        Raises:
            DataError: the pair does not fit `max_length` even without the user's text, holds the text of a special
                token, is refused by the chat template, or its responses become equal.
        """
        result = next(self.iter_tokens([pair]))
        if isinstance(result, DataError):
            raise result
        return result

    def tokenize(
        self, pairs: Sequence[Pair], on_bad_record: Literal["error", "skip"] = "error"
    ) -> tuple[list[PairTokens], list[DataError]]:
        """Token ids of many pairs, in their order, and the pairs that were skipped; `tokens` says what is an error."""
        if on_bad_record not in ("error", "skip"):
            raise ValueError(f"on_bad_record must be 'error' or 'skip', got {on_bad_record!r}")
        result, errors = [], []
        for tokens in self.iter_tokens(pairs):
            if isinstance(tokens, PairTokens):
                result.append(tokens)
            elif on_bad_record == "error":
                raise tokens
            else:
                errors.append(tokens)
        if pairs and not result:
            raise DataError(
                "no usable record",
                f"all {len(errors)} records are bad, the first: {errors[0]}",
                "correct them",
                source=pairs[0].source,
            )
        truncated = sum(tokens.truncated for tokens in result)
        if truncated:
            logger.warning(
                "%d of %d records were shortened to max_length=%d tokens", truncated, len(result), self.max_length
            )
        return result, errors

    def iter_tokens(self, pairs: Sequence[Pair]) -> Iterator[PairTokens | DataError]:
        """Token ids of many pairs, one at a time; a DataError in the place of a pair that cannot be used."""
        for start in range(0, len(pairs), _BATCH):
            batch = pairs[start : start + _BATCH]
            rendered: list[_Texts | DataError] = []
            for pair in batch:
                try:
                    self._check_special(pair)
                    rendered.append(self._render(pair))
                except DataError as error:
                    rendered.append(error)
            texts = [
                text
                for item in rendered
                if isinstance(item, _Texts)
                for text in (*item.prompts, item.chosen, item.rejected)
                if text is not None
            ]
            ids = iter(self._encode(texts))
            for pair, item in zip(batch, rendered, strict=True):
                if isinstance(item, DataError):
                    yield item
                    continue
                prompts = tuple(None if text is None else next(ids) for text in item.prompts)
                chosen, rejected = (np.append(next(ids), self.end_id) for _ in range(2))
                try:
                    yield self._fit(pair, PairTokens(pair.record, prompts, chosen, rejected, truncated=False))
                except DataError as error:
                    yield error

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        # The template's text holds its special tokens already. Padding and truncation may be stored in the tokenizer.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]

    # The chat template

    def _apply(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self._template,
        )

    def _end_of_turn(self) -> tuple[int, str, str]:
        """The token that ends a response, what the template puts after a response, and its part before that token.

        The eos token where the template puts no special token there.
        """
        exchange = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self._apply(exchange, False)
        except jinja2.TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses a user's message and an answer: {error}") from None
        if _PROBE not in text:
            raise ValueError("the tokenizer's chat template leaves out the answer; set another chat_template")
        closing = text[text.rindex(_PROBE) + len(_PROBE) :]
        for token in self._encode([closing])[0].tolist():
            if token in self._special_ids:
                end = closing.index(self.tokenizer.convert_ids_to_tokens(token))
                return token, closing, closing[:end]
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "the chat template ends a response with no special token and the tokenizer has no eos token; "
                "set tokenizer.eos_token"
            )
        return self.tokenizer.eos_token_id, closing, ""

    def _render(self, pair: Pair) -> _Texts:
        present = [name for name, here in zip(self.dimensions, self.present(pair), strict=True) if here]
        if not present:
            raise self._error(pair, "missing field", "no score for any dimension", "add one or drop the record")
        try:
            messages = {name: self.messages(pair, name) for name in present}
            prompts = {name: self._apply(messages[name], True) for name in present}
            # A response is written alike after every dimension's prompt: the prompt differs inside one user message.
            first = present[0]
            sides = [
                self._response(prompts[first], messages[first], response) for response in (pair.chosen, pair.rejected)
            ]
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            found = " ".join(str(error).split()) or type(error).__name__
            remedy = "give the conversation roles and an order that the model's chat template takes"
            raise self._error(pair, "refused by the chat template", found, remedy, "prompt") from None
        (inserted, chosen), (inserted_rejected, rejected) = sides
        if inserted != inserted_rejected:
            inserted, chosen, rejected = "", inserted + chosen, inserted_rejected + rejected
        return _Texts(
            tuple(prompts[name] + inserted if name in prompts else None for name in self.dimensions), chosen, rejected
        )

    def _response(self, prompt: str, messages: Sequence[dict[str, str]], response: str) -> tuple[str, str]:
        """What the template puts between header and response (an empty thinking block), and the response it writes."""
        full = self._apply([*messages, {"role": "assistant", "content": response}], False)
        if not (full.startswith(prompt) and full.endswith(self._closing)):
            # The template rewrites the conversation once it is answered. A model that generates has seen this prompt,
            # so the response follows it as it is.
            return "", response + self._before_end
        body = full[len(prompt) : len(full) - len(self._closing)]
        content = response.strip()
        start = len(body.rstrip()) - len(content)
        if start < 0 or body[start : start + len(content)] != content:
            return "", body + self._before_end  # the template rewrites the response itself
        leading = response[: len(response) - len(response.lstrip())]
        if body[:start].endswith(leading):
            start -= len(leading)
        # Blanks stay with the response: many vocabularies merge them with its first word.
        if not body[:start].strip():
            start = 0
        return body[:start], body[start:] + self._before_end

    # Limits

    def _error(self, pair: Pair, kind: str, found: str, remedy: str, field: str = "") -> DataError:
        return DataError(kind, found, remedy, source=pair.source, record=pair.record, field=field)

    def _check_special(self, pair: Pair) -> None:
        """Text that spells a special token would become that token and end a turn or open one."""
        if self._special is None:
            return
        parts = [(f"prompt[{index}]", message.content) for index, message in enumerate(pair.messages)]
        for field, text in (*parts, ("chosen", pair.chosen), ("rejected", pair.rejected)):
            match = self._special.search(text)
            if match:
                found = f"the text of the special token {match[0]} at character {match.start()}"
                remedy = "write it differently or drop the record"
                raise self._error(pair, "special token in text", found, remedy, field)

    def _fit(self, pair: Pair, tokens: PairTokens) -> PairTokens:
        """Shortens the pair to `max_length`: turns before the last (oldest first), then text.

        Of the room beside the template and the instruction, a response keeps at least three quarters; the user's text
        keeps its beginning and gets what the longer response leaves.
        """
        if _longest(tokens) > self.max_length:
            tokens = self._shorten(pair, tokens)
        if np.array_equal(tokens.chosen, tokens.rejected):
            found = "the same tokens on both sides" + (" after truncation" if tokens.truncated else "")
            remedy = "drop the record" + (" or raise max_length" if tokens.truncated else "")
            raise self._error(pair, "identical sides", found, remedy, "rejected")
        return tokens

    def _shorten(self, pair: Pair, tokens: PairTokens) -> PairTokens:
        full = tokens
        while _longest(tokens) > self.max_length and len(turns := _without_oldest_turn(pair.messages)) < len(
            pair.messages
        ):
            pair = replace(pair, messages=turns)
            tokens = self._with_user_text(pair, full, pair.messages[-1].content)
        if _longest(tokens) <= self.max_length:
            return tokens
        user = pair.messages[-1].content
        fixed = _longest_prompt(self._with_user_text(pair, full, ""))
        room = self.max_length - fixed
        if room < 2:
            raise self._error(
                pair,
                "prompt does not fit",
                f"template and instruction take {fixed} tokens, which leaves {max(room, 0)} of max_length="
                f"{self.max_length} for a response of 2 tokens or more",
                f"raise max_length to {fixed + 2} or more, or shorten the wording",
                "prompt",
            )
        encoding = self.tokenizer(user, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoding["offset_mapping"]]
        limit = max(room - min(len(ends), room // 4), 2)
        chosen, rejected = (self._cut(response, limit) for response in (full.chosen, full.rejected))
        full = replace(full, chosen=chosen, rejected=rejected)
        keep = min(len(ends), room - max(len(chosen), len(rejected)))
        while True:
            tokens = self._with_user_text(pair, full, user[: ends[keep - 1]] if keep > 0 else "")
            excess = _longest(tokens) - self.max_length
            if excess <= 0 or keep <= 0:
                break
            # Tokens at the cut can differ from those of the whole text, so the count may be off by a few.
            keep = max(keep - excess, 0)
        return tokens

    def _cut(self, response: np.ndarray, limit: int) -> np.ndarray:
        return response if len(response) <= limit else np.append(response[: limit - 1], self.end_id)

    def _with_user_text(self, pair: Pair, tokens: PairTokens, user: str) -> PairTokens:
        messages = (*pair.messages[:-1], Message("user", user))
        prompts = self._render(replace(pair, messages=messages)).prompts
        ids = iter(self._encode([text for text in prompts if text is not None]))
        return replace(tokens, prompts=tuple(None if text is None else next(ids) for text in prompts), truncated=True)


def _longest_prompt(tokens: PairTokens) -> int:
    return max(len(prompt) for prompt in tokens.prompts if prompt is not None)


def _longest(tokens: PairTokens) -> int:
    return _longest_prompt(tokens) + max(len(tokens.chosen), len(tokens.rejected))


def _without_oldest_turn(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation without its first user message and the answers to it; itself where it has only one turn."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if len(users) < 2:
        return messages
    head = tuple(message for message in messages[: users[1]] if message.role == "system")
    return head + messages[users[1] :]


def _any_of(texts: set[str]) -> re.Pattern | None:
    # Longest first, so that the message names the token and not its beginning.
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))) if texts else None
