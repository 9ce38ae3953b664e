"""Text to token ids: prompts in one piece, responses in the place where they stand, users' texts as text.

A response's ids are those that its text has *behind its prompt*: a tokenizer that writes blanks as ▁ gives other pieces
to a text that stands alone. Encoding prompt and response together would cost the prompt again for every response, so a
response is encoded behind the prompt's tail alone, from its last control token on (or from a blank near its end), and
two checks say whether that was the same: the tail's ids end the prompt's, and begin those of tail and response. Where
they do not, for a piece that spans the border, the response gets ids that read as its text behind the prompt, or none.

A control token that a user's text spells (`<|im_end|>` in a question about chat templates) is text. The chat template
is rendered with a mark in its place, and such a rendering is encoded by a twin of the tokenizer that knows the control
tokens under other names: one piece, no token of the template's lost, none made of the user's text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from amopo_fast.prompts.chat import any_of

_MARK = "qz8c31f05b7d96e2a4"  # letters and digits: no template and no normalizer changes them
_TAIL_CHARACTERS = (48, 160, 480)  # of a prompt without a control token near its end
_LOOK_BACK = 160
_BLANK = re.compile(r"[ \n]")
_PIECE_CHARACTERS = 1 << 16
_EMPTY = np.empty(0, dtype=np.int64)


class CannotEncode(ValueError):
    """A text that has no token ids in its place."""


class Encoder:
    """A fast tokenizer as ids of texts in their places.

    Args:
        tokenizer: a fast tokenizer of transformers.
        control: the tokens that a template sets and no user may, text by id; at least one.
    """

    def __init__(self, tokenizer, control: Mapping[int, str]):
        self.tokenizer = tokenizer
        self._control = dict(control)
        self._pattern = any_of(self._control.values())
        names = list(self._control.values())
        self._marks = {text: f"{_MARK}u{index}e" for index, text in enumerate(names)}  # in a user's text
        self._names = {text: f"{_MARK}c{index}e" for index, text in enumerate(names)}  # of the twin's tokens
        self._texts = {mark: text for text, mark in self._marks.items()}
        self._mark_pattern = any_of(self._texts)
        self._twin: Tokenizer | None = None
        self._tails: dict[str, np.ndarray] = {}
        self._cut_behind_blank = True

    # Users' texts

    def control_text(self, text: str) -> str | None:
        """The first control token that a text spells, None where it spells none."""
        if _MARK in text:
            return _MARK
        match = self._pattern.search(text)
        return match[0] if match else None

    def marked(self, value: Any) -> Any:
        """A user's texts (nested in lists and mappings) with marks for the control tokens that they spell.

        Raises CannotEncode where the tokenizer cannot be told to leave a control token alone.
        """
        if self._twin is None:
            self._twin = self._make_twin()
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._marks[match[0]], value)
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(item) for key, item in value.items()}
        return [self.marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    def unmarked(self, text: str) -> str:
        """The text as the user wrote it."""
        return self._mark_pattern.sub(lambda match: self._texts[match[0]], text) if _MARK in text else text

    # Whole texts

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int64) of rendered texts, each in one piece."""
        if not texts:
            return []
        backend = self.tokenizer.backend_tokenizer
        # May be stored in the tokenizer; its next call by transformers sets them anew.
        backend.no_padding()
        backend.no_truncation()
        # The template's text holds its special tokens already.
        plain = backend.encode_batch_fast([text for text in texts if _MARK not in text], add_special_tokens=False)
        ids = iter(plain)
        return [
            self._encode_marked(text) if _MARK in text else np.array(next(ids).ids, dtype=np.int64) for text in texts
        ]

    def count(self, text: str) -> int:
        """About how many tokens a long text has, in memory that does not grow with it: a few too many at most for
        every 65,536 characters."""
        total, start = 0, 0
        while start < len(text):
            end = start + _PIECE_CHARACTERS
            if end < len(text):
                end = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
                end = end if end > start else start + _PIECE_CHARACTERS
            [ids] = self.encode([text[start:end]])
            total, start = total + len(ids), end
        return total

    def token_ends(self, text: str) -> list[int]:
        """Character offsets at which the text's tokens end."""
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return [end for _, end in encoding.offsets]

    def _encode_marked(self, text: str) -> np.ndarray:
        renamed = self._pattern.sub(lambda match: self._names[match[0]], text)
        return np.array(self._twin.encode(self.unmarked(renamed), add_special_tokens=False).ids, dtype=np.int64)

    def _make_twin(self) -> Tokenizer:
        """The tokenizer with other names for the control tokens, under the same ids."""
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = self._names
        for token in content["added_tokens"]:
            if token["content"] in names:
                token.update(content=names[token["content"]], single_word=False)
        model = content["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(text, text): index for text, index in vocabulary.items()}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        content.update(post_processor=None, truncation=None, padding=None)
        try:
            twin = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # tokenizers raises plain Exception
            raise CannotEncode(f"the tokenizer knows its control tokens by no other name ({error})") from None
        wrong = [text for index, text in self._control.items() if twin.token_to_id(names[text]) != index]
        if wrong:
            raise CannotEncode(f"the tokenizer knows {wrong[0]!r} by no other name")
        return twin

    # Responses in their place

    def tail(self, prompts: Sequence[str]) -> str:
        """The end of the prompts, the same for all of them, that a response is encoded behind; "" where they share no
        end that may be tokenised by itself."""
        text = prompts[0]
        end = text[-_LOOK_BACK:]
        place = None
        for match in self._pattern.finditer(end):
            place = match.start()
        if place is not None and all(prompt.endswith(end[place:]) for prompt in prompts):
            return end[place:]
        return next(iter(self._blank_tails(prompts, self._cut_behind_blank)), "")

    @staticmethod
    def _blank_tails(prompts: Sequence[str], behind_blank: bool):
        for length in _TAIL_CHARACTERS:
            end = _common_end(prompts, length)
            blank = _BLANK.search(end)
            if blank is not None and (tail := end[blank.start() + behind_blank :]):
                yield tail
            if len(end) < length:
                return

    def tail_ids(self, tails: Sequence[str]) -> list[np.ndarray]:
        """Ids of tails. Most templates have one, which is encoded once."""
        new = list(dict.fromkeys(tail for tail in tails if tail not in self._tails))
        if len(self._tails) > 4096:  # tails that hold a user's words
            self._tails.clear()
            new = list(dict.fromkeys(tails))
        self._tails.update(zip(new, self.encode(new), strict=True))
        return [self._tails[tail] for tail in tails]

    def behind(
        self, prompts: Sequence[str], prompt_ids: Sequence[np.ndarray], tail: str, response: str, ids: np.ndarray
    ) -> np.ndarray:
        """Ids of a response as it goes on from each of the prompts.

        Args:
            prompts, prompt_ids: texts and ids of the present dimensions.
            tail: as `tail` gave it.
            ids: of tail + response.

        Raises:
            CannotEncode: no ids read as the response behind the prompts.
        """
        before = self._tails[tail] if tail else _EMPTY
        if tail and _begins(ids, before) and all(_ends(prompt, before) for prompt in prompt_ids):
            return ids[len(before) :]
        return self._behind_whole(prompts, prompt_ids, response)

    def _behind_whole(self, prompts: Sequence[str], prompt_ids: Sequence[np.ndarray], response: str) -> np.ndarray:
        """The slow way, for a tail that does not do: behind other ends of the prompts, behind the whole prompts, and
        last any ids that read as the response."""
        for behind_blank in (True, False):
            for tail in self._blank_tails(prompts, behind_blank):
                before, ids = self.encode([tail, tail + response])
                if _begins(ids, before) and all(_ends(prompt, before) for prompt in prompt_ids):
                    self._cut_behind_blank = behind_blank
                    return ids[len(before) :]
        wholes = self.encode([prompt + response for prompt in prompts])
        if all(_begins(whole, ids) for whole, ids in zip(wholes, prompt_ids, strict=True)):
            rests = [whole[len(ids) :] for whole, ids in zip(wholes, prompt_ids, strict=True)]
            if all(np.array_equal(rest, rests[0]) for rest in rests):
                return rests[0]
        for anchor in ("", *_ANCHORS, *self._control.values()):
            before, ids = self.encode([anchor, anchor + response])
            if not _begins(ids, before):
                continue
            rest = ids[len(before) :]
            if all(
                self._text(np.concatenate([prompt, rest])) == self._text(whole)
                for prompt, whole in zip(prompt_ids, wholes, strict=True)
            ):
                return rest
        raise CannotEncode("no tokens read as the response behind its prompt")

    def _text(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


_ANCHORS = ("\n", "a", ".", ":")  # a text behind one of them is not the first of its piece


def _begins(ids: np.ndarray, prefix: np.ndarray) -> bool:
    return len(ids) >= len(prefix) and bool((ids[: len(prefix)] == prefix).all())


def _ends(ids: np.ndarray, suffix: np.ndarray) -> bool:
    return len(ids) >= len(suffix) and bool((ids[len(ids) - len(suffix) :] == suffix).all())


def _common_end(texts: Sequence[str], limit: int) -> str:
    """The last characters that all texts share, `limit` at most."""
    end = texts[0][-limit:]
    if all(text.endswith(end) for text in texts):
        return end
    return os.path.commonprefix([text[-limit:][::-1] for text in texts])[::-1]
