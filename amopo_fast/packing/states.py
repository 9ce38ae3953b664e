"""In which calls a recurrent layer runs the nodes of a row, each node from its parent's state; numpy and torch alone.

Batches: a layer's state at the end of a node must not have seen padding, so nodes with children run in batches of one
depth and one length. Their lengths are multiples of STATE_MULTIPLE: few lengths, few batches. Nobody reads the state at
the end of a leaf, so leaves of any depth are padded on the right, sorted by length.

Levels: kernels that take cu_seqlens and initial states run all nodes of one depth in one call, without padding; and a
causal convolution runs over the whole row at once, where every node stands behind a copy of the columns before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from amopo_fast.packing.trie import Trie, spans

STATE_MULTIPLE = 16  # tokens; docs/packing.md says what other multiples cost
PADDING = 1.25  # computed per real token in a batch of leaves, at most
# One token that continues a state takes the layers' decoding path, which writes in place.
_LEAST = 2
HISTORY = 6  # columns copied before a node: causal convolutions of the models are 3, 4 and 7 wide


@dataclass(frozen=True)
class NodeBatch:
    """n nodes of L tokens each, padding on the right included."""

    nodes: tuple[int, ...]  # (n,) nodes of the row
    parents: tuple[int, ...]  # (n,) nodes whose states they begin with; empty: they are roots
    length: int  # L
    keeps: bool  # whether the nodes have children: then there is no padding


@dataclass(frozen=True)
class NodeLevel:
    """The n nodes of one depth."""

    parents: tuple[int, ...]  # (n,) places of their parents in the level above; empty: they are roots
    cu_seqlens: tuple[int, ...]  # (n + 1,) tokens of each node
    keeps: bool  # whether any of them has children


@dataclass(frozen=True)
class NodeColumns:
    """The row with the HISTORY tokens before a node copied in front of it: C = T + HISTORY * nodes columns."""

    rows: torch.Tensor  # (C,) int64, the token of the row that a column is; 0 where it is none
    order: torch.Tensor  # (C,) int32, places in `rows` sorted by the token that they hold, stable
    offsets: torch.Tensor  # (T + 1,) int32, order[offsets[t]:offsets[t + 1]] are the places of token t
    empty: torch.Tensor  # (C,) bool, columns before the beginning of a sequence
    places: torch.Tensor  # (T,) int64, the column that a token of the row is


@dataclass(frozen=True)
class NodeStates:
    """Batches and levels in the order in which they run: parents before their children.

    An object of its own as a keyword argument of the model: transformers, PEFT and FSDP2 hand it on as it is, and
    torch.compile looks at its type alone, so other batches do not recompile a layer.
    """

    batches: tuple[NodeBatch, ...]
    rows: torch.Tensor  # (P,) int64, the batches' tokens one after another; padding repeats a node's last token
    places: torch.Tensor  # (T,) int64, where in `rows` each token of the row stands
    levels: tuple[NodeLevel, ...]
    level_rows: torch.Tensor  # (T,) int64, the levels' tokens one after another
    level_places: torch.Tensor  # (T,) int64, where in `level_rows` each token of the row stands
    level_cu_seqlens: torch.Tensor  # int64, the levels' cu_seqlens one after another
    columns: NodeColumns


def node_states(trie: Trie) -> NodeStates:
    """The batches of a trie."""
    last = np.cumsum(trie.path_nodes) - 1
    parents = np.where(trie.path_nodes > 1, trie.paths[np.maximum(last - 1, 0)], -1)
    node_begin = np.cumsum(trie.length) - trie.length
    batches, rows = [], []
    places = np.zeros(int(trie.length.sum()), dtype=np.int64)
    filled = 0
    for nodes, keeps in _groups(trie, parents):
        lengths = trie.length[nodes]
        length = max(int(lengths.max()), _LEAST)
        batch_parents = () if parents[nodes[0]] < 0 else tuple(parents[nodes].tolist())
        batches.append(NodeBatch(tuple(nodes.tolist()), batch_parents, length, keeps))
        offset = np.minimum(np.arange(length), lengths[:, None] - 1)
        rows.append((node_begin[nodes][:, None] + offset).ravel())
        places[spans(node_begin[nodes], lengths)] = spans(filled + length * np.arange(len(nodes)), lengths)
        filled += length * len(nodes)
    levels, level_rows = _levels(trie, parents, node_begin)
    return NodeStates(
        batches=tuple(batches),
        rows=torch.from_numpy(np.concatenate(rows)),
        places=torch.from_numpy(places),
        levels=levels,
        level_rows=torch.from_numpy(level_rows),
        level_places=torch.from_numpy(np.argsort(level_rows)),
        level_cu_seqlens=torch.tensor([end for level in levels for end in level.cu_seqlens]),
        columns=_columns(trie, parents, node_begin),
    )


def _levels(trie: Trie, parents: np.ndarray, node_begin: np.ndarray) -> tuple[tuple[NodeLevel, ...], np.ndarray]:
    """(levels from the roots down, (T,) rows of their tokens)"""
    levels, order = [], []
    place = np.zeros(len(trie.length), dtype=np.int64)  # of a node in its level
    depths = range(1, int(trie.path_nodes.max()) + 1)
    for depth in depths:
        nodes = np.flatnonzero(trie.path_nodes == depth)
        place[nodes] = np.arange(len(nodes))
        above = tuple(place[parents[nodes]].tolist()) if depth > 1 else ()
        levels.append(NodeLevel(above, (0, *np.cumsum(trie.length[nodes]).tolist()), depth < depths[-1]))
        order.append(nodes)
    nodes = np.concatenate(order)
    return tuple(levels), spans(node_begin[nodes], trie.length[nodes])


def _columns(trie: Trie, parents: np.ndarray, node_begin: np.ndarray) -> NodeColumns:
    tokens, nodes = int(trie.length.sum()), len(trie.length)
    # The token before each one on its path; -1 before the beginning.
    before = np.arange(-1, tokens - 1)
    last = node_begin + trie.length - 1
    before[node_begin] = np.where(parents >= 0, last[parents], -1)
    rows = np.full(tokens + HISTORY * nodes, -1)
    places = np.arange(tokens) + HISTORY * np.repeat(np.arange(1, nodes + 1), trie.length)
    rows[places] = np.arange(tokens)
    token, first = node_begin, places[node_begin]
    for back in range(1, HISTORY + 1):
        token = np.where(token >= 0, before[token], -1)
        rows[first - back] = token
    empty = rows < 0
    held = np.where(empty, 0, rows)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(held, minlength=tokens))])
    return NodeColumns(
        rows=torch.from_numpy(held),
        order=torch.from_numpy(np.argsort(held, kind="stable").astype(np.int32)),
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        empty=torch.from_numpy(empty),
        places=torch.from_numpy(places),
    )


def _groups(trie: Trie, parents: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """(nodes of a batch, whether they have children), parents first; roots and others apart, as a root has no state."""
    inner = np.zeros(len(trie.length), dtype=bool)
    inner[parents[parents >= 0]] = True
    keys = np.stack([trie.path_nodes, trie.length], 1)[inner]
    for depth, length in np.unique(keys, axis=0):
        yield np.flatnonzero(inner & (trie.path_nodes == depth) & (trie.length == length)), True
    for leaves in (np.flatnonzero(~inner & (parents < 0)), np.flatnonzero(~inner & (parents >= 0))):
        leaves = leaves[np.argsort(trie.length[leaves], kind="stable")]
        begin = 0
        for end in range(1, len(leaves) + 1):
            lengths = trie.length[leaves[begin : end + 1]]
            if end == len(leaves) or lengths[-1] * len(lengths) > PADDING * max(lengths.sum(), _LEAST * len(lengths)):
                yield leaves[begin:end], False
                begin = end
