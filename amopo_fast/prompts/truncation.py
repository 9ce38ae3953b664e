"""Shortening a pair to max_length: old turns first, then the end of the user's text, then the responses' ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from amopo_fast.data.pairs import Message, Pair, last_user
from amopo_fast.data.sources.candidate import Dropped
from amopo_fast.errors import DataError
from amopo_fast.prompts.tokens import PairTokens

TruncatedResponses = Literal["drop", "keep_end", "no_end"]


@dataclass(frozen=True)
class Limits:
    """How long a sequence may be.

    Attributes:
        max_length: most tokens of a sequence, prompt and response.
        token_characters: most characters of one token; `max_length` of them hold every text that fits.
        truncated_responses: what becomes of a response that does not fit: "drop" leaves its pair out, "no_end" cuts it,
            and it has no end token, as the text does not end there; "keep_end" cuts it and ends it.
        end_id: the end token.
    """

    max_length: int
    token_characters: int
    truncated_responses: TruncatedResponses
    end_id: int

    @property
    def characters(self) -> int:
        """More than fit into a sequence: what is beyond them is cut before it is tokenised."""
        return self.max_length * self.token_characters

    def pre_cut(self, pair: Pair) -> tuple[Pair, tuple[bool, bool]]:
        """The pair without text that cannot fit, and which of its responses (chosen, rejected) lost something.

        Raises DataError where a text that is never shortened cannot fit.
        """
        limit = self.characters
        if sum(len(message.content) for message in pair.messages) > limit:
            messages = pair.messages
            while sum(len(message.content) for message in messages) > limit:
                shorter = without_oldest_turn(messages)
                if len(shorter) == len(messages):
                    break
                messages = shorter
            user = last_user(messages)
            messages = with_content(messages, messages[user].content[:limit])
            for index, message in enumerate(messages):
                if index != user and len(message.content) > limit:
                    field = f"prompt[{index + len(pair.messages) - len(messages)}]"
                    raise self._does_not_fit(pair, f"the {message.role}'s message is {len(message.content)} characters "
                                             "long", "shorten it, or raise max_length", field)  # fmt: skip
            pair = replace(pair, messages=messages)
        cut = (len(pair.chosen) > limit, len(pair.rejected) > limit)
        if any(cut):
            pair = replace(pair, chosen=pair.chosen[:limit], rejected=pair.rejected[:limit])
        return pair, cut

    def fit(
        self,
        pair: Pair,
        tokens: PairTokens,
        cut: tuple[bool, bool],
        prompts_of: Callable[[Pair], tuple[np.ndarray | None, ...]],
        ends_of: Callable[[str], Sequence[int]],
    ) -> PairTokens | Dropped:
        """The pair's tokens, shortened where they do not fit.

        Of the room beside the template and the instruction, a response keeps at least three quarters; the user's text
        keeps its beginning and gets what the longer response leaves.

        Args:
            cut: as `pre_cut` gave it.
            prompts_of: a pair's prompts' ids.
            ends_of: the characters at which a text's tokens end.

        Raises:
            DataError: the pair does not fit even without the user's text.
        """
        if longest(tokens) <= self.max_length and not any(cut):
            return tokens
        if any(cut) and self.truncated_responses == "drop":
            return self._dropped(pair)
        full = replace(tokens, truncated=True)
        turns = pair
        while longest(tokens) > self.max_length:
            shorter = without_oldest_turn(turns.messages)
            if len(shorter) == len(turns.messages):
                break
            turns = replace(turns, messages=shorter)
            tokens = replace(full, prompts=prompts_of(turns))
        if longest(tokens) <= self.max_length and not any(cut):
            return tokens

        def with_user(text: str) -> PairTokens:
            return replace(full, prompts=prompts_of(replace(turns, messages=with_content(turns.messages, text))))

        user = turns.messages[last_user(turns.messages)].content
        fixed = longest_prompt(with_user(""))
        room = self.max_length - fixed
        if room < 2:
            raise self._does_not_fit(
                pair,
                f"template and instruction take {fixed} tokens, which leaves {max(room, 0)} of max_length="
                f"{self.max_length} for a response of 2 tokens or more",
                f"raise max_length to {fixed + 2} or more, or shorten the wording",
                "prompt",
            )
        ends = ends_of(user)
        limit = max(room - min(len(ends), room // 4), 2)
        responses = [
            self._cut(response, limit, was_cut)
            for response, was_cut in zip((full.chosen, full.rejected), cut, strict=True)
        ]
        if self.truncated_responses == "drop" and max(len(full.chosen), len(full.rejected)) > limit:
            return self._dropped(pair)
        full = replace(full, chosen=responses[0], rejected=responses[1])
        keep = min(len(ends), room - max(map(len, responses)))
        while True:
            tokens = with_user(user[: ends[keep - 1]] if keep > 0 else "")
            excess = longest(tokens) - self.max_length
            if excess <= 0 or keep <= 0:
                return tokens
            # Tokens at the cut can differ from those of the whole text, so the count may be off by a few.
            keep = max(keep - excess, 0)

    def _cut(self, response: np.ndarray, limit: int, was_cut: bool) -> np.ndarray:
        if len(response) <= limit and not was_cut:
            return response
        if was_cut:  # the end token that it has is not its text's
            response = response[:-1]
        if self.truncated_responses == "keep_end":
            return np.append(response[: limit - 1], self.end_id)
        return response[:limit]

    def _dropped(self, pair: Pair) -> Dropped:
        return Dropped(pair.record, f"a response that does not fit max_length={self.max_length}")

    @staticmethod
    def _does_not_fit(pair: Pair, found: str, remedy: str, field: str) -> DataError:
        return DataError("prompt does not fit", found, remedy, source=pair.source, record=pair.record, field=field)


def longest_prompt(tokens: PairTokens) -> int:
    """Tokens of the longest prompt."""
    return max(len(prompt) for prompt in tokens.prompts if prompt is not None)


def longest(tokens: PairTokens) -> int:
    """Tokens of the longest sequence."""
    return longest_prompt(tokens) + max(len(tokens.chosen), len(tokens.rejected))


def with_content(messages: Sequence[Message], text: str) -> tuple[Message, ...]:
    """The messages with another text in the last of the user's."""
    index = last_user(messages)
    return (*messages[:index], messages[index]._replace(content=text), *messages[index + 1 :])


def without_oldest_turn(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation without its first user message and the answers to it; itself where it has only one turn."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if len(users) < 2:
        return messages
    head = tuple(message for message in messages[: users[1]] if message.role in ("system", "developer"))
    return head + messages[users[1] :]
