"""From a Pair to token ids: the prompt x_k = f(x, d_k) of every dimension, and the two responses.

    prompt     the chat template's generation prompt, tokenised in one piece: what a model has in context when asked
    response   the tokens that its text has behind the prompt, up to and with the end token

Where the whole conversation's rendering, tokenised in one piece, begins with the prompt's ids, the rest of it up to the
end token are the response's ids. rendering.py makes texts (of chat.py and answers.py), encoding.py ids, truncation.py
shortens.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from amopo_fast.data.pair import prompt_key
from amopo_fast.data.pairs import Pair, check_dimensions
from amopo_fast.data.sources.candidate import Dropped
from amopo_fast.errors import DataError
from amopo_fast.prompts.answers import AnswerFormat, Reasoning
from amopo_fast.prompts.chat import ChatTemplate
from amopo_fast.prompts.encoding import CannotEncode, Encoder
from amopo_fast.prompts.rendering import Order, Renderer, Texts, error_in
from amopo_fast.prompts.tokenizer import require_vocabulary
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.prompts.truncation import Limits, TruncatedResponses
from amopo_fast.prompts.wording import Wording

logger = logging.getLogger(__name__)

_BATCH = 64  # pairs per call of the tokenizer; bounds the texts alive, not the result
_COUNTED_CHARACTERS = 1 << 18  # a longer text's tokens are counted piece by piece
CONTROL_TEXT = "text of a special token, encoded as text"
CLOSED = "reasoning closed before the answer"


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
        reasoning: where the generation prompt opens reasoning and a response has none: "refuse" the record, or "close"
            it before the answer.
        chat_template_kwargs: variables for the chat template, as {"enable_thinking": False}; a pair's own override
            them.
        template_date: ISO date that a template which reads the clock is shown; None takes today's.
        truncated_responses: a response that does not fit has "no_end" token, or is ended all the same ("keep_end"), or
            leaves its pair out ("drop").

    Attributes:
        template_date: the date in use; None where the template reads no clock. A run has to store it to go on.
        end_id: the token that ends a response.
        options: those beside dimensions, wording, order, range and length, by name: what makes the same prompts again.

    Raises:
        ValueError: an argument makes no sense, the chat template cannot be used, or the tokenizer is slow or has no
            token to end a response with.
        DataError: the wording's file is bad.
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
        reasoning: Reasoning = "refuse",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        template_date: str | None = None,
        truncated_responses: TruncatedResponses = "no_end",
    ):
        check_dimensions(dimensions, score_range)
        for name, value, choices in (
            ("order", order, Order),
            ("truncated_responses", truncated_responses, TruncatedResponses),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length must be a positive whole number of tokens, got {max_length!r}")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is a slow tokenizer, whose tokens have no place in the text; "
                "save it as a fast one (tokenizer.json)"
            )
        require_vocabulary(tokenizer)
        self.tokenizer, self.dimensions = tokenizer, tuple(dimensions)
        self.score_range, self.order, self.max_length = tuple(score_range), order, max_length
        self.chat = ChatTemplate(tokenizer, date=template_date, kwargs=chat_template_kwargs)
        self.template_date = self.chat.date
        self.reasoning, self.truncated_responses = reasoning, truncated_responses
        self.answers = AnswerFormat(self.chat, tokenizer, reasoning)
        self.end_id = self.answers.end_id
        self.encoder = Encoder(tokenizer, self.answers.control)
        self._renderer = Renderer(
            self.chat, self.answers, self.encoder, dimensions, highest_score=score_range[1], order=order,
            wording=template,
        )  # fmt: skip
        self.wording = self._renderer.wording
        longest_token = max(map(len, tokenizer.get_vocab()))
        self._limits = Limits(max_length, longest_token, truncated_responses, self.end_id)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "chat_template_kwargs": self.chat.kwargs or None, "template_date": self.template_date,
            "reasoning": self.reasoning, "truncated_responses": self.truncated_responses,
        }  # fmt: skip

    def instruction(self, pair: Pair, dimension: str) -> str:
        """The instruction of one dimension; always with the chosen side's score.

        Raises ValueError where the pair has no score for the dimension.
        """
        return self._renderer.instruction(pair, dimension)

    def messages(self, pair: Pair, dimension: str) -> list[dict[str, Any]]:
        """f(x, d_k) as chat messages: the pair's, with the instruction in the last one of the user's."""
        return self._renderer.messages(pair, dimension)

    def present(self, pair: Pair) -> list[bool]:
        """Which of the K dimensions the pair has."""
        return self._renderer.present(pair)

    def unlimited(self) -> PromptBuilder:
        """The same builder without a limit on the length, to learn how long pairs are before they are shortened."""
        builder = copy.copy(self)
        builder.max_length = sys.maxsize
        builder._limits = replace(self._limits, max_length=sys.maxsize)
        return builder

    def notes(self, pair: Pair) -> list[str]:
        """What is done to a pair that its owner may want to know of: CONTROL_TEXT, CLOSED. Raises as `tokens`."""
        notes = [CONTROL_TEXT] if self._renderer.spells_control(pair) else []
        if self.answers.tags is not None and self._renderer.texts(pair).closed:
            notes.append(CLOSED)
        return notes

    def tokens(self, pair: Pair) -> PairTokens:
        """Token ids of one pair.

        Raises:
            DataError: the pair does not fit `max_length` even without the user's text, the chat template refuses it,
                has no place for a part of it or alters a response, or its responses become equal.
        """
        result = next(self.iter_tokens([pair]))
        if isinstance(result, Dropped):
            raise error_in(pair, "dropped", result.reason, "raise max_length, or set truncated_responses: no_end")
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
        dropped: Counter[str] = Counter()
        for tokens in self.iter_tokens(pairs):
            if isinstance(tokens, PairTokens):
                result.append(tokens)
            elif isinstance(tokens, Dropped):
                dropped[tokens.reason] += 1
            elif on_bad_record == "error":
                raise tokens
            else:
                errors.append(tokens)
        if pairs and not result:
            found = f"all {len(errors)} records are bad, the first: {errors[0]}" if errors else str(dict(dropped))
            raise DataError("no usable record", found, "correct them", source=pairs[0].source)
        for reason, count in dropped.items():
            logger.warning("%d of %d records are left out: %s", count, len(pairs), reason)
        truncated = sum(tokens.truncated for tokens in result)
        if truncated:
            logger.warning(
                "%d of %d records were shortened to max_length=%d tokens", truncated, len(result), self.max_length
            )
        return result, errors

    def iter_tokens(self, pairs: Sequence[Pair]) -> Iterator[PairTokens | DataError | Dropped]:
        """Token ids of many pairs, one at a time; a DataError in the place of a pair that cannot be used, a Dropped in
        the place of one that `truncated_responses` leaves out."""
        for start in range(0, len(pairs), _BATCH):
            yield from self._batch(pairs[start : start + _BATCH])

    def iter_lengths(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, int, int] | DataError]:
        """Tokens of (the longest prompt, chosen, rejected) of pairs before any shortening. Of texts of more than
        262,144 characters they are counted piece by piece, which may be off by one for every 65,536."""
        whole = self.unlimited()
        exact = iter(whole.iter_tokens([pair for pair in pairs if _characters(pair) <= _COUNTED_CHARACTERS]))
        for pair in pairs:
            if _characters(pair) > _COUNTED_CHARACTERS:
                yield whole._counted(pair)
                continue
            tokens = next(exact)
            if isinstance(tokens, DataError):
                yield tokens
            elif isinstance(tokens, PairTokens):
                prompts = [len(ids) for ids in tokens.prompts if ids is not None]
                yield max(prompts), len(tokens.chosen), len(tokens.rejected)

    def _counted(self, pair: Pair) -> tuple[int, int, int] | DataError:
        try:
            texts = self._renderer.texts(pair)
        except DataError as error:
            return error
        count = self.encoder.count
        return count(max(texts.present, key=len)), count(texts.chosen), count(texts.rejected)

    def _batch(self, batch: Sequence[Pair]) -> Iterator[PairTokens | DataError | Dropped]:
        rendered: list[tuple[Pair, tuple[bool, bool], Texts] | DataError] = []
        for pair in batch:
            try:
                shorter, cut = self._limits.pre_cut(pair)
                rendered.append((shorter, cut, self._renderer.texts(shorter)))
            except DataError as error:
                rendered.append(error)
        texts = [item[-1] for item in rendered if not isinstance(item, DataError)]
        self.encoder.tail_ids([text.tail for text in texts])
        ids = iter(
            self.encoder.encode(
                [part for text in texts for part in (*text.present, text.tail + text.chosen, text.tail + text.rejected)]
            )
        )
        for item in rendered:
            if isinstance(item, DataError):
                yield item
                continue
            pair, cut, text = item
            prompts = tuple(None if prompt is None else next(ids) for prompt in text.prompts)
            behind = next(ids), next(ids)
            try:
                yield self._finish(pair, text, prompts, behind, cut)
            except DataError as error:
                yield error

    def _finish(
        self,
        pair: Pair,
        text: Texts,
        prompts: tuple[np.ndarray | None, ...],
        behind: tuple[np.ndarray, np.ndarray],
        cut: tuple[bool, bool],
    ) -> PairTokens | Dropped:
        present = [ids for ids in prompts if ids is not None]
        responses = []
        for side, response, ids in zip(("chosen", "rejected"), (text.chosen, text.rejected), behind, strict=True):
            try:
                ids = self.encoder.behind(text.present, present, text.tail, response, ids)
            except CannotEncode as error:
                remedy = "drop the record, or take another chat_template"
                raise error_in(pair, "no tokens in its place", str(error), remedy, side) from None
            responses.append(ids if self.answers.end_text else np.append(ids, self.end_id))
        whole = PairTokens(
            pair.record, prompts, *responses, truncated=False, score_gaps=self._score_gaps(pair),
            prompt_id=int.from_bytes(prompt_key(pair)[:8], "big", signed=True),
        )  # fmt: skip
        tokens = self._limits.fit(pair, whole, cut, self._prompts_of, self.encoder.token_ends)
        if isinstance(tokens, PairTokens) and np.array_equal(tokens.chosen, tokens.rejected):
            found = "the same tokens on both sides" + (" after truncation" if tokens.truncated else "")
            remedy = "drop the record" + (" or raise max_length" if tokens.truncated else "")
            raise error_in(pair, "identical sides", found, remedy, "rejected")
        return tokens

    def _score_gaps(self, pair: Pair) -> np.ndarray:
        sides = pair.chosen_scores, pair.rejected_scores
        chosen, rejected = (np.array([scores.get(name, np.nan) for name in self.dimensions]) for scores in sides)
        return chosen - rejected

    def _prompts_of(self, pair: Pair) -> tuple[np.ndarray | None, ...]:
        texts = self._renderer.prompts(pair)
        ids = iter(self.encoder.encode([text for text in texts if text is not None]))
        return tuple(None if text is None else next(ids) for text in texts)


def _characters(pair: Pair) -> int:
    return len(pair.chosen) + len(pair.rejected) + sum(len(message.content) for message in pair.messages)
