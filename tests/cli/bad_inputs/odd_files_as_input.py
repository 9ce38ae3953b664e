"""Files that are no files (pipes, devices without an end), and values of JSON and YAML that a library trips over."""

import json
import os

from bad_input import Bad
from files_as_input import JSON, copied, with_keys, written
from numbers_as_input import STEER, TRAIN
from paths_as_input import REMEDY

CONFIG = ("validate", "--config", "{here}/c.yaml")
GENERATE = ("generate", "{here}/trained", "--prompt", "Who?", "--max_new_tokens", "1")
OF_MODEL = (*TRAIN, "--model_name_or_path", "{here}/model")
OF_ADAPTER = ("generate", "{here}/adapter", "--prompt", "Who?", "--max_new_tokens", "1")
# what takes a file, as which name: (command, exit code)
TAKES = {
    "c.yaml": (CONFIG, 2),
    "d.json": (("validate", "{here}/d.json"), 1),
    "d.jsonl": (("validate", "{here}/d.jsonl"), 1),
    "d.csv": (("validate", "{here}/d.csv"), 1),
    "d.parquet": (("validate", "{here}/d.parquet"), 1),
    "w.yaml": (("validate", "{work}/pairs.json", "--prompt_template", "{here}/w.yaml"), 1),
    "r.json": (("show", "{work}/pairs.json", "--failed_step", "{here}/r.json"), 1),
    "t.txt": ((*STEER, "--judge", "http://localhost:1/v1", "--judge_template", "{here}/t.txt"), 1),
    "f.json": ((*TRAIN, "--fsdp", "full_shard", "--fsdp_config", "{here}/f.json"), 2),
}
YAML = {  # what stands in c.yaml: (text, what is named)
    "a null character": ('run_name: "a\\0b"', "run_name"),
    "half of a surrogate pair": ('output_dir: "\\ud800"', "output_dir"),
    "bytes for text": ("run_name: !!binary aGVsbG8=", "run_name"),
    "a set for names": ("dimensions: !!set {a, b}", "dimensions"),
    "a truth for a name": ("dimensions: [on]", "dimensions.0."),
    "a truth for text": ("run_name: yes", "run_name"),
    "a truth for trackers": ("report_to: on", "report_to"),
    "on for a strategy": ("eval_strategy: on", "eval_strategy"),
    "itself as a source": ("train_data: &a [*a]", "train_data"),
    "itself as weights": ("dimension_weights: &a {b: *a}", "dimension_weights"),
    "itself as names": ("dimensions: &a [*a]", "dimensions"),
    "a null character in a source": ('train_data: "a\\0.json"', "train_data"),
    "a null character in a source's path": ('train_data: {path: "a\\0.json"}', "train_data"),
}
GENERATION = {  # of generation_config.json
    "eos_token_id": "x", "num_beams": 0, "forced_eos_token_id": 10**9, "prefill_chunk_size": -1,
    "temperature": float("nan"), "top_k": -1, "repetition_penalty": 0, "stop_strings": ["a"],
    "bad_words_ids": [[10**9]], "watermarking_config": 3, "constraints": [1], "cache_implementation": "magic",
}  # fmt: skip
SAMPLED = ("temperature", "top_k")
TOKENIZER = {"model_max_length": "many", "tokenizer_class": 3, "added_tokens_decoder": [1], "eos_token": {"a": 1},
             "padding_side": "top", "extra_special_tokens": 7}  # fmt: skip
ADAPTER = {"target_modules": 3, "modules_to_save": 3, "rank_pattern": 3, "lora_alpha": "x", "bias": "magic",
           "r": 0}  # fmt: skip
INDEX = {"a list": [], "a number": {"a": 3}, "a folder": {"a": "."}, "outside": {"a": "../../x.safetensors"}}


def pipe(name):
    return lambda work, here: os.mkfifo(here / name)


def endless(name):
    return lambda work, here: os.symlink("/dev/zero", here / name)


def indexed(weight_map):
    def change(path):
        path.rename(path.with_name("model-00001-of-00001.safetensors"))
        written("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))(None, path.parent)

    return change


def cases():
    for name, (argv, code) in TAKES.items():
        yield Bad(f"a pipe as {name}", argv, (name, "named pipe", REMEDY), code, pipe(name))
        if name != "d.parquet":
            yield Bad(f"an endless {name}", argv, (name, REMEDY), code, endless(name))
    for name, (text, word) in YAML.items():
        argv = CONFIG if word == "train_data" else (*TRAIN, "--config", "{here}/c.yaml")
        yield Bad(f"YAML: {name}", argv, (word, REMEDY), 2, written("c.yaml", text))
    for key, value in GENERATION.items():
        changes = {key: value, **({"do_sample": True} if key in SAMPLED else {})}
        yield Bad(f"generation_config.json: {key}", GENERATE, ("generation_config|trained' cannot", REMEDY), 1,
                  copied("trained", "generation_config.json", with_keys(**changes)))  # fmt: skip
    for kind, make in JSON.items():
        if kind not in ("gone", "a folder"):
            yield Bad(f"generation_config.json: {kind}", GENERATE, ("generation_config.json", REMEDY), 1,
                      copied("trained", "generation_config.json", make))  # fmt: skip
    for key, value in TOKENIZER.items():
        yield Bad(f"tokenizer_config.json: {key}", OF_MODEL, ("/model' cannot be loaded", REMEDY), 1,
                  copied("model", "tokenizer_config.json", with_keys(**{key: value})))  # fmt: skip
    for key, value in ADAPTER.items():
        yield Bad(f"adapter_config.json: {key}", OF_ADAPTER, ("/adapter' cannot be loaded", REMEDY), 1,
                  copied("adapter", "adapter_config.json", with_keys(**{key: value})))  # fmt: skip
    for name, weight_map in INDEX.items():
        yield Bad(f"an index of weights: {name}", OF_MODEL, ("/model' cannot be loaded", REMEDY), 1,
                  copied("model", "model.safetensors", indexed(weight_map)))  # fmt: skip
    yield Bad("a prompt of bytes that are no UTF-8", ("generate", "{work}/trained", "--prompt", "a\udcff"),
              ("prompt", REMEDY), 1)  # fmt: skip
    yield Bad("config.json: quantization_config", OF_MODEL, ("/model' cannot be loaded", REMEDY), 1,
              copied("model", "config.json", with_keys(quantization_config=3)))  # fmt: skip


ODD_FILES = list(cases())
