"""A step's log-probs and gradients of G completions of a prompt: TRL's own forward, and prefixes that are shared.

    python benchmarks/shared_logps.py --out shared_logps.json --device cpu --data PAIRS.json --rounds 3

SmolLM2-135M-Instruct (smollm2.py), prompts of a file in AMoPO's format, completions its responses (G of a prompt are
those of other records too, as one record has two), layers recomputed in the backward pass as TRL's trainers do by
default. TRL scores a padded batch by its fused head; `patch_trl` replaces that head, `share_prefixes` the body too.

    share of tokens     computed tokens / TRL's, padding included
    share of CPU time   least CPU time / TRL's
    goal                share of CPU time <= 1.15 share of tokens
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import harness
from amopo_fast import shared_logps
from amopo_fast.integrations.trl import share_prefixes
from amopo_kernels.integrations.trl import patch_trl

CASES = {2: (0, 1), 8: (1,), 32: (9,)}  # completions of a prompt, and the step's prompts by number in the file
TOLERANCE = 1e-4  # of ||error|| / ||.||
TEMPERATURE = 0.9
SLOW_SECONDS = 60  # of TRL's CPU time: what takes longer is run and timed once


@dataclass(frozen=True)
class Step:
    """Sequences of a step, lists and as TRL pads them: prompts on the left, completions on the right."""

    prompts: list[torch.Tensor]
    completions: list[torch.Tensor]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    factors: torch.Tensor  # of the log-probs of all completions' tokens in the loss

    @classmethod
    def of(cls, prompts: list[list[int]], completions: list[list[int]], device: str) -> Step:
        left, right = max(map(len, prompts)), max(map(len, completions))
        ids = torch.zeros(len(prompts), left + right, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            here = slice(left - len(prompt), left + len(completion))
            ids[row, here], mask[row, here] = torch.tensor(prompt + completion), 1
            labels[row, left : left + len(completion)] = torch.tensor(completion)
        count = sum(map(len, completions))
        factors = torch.randn(count, generator=torch.Generator().manual_seed(0)) / count
        tensors = [x.to(device) for x in (ids, mask, labels, factors)]
        return cls(list(map(torch.tensor, prompts)), list(map(torch.tensor, completions)), *tensors)


def load(arguments: argparse.Namespace) -> tuple[nn.Module, list[list[int]], list[list[int]]]:
    """(model, prompts, responses), of a record one prompt and two responses, as token ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if arguments.smoke:
        generator = torch.Generator().manual_seed(0)
        config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=2)  # fmt: skip
        draw = [torch.randint(1, 300, (n,), generator=generator).tolist() for n in range(20, 60)]
        return LlamaForCausalLM(config), draw[20:], draw[:20]
    from smollm2 import make_folder

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(make_folder(folder), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, responses = [], []
    for record in json.loads(Path(arguments.data).read_text())[:64]:
        messages = [{"role": "user", "content": record["prompt"]}]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        for side in ("chosen", "rejected"):
            responses.append(tokenizer(record[side]["response"] + tokenizer.eos_token)["input_ids"])
    return model, prompts, responses


def variants(model: nn.Module) -> dict[str, harness.Variant]:
    """Functions of a Step that give (log-probs of all completions' tokens, the embedding's gradient)."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, temperature=TEMPERATURE)
    trainer = SimpleNamespace(model=model)
    forwards = {"TRL": model.forward}
    patch_trl(trainer)
    forwards["TRL, patch_trl"] = model.forward
    share_prefixes(trainer)
    forwards["TRL, share_prefixes"] = model.forward

    def of_trl(forward):
        def logps(step: Step) -> torch.Tensor:
            model.forward = forward
            found = model(input_ids=step.input_ids, attention_mask=step.attention_mask, labels=step.labels,
                          fused_lm_head=True)  # fmt: skip
            return found.log_probs[step.labels[:, 1:] != -100]

        return logps

    def shared(step: Step) -> torch.Tensor:
        return torch.cat(shared_logps(model, step.prompts, step.completions, TEMPERATURE))

    def with_gradients(logps):
        def run(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
            model.zero_grad()
            found = logps(step)
            (found * step.factors).sum().backward()
            return found.detach(), model.get_input_embeddings().weight.grad

        return run

    functions = {name: of_trl(forward) for name, forward in forwards.items()} | {"shared_logps": shared}
    return {name: with_gradients(function) for name, function in functions.items()}


def computed_tokens(model: nn.Module, run: harness.Variant, step: Step) -> tuple[int, tuple]:
    """(tokens that the first layer reads in a forward pass, what `run` returns)"""
    found = []
    layer = model.base_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].shape[:2].numel()))
    outputs = run(step)
    hook.remove()
    return found[0], outputs  # what follows recomputes it


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, action="append", help="only this G; may be repeated")
    parser.add_argument("--without", action="append", default=[], help="not this variant; may be repeated")
    parser.add_argument("--data", help="JSON file in AMoPO's format; not needed with --smoke")
    arguments = parser.parse_args()
    if not arguments.data and not arguments.smoke:
        parser.error("--data is missing: a JSON file in AMoPO's format")
    deadline = harness.Deadline(arguments.minutes)
    report = harness.Report("shared_logps", arguments)
    model, prompts, responses = load(arguments)
    model.to(arguments.device).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = variants(model)
    runs = {name: run for name, run in runs.items() if name not in arguments.without}
    for group, records in CASES.items():
        if arguments.case and group not in arguments.case:
            continue
        group = min(group, len(responses) // 2)
        of_step = [prompts[record] for record in records for _ in range(group)]
        step = Step.of(of_step, [responses[i % len(responses)] for i in range(len(of_step))], arguments.device)
        benchmark(group, step, model, runs, report, arguments, deadline)


def benchmark(group: int, step: Step, model: nn.Module, runs, report, arguments, deadline) -> None:
    rows, times, wanted = {}, {}, None
    for name, run in runs.items():
        begin, cpu_begin = time.perf_counter(), time.process_time()
        tokens, (logps, gradient) = computed_tokens(model, run, step)
        times[name] = harness.summary([1e3 * (time.perf_counter() - begin)])
        times[name]["min_cpu_ms"] = 1e3 * (time.process_time() - cpu_begin)
        wanted = wanted or (logps.clone(), gradient.clone(), tokens)
        errors = [harness.relative_error(x, y) for x, y in zip((logps, gradient), wanted, strict=False)]
        rows[name] = {
            "case": f"G = {group}, {len(step.prompts) // group} prompts", "variant": name,
            "status": "ok" if max(errors) < TOLERANCE else "wrong: log-probs or gradient",
            "unpadded_tokens": int(step.attention_mask.sum()), "computed_tokens": tokens,
            "share_of_tokens": tokens / wanted[2], "logps_error": errors[0], "gradient_error": errors[1],
        }  # fmt: skip
    if times["TRL"]["min_cpu_ms"] < 1e3 * SLOW_SECONDS:
        times = harness.measure(
            runs, [step], device=arguments.device, rounds=arguments.rounds, warmup=0, deadline=deadline
        )
    clock = "min_cpu_ms" if arguments.device == "cpu" else "median_ms"
    for name, row in rows.items():
        share = times[name][clock] / times["TRL"][clock]
        report.add(**row, **times[name], share_of_time=share, time_by_tokens=share / row["share_of_tokens"])


if __name__ == "__main__":
    main()
