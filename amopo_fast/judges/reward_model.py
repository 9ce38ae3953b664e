"""A local reward model: transformers' sequence classification, whose outputs are scores.

Weights are safetensors and no code of a repository runs. Several outputs are several dimensions, by the names in the
model's id2label or by number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from amopo_fast import hub
from amopo_fast.errors import JudgeError, OptionError
from amopo_fast.judges.judge import Answer, Usage, nothing
from amopo_fast.judges.template import conversation_text
from amopo_fast.models.loading import device_named, model_errors
from amopo_fast.prompts.tokenizer import load_tokenizer


@dataclass
class RewardModel:
    """
    Attributes:
        name: folder or Hub name. outputs: the model's outputs by dimension; {}: by the names in its configuration, and
            a single output is any one dimension's.
        batch_size: answers at a time.
    """

    name: str
    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    outputs: Mapping[str, int]
    batch_size: int = 16
    usage: Usage = field(default_factory=Usage)

    @classmethod
    def load(
        cls, name: str, *, outputs: Mapping[str, int] | None = None, dtype: str = "auto", device: str | None = None,
        batch_size: int = 16,
    ) -> RewardModel:  # fmt: skip
        """
        Args:
            dtype, device: as `models.loading.load_trained`.

        Raises:
            OptionError: a tensor is missing, or an output that is named is not there.
            ValueError: it cannot be loaded.
        """
        place = device_named(device)
        kind: Any = dtype if dtype != "auto" else ("float32" if place.type == "cpu" else "auto")
        hub.prefer_cache_if_unreachable(name)
        with model_errors(name, "judge"):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=kind, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise OptionError(
                f"judge {name!r} lacks {len(missing)} tensors ({', '.join(missing[:3])}), which would be random: it is "
                "no reward model with a trained head, or not all of its .safetensors files were copied", "judge",
            )  # fmt: skip
        tokenizer = load_tokenizer(name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.get_text_config().pad_token_id is None:  # decoders find their last token by it
            model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        count = model.config.num_labels
        for dimension, index in (outputs or {}).items():
            if not 0 <= index < count:
                raise OptionError(f"judge_outputs {dimension}={index}: {name} has the outputs 0 to {count - 1}",
                                  "judge_outputs")  # fmt: skip
        return cls(name, model.to(place).eval(), tokenizer, dict(outputs or {}), batch_size)

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "reward model", "name": self.name, "outputs": dict(self.outputs)}

    def columns(self, dimensions: Sequence[str]) -> list[int]:
        """The model's output for each dimension. Raises OptionError for one that no output is known to be."""
        labels = {str(label): int(index) for index, label in self.model.config.id2label.items()}
        known = {**labels, **self.outputs}
        if not self.outputs and len(labels) == 1 and len(dimensions) == 1:
            return [0]
        for name in dimensions:
            if name not in known:
                raise OptionError(
                    f"judge {self.name!r} has {len(labels)} output{'s' * (len(labels) != 1)} ({', '.join(labels)}) and "
                    f"none for {name}: say which it is with --judge_outputs {name}=NUMBER, or judge fewer dimensions",
                    "judge_outputs",
                )
        return [known[name] for name in dimensions]

    @torch.no_grad()
    def scores(
        self, answers: Sequence[Answer], dimensions: Sequence[str], done: Callable[[int], None] = nothing
    ) -> np.ndarray:
        columns = self.columns(dimensions)
        table = np.full((len(answers), len(dimensions)), math.nan)
        ids = [self._ids(answer) for answer in answers]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        fitting = []
        for index, each in enumerate(ids):
            if limit and len(each) > limit:
                for _ in dimensions:
                    self.usage.count_unknown(f"longer than the {limit} tokens that {self.name} can read",
                                             f"{len(each)} tokens")  # fmt: skip
                done(len(dimensions))
            else:
                fitting.append(index)
        fitting.sort(key=lambda index: -len(ids[index]))
        device = next(self.model.parameters()).device
        for begin in range(0, len(fitting), self.batch_size):
            batch = fitting[begin : begin + self.batch_size]
            width = max(len(ids[index]) for index in batch)
            rows = torch.full((len(batch), width), self.tokenizer.pad_token_id or 0, dtype=torch.int64)
            mask = torch.zeros_like(rows)
            for row, index in enumerate(batch):
                rows[row, : len(ids[index])] = torch.tensor(ids[index])
                mask[row, : len(ids[index])] = 1
            logits = self.model(input_ids=rows.to(device), attention_mask=mask.to(device)).logits.double().cpu().numpy()
            if not np.isfinite(logits).all():
                raise JudgeError(f"{self.name} gave a score that is not finite; load it in float32 (--dtype float32)")
            table[batch] = logits[:, columns]
            self.usage.prompt_tokens += int(mask.sum())
            done(len(batch) * len(dimensions))
        return table

    def _ids(self, answer: Answer) -> list[int]:
        """The conversation with its answer, in the model's chat template; without one as two texts."""
        if self.tokenizer.chat_template:
            whole = [*answer.messages, {"role": "assistant", "content": answer.text}]
            text = self.tokenizer.apply_chat_template(whole, tokenize=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        last = answer.messages[-1]["content"] if len(answer.messages) == 1 else conversation_text(answer.messages)
        return self.tokenizer(last, answer.text)["input_ids"]
