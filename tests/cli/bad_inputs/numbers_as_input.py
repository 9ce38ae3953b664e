"""Every number that a command takes, as what it cannot be."""

from bad_input import Bad

HUGE = str(2**70)
WRONG = {  # kind of number: what is none of that kind
    "whole from 1": ("nan", "inf", "-1", "0", "1.5", HUGE, "many"),
    "whole from 0": ("nan", "inf", "-1", "1.5", HUGE, "many"),
    "above 0": ("nan", "inf", "-1", "0", "much"),
    "from 0": ("nan", "-inf", "-1", "much"),
    "any": ("nan", "inf", "much"),
    "0 to below 1": ("nan", "inf", "-1", "1", "much"),
    "0 to 1": ("nan", "inf", "-1", "1.1", "much"),
    "above 0 to 1": ("nan", "inf", "-1", "0", "1.1", "much"),
    "a list": ("nan", "1,inf", "1,,2", "1,much", ""),
    "two from 0": ("nan,1", "1", "1,2,3", "-1,1", "much,1"),
}
SAYS_HOW = "write|must|choose|give"
EVALUATES = ("--eval_strategy", "steps", "--eval_share", "0.5")
PEFT = ("--use_peft", "true")
WORKERS = ("--dataloader_num_workers", "1")
# option of `train`: (kind, what it needs beside it)
OF_TRAIN = {
    "max_length": ("whole from 1", ()), "lora_r": ("whole from 1", PEFT), "lora_alpha": ("whole from 1", PEFT),
    "pairs_per_step": ("whole from 1", ()), "tokens_per_micro_batch": ("whole from 1", ()),
    "per_device_train_batch_size": ("whole from 1", ()), "per_device_eval_batch_size": ("whole from 1", ()),
    "gradient_accumulation_steps": ("whole from 1", ()), "save_total_limit": ("whole from 1", ()),
    "eval_accumulation_steps": ("whole from 1", ()), "torch_empty_cache_steps": ("whole from 1", ()),
    "ddp_timeout": ("whole from 1", ()), "ddp_bucket_cap_mb": ("whole from 1", ()),
    "dataloader_prefetch_factor": ("whole from 1", WORKERS),
    "seed": ("whole from 0", ()), "dataloader_num_workers": ("whole from 0", ()),
    "keep_layers": ("whole from 0", ("--gradient_checkpointing", "true")),
    "beta": ("above 0", ()), "tau": ("above 0", ("--weighting", "worst_first")), "num_train_epochs": ("above 0", ()),
    "save_steps": ("above 0", ()), "eval_steps": ("above 0", EVALUATES), "logging_steps": ("above 0", ()),
    "adam_epsilon": ("above 0", ()),
    "learning_rate": ("from 0", ()), "weight_decay": ("from 0", ()), "max_grad_norm": ("from 0", ()),
    "sft_coef": ("from 0", ()), "cpo_alpha": ("from 0", ("--objective", "simpo")), "warmup_steps": ("from 0", ()),
    "eval_delay": ("from 0", EVALUATES), "logits_cache_gib": ("from 0", ()), "router_aux_loss_coef": ("from 0", ()),
    "gamma": ("any", ()), "score_min": ("any", ("--score_max", "5")), "score_max": ("any", ("--score_min", "0")),
    "adam_beta1": ("0 to below 1", ()), "adam_beta2": ("0 to below 1", ()), "eval_share": ("0 to below 1", ()),
    "lora_dropout": ("0 to below 1", PEFT), "label_smoothing": ("0 to below 1", ("--objective", "simpo")),
}  # fmt: skip
TRAIN = ("train", "--model_name_or_path", "{work}/model", "--train_data", "{work}/pairs.json", "--output_dir",
         "{here}/out", "--use_cpu", "true", "--dimensions", "no_object", "helpfulness", "correctness")  # fmt: skip
MORE_OF_TRAIN = {  # what only one option cannot be
    "max_steps": ("nan", "inf", "-2", "0", "1.5", HUGE, "many"), "seed": (str(2**32),), "save_steps": ("2.5",),
    "eval_steps": ("2.5",), "logging_steps": ("2.5",), "warmup_steps": ("2.5",), "label_smoothing": ("0.5",),
    "learning_rate": ("1e400",), "eval_share": ("0x1p3",), "score_min": ("7",), "beta": ("1,5",),
}  # fmt: skip
GENERATE = ("generate", "{work}/trained", "--prompt", "Who?")
STEER = ("steer", "{work}/trained", "--prompts", "{work}/pairs.json", "--output_dir", "{here}/out")
SCORE = ("score", "{work}/pairs.json", "--output_file", "{here}/x.jsonl", "--dimensions", "helpfulness", "--judge",
         "http://localhost:1/v1")  # fmt: skip
EVAL = ("eval", "{work}/trained", "--eval_data", "{work}/pairs.json")
SAMPLING = {"max_new_tokens": "whole from 1", "top_k": "whole from 0", "temperature": "from 0",
            "top_p": "0 to 1", "repetition_penalty": "above 0", "seed": "whole from 0"}  # fmt: skip
JUDGED = {"judge_concurrency": "whole from 1", "judge_timeout": "above 0", "judge_retries": "whole from 0",
          "judge_prices": "two from 0", "judge_batch_size": "whole from 1"}  # fmt: skip
OF_COMMANDS = [
    (("demo", "--output_dir", "{here}/out"), {"seed": "whole from 0"}),
    (GENERATE, {"batch_size": "whole from 1", **SAMPLING}),
    (("chat", "{work}/trained"), SAMPLING),
    (EVAL, {"beta": "above 0", "gamma": "any", "seed": "whole from 0", "tokens_per_row": "whole from 1",
            "max_length": "whole from 1", "levels": "a list"}),
    (STEER, {"max_prompts": "whole from 1", "levels": "a list", "batch_size": "whole from 1", **SAMPLING}),
    (SCORE, {"score_min": "any", "score_max": "any", "rescale": "any", **JUDGED}),
    (("show", "{work}/pairs.json"), {"record": "whole from 0", "max_length": "whole from 1"}),
    (("validate", "{work}/pairs.json"), {"max_length": "whole from 1", "eval_share": "0 to below 1"}),
    (("estimate", "{work}/model"), {"gpus": "whole from 1", "tokens": "whole from 1", "label_tokens": "whole from 1",
                                    "max_length": "whole from 1", "keep_layers": "whole from 0",
                                    "efficiency": "above 0 to 1", "gpu": "above 0", "host_memory": "above 0",
                                    "price": "above 0", "pairs": "whole from 1", "pair_tokens": "whole from 1"}),
]  # fmt: skip


def of_train():
    cases = {(name, value): beside for name, (kind, beside) in OF_TRAIN.items() for value in WRONG[kind]}
    for name, values in MORE_OF_TRAIN.items():
        cases |= {(name, value): OF_TRAIN.get(name, ("", ()))[1] for value in values}
    for (name, value), beside in cases.items():
        yield Bad(f"train --{name} {value}", (*TRAIN, *beside, f"--{name}={value}"), (rf"--{name}\b", SAYS_HOW))


def of_commands():
    for base, options in OF_COMMANDS:
        for name, kind in options.items():
            for value in WRONG[kind]:
                yield Bad(f"{base[0]} --{name} {value}", (*base, f"--{name}={value}"), (rf"\b{name}\b", SAYS_HOW))


def in_files():
    """The same in a YAML file, whose numbers have types of their own."""
    for name, (_, beside) in OF_TRAIN.items():
        for text in (".nan", "much", "[1, 2]", "{a: 1}", "true"):
            def write(work, here, line=f"{name}: {text}\n"):
                (here / "run.yaml").write_text(line)

            argv = (*TRAIN, *beside, "--config", "{here}/run.yaml")
            yield Bad(f"{name}: {text} in YAML", argv, (rf"run\.yaml: {name}\b", SAYS_HOW), damage=write)


NUMBERS = [*of_train(), *of_commands(), *in_files()]
