"""From a file of pairs to token ids, on one core: what reading, rendering and tokenising take.

Pairs are the demo's sentences drawn anew: a prompt of 60 to 120 words and answers of 40 to 160, four dimensions (six
renderings of the chat template and six texts to tokenise a pair). Two kinds of tokenizer: a byte-level BPE under
ChatML, whose answers may be tokenised by themselves, and one in the manner of Llama-2, whose answers may not. Rows give
milliseconds for all pairs and, as `ms_per_pair`, for one. `PYTHONPATH=OTHER:OTHER/kernels` measures another checkout.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core

import numpy as np  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

import harness  # noqa: E402
from amopo_fast.data.config import DataConfig  # noqa: E402
from amopo_fast.demo.data import TRAIN_FILE  # noqa: E402
from amopo_fast.demo.tokenizer import demo_tokenizer  # noqa: E402
from amopo_fast.prompts.dataset import load_data  # noqa: E402

DIMENSIONS = ["no_object", "helpfulness", "correctness", "instruction_following"]
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece_like(lines: list[str]) -> PreTrainedTokenizerFast:
    """A BPE over text whose blanks are ▁, as Llama-2's: no pre-tokenizer, a ▁ before every piece of text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    # Pieces are learned word by word, without a pre-tokenizer afterwards.
    words = (f" {word}" for line in lines for word in line.split())
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.normalizer, normalizer = normalizers.Replace(" ", "▁"), tokenizer.normalizer
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.normalizer = normalizer
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]  # byte pieces belong to the model alone
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = BRACKETS
    return wrapped


def texts(lines: list[str], rng: np.random.Generator, low: int, high: int) -> str:
    """Sentences drawn from `lines`, cut to a number of words drawn from [low, high)."""
    length = int(rng.integers(low, high))
    words: list[str] = []
    while len(words) < length:
        words += lines[int(rng.integers(len(lines)))].split()
    return " ".join(words[:length])


def write_pairs(path: Path, lines: list[str], count: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            scores = dict.fromkeys(DIMENSIONS[1:], 4)
            sides = {side: {"response": texts(lines, rng, 40, 160), **scores} for side in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": texts(lines, rng, 60, 120), **sides}) + "\n")


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.device = "cpu"
    report = harness.Report("tokens", arguments)
    records = [json.loads(line) for line in TRAIN_FILE.read_text(encoding="utf-8").splitlines()]
    lines = [text for record in records for text in (record["prompt"], record["chosen"]["response"])]
    count = 8 if arguments.smoke else arguments.pairs
    tokenizers = {
        "byte-level BPE, ChatML": demo_tokenizer(),
        "BPE over ▁, Llama-2": sentencepiece_like(lines[: 200 if arguments.smoke else None]),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_pairs(path, lines, count)
        config = DataConfig(train_data=[str(path)], dimensions=DIMENSIONS)

        def loader(tokenizer) -> Callable[[object], None]:
            def load(_: object) -> None:
                load_data(config, tokenizer, seed=0)

            return load

        times = harness.measure(
            {name: loader(tokenizer) for name, tokenizer in tokenizers.items()}, [None], device="cpu",
            rounds=1 if arguments.smoke else min(arguments.rounds, 5), warmup=0 if arguments.smoke else 1,
            deadline=harness.Deadline(arguments.minutes),
        )  # fmt: skip
        for name, tokenizer in tokenizers.items():
            pairs = load_data(config, tokenizer, seed=0).train
            lengths = [(sum(map(len, pair.prompts)), len(pair.chosen) + len(pair.rejected)) for pair in pairs]
            prompt, response = (int(sum(column)) for column in zip(*lengths, strict=True))
            report.add(case="load", variant=name, status="ok", pairs=count, prompt_tokens=prompt,
                       response_tokens=response, ms_per_pair=times[name]["min_cpu_ms"] / count,
                       **times[name])  # fmt: skip


if __name__ == "__main__":
    main()
