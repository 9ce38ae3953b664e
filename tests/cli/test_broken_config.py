"""Broken configurations, command lines and model folders: each ends with the key or place and a remedy."""

import json
import shutil

import pytest
import yaml
from demo_folder import demo_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amopo_fast.cli import main
from amopo_fast.cli.options import parse_options
from amopo_fast.data.config import DataConfig
from amopo_fast.errors import OptionError
from amopo_fast.training.config import AMoPOConfig


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    demo_folder(folder / "model")
    records = [
        {
            "prompt": f"Where is {i}?",
            "chosen": {"response": f"Here is {i}.", "helpfulness": 5},
            "rejected": {"response": "No.", "helpfulness": 1},
        }
        for i in range(4)
    ]
    (folder / "pairs.json").write_text(json.dumps(records))
    return folder


def options(workspace, tmp_path, **changes):
    base = {
        "model_name_or_path": str(workspace / "model"), "train_data": str(workspace / "pairs.json"),
        "output_dir": str(tmp_path / "out"), "dimensions": ["no_object", "helpfulness"], "use_cpu": True,
        "max_steps": 1, "pairs_per_step": 2,
    }  # fmt: skip
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def error_of(capsys, argv, code):
    found = main(argv)
    error = capsys.readouterr().err
    assert found == code, error
    assert "Traceback" not in error
    return error


KEYS = [
    ({"learning_rate": "fast"}, "run.yaml: learning_rate: write a number, found str 'fast'"),
    ({"learning_rate": [1]}, "run.yaml: learning_rate: write a number"),
    ({"learning_rate": -1}, "run.yaml: learning_rate: learning_rate=-1.0 must not be negative"),
    ({"learning_rat": 1}, "run.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    ({"beta_": 1}, "did you mean 'beta'?"),
    ({"traindata": "x"}, "did you mean 'train_data'?"),
    ({"lr_scheduler_type": "cosin"}, "run.yaml: lr_scheduler_type"),
    ({"lr_scheduler_kwargs": "{a"}, "run.yaml: lr_scheduler_kwargs"),
    ({"optim": "adam"}, "run.yaml: optim: adam is not a valid"),
    ({"save_strategy": "sometimes"}, "run.yaml: save_strategy"),
    ({"eval_strategy": "steps"}, "eval_strategy"),
    ({"num_train_epochs": "three"}, "run.yaml: num_train_epochs: write a number"),
    ({"num_train_epochs": 0, "max_steps": -1}, "run.yaml: num_train_epochs"),
    ({"max_steps": "many"}, "run.yaml: max_steps: write a whole number"),
    ({"bf16": "yes"}, "run.yaml: bf16: write true or false without quotes"),
    ({"fp16": True, "bf16": True}, "run.yaml: fp16"),
    ({"tf32": True}, "run.yaml: tf32"),
    ({"seed": "x"}, "run.yaml: seed: write a whole number"),
    ({"seed": -1}, "run.yaml: seed: seed=-1 must not be negative"),
    ({"pairs_per_step": 0}, "run.yaml: pairs_per_step"),
    ({"pairs_per_step": 2.5}, "run.yaml: pairs_per_step: write a whole number, found float 2.5"),
    ({"per_device_train_batch_size": 0}, "run.yaml: per_device_train_batch_size"),
    ({"gradient_accumulation_steps": 0}, "run.yaml: gradient_accumulation_steps"),
    ({"tokens_per_micro_batch": 0}, "run.yaml: tokens_per_micro_batch"),
    ({"beta": 0}, "run.yaml: beta: beta=0.0 must be positive"),
    ({"gamma": "x"}, "run.yaml: gamma: write a number"),
    ({"sft_coef": -1}, "run.yaml: sft_coef"),
    ({"weighting": "bst"}, "choose one of gaussian, mean, uniform, worst_first, score_gap"),
    ({"compat": "old"}, "choose one of paper, upstream"),
    ({"kernel_backend": "cuda"}, "choose one of auto"),
    ({"logits_cache_gib": -1}, "run.yaml: logits_cache_gib: logits_cache_gib=-1: write auto, or GiB, 0 for none"),
    ({"logits_cache_gib": "all"}, "logits_cache_gib=all: write auto, or GiB"),
    ({"attention_backend": "flash"}, "run.yaml: attention_backend"),
    ({"dimensions": []}, "dimensions must be a non-empty list"),
    ({"dimensions": ["a", "a"]}, "dimensions must differ"),
    ({"dimensions": ["helpfulness", "none"]}, "no dimension can be called 'none'"),
    ({"dimensions": {"a": 1}}, "run.yaml: dimensions[0]: write text"),
    ({"train_data": ...}, "train_data is missing"),
    ({"train_data": {"file": "x"}}, "run.yaml: train_data: a data set: unknown option 'file'"),
    ({"train_data": [3]}, "run.yaml: train_data: 3 is no data set"),
    ({"train_data": "none.json,weigth=2"}, "did you mean 'weight'?"),
    ({"eval_data": {"a": {"paht": "none.json"}}}, "did you mean 'path'?"),
    ({"eval_share": 2}, "eval_share=2.0"),
    ({"eval_share": "half"}, "run.yaml: eval_share: write a number"),
    ({"prompt_order": "random"}, "run.yaml: prompt_order"),
    ({"max_length": 0}, "run.yaml: max_length: max_length=0 must be positive"),
    ({"on_bad_record": "ignore"}, "run.yaml: on_bad_record"),
    ({"missing_scores": "zero"}, "run.yaml: missing_scores"),
    ({"tied_dimensions": "yes"}, "run.yaml: tied_dimensions"),
    ({"score_min": 5, "score_max": 1}, "score_min=5 must be below score_max=1"),
    ({"score_max": 5}, "both score_min and score_max"),
    ({"model_name_or_path": ...}, "model_name_or_path is missing"),
    ({"config_overrides": "hidden_size=64"}, "config_overrides='hidden_size=64' has no effect without random_weights"),
    ({"config_overrides": "hidden=3", "random_weights": True}, "config_overrides: key hidden"),
    ({"deepspeed": "none.json"}, "deepspeed"),
    ({"fsdp": "all"}, "run.yaml: fsdp"),
    ({"report_to": [[]]}, "run.yaml: report_to[0]: write text, found list []"),
    ({"report_to": "wanb"}, "report_to='wanb' is not supported; did you mean 'wandb'?"),
    ({"load_best_model_at_end": True}, "run.yaml: load_best_model_at_end"),
    ({"metric_for_best_model": "x", "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch",
      "eval_share": 0.5}, "metric_for_best_model"),
    ({"warmup_steps": -1}, "run.yaml: warmup_steps"),
    ({"max_grad_norm": "none"}, "run.yaml: max_grad_norm"),
    ({"logging_steps": 0}, "run.yaml: logging_steps"),
    ({"dataloader_num_workers": -1}, "run.yaml: dataloader_num_workers"),
]  # fmt: skip


# What a key names is not there, or does not go with the rest: no mistake of usage.
FILES = [
    ({"dimensions": ["no_object", "helpfullness"]}, "no record has a score 'helpfullness'; scores found: helpfulness"),
    ({"train_data": "none.json"}, "none.json: unreadable file"),
    ({"train_data": "nobody/nothing"}, "nobody/nothing: unreadable data set"),
    ({"eval_data": {"a": {"path": "none.json"}}, "eval_strategy": "epoch"}, "none.json: unreadable file"),
    ({"prompt_template": "none.yaml"}, "none.yaml: unreadable file"),
    ({"max_length": 3}, "raise max_length to"),
    ({"score_min": 1, "score_max": 4}, "score out of range"),
    ({"model_name_or_path": "no/such-model"}, "model_name_or_path: 'no/such-model' cannot be loaded"),
    ({"resume_from_checkpoint": "last"}, "no checkpoint"),
]  # fmt: skip
BROKEN = [(2, *each) for each in KEYS] + [(1, *each) for each in FILES]
NAMES_OF_BROKEN = [f"{number}-{next(iter(changes))}" for number, (_, changes, _) in enumerate(BROKEN)]


@pytest.mark.parametrize(("code", "changes", "message"), BROKEN, ids=NAMES_OF_BROKEN)
def test_a_broken_key_is_named(workspace, tmp_path, capsys, code, changes, message):
    if changes.get("train_data") == "nobody/nothing":
        pytest.importorskip("datasets")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(options(workspace, tmp_path, **changes)))
    assert message in error_of(capsys, ["train", "--config", str(config)], code)


@pytest.mark.parametrize("place", ["pairs.json", "pairs.json/below/it"])
def test_an_output_dir_that_is_a_file(workspace, tmp_path, capsys, place):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(options(workspace, tmp_path, output_dir=str(workspace / place))))
    assert "pairs.json is a file; name a folder" in error_of(capsys, ["train", "--config", str(config)], 2)


TEXTS = [
    ("a: [", "not valid YAML"),
    ("- a\n- b", "write `key: value` lines"),
    ("just text", "write `key: value` lines"),
    ("a: b: c", "not valid YAML"),
    ("\t- x", "not valid YAML"),
    ("beta: 1\nbeta: 2", "the key 'beta' is there twice"),
    ("!!python/object:os.system x", "not valid YAML"),
    ("? [a]: b", "not valid YAML"),
    ("1: 2", "unknown key 1"),
    ("\udcff", "not valid YAML"),
    ("&a [*a]", "write `key: value` lines"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_a_broken_yaml_file_is_named(tmp_path, capsys, text, message):
    config = tmp_path / "run.yaml"
    config.write_bytes(text.encode("utf-8", "surrogateescape"))
    error = error_of(capsys, ["train", "--config", str(config)], 2)
    assert message in error and str(config) in error


COMMANDS = [  # a mistake of usage, but where what is named is not there
    (["train", "--learning-rat", "1"], "did you mean '--learning-rate'?"),
    (["train", "--beta"], "argument --beta: expected one argument"),
    (["train", "--beta", "x"], "argument --beta: write a finite number, found 'x'"),
    (["train", "--config", "none.yaml"], "none.yaml: No such file"),
    (["train", "extra"], "unknown option extra; a value stands behind its flag, as --train_data FILE"),
    (["train", "--liger_kernel_config", "rope"], "write a JSON object, found 'rope'"),
    (["train", "--liger_kernel_config", '{"rope": false}'], "no effect without use_liger_kernel"),
    (["train", "--split", "test"], "it is of one data set and stands behind its name: FILE,split=..."),
    (["train", "--lr_scheduler_type", "cosine_with_min_lr"], "error: lr_scheduler_kwargs: One of min_lr"),
    (["validate", "a.json", "--use_peft"], "--use_peft has no effect on validate, which loads no model: leave it out"),
    (["eval", "m", "--data", "a.json"], "did you mean '--eval_data'?"),
    (["eval", "m", "--eval_data", "a.json", "--train_data", "b.json"], "--train_data has no effect beside eval_data"),
    (["train", "--prompt_order", "x"], "invalid choice: 'x'"),
    (["train", "--use_cpu", "maybe"], "--use_cpu"),
    (["train", "--dimensions"], "--dimensions"),
    (["validate"], "name the data"),
    (["validate", "a.json", "--bogus"], "unknown option --bogus"),
    (["validate", "a.json", "--tokenizer", "x"], "did you mean '--tokenizer_name_or_path'?"),
    (["validate", "a.json", "--tokenizer_name_or_path", "no/such"], "tokenizer 'no/such' cannot be loaded"),
    (["show", "a.json", "--record", "first"], "argument --record"),
    (["show", "a.json"], "a.json: unreadable file"),
    (["eval"], "MODEL"),
    (["plot", "nowhere"], "give the output_dir of a training run"),
]
ABSENT = [["validate", "a.json", "--tokenizer_name_or_path", "no/such"], ["show", "a.json"], ["plot", "nowhere"]]


@pytest.mark.parametrize(("argv", "message"), COMMANDS, ids=[" ".join(argv) for argv, _ in COMMANDS])
def test_a_broken_command_line_is_explained(capsys, argv, message):
    assert message in error_of(capsys, argv, 1 if argv in ABSENT else 2)


@pytest.mark.parametrize("argv", [[], ["tarin"], ["plot"], ["demo", "--seed", "x"]])
def test_bad_usage_has_exit_code_2(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2 and "error:" in capsys.readouterr().err


def edit(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


WEIGHTS = "model.safetensors"
FOLDERS = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config cut off": write("config.json", b"{"),
    "config a list": write("config.json", b"[]"),
    "config empty": write("config.json", b"{}"),
    "unknown type": edit(model_type="nothing"),
    "remote code": edit(model_type="custom", auto_map={"AutoModelForCausalLM": "x.Y"}),
    "no causal model": edit(model_type="bert"),
    "size as text": edit(hidden_size="big"),
    "another size": edit(hidden_size=32),
    "another number of layers": edit(num_hidden_layers=3),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights cut off": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000]),
    "header cut off": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100]),
    "weights empty": write(WEIGHTS, b""),
    "weights text": write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "pickled weights": lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tok*")],
    "tokenizer cut off": write("tokenizer.json", b"{"),
    "tokenizer empty": write("tokenizer.json", b"{}"),
    "template broken": write("chat_template.jinja", b"{% for m in %}"),
    "template refuses": write("chat_template.jinja", b"{{ raise_exception('never') }}"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_broken_model_folder_is_named_with_a_remedy(workspace, tmp_path, capsys, name):
    folder = tmp_path / "model"
    shutil.copytree(workspace / "model", folder)
    FOLDERS[name](folder)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(options(workspace, tmp_path, model_name_or_path=str(folder))))
    error = error_of(capsys, ["train", "--config", str(config)], 1)
    last = error.replace("\r", "\n").strip().splitlines()[-1]
    assert str(folder) in last or "tokenizer" in last or "cannot be packed" in last
    assert not (tmp_path / "out" / WEIGHTS).exists()


NAMES = ["learning_rate", "beta", "dimensions", "train_data", "eval_data", "seed", "bf16", "max_length", "report_to",
         "lr_scheduler_type", "score_min", "score_max", "weighting", "warmup_steps", "save_steps", "optim",
         "betta"]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text("abc,=: ", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("pathx", max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_options_of_any_type_never_end_in_a_traceback(tmp_path, capsys, changes):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "use_cpu": True, **changes}))
    error = error_of(capsys, ["train", "--config", str(config)], 2)  # no model is named
    assert "error: " in error


def test_the_command_line_takes_the_place_of_what_says_the_same_in_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("eval_share: 0.1\npairs_per_step: 8\neval_strategy: epoch\nuse_cpu: true\n")

    def given(*arguments):
        return parse_options("train", (DataConfig, AMoPOConfig), ["--config", str(path), *arguments])

    data, run, _ = given("--eval_data", "b.json", "--per_device_train_batch_size", "3")
    assert (data.eval_share, data.eval_data, run.pairs_per_step) == (0.0, ["b.json"], 3)
    data, run, _ = given("--pairs_per_step", "4")
    assert (data.eval_share, run.pairs_per_step) == (0.1, 4)
    with pytest.raises(OptionError, match="gradient_accumulation_steps=2 has no effect beside pairs_per_step=4"):
        given("--gradient_accumulation_steps", "2", "--pairs_per_step", "4")
