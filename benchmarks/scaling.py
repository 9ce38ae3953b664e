"""Memory, communication and compute per GPU for 32B to 405B on 8 to 512 GPUs under FSDP2, by arithmetic: no GPU.

    PYTHONPATH=.:kernels python benchmarks/scaling.py --out benchmarks/results/scaling.json
    PYTHONPATH=.:kernels python benchmarks/scaling.py --tables     those of docs/scaling.md, from that file

Memory is amopo_fast.estimate's. Communication of a micro-batch, per parameter: all-gathers in the forward and in the
backward pass (bf16: 2 + 2 bytes) and a reduce-scatter of the gradient (float32: 4 bytes, as accelerate and torchtitan
reduce; LoRA: of the adapters only), times (N - 1) / N. A node receives these bytes once through all of its network
cards and spreads them over NVLink, so the bandwidth of a GPU is GPUS_PER_NODE times its card's. To that comes a latency
for each of the N - 1 hops of every collective, three a layer. Compute and communication overlap: the step takes the
longer of the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from transformers import LlamaConfig, Qwen2Config

from amopo_fast.memory.estimate import Row, Setup, estimate
from amopo_fast.memory.gpus import GIB, GPUS

GPUS_PER_NODE = 8
CARD = 50e9  # bytes/s each way of a GPU's network card: 400 Gb/s, as in torchtitan's published runs
NVLINK = 450e9  # bytes/s each way, H100 and H200 (data sheet)
HOP = 10e-6  # seconds, assumed
EFFICIENCY = 0.4  # of the dense bf16 peak without waiting for communication, assumed
WORLDS = (8, 16, 32, 64, 128, 256, 512)
RESULTS = Path(__file__).with_name("results") / "scaling.json"
TOKENS = (8192, 2048)  # of a micro-batch: a full one, and about one pair


def row_of(tokens: int) -> Row:
    return Row(tokens=tokens, label_tokens=tokens // 2, kv_tokens=2 * tokens, sequence_tokens=1024)


# Published shapes (config.json of Qwen2.5-32B, Llama-3.1-8B, -70B and -405B).
_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
MODELS = {
    "Qwen2.5-32B": Qwen2Config(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
                               num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False),
    "Llama-3.1-70B": LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                 num_attention_heads=64, **_LLAMA),
    "Llama-3.1-405B": LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                                  num_attention_heads=128, **_LLAMA),
}  # fmt: skip
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA
)
SETUPS = {
    "AdamW, float32 weights": Setup(weights="fp32"),
    "8-bit AdamW, bf16 weights": Setup(weights="bf16", states="8bit"),
    "LoRA": Setup(lora_rank=16),
}


def bandwidth(gpus: int, card: float = CARD) -> float:
    """Bytes/s at which one GPU receives a gathered parameter."""
    return NVLINK if gpus <= GPUS_PER_NODE else min(NVLINK, GPUS_PER_NODE * card)


def communication(parameters: int, trained: int, layers: int, gpus: int, card: float = CARD) -> tuple[float, float]:
    """(bytes received by a GPU, seconds) of a micro-batch."""
    received = (4 * parameters + 4 * trained) * (gpus - 1) / gpus
    return received, received / bandwidth(gpus, card) + 3 * layers * (gpus - 1) * HOP


def break_even_tokens(flops_per_second: float, card: float = CARD, multiplications: int = 8) -> float:
    """Computed tokens of a micro-batch at which compute takes as long as communication, without latency.

    8 bytes a parameter against `multiplications` FLOP a parameter and token (6, and 2 for the recomputed forward): the
    model's size drops out.
    """
    return 8 / (GPUS_PER_NODE * card) * flops_per_second / multiplications


def rows() -> list[dict]:
    gpu = GPUS["h200"]
    found = []
    for model, config in MODELS.items():
        for name, setup in SETUPS.items():
            for tokens in TOKENS:
                for gpus in WORLDS:
                    result = estimate(config, row_of(tokens), dataclasses.replace(setup, gpus=gpus, liger=True))
                    received, seconds = communication(result.parameters, result.trained, config.num_hidden_layers, gpus)
                    found.append({
                        "model": model, "setup": name, "gpus": gpus, "tokens": tokens,
                        "memory_gib": round(result.needed / GIB, 1), "received_gb": round(received / 1e9, 1),
                        "communication_s": round(seconds, 3),
                        "compute_s": round(result.flops / (gpu.flops * EFFICIENCY), 3),
                    })  # fmt: skip
    return found


def checks() -> list[dict]:
    """Published figures beside what the same arithmetic gives."""
    sharded = 16 * estimate(LLAMA_8B, row_of(8192), Setup(weights="fp32")).parameters / GIB
    _, small = communication(int(8.03e9), int(8.03e9), 32, 128)
    llama70 = estimate(MODELS["Llama-3.1-70B"], row_of(8192), Setup(weights="fp32", gpus=64))
    _, seconds = communication(llama70.parameters, llama70.trained, 80, 64, card=25e9)
    llama405 = estimate(MODELS["Llama-3.1-405B"], row_of(16384), Setup(weights="fp32", gpus=128))
    return [
        {"what": "8B, FSDP: memory that 128 H100 save over 8, GiB a GPU", "published": "82.4 - 67.0 = 15.4",
         "here": f"{sharded / 8 - sharded / 128:.1f}"},
        {"what": "8B, FSDP: loss of tokens/s a GPU from 8 to 128 H100", "published": "2.7 % (5762 to 5605)",
         "here": f"none: {small:.2f} s of communication behind {16384 / 5762:.1f} s of compute"},
        {"what": "70B, FSDP, 64 A100-80 (25 GB/s a GPU assumed), a step of 8192 tokens a GPU",
         "published": "24.7 s (331 tokens/s)",
         "here": f"{seconds:.1f} s of communication, hidden"},
        {"what": "the same, memory", "published": "fits into 80 GB", "here": f"{llama70.needed / GIB:.0f} GiB"},
        {"what": "405B, FSDP alone, 128 H100 (94 GB), 16384 tokens a GPU", "published": "out of memory",
         "here": f"{llama405.needed / GIB:.0f} GiB"},
    ]  # fmt: skip


def tables(report: dict) -> dict[str, str]:
    """Markdown by name: memory, time, published."""
    found = {(r["model"], r["setup"], r["tokens"], r["gpus"]): r for r in report["rows"]}
    head = " | ".join(map(str, WORLDS))
    memory = [f"| GiB per GPU | {head} |", "|---|" + "---:|" * len(WORLDS)]
    for model in MODELS:
        for name in SETUPS:
            cells = [f"{found[model, name, 8192, gpus]['memory_gib']:.0f}" for gpus in WORLDS]
            memory.append(f"| {model}, {name} | {' | '.join(cells)} |")
    time = [
        f"| seconds: compute, then communication by GPUs | compute | {head} |",
        "|---|---:|" + "---:|" * len(WORLDS),
    ]
    for model in MODELS:
        for tokens in TOKENS:
            here = [found[model, "AdamW, float32 weights", tokens, gpus] for gpus in WORLDS]
            cells = [
                f"**{r['communication_s']:.1f}**"
                if r["communication_s"] > r["compute_s"]
                else f"{r['communication_s']:.1f}"
                for r in here
            ]
            time.append(f"| {model}, {tokens} tokens | {here[0]['compute_s']:.1f} | {' | '.join(cells)} |")
    published = ["| | published | here |", "|---|---|---|"]
    published += [f"| {check['what']} | {check['published']} | {check['here']} |" for check in report["checks"]]
    return {"memory": "\n".join(memory), "time": "\n".join(time), "published": "\n".join(published)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="compute everything and write it here")
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    if options.out:
        report = {"checks": checks(), "break_even_tokens": break_even_tokens(GPUS["h200"].flops * EFFICIENCY),
                  "rows": rows()}  # fmt: skip
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.tables:
        for text in tables(json.loads(RESULTS.read_text())).values():
            print(text + "\n")


if __name__ == "__main__":
    main()
