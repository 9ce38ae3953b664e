"""One training step, one technique added a row: forward and backward of a step's pairs, without the optimizer.

    reference way     2K padded sequences per pair, FlashAttention with padding where flash-attn is installed (else SDPA
                      with a mask), logits of every token in float32
    unpadded          the sequences in one row without padding
    side-shared       every common prefix once (a token trie)
    fused head        amopo_kernels' head on label rows instead of full logits
    Liger body        liger-kernel's RMSNorm, RoPE and SwiGLU
    compiled layers   torch.compile
    dimension_last    the instruction after the user's text: all dimensions share it (a change of the paper's prompt)

bf16 weights and gradients, random weights in the shapes of Qwen2.5. Every row takes the best of several sizes of its
micro-batch, with and without recomputing layers, among those that fit. Before it is timed, its log-probabilities are
compared with the reference way's. MFU counts the matmuls of what the row itself computes (padding included, recomputed
layers not) against the GPU's dense bf16 figure by its vendor. On a CPU rates are by CPU time. The reference way alone:

    PYTHONPATH=.:kernels python benchmarks/step.py --out reference.json --model 7B --data qa --only reference
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import harness
from amopo_fast.models.architecture import attention_needs, head_of
from amopo_fast.models.attention import is_switched
from amopo_fast.models.attention_backends import FLASH, choose_backend
from amopo_fast.models.check import prepare_model
from amopo_fast.models.faster_layers import LIGER_BODY, compile_layers
from amopo_fast.models.scoring import hidden_states, score
from amopo_fast.packing.plan import Plan, build_plan
from amopo_fast.packing.schedule import PairSizes, best_fit, noise
from amopo_fast.prompts.tokens import PairTokens
from amopo_kernels import SequenceStats, amopo_loss, reference
from step_data import DIMENSIONS, lengths, random_pairs

K = len(DIMENSIONS)
SHAPES = {
    "0.5B": dict(num_hidden_layers=24, hidden_size=896, intermediate_size=4864, num_attention_heads=14,
                 num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7B": dict(num_hidden_layers=28, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "14B": dict(num_hidden_layers=48, hidden_size=5120, intermediate_size=13824, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False),
    "cpu": dict(num_hidden_layers=4, hidden_size=256, intermediate_size=704, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=8192, tie_word_embeddings=False),
    "smoke": dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2,
                  num_key_value_heads=1, vocab_size=512, tie_word_embeddings=True),
}  # fmt: skip
CASES = [("7B", "qa"), ("0.5B", "qa"), ("7B", "short"), ("7B", "long"), ("14B", "qa")]
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}  # FLOP/s, dense bf16, vendors' figures
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Technique:
    name: str
    packed: bool = True
    share: bool = True
    fused_head: bool = True
    order: str = "dimension_first"
    patch: str = ""  # a change of the model's layers, which all later rows keep


TECHNIQUES = [
    Technique("reference", packed=False, share=False, fused_head=False),
    Technique("+ unpadded", share=False, fused_head=False),
    Technique("+ side-shared", fused_head=False),
    Technique("+ fused head"),
    Technique("+ Liger body", patch="liger"),
    Technique("+ compiled layers", patch="compile"),
    Technique("+ dimension_last", order="dimension_last"),
]


@dataclass(frozen=True)
class Setting:
    """How a step is split: pairs of a padded batch, or computed tokens of a packed row, at most."""

    size: int
    checkpointing: bool


@dataclass(frozen=True)
class Padded:
    """Sequences of some pairs, padded on the right: all (n, L) but cu_seqlens."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response: torch.Tensor  # bool, whether the token is a label
    cu_seqlens: torch.Tensor
    records: list[int]

    @classmethod
    def of(cls, pairs: list[PairTokens], device: str) -> Padded:
        sequences = [
            (len(prompt), np.concatenate([prompt, response]))
            for pair in pairs
            for prompt in pair.prompts
            for response in (pair.chosen, pair.rejected)
        ]
        longest = max(len(tokens) for _, tokens in sequences)
        ids, mask, response = (np.zeros((len(sequences), longest), dtype=np.int64) for _ in range(3))
        for row, (prompt, tokens) in enumerate(sequences):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
            response[row, prompt : len(tokens)] = 1
        cu_seqlens = np.concatenate([[0], response.sum(1).cumsum()]).astype(np.int32)
        tensors = [torch.from_numpy(x).to(device) for x in (ids, mask, response.astype(bool), cu_seqlens)]
        return cls(*tensors, [pair.record for pair in pairs])


def padded_stats(model: nn.Module, batch: Padded) -> SequenceStats:
    """Full logits of every token in float32, as the reference code computes them."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    return reference.sequence_stats(logps[batch.response[:, 1:]], batch.cu_seqlens)


def packed_stats(model: nn.Module, plan: Plan, fused_head: bool) -> SequenceStats:
    if fused_head:
        return score(model, plan)
    logps = model.lm_head(hidden_states(model, plan)).float().log_softmax(-1)
    return reference.sequence_stats(logps[plan.label_rows, plan.labels], plan.cu_seqlens)


class Step:
    """One technique on one model: builds a step's micro-batches and runs them."""

    def __init__(self, model: nn.Module, technique: Technique, pairs: list[PairTokens], device: str):
        self.model, self.technique, self.pairs, self.device = model, technique, pairs, device

    def batches(self, setting: Setting) -> list[Padded | Plan]:
        if not self.technique.packed:
            groups = [self.pairs[i : i + setting.size] for i in range(0, len(self.pairs), setting.size)]
            return [Padded.of(group, self.device) for group in groups]
        sizes = PairSizes.of(self.pairs)
        tokens = sizes.computed if self.technique.share else sizes.unshared
        groups = best_fit(range(len(self.pairs)), tokens, setting.size)
        return [
            build_plan([self.pairs[i] for i in group], share=self.technique.share).to(self.device) for group in groups
        ]

    def stats(self, batch: Padded | Plan) -> SequenceStats:
        if isinstance(batch, Padded):
            return padded_stats(self.model, batch)
        return packed_stats(self.model, batch, self.technique.fused_head)

    def run(self, batches: list[Padded | Plan]) -> torch.Tensor:
        """Forward and backward of all micro-batches; the loss. Gradients stay in the parameters."""
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            records = batch.records if isinstance(batch, Padded) else batch.records.tolist()
            eps = torch.from_numpy(np.stack([noise(0, 0, record, K) for record in records])).to(self.device)
            loss = amopo_loss(
                self.stats(batch), num_dimensions=K, beta=0.8, gamma=2.0, noise=eps, num_pairs=len(self.pairs)
            ).loss
            loss.backward()
            total += loss.detach()
        return total


def build_model(shape: str, device: str, layers: int | None = None) -> nn.Module:
    """Random weights, made where they stay; bf16 on a GPU, float32 elsewhere."""
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.startswith("cuda") else torch.float32)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            return Qwen2ForCausalLM(Qwen2Config(**sizes, max_position_embeddings=8192)).train()
    finally:
        torch.set_default_dtype(previous)


def patch_layers(patch: str, model: nn.Module, device: str) -> None:
    """Raises RuntimeError or ImportError where it cannot be had."""
    if patch == "compile":
        compile_layers(model)
    elif patch == "liger":
        if not device.startswith("cuda"):
            raise RuntimeError("Liger's kernels need a GPU")
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, LIGER_BODY)


def choose_attention(technique: Technique, model: nn.Module, device: str) -> str:
    """Switch the model to the technique's attention and name it."""
    if technique.packed:
        return choose_backend("auto", attention_needs(model, torch.device(device)))
    for name in (*FLASH, "sdpa"):
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError):
            continue
        return name
    raise RuntimeError("no attention for padded batches")


def settings(technique: Technique, arguments) -> Iterator[Setting]:
    """From small to large, so that the first that does not fit ends its half."""
    if arguments.smoke:
        yield Setting(2 if not technique.packed else 2048, False)
        return
    if not arguments.device.startswith("cuda"):
        yield Setting(1 if not technique.packed else 8192, False)
        return
    for checkpointing in (False, True):
        if arguments.quick:
            yield Setting(2 if not technique.packed else 16384, checkpointing)
            continue
        for size in (1, 2, 4, 8) if not technique.packed else (4096, 8192, 16384, 32768):
            yield Setting(size, checkpointing)


def computed_tokens(batches: list[Padded | Plan]) -> int:
    return sum(b.input_ids.numel() for b in batches)


def step_flop(model: nn.Module, batches: list[Padded | Plan], fused_head: bool) -> float:
    """Matmuls of forward and backward: 6 per weight and token, causal attention, the head on the rows that it sees."""
    config = model.config
    body = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name)
    total = 0.0
    for batch in batches:
        if isinstance(batch, Padded):
            n, length = batch.input_ids.shape
            keys, rows = n * length * (length + 1) / 2, n * length
        else:
            q, k = (c.diff().double() for c in (batch.cu_seqlens_q, batch.cu_seqlens_k))
            keys = float((q * (k - q) + q * (q + 1) / 2).sum())
            rows = batch.labels.shape[0] if fused_head else batch.num_tokens
        attention = 4 * config.hidden_size * keys * config.num_hidden_layers
        head = 2 * config.hidden_size * config.vocab_size * rows
        total += 3 * (2 * body * batch.input_ids.numel() + attention + head)
    return total


def check(step: Step) -> float:
    """Largest relative error of the first pair's sequence log-probs against the padded way on the same model."""
    pair = step.pairs[:1]
    plan = build_plan(pair, share=step.technique.share).to(step.device)
    batch = plan if step.technique.packed else Padded.of(pair, step.device)
    with torch.no_grad():
        wanted = padded_stats(step.model, Padded.of(pair, step.device)).logp_sum
        got = step.stats(batch).logp_sum
    return float(((got - wanted) / wanted).abs().max())


def peak_flop_per_second() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for gpu, peak in PEAK.items() if gpu in name), None)


def measure(step: Step, setting: Setting, rounds: int, warmup: int, deadline: harness.Deadline) -> dict:
    """Times, rates and peak memory of one setting. Raises OutOfMemoryError where it does not fit."""
    cuda = step.device.startswith("cuda")
    if setting.checkpointing:
        step.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        batches = step.batches(setting)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = harness.measure(
            {"step": step.run}, [batches], device=step.device, rounds=rounds, warmup=warmup, deadline=deadline
        )["step"]
    finally:
        if setting.checkpointing:
            step.model.gradient_checkpointing_disable()
        step.model.zero_grad(set_to_none=True)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    seconds = times["median_ms" if cuda else "min_cpu_ms"] / 1e3
    tokens = computed_tokens(batches)
    flop = step_flop(step.model, batches, step.technique.fused_head)
    peak = peak_flop_per_second() if cuda else None
    return {
        "pairs_per_s": len(step.pairs) / seconds,
        "computed_tokens": tokens,
        "computed_tokens_per_s": tokens / seconds,
        "mfu": flop / seconds / peak if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "micro_batch": f"{setting.size} {'tokens' if step.technique.packed else 'pairs'}",
        "micro_batches": len(batches),
        "recompute": setting.checkpointing,
        **times,
    }


def best(step: Step, arguments, deadline: harness.Deadline) -> dict:
    """The fastest setting that fits, found by one run of each, and which did not fit."""
    candidates: list[tuple[float, Setting]] = []
    too_large, done = [], set()
    possible = list(settings(step.technique, arguments))
    for setting in possible:
        enough = candidates and (arguments.quick or deadline.over())
        if setting.checkpointing in done or len(possible) > 1 and enough:
            continue
        try:
            row = measure(step, setting, 1, 0 if candidates else 1, deadline) if len(possible) > 1 else None
        except torch.OutOfMemoryError:
            too_large.append(f"{setting.size}{' recomputed' if setting.checkpointing else ''}")
            done.add(setting.checkpointing)
        else:
            candidates.append((row["pairs_per_s"] if row else 0.0, setting))
            if row and row["micro_batches"] == 1:  # larger ones are the same
                done.add(setting.checkpointing)
    if not candidates:
        return {"status": "not run: out of memory", "out_of_memory": ", ".join(too_large)}
    _, setting = max(candidates, key=lambda candidate: candidate[0])
    rounds = 1 if arguments.smoke else min(arguments.rounds, 3)
    row = measure(step, setting, rounds, 0 if len(possible) > 1 else 1, deadline)
    return {"status": "ok", **row, "out_of_memory": ", ".join(too_large)}


def run_case(shape: str, data: str, arguments, report: harness.Report, deadline: harness.Deadline) -> None:
    device = arguments.device
    pairs_of = functools.partial(random_pairs, lengths(data), vocabulary=SHAPES[shape]["vocab_size"])
    limits = dict(count=4, max_length=160) if arguments.smoke else dict(count=arguments.pairs)
    case = f"{shape}, {data}" + (f", {arguments.layers} layers" if arguments.layers else "")
    model, without = None, []
    for technique in TECHNIQUES:
        row = {"case": case, "variant": technique.name}
        name = technique.name.removeprefix("+ ")
        wanted = not arguments.only or name in arguments.only
        if deadline.over():
            if wanted:
                report.add(**row, status="not run: no time left")
            continue
        try:
            model = model or build_model(shape, device, arguments.layers)
            if technique.packed and not is_switched(model):
                prepare_model(model)
            try:
                patch_layers(technique.patch, model, device)
            except (RuntimeError, ImportError):
                without.append(name)
                raise
            if not wanted:
                continue
            attention = choose_attention(technique, model, device)
            step = Step(model, technique, pairs_of(order=technique.order, **limits), device)
            error = check(step)
            if not error <= TOLERANCE[head_of(model).weight.dtype]:
                report.add(**row, status=f"wrong: log-probs differ by {error:.1e} from the padded way")
                continue
            row |= {"pairs": len(step.pairs), "attention": attention, "without": ", ".join(without), "error": error}
            report.add(**row, **best(step, arguments, deadline))
        except (RuntimeError, ImportError, ValueError) as problem:  # out of memory is a RuntimeError
            if wanted:
                report.add(**row, status=f"not run: {type(problem).__name__}: {problem}".splitlines()[0])


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[name for name in SHAPES if name != "smoke"], help="one shape; default: all")
    parser.add_argument("--data", choices=("qa", "short", "long"), default="qa", help="with --model")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step")
    parser.add_argument("--layers", type=int, help="of the model; default: the shape's")
    parser.add_argument("--quick", action="store_true", help="one size of micro-batch, the first that fits")
    names = [technique.name.removeprefix("+ ") for technique in TECHNIQUES]
    parser.add_argument("--only", action="append", choices=names, metavar="ROW", help="rows; default: all")
    arguments = parser.parse_args()
    report = harness.Report("step", arguments)
    deadline = harness.Deadline(arguments.minutes)
    cases = [("smoke", "qa")] if arguments.smoke else [(arguments.model, arguments.data)] if arguments.model else CASES
    for shape, data in cases:
        run_case(shape, data, arguments, report, deadline)
        gc.collect()
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
