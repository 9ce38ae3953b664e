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

from amopo_fast.prompts import PairTokens

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
    label_rows: torch.Tensor  # (N,) int64, the row whose hidden state predicts labels[i]
    labels: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (S + 1,) int32, label rows of each sequence; empty where a dimension is absent
    records: torch.Tensor  # (pairs,) int64, Pair.record
    num_dimensions: int  # K
    max_seqlen_q: int
    max_seqlen_k: int
    unshared_tokens: int  # tokens of the separate sequences
    padded_tokens: int  # tokens of the separate sequences padded to the longest of the row

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
class _Trie:
    """Nodes in the order of the row: parents stand before their children."""

    parent: np.ndarray  # (B,) int64, -1 for a root
    start: np.ndarray  # (B,) depth at which the node's tokens begin
    length: np.ndarray  # (B,) its number of tokens
    source: np.ndarray  # (B,) a sequence through the node: its tokens are sequences[source][start:start+length]
    leaf: np.ndarray  # (S,) the node in which the sequence ends, -1 for an absent sequence


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def _build_trie(sequences: Sequence[np.ndarray | None], min_node_tokens: int) -> _Trie:
    present = [i for i, s in enumerate(sequences) if s is not None]
    # Big-endian bytes sort like the token ids themselves, prefixes first.
    order = sorted(present, key=lambda i: sequences[i].astype(">u4").tobytes())
    lcp = [0] + [_common_prefix(sequences[a], sequences[b]) for a, b in zip(order, order[1:], strict=False)]
    parent, start, length, source = [], [], [], []
    leaf = np.full(len(sequences), -1, dtype=np.int64)

    def add(node_parent: int, node_start: int, end: int, sequence: int) -> int:
        parent.append(node_parent)
        start.append(node_start)
        length.append(end - node_start)
        source.append(sequence)
        return len(parent) - 1

    # Work on ranges of the sorted order that agree on `depth` tokens, already covered by `node`.
    stack = [(0, len(order), 0, -1)]
    while stack:
        low, high, depth, node = stack.pop()
        # Children: maximal runs whose neighbours share more than `depth` tokens.
        cuts = [i for i in range(low + 1, high) if lcp[i] < depth + min_node_tokens]
        children = []
        for a, b in zip([low, *cuts], [*cuts, high], strict=True):
            first = order[a]
            shared = min(lcp[a + 1 : b]) if b - a > 1 else len(sequences[first])
            if shared == depth:  # only a sequence that ends exactly where `node` ends
                leaf[first] = node
                continue
            child = add(node, depth, shared, first)
            if b - a == 1:
                leaf[first] = child
            else:
                children.append((a, b, shared, child))
        stack.extend(reversed(children))
    return _Trie(np.array(parent), np.array(start), np.array(length), np.array(source), leaf)


def build_plan(pairs: Sequence[PairTokens], *, min_node_tokens: int = MIN_NODE_TOKENS, share: bool = True) -> Plan:
    """Pack pairs into one row.

    Args:
        pairs: tokens of one or more pairs with the same number of dimensions.
        min_node_tokens: a common prefix is shared only if it adds at least this many tokens to its parent's.
        share: False lays the sequences out one after another, each computed on its own.

    Raises:
        ValueError: no pairs, differing numbers of dimensions, or an empty prompt or response.
    """
    if not pairs:
        raise ValueError("build_plan needs at least one pair")
    num_dimensions = len(pairs[0].prompts)
    sequences: list[np.ndarray | None] = []
    prompt_lengths: list[int] = []
    for pair in pairs:
        if len(pair.prompts) != num_dimensions:
            raise ValueError(
                f"record {pair.record} has {len(pair.prompts)} dimensions, record {pairs[0].record} {num_dimensions}; "
                "tokenize all pairs of a row with the same dimensions"
            )
        for prompt in pair.prompts:
            for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                if prompt is None:
                    sequences.append(None)
                    prompt_lengths.append(0)
                    continue
                if len(prompt) == 0 or len(response) == 0:
                    empty = "prompt" if len(prompt) == 0 else f"{name} response"
                    raise ValueError(f"record {pair.record}: the {empty} has no tokens; a label needs a row before it")
                sequences.append(np.concatenate([prompt, response]))
                prompt_lengths.append(len(prompt))
    if all(s is None for s in sequences):
        raise ValueError(f"records {[p.record for p in pairs]}: every dimension is absent; leave such pairs out")

    inputs = [None if s is None else s[:-1] for s in sequences]
    trie = _build_trie(inputs, min_node_tokens if share else np.iinfo(np.int64).max // 2)
    offset = np.concatenate([[0], np.cumsum(trie.length)])
    num_nodes = len(trie.length)

    input_ids = np.empty(offset[-1], dtype=np.int64)
    position_ids = np.empty(offset[-1], dtype=np.int64)
    paths: list[np.ndarray] = []  # rows of root..node
    for b in range(num_nodes):
        begin, end, depth = offset[b], offset[b + 1], trie.start[b]
        input_ids[begin:end] = inputs[trie.source[b]][depth : depth + trie.length[b]]
        position_ids[begin:end] = np.arange(depth, depth + trie.length[b])
        own = np.arange(begin, end)
        paths.append(own if trie.parent[b] < 0 else np.concatenate([paths[trie.parent[b]], own]))
    key_lengths = trie.start + trie.length

    label_rows, labels, segment = [], [], [0]
    for i, sequence in enumerate(sequences):
        if sequence is not None:
            rows = paths[trie.leaf[i]]
            label_rows.append(rows[prompt_lengths[i] - 1 : len(sequence) - 1])
            labels.append(sequence[prompt_lengths[i] :])
            segment.append(segment[-1] + len(labels[-1]))
        else:
            segment.append(segment[-1])

    lengths = [len(s) for s in sequences if s is not None]
    return Plan(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens_q=torch.from_numpy(offset.astype(np.int32)),
        cu_seqlens_k=torch.from_numpy(np.concatenate([[0], np.cumsum(key_lengths)]).astype(np.int32)),
        kv_indices=torch.from_numpy(np.concatenate(paths)),
        label_rows=torch.from_numpy(np.concatenate(label_rows)),
        labels=torch.from_numpy(np.concatenate(labels)).long(),
        cu_seqlens=torch.tensor(segment, dtype=torch.int32),
        records=torch.tensor([pair.record for pair in pairs], dtype=torch.int64),
        num_dimensions=num_dimensions,
        max_seqlen_q=int(trie.length.max()),
        max_seqlen_k=int(key_lengths.max()),
        unshared_tokens=sum(lengths),
        padded_tokens=len(lengths) * max(lengths),
    )
