"""The good files of all bad inputs: a model, pairs, a trained model and an adapter, each with a checkpoint."""

import json

from demo_folder import demo_folder

from amopo_fast.cli import main


def side(text, helpfulness, correctness):
    return {"response": text, "helpfulness": helpfulness, "correctness": correctness}


RECORDS = [
    {"prompt": f"Where is {i}?", "chosen": side(f"Here is {i}.", 5, 4), "rejected": side("No.", 1, 4)} for i in range(4)
]


def make_inputs(folder):
    """A model and pairs."""
    demo_folder(folder / "model")
    (folder / "pairs.json").write_text(json.dumps(RECORDS))


def make_outputs(folder):
    """What two steps of training make of them."""
    for name, options in (("trained", ()), ("adapter", ("--use_peft", "true"))):
        argv = ["train", "--model_name_or_path", str(folder / "model"), "--train_data", str(folder / "pairs.json"),
                "--output_dir", str(folder / name), "--dimensions", "no_object", "helpfulness", "correctness",
                "--use_cpu", "true", "--pairs_per_step", "2", "--max_steps", "2", "--save_steps", "1",
                "--gamma", "0.5", "--beta", "2", "--disable_tqdm", "true", *options]  # fmt: skip
        assert main(argv) == 0
