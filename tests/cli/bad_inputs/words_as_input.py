"""Words that are none of an option's, options that do not go together, configurations, and calls of the Python API."""

from bad_input import Bad
from numbers_as_input import EVAL, GENERATE, PEFT, SCORE, STEER, TRAIN
from paths_as_input import REMEDY

CHOICES = ("objective", "weighting", "compat", "weight_precision", "optim_in_backward", "clip_in_backward",
           "optimizer_states", "kernel_backend", "on_changed_option", "attention_backend", "layout", "save_dtype",
           "prompt_order", "reasoning", "truncated_responses", "on_bad_record", "missing_scores", "tied_dimensions",
           "bnb_4bit_quant_type", "lr_scheduler_type", "optim", "save_strategy", "eval_strategy", "logging_strategy",
           "log_level", "report_to", "hub_model_id", "debug", "fsdp", "preset", "template_date",
           "dataloader_multiprocessing_context", "ddp_backend")  # fmt: skip
BOOLEANS = ("use_peft", "use_dora", "use_rslora", "random_weights", "load_in_4bit", "bf16", "fp16", "tf32",
            "compile_layers", "streaming", "use_cpu", "dry_run", "memory_check", "load_best_model_at_end",
            "gradient_checkpointing", "push_to_hub", "full_determinism", "disable_tqdm")  # fmt: skip
NEEDS = {"bnb_4bit_quant_type": (*PEFT, "--load_in_4bit", "true"), "hub_model_id": ("--push_to_hub", "true"),
         "clip_in_backward": ("--optim_in_backward", "adamw"), "optimizer_states": ("--optim_in_backward", "adamw"),
         "dataloader_multiprocessing_context": ("--dataloader_num_workers", "1")}  # fmt: skip
MAPPINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "chat_template_kwargs", "dimension_weights",
            "fsdp_config")  # fmt: skip
SHOWN_WITH = {"gradient_checkpointing_kwargs": ("--gradient_checkpointing", "true"),
              "fsdp_config": ("--fsdp", "full_shard"),
              "lr_scheduler_kwargs": ("--lr_scheduler_type", "cosine_with_restarts")}  # fmt: skip
# options of `train` that do not go together, or that nothing reads: (words, what is named)
TOGETHER = [
    (("--fp16", "true", "--bf16", "true"), "fp16"), (("--lora_r", "8"), "lora_r"), (("--lora_alpha", "8"),
    "lora_alpha"),
    (("--lora_target_modules", "q_proj"), "lora_target_modules"), (("--use_dora", "true"), "use_dora"),
    (("--load_in_4bit", "true"), "load_in_4bit"), (("--config_overrides", "hidden_size=8"), "config_overrides"),
    (("--eval_data", "{work}/pairs.json"), "eval_data"), (("--eval_strategy", "epoch"), "eval_strategy"),
    (("--eval_share", "0.5", "--eval_data", "{work}/pairs.json"), "eval_share"), (("--eval_steps", "3"), "eval_steps"),
    (("--tau", "2"), "tau"), (("--label_smoothing", "0.1"), "label_smoothing"), (("--cpo_alpha", "1"), "cpo_alpha"),
    (("--gamma", "1", "--objective", "dpo"), "gamma"), (("--sft_coef", "1", "--objective", "orpo"), "sft_coef"),
    (("--weighting", "mean", "--objective", "simpo"), "weighting"),
    (("--clip_in_backward", "per_tensor"), "clip_in_backward"), (("--optimizer_states", "host"), "optimizer_states"),
    (("--keep_layers", "1"), "keep_layers"), (("--optim_in_backward", "adamw", "--optim", "sgd"), "optim"),
    (("--gradient_accumulation_steps", "2", "--pairs_per_step", "2"), "gradient_accumulation_steps"),
    (("--label_smoothing_factor", "0.1"), "label_smoothing_factor"), (("--neftune_noise_alpha", "5"), "neftune"),
    (("--dataloader_drop_last", "true"), "dataloader_drop_last"), (("--data_seed", "3"), "data_seed"),
    (("--train_sampling_strategy", "group_by_length"), "train_sampling_strategy"), (("--torch_compile", "true"),
    "torch_compile"), (("--auto_find_batch_size", "true"), "auto_find_batch_size"),
    (("--prediction_loss_only", "true"), "prediction_loss_only"), (("--bf16_full_eval", "true"), "bf16_full_eval"),
    (("--use_cache", "true"), "use_cache"), (("--run_name", "a"), "run_name"), (("--hub_revision", "a"),
    "hub_revision"),
    (("--save_strategy", "no", "--save_steps", "3"), "save_steps"), (("--load_best_model_at_end", "true"), "load_best"),
    (("--metric_for_best_model", "nothing", "--load_best_model_at_end", "true", "--save_strategy", "epoch",
      "--eval_strategy", "epoch", "--eval_share", "0.5"), "metric_for_best_model"),
    (("--greater_is_better", "true"), "greater_is_better"), (("--optim_args", "a=1"), "optim_args"),
    (("--optim", "lion_8bit", "--optim_args", "momentum=3"), "optim"), (("--optim", "galore_adamw"), "optim"),
    (("--warmup_steps", "5", "--lr_scheduler_type", "constant"), "warmup_steps"),
    (("--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{{"lr_end": 5}}'), "lr_scheduler_kwargs"),
    (("--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", '{{"cycles": 5}}'),
    "lr_scheduler_kwargs"),
    (("--adam_beta1", "0.5", "--optim", "adafactor"), "adam_beta1"), (("--dataloader_prefetch_factor", "2"),
    "prefetch"),
    (("--attention_backend", "flash_attention_2"), "attention"),
    (("--logits_cache_gib", "1"), "logits_cache_gib"), (("--fp16", "true"), "fp16"), (("--tf32", "true"), "tf32"),
    (("--report_to", "wandb"), "report_to"), (("--push_to_hub", "true"), "push_to_hub"), (("--fsdp", "full_shard"),
    "FSDP"),
    (("--score_min", "5", "--score_max", "1"), "score_min"), (("--score_min", "1"), "score_min"),
    (("--dimension_weights", '{{"brevity": 1}}'), "dimension_weights"),
    (("--dimension_weights", '{{"helpfulness": -1}}'), "dimension_weights"),
    (("--dimension_weights", '{{"helpfulness": "a"}}'), "dimension_weights"),
    (("--dimension_weights", '{{"no_object": 0, "helpfulness": 0, "correctness": 0}}'), "dimension_weights"),
    (("--dimensions", "helpfulness", "helpfulness"), "dimensions"), (("--dimensions", "none"), "dimensions"),
    (("--train_data", "a.json,weight=0"), "train_data"), (("--train_data", "a.json,weight=nan"), "train_data"),
    (("--train_data", "a.json,split=", "b.json,wieght=1"), "weight"), (("--train_data", "a.json,pairs=some"), "pairs"),
    (("--train_data", "a.json,score_min=1"), "score_min"),
    (("--train_data", "a.json,score_min=5,score_max=1"), "score_min=5"),
    (("--group_by_length", "true"), "leave it out"),
    (("--no_cuda", "true"), "use_cpu"), (("--train_data", ",split=train"), "train_data"),
    (("--eval_data", "a.json,name=../a", "--eval_strategy", "epoch"), "name"),
    (("--bogus", "1"), "bogus"), (("--lora_rank", "8"), "lora_r"), (("--cutoff_len", "8"), "max_length"),
    (("--loss_type", "a"), "objective"), (("--dtype", "a"), "weight_precision"), (("--dataset_name", "a"),
    "train_data"),
    (("--random_weights", "true", "--config_overrides", "hidden_sise=8"), "config_overrides"),
    (("--random_weights", "true", "--config_overrides", "hidden_size=-7"), "config_overrides"),
    (("--random_weights", "true", "--config_overrides", "hidden_size"), "config_overrides"),
    (("--random_weights", "true", "--config_overrides", "num_hidden_layers=-2"), "config_overrides"),
    (("--random_weights", "true", "--config_overrides", "num_attention_heads=0"), "config_overrides"),
]  # fmt: skip
LORA = ("no_such_layer", "(", "q_proj [", "*_proj", "lm_head", "embed_tokens ( q", "all-linear q_proj", "q_proj,v_proj")
OF_COMMANDS = [
    ((*EVAL, "--layout", "x"), "layout"), ((*EVAL, "--dtype", "int8"), "dtype"), ((*EVAL, "--device", "tpu"), "device"),
    ((*EVAL, "--device", "cuda:77"), "device"), ((*EVAL, "--levels", "9"), "levels|level"),
    ((*EVAL, "--dimensions", "a", "a"), "dimensions"), (EVAL[:2], "eval_data"), (("eval",), "MODEL"),
    ((*EVAL, "--bogus", "1"), "bogus"), ((*GENERATE, "--do_sample", "maybe"), "do_sample"),
    ((*GENERATE, "--dtype", "int8"), "dtype"), ((*GENERATE, "--device", "tpu"), "device"),
    (GENERATE[:2], "prompt"), ((*GENERATE, "--data", "x"), "data|prompt"), ((*STEER, "--levels", "99"), "level"),
    ((*STEER, "--dimension", "brevity"), "brevity"), ((*STEER, "--judge_model", "x"), "judge_model"),
    ((*STEER, "--pairwise_judge", "http://localhost:1"), "pairwise_judge"), ((*STEER, "--device", "tpu"), "device"),
    (STEER[:2], "prompts"), ((*SCORE, "--scores", "preference"), "scores|judge"), (SCORE[:6], "judge|scores"),
    ((*SCORE, "--rescale", "9"), "rescale"), ((*SCORE, "--dimensions", "no_object"), "dimensions"),
    ((*SCORE, "--score_min", "5"), "score_min=5"), ((*SCORE, "--dimensions", "a", "a"), "dimensions"),
    ((*SCORE, "--output_file", "{here}/x.json"), "output_file"), ((*SCORE, "--output_file", "{work}/pairs.json"),
    "output"),
    ((*SCORE[:6], "--scores", "all"), "scores"), (("plot",), "RUN"),
    (("validate", "a.json,score_min=5,score_max=1"), "score_min=5"),
    (("score", "a.json,wieght=1", *SCORE[2:]), "weight"),
    (("generate", "{work}/trained", "--data", "a.json,sise=1"), "sise"),
    (("eval", "--model_name_or_path", "x"), "MODEL"), (("generate", "x", "--prompt", "a", "--model", "y"), "MODEL"),
    (("chat", "x", "--base_model", "y"), "MODEL"),
    (("score", "x.json", *SCORE[2:], "--dataset_name", "y"), "DATA"),
    (("plot", "{work}/trained", "--formats", "gif"),
    "gif"),
    (("plot", "{work}/trained", "{work}/trained"), "twice"), (("plot", "{work}/trained", "--trade_off", "a", "b"),
    "trade"),
    (("merge",), "adapter"), (("merge", "{work}/adapter"), "output_dir"),
    (("merge", "{work}/adapter", "{here}/x", "--dtype", "int8"), "dtype"), (("estimate",), "MODEL"),
    (("estimate", "{work}/model", "--model_name_or_path", "x"), "model"), (("estimate", "{work}/model", "--gpu",
    "h900"),
    "gpu"), (("estimate", "{work}/model", "--objective", "ppo"), "objective"),
    (("estimate", "{work}/model", "--config_overrides", "layers=3"), "config_overrides"), (("demo", "--bogus"),
    "bogus"),
    (("tarin",), "tarin"), ((), "COMMAND"), (("validate",), "data"), (("validate", "x.json", "--dimensions"),
    "dimensions"),
    (("show", "{work}/pairs.json", "--score_min", "3", "--score_max", "2"), "score_min"), (("show",), "data"),
]  # fmt: skip
YAML = {
    "a list": "- a\n", "text": "just text", "a tab": "\tbeta: 1", "two values": "beta: 1: 2",
    "a key twice": "beta: 1\nbeta: 2",
    "not closed": "dimensions: [a", "an object": "beta: !!python/object:os.system x", "an alias": "beta: *a",
    "a number as key": "1: 2", "an unknown key": "betta: 1", "a list as key": "? [a]\n: 1",
    "nesting": "a: " + 3000 * "[",
    "a mapping for text": "output_dir: {a: 1}", "a list for a truth": "bf16: [true]", "text for a truth": "bf16: 'yes'",
    "a mapping for names": "dimensions: {a: 1}", "a source's unknown key": "train_data: {path: a.json, sise: 1}",
    "a source without path": "train_data: {split: train}", "a number for a source": "train_data: [3]",
    "a date": "beta: 2025-01-31", "an unknown tag": "beta: !much 1",
}  # fmt: skip
# What a model or data decide: 1. All else of TOGETHER and OF_COMMANDS is usage: 2.
OF_DATA = {"twice", "trade"}


def words():
    for name in CHOICES:
        beside = NEEDS.get(name, ())
        for value in ("bogus/-of all", "", "None"):
            if (name, value) not in NOT_WRONG:
                yield Bad(f"train --{name} '{value}'", (*TRAIN, *beside, f"--{name}={value}"), (name, REMEDY))
    for name in BOOLEANS:
        yield Bad(f"train --{name} maybe", (*TRAIN, f"--{name}=maybe"), (name, REMEDY + "|expected"))
    for name in MAPPINGS:
        for value in ("{{", "[1]", "text", '{{"a"}}'):
            yield Bad(f"train --{name} {value}", (*TRAIN, *SHOWN_WITH.get(name, ()), f"--{name}={value}"),
                      (name, REMEDY))  # fmt: skip
    for number, (given, word) in enumerate(TOGETHER):
        yield Bad(f"train, {number}: {' '.join(given)}", (*TRAIN, *given), (word, REMEDY))
    for value in LORA:
        yield Bad(f"lora_target_modules {value}", (*TRAIN, *PEFT, "--lora_target_modules", *value.split()),
                  ("lora_target_modules|adapter on the head", REMEDY))  # fmt: skip
    for given, word in OF_COMMANDS:
        code = 1 if word in OF_DATA else 2
        yield Bad(f"command: {' '.join(given)}", given, (word, REMEDY + "|--help|must"), code)
    for name, text in YAML.items():
        def write(work, here, text=text):
            (here / "run.yaml").write_text(text)

        yield Bad(f"YAML: {name}", ("train", "--config", "{here}/run.yaml"), (r"run\.yaml", REMEDY), damage=write)


NOT_WRONG = {("fsdp", ""), ("hub_model_id", "None"), ("optim_in_backward", ""), ("on_changed_option", "")}


def a_data_set(work, here):
    from datasets import Dataset

    trainer_of(work, here, train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]))


def trainer_of(work, here, **changes):
    from transformers import AutoModelForCausalLM

    from amopo_fast.training.config import AMoPOConfig
    from amopo_fast.training.trainer import AMoPOTrainer

    model = AutoModelForCausalLM.from_pretrained(work / "model")
    args = AMoPOConfig(output_dir=str(here / "out"), use_cpu=True)
    AMoPOTrainer(model, **{"args": args, "dimensions": ["helpfulness"], "train_dataset": None, **changes})


def calls():
    for name, make, words_of_it in (
        ("a datasets.Dataset", a_data_set, ("train_dataset|Dataset", REMEDY)),
        ("a list of texts", lambda w, h: trainer_of(w, h, train_dataset=["a", "b"]), ("train_dataset|pairs", REMEDY)),
        ("a list of records", lambda w, h: trainer_of(w, h, train_dataset=[{"prompt": "a"}]), ("train_dataset",
            REMEDY)),
        ("no pairs", lambda w, h: trainer_of(w, h, train_dataset=[]), ("train_dataset|pairs", REMEDY)),
        ("TrainingArguments", training_arguments, ("AMoPOConfig", REMEDY)),
    ):  # fmt: skip
        yield Bad(f"Python: {name}", make, words_of_it, 1)


def training_arguments(work, here):
    from transformers import TrainingArguments

    trainer_of(work, here, args=TrainingArguments(output_dir=str(here / "out"), use_cpu=True))


WORDS = [*words(), *calls()]
