"""One packed row: sequences of several pairs laid out so that every shared token prefix is computed once.

The 2K sequences of a pair share prompts (a prompt serves its chosen and its rejected response) and often more (the
same instruction, the user's text, the beginning of a response). All sequences of a row are merged into a token trie.
Each trie node is a run of consecutive tokens of the row; a node's tokens attend to the path root..node, so exact
causal attention needs only, per node, the list of rows on that path (DESIGN: bottom-right-aligned varlen attention).

    pairs -> sequences -> trie nodes -> Plan

The last token of a sequence predicts nothing and is not computed. The last prompt token of a dimension carries one
label per response, so label rows repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from amopo_fast.prompts.tokens import PairTokens

MIN_NODE_TOKENS = 16  # a shorter shared run costs an attention segment more than its recomputation; see docs/packing.md


@dataclass(frozen=True)
class Plan:
    """A packed row of T tokens in B trie nodes, holding S = pairs * K * 2 sequences with N label rows in all.

    All tensors are on the CPU until `to` moves them.
    """

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, position on the path from the root
    cu_seqlens_q: torch.Tensor  # (B + 1,) int32, tokens of each node
    cu_seqlens_k: torch.Tensor  # (B + 1,) int32, tokens of each node's path, itself included
    kv_indices: torch.Tensor  # (cu_seqlens_k[-1],) int64, rows of the paths, root first
    kv_order: torch.Tensor  # (cu_seqlens_k[-1],) int32, places in kv_indices sorted by the row they hold, stable
    kv_offsets: torch.Tensor  # (T + 1,) int32, kv_order[kv_offsets[t]:kv_offsets[t + 1]] are the places of row t
    label_rows: torch.Tensor  # (N,) int64, the row whose hidden state predicts labels[i]
    labels: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (S + 1,) int32, label rows of each sequence; empty where a dimension is absent
    records: torch.Tensor  # (pairs,) int64, Pair.record
    num_dimensions: int  # K
    max_seqlen_q: int
    max_seqlen_k: int
    unshared_tokens: int  # tokens of the separate sequences
    padded_tokens: int  # tokens of the separate sequences, each pair's padded to the pair's longest

    @property
    def num_tokens(self) -> int:
        """Tokens that the model's body computes, T."""
        return self.input_ids.shape[1]

    @property
    def num_pairs(self) -> int:
        return self.records.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Plan:
        """A copy with every tensor on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
            for f in fields(self)
            for value in [getattr(self, f.name)]
        }
        return Plan(**moved)

    def pin_memory(self) -> Plan:
        """A copy in page-locked memory; DataLoader(pin_memory=True) calls this."""
        pinned = {
            f.name: value.pin_memory() if isinstance(value, torch.Tensor) else value
            for f in fields(self)
            for value in [getattr(self, f.name)]
        }
        return Plan(**pinned)


@dataclass(frozen=True)
class _Sequences:
    """S sequences of a row in one array; an absent one is empty. The last token of each is a label only."""

    tokens: np.ndarray  # int64, all sequences one after another
    begin: np.ndarray  # (S,) where each starts
    prompt: np.ndarray  # (S,) tokens of its prompt
    length: np.ndarray  # (S,) tokens of prompt and response
    num_dimensions: int

    @property
    def end_of_inputs(self) -> np.ndarray:
        """(S,) where the tokens that the model computes end."""
        return self.begin + np.maximum(self.length - 1, 0)


@dataclass(frozen=True)
class _Trie:
    """B nodes in the order of the row: parents stand before their children."""

    start: np.ndarray  # (B,) depth at which the node's tokens begin
    length: np.ndarray  # (B,) its number of tokens
    source: np.ndarray  # (B,) a sequence that runs through the node: its tokens are sequence[start : start + length]
    paths: np.ndarray  # the nodes root..node of every node, one path after another
    path_nodes: np.ndarray  # (B,) number of nodes on each path
    leaf: np.ndarray  # (S,) the node in which the sequence ends, -1 for an absent sequence


def _spans(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, ... (length[0] of them), begin[1], ..."""
    ends = np.cumsum(length)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begin - ends + length, length)


def _sequences(pairs: Sequence[PairTokens]) -> _Sequences:
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
    return _Sequences(tokens, np.cumsum(lengths) - lengths, np.array(prompt), lengths, num_dimensions)


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


def _build_trie(sequences: _Sequences, min_node_tokens: int) -> _Trie:
    begin, end = sequences.begin.tolist(), sequences.end_of_inputs.tolist()
    # Big-endian bytes sort like the token ids themselves, prefixes first.
    blob = sequences.tokens.astype(">u4").tobytes()
    order = sorted(
        (i for i in range(len(begin)) if end[i] > begin[i]), key=lambda i: blob[4 * begin[i] : 4 * end[i]]
    )
    lcp = _common_prefixes(sequences.tokens, [begin[i] for i in order], [end[i] for i in order])
    start, length, source, paths = [], [], [], []
    leaf = [-1] * len(begin)

    # Work on ranges of the sorted order that agree on `depth` tokens, already covered by the path's last node.
    stack: list[tuple[int, int, int, list[int]]] = [(0, len(order), 0, [])]
    while stack:
        low, high, depth, path = stack.pop()
        # Children: maximal runs whose neighbours share at least a node's tokens beyond `depth`.
        limit = depth + min_node_tokens
        cuts = [low, *(i for i in range(low + 1, high) if lcp[i] < limit), high]
        children = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            first = order[a]
            shared = min(lcp[a + 1 : b]) if b - a > 1 else end[first] - begin[first]
            if shared == depth:  # only a sequence that ends exactly where its parent ends
                leaf[first] = path[-1]
                continue
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
    return _Trie(
        np.array(start),
        np.array(length),
        np.array(source),
        np.array([node for path in paths for node in path]),
        np.array([len(path) for path in paths]),
        np.array(leaf),
    )


def pair_sizes(pair: PairTokens, min_node_tokens: int = MIN_NODE_TOKENS) -> tuple[int, int, int, int, int]:
    """(computed, unshared, padded, label, chosen label) tokens of a row of this pair alone; in a longer row it computes
    no more."""
    sequences = _sequences([pair])
    return (
        int(_build_trie(sequences, min_node_tokens).length.sum()),
        int(sequences.length.sum()),
        _padded(sequences),
        int((sequences.length - sequences.prompt).sum()),
        len(pair.chosen) * sum(prompt is not None for prompt in pair.prompts),
    )


def _padded(sequences: _Sequences) -> int:
    by_pair = sequences.length.reshape(-1, 2 * sequences.num_dimensions)
    return int((np.count_nonzero(by_pair, axis=1) * by_pair.max(axis=1)).sum())


def build_plan(pairs: Sequence[PairTokens], *, min_node_tokens: int = MIN_NODE_TOKENS, share: bool = True) -> Plan:
    """Pack pairs into one row.

    Args:
        pairs: tokens of one or more pairs with the same number of dimensions.
        min_node_tokens: a common prefix is shared only if it adds at least this many tokens to its parent's.
        share: False lays the sequences out one after another, each computed on its own.

    Raises:
        ValueError: no pairs, differing numbers of dimensions, or an empty prompt or response.
    """
    sequences = _sequences(pairs)
    trie = _build_trie(sequences, min_node_tokens if share else np.iinfo(np.int64).max // 2)
    node_end = np.cumsum(trie.length)
    node_begin = node_end - trie.length
    key_length = trie.start + trie.length
    key_begin = np.cumsum(key_length) - key_length

    position_ids = _spans(trie.start, trie.length)
    input_ids = sequences.tokens[_spans(sequences.begin[trie.source] + trie.start, trie.length)]
    kv_indices = _spans(node_begin[trie.paths], trie.length[trie.paths])
    # A row's places: one on the path of every node below its own, in the order of the nodes.
    below = np.repeat(np.arange(len(trie.length)), trie.path_nodes)[np.argsort(trie.paths, kind="stable")]
    readers = np.bincount(trie.paths, minlength=len(trie.length))
    row_readers = np.repeat(readers, trie.length)
    kv_offsets = np.concatenate([[0], np.cumsum(row_readers)])
    reader = below[_spans(np.repeat(np.cumsum(readers) - readers, trie.length), row_readers)]
    kv_order = key_begin[reader] + np.repeat(position_ids, row_readers)

    responses = sequences.length - sequences.prompt
    label_rows = kv_indices[_spans(key_begin[trie.leaf] + sequences.prompt - 1, responses)]
    labels = sequences.tokens[_spans(sequences.begin + sequences.prompt, responses)]
    return Plan(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens_q=_offsets(trie.length),
        cu_seqlens_k=_offsets(key_length),
        kv_indices=torch.from_numpy(kv_indices),
        kv_order=torch.from_numpy(kv_order.astype(np.int32)),
        kv_offsets=torch.from_numpy(kv_offsets.astype(np.int32)),
        label_rows=torch.from_numpy(label_rows),
        labels=torch.from_numpy(labels),
        cu_seqlens=_offsets(responses),
        records=torch.tensor([pair.record for pair in pairs], dtype=torch.int64),
        num_dimensions=sequences.num_dimensions,
        max_seqlen_q=int(trie.length.max()),
        max_seqlen_k=int(key_length.max()),
        unshared_tokens=int(sequences.length.sum()),
        padded_tokens=_padded(sequences),
    )


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
