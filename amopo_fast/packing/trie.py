"""The sequences of a row, and the trie of token runs that they merge into; numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amopo_fast.prompts.tokens import PairTokens


@dataclass(frozen=True)
class Sequences:
    """S sequences of a plan in one array; an absent one is empty. The last token of each is a label only."""

    tokens: np.ndarray  # int64, all sequences one after another
    begin: np.ndarray  # (S,) where each starts
    prompt: np.ndarray  # (S,) tokens of its prompt
    length: np.ndarray  # (S,) tokens of prompt and response
    group: int  # how many, one after another, a batch pads together: the 2K of a pair

    @property
    def inputs(self) -> np.ndarray:
        """(S,) tokens that the model computes."""
        return np.maximum(self.length - 1, 0)

    @property
    def responses(self) -> np.ndarray:
        """(S,) labels."""
        return self.length - self.prompt

    @property
    def padded(self) -> int:
        """Tokens with each group's sequences padded to the group's longest."""
        groups = self.length.reshape(-1, self.group)
        return int((np.count_nonzero(groups, axis=1) * groups.max(axis=1)).sum())


@dataclass(frozen=True)
class Trie:
    """B nodes in the order of the row: parents stand before their children."""

    start: np.ndarray  # (B,) depth at which the node's tokens begin
    length: np.ndarray  # (B,) its number of tokens
    source: np.ndarray  # (B,) a sequence that runs through the node: its tokens are sequence[start : start + length]
    paths: np.ndarray  # the nodes root..node of every node, one path after another
    path_nodes: np.ndarray  # (B,) number of nodes on each path
    leaf: np.ndarray  # (S,) the node in which the sequence ends, -1 for an absent sequence


def spans(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, ... (length[0] of them), begin[1], ..."""
    ends = np.cumsum(length)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begin - ends + length, length)


def sequences_of(pairs: Sequence[PairTokens]) -> Sequences:
    """The 2K sequences of every pair.

    Raises:
        ValueError: no pairs, differing numbers of dimensions, or an empty prompt or response.
    """
    if not pairs:
        raise ValueError("build_plan needs at least one pair")
    num_dimensions = len(pairs[0].prompts)
    parts: list[np.ndarray] = []
    prompt, length = [], []
    for pair in pairs:
        if len(pair.prompts) != num_dimensions:
            raise ValueError(
                f"record {pair.record} has {len(pair.prompts)} dimensions, record {pairs[0].record} {num_dimensions}; "
                "tokenize all pairs of a row with the same dimensions"
            )
        for tokens in pair.prompts:
            for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                if tokens is None:
                    prompt.append(0)
                    length.append(0)
                    continue
                if len(tokens) == 0 or len(response) == 0:
                    empty = "prompt" if len(tokens) == 0 else f"{name} response"
                    raise ValueError(f"record {pair.record}: the {empty} has no tokens; a label needs a row before it")
                parts += (tokens, response)
                prompt.append(len(tokens))
                length.append(len(tokens) + len(response))
    if not parts:
        raise ValueError(f"records {[p.record for p in pairs]}: every dimension is absent; leave such pairs out")
    lengths = np.array(length)
    tokens = np.concatenate(parts).astype(np.int64, copy=False)
    return Sequences(tokens, np.cumsum(lengths) - lengths, np.array(prompt), lengths, 2 * num_dimensions)


def _common_prefixes(tokens: np.ndarray, begin: list[int], end: list[int]) -> list[int]:
    """Tokens that each of the sequences tokens[begin:end] shares with the one before it; 0 for the first."""
    result = [0]
    for i in range(1, len(begin)):
        a, b = begin[i - 1], begin[i]
        n = min(end[i - 1] - a, end[i] - b)
        differs = tokens[a : a + n] != tokens[b : b + n]
        first = int(differs.argmax())
        result.append(first if differs[first] else n)
    return result


def build_trie(sequences: Sequences, min_node_tokens: int, multiple: int = 1) -> Trie:
    """Merge common prefixes.

    Args:
        min_node_tokens: a common prefix is shared only if it adds at least this many tokens to its parent's.
        multiple: a shared run's length is rounded down to a multiple of it, and what is cut off computed by each child.
    """
    begin, end = sequences.begin.tolist(), (sequences.begin + sequences.inputs).tolist()
    # Big-endian bytes sort like the token ids themselves, prefixes first.
    blob = sequences.tokens.astype(">u4").tobytes()
    order = sorted(
        (i for i in range(len(begin)) if end[i] > begin[i]), key=lambda i: blob[4 * begin[i] : 4 * end[i]]
    )
    lcp = _common_prefixes(sequences.tokens, [begin[i] for i in order], [end[i] for i in order])
    start, length, source, paths = [], [], [], []
    leaf = [-1] * len(begin)
    least = max(min_node_tokens, multiple)

    # Work on ranges of the sorted order that agree on `depth` tokens, already covered by the path's last node.
    stack: list[tuple[int, int, int, list[int]]] = [(0, len(order), 0, [])]
    while stack:
        low, high, depth, path = stack.pop()
        # Children: maximal runs whose neighbours share at least a node's tokens beyond `depth`.
        cuts = [low, *(i for i in range(low + 1, high) if lcp[i] < depth + least), high]
        children = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            first = order[a]
            shared = min(lcp[a + 1 : b]) if b - a > 1 else end[first] - begin[first]
            if shared == depth:  # only a sequence that ends exactly where its parent ends
                leaf[first] = path[-1]
                continue
            if b - a > 1:
                shared -= (shared - depth) % multiple
            child = [*path, len(start)]
            start.append(depth)
            length.append(shared - depth)
            source.append(first)
            paths.append(child)
            if b - a == 1:
                leaf[first] = child[-1]
            else:
                children.append((a, b, shared, child))
        stack.extend(reversed(children))
    return Trie(
        np.array(start),
        np.array(length),
        np.array(source),
        np.array([node for path in paths for node in path]),
        np.array([len(path) for path in paths]),
        np.array(leaf),
    )
