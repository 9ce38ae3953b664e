"""Files of models, adapters, checkpoints, runs and templates that are damaged or say what cannot be."""

import json
import shutil

from bad_input import Bad
from numbers_as_input import GENERATE, STEER, TRAIN
from paths_as_input import REMEDY


def gone(path):
    path.unlink()


def emptied(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path):
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_list(path):
    path.write_text("[]")


def a_number(path):
    path.write_text("3")


def random_bytes(path):
    path.write_bytes(bytes(range(128, 256)) * 9)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def with_keys(**changes):
    """The JSON object with other values; ... takes a key away."""
    def change(path):
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


JSON = {"gone": gone, "empty": emptied, "cut": cut, "zeroed": zeroed, "a list": a_list, "a number": a_number,
        "bytes": random_bytes, "a folder": folder_instead}  # fmt: skip
TENSORS = {"gone": gone, "empty": emptied, "cut": cut, "zeroed": zeroed, "bytes": random_bytes}
MODEL = {"config.json": JSON, "model.safetensors": TENSORS,
         "tokenizer.json": {name: make for name, make in JSON.items() if name != "gone"}}  # fmt: skip
RESUME = ("--pairs_per_step", "2", "--max_steps", "3", "--save_steps", "1", "--gamma", "0.5", "--beta", "2",
          "--output_dir", "{here}/run", "--resume_from_checkpoint", "{here}/run/checkpoint-2")  # fmt: skip
CHECKPOINT = ("complete.json", "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
              "trainer_state.json", "amopo_state_0.pt", "amopo_recipe.json")  # fmt: skip
# name: (folder of good files that is copied, the command that reads the copy, its files and what becomes of each)
READ = {
    "train": ("model", (*TRAIN, "--model_name_or_path", "{here}/model"), MODEL),
    "eval": ("trained", ("eval", "{here}/trained", "--eval_data", "{work}/pairs.json", "--dimensions", "helpfulness"),
             {**MODEL, "amopo_recipe.json": {name: make for name, make in JSON.items() if name != "gone"}}),
    "generate": ("trained", ("generate", "{here}/trained", "--prompt", "Who?", "--max_new_tokens", "1"),
                 {**MODEL, "amopo_recipe.json": JSON}),
    "generate, an adapter": ("adapter", ("generate", "{here}/adapter", "--prompt", "Who?", "--max_new_tokens", "1"),
                             {"adapter_config.json": JSON, "adapter_model.safetensors": TENSORS}),
    "merge": ("adapter", ("merge", "{here}/adapter", "{here}/out"),
              {"adapter_config.json": JSON, "adapter_model.safetensors": TENSORS}),
    "plot": ("trained", ("plot", "{here}/trained"),
             {"metrics.jsonl": {"gone": gone, "empty": emptied, "zeroed": zeroed, "a list": a_list,
                                "a number": a_number, "a folder": folder_instead}}),
    "estimate": ("model", ("estimate", "{here}/model"), {"config.json": JSON}),
    "validate": ("model", ("validate", "{work}/pairs.json", "--model_name_or_path", "{here}/model"),
                 {"tokenizer.json": {name: make for name, make in JSON.items() if name != "gone"}}),
}  # fmt: skip
# (name of READ, file, what is said of, how it is changed)
SAID = [
    ("train", "config.json", "num_hidden_layers", with_keys(num_hidden_layers=-1)),
    ("train", "config.json", "vocab_size", with_keys(vocab_size="many")),
    ("train", "config.json", "vocabulary|embed_tokens", with_keys(vocab_size=7)),
    ("train", "config.json", "hidden_size|cannot be loaded", with_keys(hidden_size=None)),
    ("train", "config.json", "model_type|cannot be loaded", with_keys(model_type=["qwen2"])),
    ("train", "config.json", "rope|cannot be loaded", with_keys(rope_parameters={"rope_type": "magic"})),
    ("train", "config.json", "dtype|cannot be loaded", with_keys(dtype="float3", torch_dtype="float3")),
    ("generate, an adapter", "adapter_config.json", "base_model", with_keys(base_model_name_or_path="{no}/model")),
    ("generate, an adapter", "adapter_config.json", "adapter", with_keys(base_model_name_or_path=None)),
    ("generate, an adapter", "adapter_config.json", "adapter", with_keys(r="many")),
    ("generate, an adapter", "adapter_config.json", "adapter", with_keys(peft_type="NOTHING")),
    ("merge", "adapter_config.json", "adapter", with_keys(r=3)),
    ("merge", "adapter_config.json", "adapter", with_keys(target_modules=["no_such"])),
    ("merge", "adapter_config.json", "base", with_keys(base_model_name_or_path=7)),
    ("eval", "amopo_recipe.json", "amopo_recipe", with_keys(dimensions=3)),
    ("eval", "amopo_recipe.json", "amopo_recipe", with_keys(dimensions=[])),
    ("eval", "amopo_recipe.json", "amopo_recipe", with_keys(wording="text")),
    ("eval", "amopo_recipe.json", "amopo_recipe", with_keys(score_range=["low", "high"])),
    ("eval", "amopo_recipe.json", "amopo_recipe", with_keys(score_range=...)),
    ("eval", "amopo_recipe.json", "amopo_recipe", with_keys(objective=[])),
    ("eval", "amopo_recipe.json", "amopo_recipe", with_keys(prompt_options=7)),
    ("plot", "metrics.jsonl", "metrics.jsonl", lambda path: path.write_text('{"step": 1}\n{"loss": 3}\n{"step": 2}\n')),
    ("plot", "metrics.jsonl", "metrics.jsonl", lambda path: path.write_text('{"step": "one"}\n{"step": 2}\n')),
]  # fmt: skip


def copied(name, file, make):
    def damage(work, here):
        shutil.copytree(work / name, here / name, ignore=shutil.ignore_patterns("checkpoint-*"))
        make(here / name / file)

    return damage


def of_models():
    for name, (folder, argv, files) in READ.items():
        for file, kinds in files.items():
            for kind, make in kinds.items():
                words = (rf"/{folder}\b|{file}", REMEDY)
                yield Bad(f"{name}: {file} {kind}", argv, words, 1, copied(folder, file, make))
    for number, (name, file, word, make) in enumerate(SAID):
        folder, argv, _ = READ[name]
        yield Bad(f"{name}: {number} of {file}", argv, (word, REMEDY), 1, copied(folder, file, make))


def of_checkpoints():
    kinds = {"gone": gone, "empty": emptied, "cut": cut, "zeroed": zeroed, "flipped": flipped}
    for file in CHECKPOINT:
        for kind, make in kinds.items():
            def damage(work, here, file=file, make=make):
                shutil.copytree(work / "trained", here / "run")
                make(here / "run" / "checkpoint-2" / file)

            yield Bad(f"resume: {file} {kind}", (*TRAIN, *RESUME), ("checkpoint-2 cannot be resumed", REMEDY), 1,
                      damage)  # fmt: skip


def written(name, content):
    def damage(work, here):
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


GOOD_WORDING = {"score": "{dimension} {score}", "no_object": "all {dimensions}"}
WORDINGS = {  # file: (content, what is named)
    "an unknown key": ({**GOOD_WORDING, "sore": "x"}, "sore"),
    "no score": ({"no_object": "a"}, "field 'score'"),
    "no {score}": ({**GOOD_WORDING, "score": "no number"}, "no .score."),
    "an unknown placeholder": ({**GOOD_WORDING, "score": "{score} {level}"}, "level"),
    "a placeholder of the other": ({**GOOD_WORDING, "no_object": "{score}"}, "field 'no_object'"),
    "a number": ({**GOOD_WORDING, "score": 3}, "field 'score'"),
    "empty text": ({**GOOD_WORDING, "score": ""}, "field 'score'"),
    "null": ({**GOOD_WORDING, "no_object": None}, "field 'no_object'"),
    "dimensions as a list": ({**GOOD_WORDING, "dimensions": ["a"]}, "field 'dimensions'"),
    "a dimension as text": ({**GOOD_WORDING, "dimensions": {"helpfulness": "a"}}, "dimensions.helpfulness"),
    "an unknown key of one": ({**GOOD_WORDING, "dimensions": {"helpfulness": {"nam": "a"}}}, "dimensions.helpfulness"),
    "a name as a number": ({**GOOD_WORDING, "dimensions": {"helpfulness": {"name": 3}}}, "helpfulness.name"),
}  # fmt: skip
JUDGED = {
    "no {answer}": "How good is {conversation} in {dimension}?",
    "an unknown placeholder": "{conversation} {answer} {score}",
    "one of the other kind": "{conversation} {first} {second}",
    "empty": "",
    "bytes": b"\xff\xfe{answer}",
}
TEMPLATES = {  # chat templates: (text, what is named)
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops or explodes"),
    "explodes": ("{{ 'a' * 10**10 }}", "loops or explodes|chat template"),
    "TypeError": ("{{ 1 + 'a' }}", "chat template"),
    "OverflowError": ("{{ 2.0 ** 99999 }}", "chat template"),
    "ZeroDivisionError": ("{{ 1 / 0 }}", "chat template"),
    "an unknown filter": ("{{ messages | nothing }}", "template"),
    "an unknown variable's item": ("{{ nothing.at.all }}", "chat template"),
    "not closed": ("{% for m in messages %}{{ m.content }}", "template"),
    "Python's classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
    "raises": ("{{ raise_exception('No system messages, please') }}", "No system messages"),
    "nothing": ("{% if false %}{% endif %}", "template"),
    "the same for all": ("Always this.", "template"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "template"),
    "includes": ("{% include 'other' %}", "template"),
}  # fmt: skip


def of_templates():
    for name, (content, word) in WORDINGS.items():
        for argv in ((*TRAIN, "--prompt_template", "{here}/t.yaml"),
                     ("validate", "{work}/pairs.json", "--prompt_template", "{here}/t.yaml")):  # fmt: skip
            yield Bad(f"{argv[0]}: wording with {name}", argv, (r"t\.yaml", word, REMEDY), 1,
                      written("t.yaml", json.dumps(content)))  # fmt: skip
    asked = (*STEER, "--judge", "http://localhost:1/v1", "--judge_template", "{here}/t.txt")
    for name, content in JUDGED.items():
        yield Bad(f"judge's template: {name}", asked, (r"t\.txt", REMEDY), 1, written("t.txt", content))
    for name, (text, word) in TEMPLATES.items():
        def broken(path, text=text):
            (path.parent / "chat_template.jinja").write_text(text)

        argv = (*TRAIN, "--model_name_or_path", "{here}/model")
        yield Bad(f"chat template: {name}", argv, (word, REMEDY), 1, copied("model", "config.json", broken))


PROGRAMS = {
    "raises": "raise ValueError('no')",
    "gives text": "return 'good'",
    "gives infinity": "return float('inf')",
    "gives a list": "return [1]",
    "takes other arguments": None,
}


def of_judges():
    for name in ("no.such.module:score", "json:no_such", "json:", ":dumps", "http://", "ftp://host/v1",
                 "http://localhost:99999/v1", "http://[::1", "json:__doc__"):  # fmt: skip
        yield Bad(f"judge {name}", (*STEER, "--judge", name), ("judge", REMEDY))
    base = (*STEER, "--max_new_tokens", "1", "--max_prompts", "1", "--judge")
    for number, (name, body) in enumerate(PROGRAMS.items()):
        signature = "messages, answer, dimension" if body else "one"
        module = f"judge_{number}_of_bad_inputs"

        def damage(work, here, text=f"def score({signature}):\n    {body or 'return 1'}\n", module=module):
            (here / f"{module}.py").write_text(text)

        yield Bad(f"a judge that {name}", (*base, f"{module}:score"), (f"{module}:score", REMEDY + "|failed"), 1,
                  damage)  # fmt: skip
    options = {"judge_request": ("3", "{{", "[]", "text"), "judge_outputs": ("a", "a=x", "=1", "a=-1"),
               "judge_prices": ("free",)}  # fmt: skip
    for option, values in options.items():
        for value in values:
            yield Bad(f"--{option} {value}", (*STEER, "--judge", "http://localhost:1/v1", f"--{option}", value),
                      (option, REMEDY))  # fmt: skip
    for words in (("--judge_outputs", "helpfulness=1"), ("--judge_batch_size", "2")):
        yield Bad(f"{words[0]} of a server", (*STEER, "--judge", "http://localhost:1/v1", *words),
                  (words[0][2:], "no effect", REMEDY))  # fmt: skip
    for target in ("helpfulness=9", "helpfulness=nan", "helpfulness=x", "nothing=1", "no_object=1", "none=1", "=1",
                   "helpfulness"):  # fmt: skip
        yield Bad(f"--target {target}", (*GENERATE, "--target", target), ("target", REMEDY + "|needs|takes no score"))


REPORT = {"step": 1, "reason": "loss", "records": [0], "pairs": []}
REPORTS = {
    "no records": {**REPORT, "records": ...}, "records as text": {**REPORT, "records": "all"},
    "a record as text": {**REPORT, "records": ["first"]}, "pairs as a number": {**REPORT, "pairs": 3},
    "a pair as text": {**REPORT, "pairs": ["a"]}, "dimensions as a list": {
        **REPORT, "pairs": [{"record": 0, "micro_batch_loss": 1, "dimensions": []}]},
    "no rank": {**REPORT, "pairs": [{"record": 0, "micro_batch_loss": 1, "dimensions": {"a": {}}}]},
    "numbers as a list": {**REPORT, "pairs": [{"record": 0, "rank": 0, "micro_batch": 0, "micro_batch_loss": 1,
                                               "dimensions": {"a": []}}]},
    "a record that is not there": {**REPORT, "records": [10**6]},
    "weights as a number": {**REPORT, "weights": 3},
}  # fmt: skip


def of_reports():
    for name, content in REPORTS.items():
        content = {key: value for key, value in content.items() if value is not ...}
        yield Bad(f"failed step: {name}", ("show", "{work}/pairs.json", "--dimensions", "helpfulness", "--failed_step",
                                           "{here}/f.json"), (r"f\.json|records, numbered", REMEDY + "|there is no"),
                  1, written("f.json", json.dumps(content)))  # fmt: skip


FILES_GIVEN = [*of_models(), *of_checkpoints(), *of_templates(), *of_judges(), *of_reports()]
