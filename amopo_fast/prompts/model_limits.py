"""Whether a model can take the tokens that it is to be trained on: its vocabulary and its positions, before the first
step."""

from __future__ import annotations

from collections.abc import Iterable

from amopo_fast.data.pair import record_of
from amopo_fast.errors import DataError
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.prompts.truncation import longest


def check_vocabulary(tokenizer, vocabulary: int) -> None:
    """Raises ValueError where the tokenizer has an id that is no row of an embedding of `vocabulary` rows."""
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if index >= vocabulary:
        raise ValueError(
            f"the tokenizer has ids up to {index} ({token!r}), the model's embedding only {vocabulary} rows; take the "
            f"model's own tokenizer, or a model whose embedding was resized to {index + 1} rows or more"
        )


def check_pairs(pairs: Iterable[PairTokens], *, vocabulary: int, positions: int | None, source: str = "") -> None:
    """Raises DataError for the first pair that has an id beyond the model's embedding, or a sequence that is longer
    than the model has positions.

    Args:
        vocabulary: rows of the embedding.
        positions: the longest sequence that the model can take; None where it has no limit.
        source: of the pairs, for the message.
    """
    for pair in pairs:
        record = record_of(pair.record)
        parts = [*(ids for ids in pair.prompts if ids is not None), pair.chosen, pair.rejected]
        highest = max(int(ids.max()) for ids in parts if len(ids))
        if highest >= vocabulary:
            raise DataError(
                "token beyond the vocabulary",
                f"id {highest}, where the model's embedding has {vocabulary} rows",
                "take the model's own tokenizer",
                source=source,
                record=record,
            )
        if positions is not None and longest(pair) > positions:
            raise DataError(
                "sequence too long for the model",
                f"{longest(pair)} tokens, where the model has {positions} positions",
                f"set max_length to {positions} or less",
                source=source,
                record=record,
            )
