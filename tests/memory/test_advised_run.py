"""Random runs: what the estimate counts adds up; with the advice applied as it is written a run fits as predicted."""

import dataclasses
import random
import shlex

import pytest
import torch
from transformers import Qwen2Config

from amopo_fast.cli.options import parse_options
from amopo_fast.errors import OptionError
from amopo_fast.memory.advice import cheapest_change, shorter_rows
from amopo_fast.memory.estimate import HOST_PROCESS, RESERVE, Row, estimate
from amopo_fast.memory.gpus import GPUS
from amopo_fast.memory.preflight import Room
from amopo_fast.models.config import ModelConfig
from amopo_fast.models.precision import weights_dtype
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.host_memory import refuse_in_host_memory
from amopo_fast.training.loading import setup_of

CONFIG = Qwen2Config(vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
ROW, LONG = Row(1024, 512, 2048), Row(4096, 2048, 8192)  # nothing shorter than the first is advised
OFFLOAD = ("--gradient_checkpointing_kwargs", '{"offload": true}')


def options_of(draw: random.Random) -> list[str]:
    """Of a run that `train` may refuse."""
    options = []
    if draw.random() < 0.2:
        options += ["--use_peft", "true", "--load_in_4bit", draw.choice(["true", "false"])]
    else:
        options += ["--weight_precision", draw.choice(["fp32", "bf16_stochastic", "bf16"])]
        inside = draw.choice(["", "adamw", "adamw_8bit", "adamw_4bit"])
        if inside:
            options += ["--optim_in_backward", inside, "--optimizer_states", draw.choice(["device", "host"]),
                        "--weights", draw.choice(["device", "device", "host"])]  # fmt: skip
        elif draw.random() < 0.5:
            options += ["--optim", "adamw_torch_8bit"]
    if draw.random() < 0.6:
        options += ["--gradient_checkpointing", "true", *draw.choice([(), OFFLOAD, ("--keep_layers", "2")])]
    return options


def setup_from(options: list[str], on_gpu: bool, folder):
    """(the estimate's view of the run, tokens of its micro-batch). Raises OptionError as `train` does."""
    given = ["--model_name_or_path", "x", "--output_dir", str(folder), "--use_cpu", "true", *options]
    model, args, _ = parse_options("train", (ModelConfig, AMoPOConfig), given)
    refuse_in_host_memory(args, adapter=model.use_peft)
    dtype = weights_dtype(
        args.weight_precision, device=torch.device("cpu"), adapter=model.use_peft, fp32_fits=lambda: True
    )
    if on_gpu and args.weight_precision == "auto":  # under an adapter
        dtype = torch.bfloat16
    setup = setup_of(args, dtype, lora_rank=model.lora_r if model.use_peft else None, quantised=model.load_in_4bit,
                     nested=False, accumulates=False)  # fmt: skip
    return dataclasses.replace(setup, autocast=on_gpu, head_slice=None), args.tokens_per_micro_batch


IN_CI = (15,)  # its --optim has to be taken back


@pytest.mark.parametrize(
    "seed", [*IN_CI, *(pytest.param(n, marks=pytest.mark.slow) for n in range(200) if n not in IN_CI)]
)
def test_parts_add_up_and_advice_fits_where_it_is_followed(seed, tmp_path):
    draw, whole_row = random.Random(seed), LONG if seed % 2 and seed not in IN_CI else ROW
    options, on_gpu = options_of(draw), draw.random() < 0.85
    try:
        setup, _ = setup_from(options, on_gpu, tmp_path)
    except OptionError:
        return
    several = not setup.in_backward and draw.random() < 0.5  # micro-batches a step
    setup = dataclasses.replace(setup, accumulates=several)
    prediction = estimate(CONFIG, whole_row, setup)
    for parts, whole in ((prediction.parts, prediction.peak), (prediction.pinned, prediction.host_pinned)):
        assert all(type(part) is int and part >= 0 for part in parts.values()) and sum(parts.values()) == whole
    assert prediction.host_needed - prediction.host_pinned == sum(prediction.unpinned.values()) >= HOST_PROCESS
    assert prediction.whole_cache >= 0

    short = draw.uniform(0.1, 1)
    host = draw.choice([None, 0, HOST_PROCESS + int(prediction.peak * draw.random())])
    room = Room(dataclasses.replace(GPUS["h100"], memory=RESERVE + int(prediction.peak * short)), host)
    room = room if on_gpu else Room(None, int(prediction.needed_on_cpu * short))
    change = cheapest_change(CONFIG, whole_row, setup, room.fits, room.gpu)
    if room.fits(prediction) or change is None:
        return
    followed, tokens = setup_from(options + shlex.split(change.flags), on_gpu, tmp_path)
    row = next(row for row in shorter_rows(whole_row) if row.tokens == (tokens or whole_row.tokens))
    several = not followed.in_backward and (several or row is not whole_row)
    found = estimate(CONFIG, row, dataclasses.replace(followed, accumulates=several))
    assert room.fits(found) and found.parts == change.prediction.parts
