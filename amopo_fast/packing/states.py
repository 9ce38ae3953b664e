"""In which batches a recurrent layer runs the nodes of a row, each node from its parent's state; numpy and torch alone.

A layer's state at the end of a node must not have seen padding, so nodes with children run in batches of one depth and
one length. Their lengths are multiples of STATE_MULTIPLE: few lengths, few batches. Nobody reads the state at the end
of a leaf, so leaves of any depth are padded on the right, sorted by length.
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


@dataclass(frozen=True)
class NodeBatch:
    """n nodes of L tokens each, padding on the right included."""

    nodes: tuple[int, ...]  # (n,) nodes of the row
    parents: tuple[int, ...]  # (n,) nodes whose states they begin with; empty: they are roots
    length: int  # L
    keeps: bool  # whether the nodes have children: then there is no padding


@dataclass(frozen=True)
class NodeStates:
    """Batches in the order in which they run: parents before their children.

    An object of its own as a keyword argument of the model: transformers, PEFT and FSDP2 hand it on as it is, and
    torch.compile looks at its type alone, so other batches do not recompile a layer.
    """

    batches: tuple[NodeBatch, ...]
    rows: torch.Tensor  # (P,) int64, the batches' tokens one after another; padding repeats a node's last token
    places: torch.Tensor  # (T,) int64, where in `rows` each token of the row stands


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
    return NodeStates(tuple(batches), torch.from_numpy(np.concatenate(rows)), torch.from_numpy(places))


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
