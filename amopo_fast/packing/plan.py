"""What of several pairs goes through the model in one call, and where its labels are.

The 2K sequences of a pair share prompts (a prompt serves its chosen and its rejected response) and often more (the
same instruction, the user's text, the beginning of a response). In the layout SHARED all sequences of a row are merged
into a token trie. Each trie node is a run of consecutive tokens of the row; a node's tokens attend to the path
root..node, so exact causal attention needs only, per node, the list of rows on that path (DESIGN: bottom-right-aligned
varlen attention). STATES adds the batches in which recurrent layers run the nodes. In SEPARATE each sequence is a row.

    pairs -> sequences -> trie nodes -> Plan

The last token of a sequence predicts nothing and is not computed. In a trie the last prompt token of a dimension
carries one label per response, so label rows repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum

import numpy as np
import torch

from amopo_fast.packing.states import STATE_MULTIPLE, NodeStates, node_states
from amopo_fast.packing.trie import Sequences, Trie, build_trie, sequences_of, spans
from amopo_fast.prompts.tokens import PairTokens

MIN_NODE_TOKENS = 16  # a shorter shared run costs an attention segment more than its recomputation; see docs/packing.md


class Layout(Enum):
    """How sequences lie in a plan."""

    SHARED = "shared"  # one row without padding, every shared prefix once; attention alone looks along the row
    STATES = "shared through states"  # the same, for models with recurrent layers, which run from node to node
    SEPARATE = "separate"  # each sequence a row, padded on the right; nothing is shared


@dataclass(frozen=True)
class Paths:
    """How the T tokens of a shared row see each other: B trie nodes, each behind its path from the root."""

    position_ids: torch.Tensor  # (1, T) int64, position on the path from the root
    cu_seqlens_q: torch.Tensor  # (B + 1,) int32, tokens of each node
    cu_seqlens_k: torch.Tensor  # (B + 1,) int32, tokens of each node's path, itself included
    kv_indices: torch.Tensor  # (cu_seqlens_k[-1],) int64, rows of the paths, root first
    kv_order: torch.Tensor  # (cu_seqlens_k[-1],) int32, places in kv_indices sorted by the row they hold, stable
    kv_offsets: torch.Tensor  # (T + 1,) int32, kv_order[kv_offsets[t]:kv_offsets[t + 1]] are the places of row t
    max_seqlen_q: int
    max_seqlen_k: int
    states: NodeStates | None  # of the layout STATES


@dataclass(frozen=True)
class Plan:
    """S = pairs * K * 2 sequences with N label rows in all; tensors are on the CPU until `to` moves them."""

    input_ids: torch.Tensor  # (R, L) int64: R = 1 row of T tokens, or in the layout SEPARATE a sequence a row
    label_rows: torch.Tensor  # (N,) int64, the row of the (R * L, H) hidden states that predicts labels[i]
    labels: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (S + 1,) int32, label rows of each sequence; empty where a dimension is absent
    token_uses: torch.Tensor  # (R * L,) int32, sequences that a computed token is part of; 0: padding
    records: torch.Tensor  # (pairs,) int64, Pair.record; empty where the sequences are of no pairs
    num_dimensions: int  # K; 0 likewise
    longest: int  # tokens that the longest sequence computes
    unshared_tokens: int  # tokens of the separate sequences
    padded_tokens: int  # tokens of the separate sequences, each pair's padded to the pair's longest
    paths: Paths | None  # None: the layout SEPARATE

    @property
    def num_tokens(self) -> int:
        """Tokens that the model's body computes, padding included."""
        return self.input_ids.numel()

    @property
    def num_pairs(self) -> int:
        return self.records.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Plan:
        """A copy with every tensor on `device`."""
        return _mapped(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Plan:
        """A copy in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return _mapped(self, torch.Tensor.pin_memory)


def _mapped(value, function: Callable[[torch.Tensor], torch.Tensor]):
    """A dataclass with every tensor in it, at any depth, replaced by its function."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if is_dataclass(value):
        return type(value)(**{f.name: _mapped(getattr(value, f.name), function) for f in fields(value)})
    return value


def _trie_of(sequences: Sequences, layout: Layout, min_node_tokens: int) -> Trie:
    return build_trie(sequences, min_node_tokens, STATE_MULTIPLE if layout is Layout.STATES else 1)


def pair_sizes(
    pair: PairTokens, layout: Layout = Layout.SHARED, min_node_tokens: int = MIN_NODE_TOKENS
) -> tuple[int, int, int, int, int, int]:
    """(computed, unshared, padded, label, chosen label, longest) tokens of a plan of this pair alone.

    longest is the length of its rows in SEPARATE; elsewhere 0, and a plan of several pairs computes no more than their
    sum.
    """
    sequences = sequences_of([pair])
    longest = 0
    if layout is Layout.SEPARATE:
        longest = int(sequences.inputs.max())
        computed = longest * int(np.count_nonzero(sequences.length))
    else:
        computed = int(_trie_of(sequences, layout, min_node_tokens).length.sum())
    responses = sequences.responses
    return (computed, int(sequences.length.sum()), sequences.padded, int(responses.sum()),
            int(responses[::2].sum()), longest)  # fmt: skip


def build_plan(
    pairs: Sequence[PairTokens],
    layout: Layout = Layout.SHARED,
    *,
    min_node_tokens: int = MIN_NODE_TOKENS,
    share: bool = True,
) -> Plan:
    """Lay pairs out for one call of the model.

    Args:
        pairs: tokens of one or more pairs with the same number of dimensions.
        min_node_tokens: a common prefix is shared only if it adds at least this many tokens to its parent's.
        share: False lays the sequences of a shared row out one after another, each computed on its own.

    Raises:
        ValueError: no pairs, differing numbers of dimensions, or an empty prompt or response.
    """
    records = torch.tensor([pair.record for pair in pairs], dtype=torch.int64)
    plan = plan_sequences(sequences_of(pairs), layout, min_node_tokens=min_node_tokens, share=share)
    return replace(plan, records=records, num_dimensions=len(pairs[0].prompts))


def plan_sequences(
    sequences: Sequences,
    layout: Layout = Layout.SHARED,
    *,
    min_node_tokens: int = MIN_NODE_TOKENS,
    share: bool = True,
) -> Plan:
    """Lay sequences that are of no pairs out for one call of the model. Arguments as `build_plan`."""
    if layout is Layout.SEPARATE:
        input_ids, rows, uses = _padded_rows(sequences)
        paths = None
    else:
        trie = _trie_of(sequences, layout, min_node_tokens if share else np.iinfo(np.int64).max // 2)
        input_ids = sequences.tokens[spans(sequences.begin[trie.source] + trie.start, trie.length)][None]
        paths, rows, uses = _paths(trie, sequences, layout)
    return Plan(
        input_ids=torch.from_numpy(input_ids),
        label_rows=torch.from_numpy(rows),
        labels=torch.from_numpy(sequences.tokens[spans(sequences.begin + sequences.prompt, sequences.responses)]),
        cu_seqlens=_offsets(sequences.responses),
        token_uses=torch.from_numpy(uses.astype(np.int32)),
        records=torch.empty(0, dtype=torch.int64),
        num_dimensions=0,
        longest=int(sequences.inputs.max()),
        unshared_tokens=int(sequences.length.sum()),
        padded_tokens=sequences.padded,
        paths=paths,
    )


def _padded_rows(sequences: Sequences) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((R, L) token ids, (N,) label rows, (R * L,) uses).

    Rows are padded with their own last token, which every vocabulary has.
    """
    present = np.flatnonzero(sequences.length)
    inputs = sequences.inputs[present]
    length = int(inputs.max())
    offset = np.minimum(np.arange(length), inputs[:, None] - 1)
    row = np.zeros_like(sequences.length)
    row[present] = np.arange(len(present))
    label_rows = spans(row * length + sequences.prompt - 1, sequences.responses)
    uses = np.arange(length) < sequences.inputs[present][:, None]
    return sequences.tokens[sequences.begin[present][:, None] + offset], label_rows, uses.ravel()


def _paths(trie: Trie, sequences: Sequences, layout: Layout) -> tuple[Paths, np.ndarray, np.ndarray]:
    """(paths, (N,) label rows, (T,) uses)"""
    node_begin = np.cumsum(trie.length) - trie.length
    key_length = trie.start + trie.length
    key_begin = np.cumsum(key_length) - key_length
    position_ids = spans(trie.start, trie.length)
    kv_indices = spans(node_begin[trie.paths], trie.length[trie.paths])
    # A row's places: one on the path of every node below its own, in the order of the nodes.
    below = np.repeat(np.arange(len(trie.length)), trie.path_nodes)[np.argsort(trie.paths, kind="stable")]
    readers = np.bincount(trie.paths, minlength=len(trie.length))
    row_readers = np.repeat(readers, trie.length)
    kv_offsets = np.concatenate([[0], np.cumsum(row_readers)])
    reader = below[spans(np.repeat(np.cumsum(readers) - readers, trie.length), row_readers)]
    kv_order = key_begin[reader] + np.repeat(position_ids, row_readers)
    paths = Paths(
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens_q=_offsets(trie.length),
        cu_seqlens_k=_offsets(key_length),
        kv_indices=torch.from_numpy(kv_indices),
        kv_order=torch.from_numpy(kv_order.astype(np.int32)),
        kv_offsets=torch.from_numpy(kv_offsets.astype(np.int32)),
        max_seqlen_q=int(trie.length.max()),
        max_seqlen_k=int(key_length.max()),
        states=node_states(trie) if layout is Layout.STATES else None,
    )
    first = key_begin[trie.leaf]
    uses = np.bincount(kv_indices[spans(first, sequences.inputs)], minlength=int(trie.length.sum()))
    return paths, kv_indices[spans(first + sequences.prompt - 1, sequences.responses)], uses


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
