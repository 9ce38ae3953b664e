"""Writes docs/models.md from the sweep's report: `python docs/make_models.py` (benchmarks/models.py measures)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).with_name("models.md")
REPORT = PAGE.parent.parent / "benchmarks" / "results" / "models.json"
_HEAD = """# Models

<!-- Written by docs/make_models.py from benchmarks/results/models.json. -->

Before anything is trained, the model's own class is tried in miniature, in float64 and without kernels that need a GPU:
log-probs and all gradients of a layout against those of its sequences one by one. The first layout that is exact is
taken, and a line of the run says which and why (`--layout shared` or `separate` asks for one):

- **shared**: every prefix is computed once; attention runs over the paths of the token trie.
- **shared through states**: the same with recurrent layers, which run from node to node of the trie.
- **separate**: each sequence is a padded row; exact for any causal decoder.

A multimodal class is loaded as it was published and its text part is trained; what no loss of text leads to (towers,
projectors; cross-attention without its encoder and indexers that choose keys of text models too) is frozen, said, and
saved byte for byte with the processor's files, so that every folder is the whole checkpoint again. Pairs are text:
records with images are refused by name. Gemma 3n, FastVLM and PerceptionLM need `pip install timm torchvision`, as
transformers builds their towers with timm, and Inkling's multimodal class needs scipy; without it the error names it.

Of a mixture of experts `router_aux_loss_coef` adds the router's load-balancing loss, E sum_e f_e P_e over all layers,
as transformers has it for the separate sequences: a token that several sequences share counts once for each, padding
and the last token of a sequence, which predicts nothing, not at all. A step has the mean of its micro-batches by pairs;
as it is not linear, another split of a step gives other values. `lora_target_modules` may name the matrices of fused
experts (`down_proj`, `experts.gate_up_proj`); `all-linear` holds the linear layers that a loss of text leads to, but
the head. A router that draws noise in training (PhiMoE's `router_jitter_noise`) is said when a run begins.

When a run or an evaluation begins, a few tokens go through the real model's own forward, and their logits are compared
with those that are trained: softcap, temperature, bias, multipliers and a padded vocabulary, under DDP, FSDP2 and
DeepSpeed too. What differs is named. `compile_layers` is for shared layouts and refused in separate ones. Under
DeepSpeed ZeRO-3 recurrent layers do not run through states: such models are trained on separate rows there, and said.

Doge is exact up to `keep_window_size` tokens, Llama 4 in a shared row up to `attention_chunk_size`; longer sequences
are refused by length. The 45 types that people train most, as tests/models/test_types.py
lists them, all share. Refused is what is not causal by its own forward (that is tried, and how it shows is said), what
has an encoder, and what text alone is no input of; *why* has the error's words, which tests/models/test_refusals.py
shows on the model itself. Encoders that can be decoders are tried with
`is_decoder: true`. *Tokens* are those that the trial's pairs compute, of the separate sequences' tokens (padding
counts; of real data a run's line says it); *error* is the largest relative one of log-probs and gradients; *seconds*
are CPU time of the check. Rows are of {versions}.

All {accepted} accepted rows are tried again, with the attention backend that `auto` takes on a GPU with and without
flash-attn, by `python -m pytest -m slow tests/models/test_types.py`; and `amopo-fast estimate` predicts the memory of
each, whole and with an adapter, by `python -m pytest -m slow tests/memory/test_estimate_of_types.py`. timm and scipy
were there.

"""


def page() -> str:
    """The page's text."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    versions = report["environment"]["versions"]
    accepted = sum("error" in row for row in report["rows"])
    packages = f"transformers {versions['transformers']}, torch {versions['torch']}"
    parts = [_HEAD.format(accepted=accepted, versions=packages)]
    for kind, title in (("causal", "Causal language models"), ("image-text", "Image-text models, trained on text")):
        rows = [row for row in report["rows"] if row["kind"] == kind]
        layouts = Counter(row["layout"] for row in rows).most_common()
        counts = ", ".join(f"{count} {layout}" for layout, count in layouts)
        lines = [f"## {title}", "", f"{len(rows)} types: {counts}.", "",
                 "| type | layout | tokens | error | seconds | why |", "|---|---|---|---|---|---|"]  # fmt: skip
        lines += [_line(row) for row in sorted(rows, key=lambda row: row["case"])]
        parts.append("\n".join(lines) + "\n\n")
    return "".join(parts).rstrip() + "\n"


def _line(row: dict) -> str:
    reason = row.get("reason", "").replace("|", "\\|")
    reason = reason if len(reason) <= 160 else reason[:157] + "..."
    if "error" not in row:
        return f"| `{row['case']}` | {row['layout']} | | | | {reason} |"
    numbers = f"{row['share']:.0%} | {row['error']:.0e} | {row['cpu_ms'] / 1e3:.1f}"
    return f"| `{row['case']}` | {row['layout']} | {numbers} | {reason} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
