"""Every path that a command takes, as what does not lie there."""

import os

from bad_input import Bad
from numbers_as_input import EVAL, GENERATE, SCORE, STEER, TRAIN

REMEDY = (
    r"(?i)\b(give|name|write|check|choose|copy|raise|leave|correct|convert|rename|remove|set|train|return|start)\b"
    "|Remedy: |did you mean"
)


def missing(path):
    pass


def folder(path):
    path.mkdir()


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("Not what is asked for.\n")


def binary(path):
    path.write_bytes(bytes(range(256)))


def link(path):
    os.symlink(path.name, path)


FILE = {"missing": missing, "a folder": folder, "empty": empty, "text": text, "bytes": binary, "a link to itself": link}
FOLDER = {"missing": missing, "an empty folder": folder, "a file": text, "a link to itself": link}
CONFIG = {name: make for name, make in FILE.items() if name != "empty"}  # which sets no option
OUT_FOLDER = {"a file": text, "a link to itself": link}
OUT_FILE = {"a folder": folder, "a link to itself": link}
ELSEWHERE = {  # names at which nothing can lie
    "below a file": "{work}/pairs.json/below", "too long": "{here}/" + 300 * "x",
}  # fmt: skip
VALIDATE = ("validate", "{work}/pairs.json", "--dimensions", "helpfulness")
EVALUATES = (*TRAIN, "--eval_strategy", "epoch")
JUDGED = (*STEER, "--judge", "http://localhost:1/v1")
# (what is given by {path}, what can lie there, exit code)
PATHS = {
    "train --config": ((*TRAIN, "--config", "{path}.yaml"), CONFIG, 2),
    "train --train_data": ((*TRAIN, "--train_data", "{path}.jsonl"), FILE, 1),
    "train --eval_data": ((*EVALUATES, "--eval_data", "{path}.json"), FILE, 1),
    "train --model_name_or_path": ((*TRAIN, "--model_name_or_path", "{path}"), FOLDER, 1),
    "train --tokenizer_name_or_path": ((*TRAIN, "--tokenizer_name_or_path", "{path}"), FOLDER, 1),
    "train --prompt_template": ((*TRAIN, "--prompt_template", "{path}.yaml"), FILE, 1),
    "train --output_dir": ((*TRAIN, "--output_dir", "{path}"), OUT_FOLDER, 2),
    "train --resume_from_checkpoint": ((*TRAIN, "--resume_from_checkpoint", "{path}"), FOLDER, 1),
    "train --deepspeed": ((*TRAIN, "--deepspeed", "{path}.json"), FILE, 2),
    "train --fsdp_config": ((*TRAIN, "--fsdp", "full_shard", "--fsdp_config", "{path}.json"), FILE, 2),
    "validate": (("validate", "{path}.csv"), FILE, 1),
    "validate, Parquet": (("validate", "{path}.parquet"), FILE, 1),
    "validate, gzip": (("validate", "{path}.jsonl.gz"), FILE, 1),
    "validate --config": (("validate", "--config", "{path}.yaml"), CONFIG, 2),
    "validate --prompt_template": ((*VALIDATE, "--prompt_template", "{path}.yaml"), FILE, 1),
    "validate --tokenizer_name_or_path": (
        ("validate", "{work}/pairs.json", "--tokenizer_name_or_path", "{path}"), FOLDER, 1),
    "show": (("show", "{path}.json"), FILE, 1),
    "show --failed_step": (("show", "{work}/pairs.json", "--failed_step", "{path}.json"), FILE, 1),
    "show --model_name_or_path": (("show", "{work}/pairs.json", "--model_name_or_path", "{path}"), FOLDER, 1),
    "eval": (("eval", "{path}", "--eval_data", "{work}/pairs.json"), FOLDER, 1),
    "eval --eval_data": ((*EVAL, "--eval_data", "{path}.json"), FILE, 1),
    "eval --output_dir": ((*EVAL, "--output_dir", "{path}"), OUT_FOLDER, 2),
    "eval --per_pair": ((*EVAL, "--output_dir", "{here}/out", "--per_pair", "{path}"), OUT_FILE, 2),
    "generate": (("generate", "{path}", "--prompt", "Who?"), FOLDER, 1),
    "generate --data": (("generate", "{work}/trained", "--data", "{path}.jsonl"), FILE, 1),
    "generate --compare": ((*GENERATE, "--max_new_tokens", "1", "--compare", "{path}"), FOLDER, 1),
    "generate --output_file": ((*GENERATE, "--max_new_tokens", "1", "--output_file", "{path}"), OUT_FILE, 2),
    "chat": (("chat", "{path}"), FOLDER, 1),
    "steer": (("steer", "{path}", "--prompts", "{work}/pairs.json", "--output_dir", "{here}/out"), FOLDER, 1),
    "steer --prompts": ((*STEER, "--prompts", "{path}.jsonl"), FILE, 1),
    "steer --output_dir": ((*STEER, "--output_dir", "{path}"), OUT_FOLDER, 2),
    "steer --judge": ((*STEER, "--judge", "{path}"), FOLDER, 1),
    "steer --judge_template": ((*JUDGED, "--judge_template", "{path}.txt"), FILE, 1),
    "steer --pairwise_template": (
        ("steer", "{work}/adapter", *STEER[1:], "--pairwise_judge", "http://localhost:1/v1",
         "--pairwise_template", "{path}.txt"), FILE, 1),
    "score": (("score", "{path}.json", *SCORE[2:]), FILE, 1),
    "score --output_file": ((*SCORE, "--output_file", "{path}.jsonl"), OUT_FILE, 2),
    "score --judge_template": ((*SCORE, "--judge_template", "{path}.txt"), FILE, 1),
    "score --prompt_template": ((*SCORE, "--prompt_template", "{path}.yaml"), FILE, 1),
    "score --judge": ((*SCORE, "--judge", "{path}"), FOLDER, 1),
    "plot": (("plot", "{path}"), FOLDER, 1),
    "plot --output_dir": (("plot", "{work}/trained", "--output_dir", "{path}"), OUT_FOLDER, 2),
    "merge": (("merge", "{path}", "{here}/out"), FOLDER, 1),
    "merge, its output": (("merge", "{work}/adapter", "{path}"), OUT_FOLDER, 2),
    "merge --base": (("merge", "{work}/adapter", "{here}/out", "--base", "{path}"), FOLDER, 1),
    "estimate": (("estimate", "{path}"), FOLDER, 1),
}  # fmt: skip


def paths():
    for name, (argv, kinds, code) in PATHS.items():
        ending = next(word for word in argv if "{path}" in word).removeprefix("{path}")
        for kind, make in kinds.items():
            def damage(work, here, make=make, ending=ending):
                make(here / f"a{ending}")

            words = tuple(word.replace("{path}", "{here}/a") for word in argv)
            yield Bad(f"{name}: {kind}", words, (rf"/a{ending}\b|/a\b", REMEDY), code, damage)
        for kind, place in ELSEWHERE.items():
            words = tuple(word.replace("{path}", place) for word in argv)
            yield Bad(f"{name}: {kind}", words, ("pairs.json|xxxxx", REMEDY), code)


PATHS_GIVEN = list(paths())
