"""Names that TRL, LLaMA-Factory and axolotl have for an option of ours, so that an unknown option gets its name here.

Read from their configurations' documentation: TRL 1.x (DPOConfig, CPOConfig, ModelConfig, ScriptArguments),
LLaMA-Factory (`llamafactory-cli train`), axolotl (config reference).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from amopo_fast.data.sources.spec import Source, did_you_mean

_SAME = {
    "model_name_or_path": "model model_name model_path base_model model_id base_model_config",
    "tokenizer_name_or_path": "tokenizer tokenizer_name tokenizer_path tokenizer_config",
    "train_data": "dataset datasets dataset_name train_dataset train_file data_path data dataset_path",
    "eval_data": "eval_dataset test_datasets eval_file validation_file test_data",
    "eval_share": "val_size val_set_size test_size",
    "max_length": "cutoff_len sequence_len max_seq_length max_seq_len model_max_length max_prompt_length block_size",
    "objective": "loss_type pref_loss rl stage",
    "beta": "pref_beta rl_beta dpo_beta",
    "gamma": "simpo_gamma gamma_beta_ratio rl_gamma",
    "cpo_alpha": "bc_coef",
    "sft_coef": "pref_ftx rpo_alpha sft_weight",
    "lora_r": "lora_rank lora_dim peft_r rank",
    "lora_target_modules": "lora_target lora_target_linear lora_modules target_modules",
    "use_peft": "finetuning_type adapter use_lora peft lora",
    "load_in_4bit": "quantization_bit load_in_8bit bits qlora",
    "use_bnb_nested_quant": "double_quantization bnb_4bit_use_double_quant",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
    "weight_precision": "dtype torch_dtype pure_bf16 infer_dtype",
    "attention_backend": "flash_attn flash_attention attn_implementation sdp_attention xformers_attention",
    "use_liger_kernel": "enable_liger_kernel liger",
    "per_device_train_batch_size": "micro_batch_size train_batch_size batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "pairs_per_step": "global_batch_size total_batch_size",
    "num_train_epochs": "num_epochs epochs n_epochs",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "optim": "optimizer",
    "warmup_steps": "warmup_ratio",
    "max_grad_norm": "gradient_clipping grad_clip",
    "eval_strategy": "evaluation_strategy evals_per_epoch",
    "save_strategy": "saves_per_epoch",
    "gradient_checkpointing": "use_gradient_checkpointing disable_gradient_checkpointing",
    "compile_layers": "torch_compile_layers",
    "dataloader_num_workers": "preprocessing_num_workers dataset_num_proc dataset_processes",
    "resume_from_checkpoint": "auto_resume_from_checkpoints resume",
    "seed": "random_seed",
    "use_cpu": "no_cuda",
    "output_dir": "output output_path save_path",
}
_OF_A_SOURCE = {each.name for each in dataclasses.fields(Source)} - {"path", "name", "score_min", "score_max"}
_OURS = {theirs: ours for ours, names in _SAME.items() for theirs in names.split()}
_NO_OPTION = {
    "ref_model": "there is no second model: dpo and ipo compute the reference's log-probs before the first step",
    "reference_free": "choose objective simpo, cpo or orpo, which need no reference",
    "precompute_ref_log_probs": "dpo and ipo compute them before the first step in any case",
    "template": "the tokenizer's own chat template is used; reasoning, chat_template_kwargs and prompt_order change it",
    "chat_template": "the tokenizer's own chat template is used; reasoning and chat_template_kwargs change it",
    "packing": "rows are always packed, and exactly; tokens_per_micro_batch is their length",
    "sample_packing": "rows are always packed, and exactly; tokens_per_micro_batch is their length",
    "padding_free": "rows have no padding in any case; tokens_per_micro_batch is their length",
    "neat_packing": "rows are always packed, and exactly; tokens_per_micro_batch is their length",
    "trust_remote_code": "no code of a model or data set is run",
    "use_unsloth": "layers are made faster by use_liger_kernel and compile_layers",
    "wandb_project": "report_to wandb, and the environment variable WANDB_PROJECT",
    "max_samples": "name a file with fewer records, or weight=0.1 behind the data set's name",
    "dataset_dir": "train_data takes the path of a file or folder",
    "overwrite_output_dir": "name another output_dir, or resume_from_checkpoint",
    "group_by_length": "rows of like length are packed in any case; leave it out",
    "overwrite_cache": "nothing is cached; leave it out",
}


def hint(name: str, known: Iterable[str], flags: bool = False, positional: Iterable[str] = ()) -> str:
    """What to write for an unknown option: "; did you mean 'lora_r'?", why there is none, or "".

    positional: names of the command's arguments without a flag.
    """
    known = list(known)
    bare = name.lstrip("-").replace("-", "_")
    if bare in _NO_OPTION:
        return f"; {_NO_OPTION[bare]}"
    ours = _OURS.get(bare)
    names = {each.lstrip("-").replace("-", "_") for each in known}
    if bare in _OF_A_SOURCE and "train_data" in names:
        return f"; it is of one data set and stands behind its name: FILE,{bare}=..."
    if ours == "train_data" and "models" in positional:  # what is evaluated
        ours = "eval_data"
    if ours in names:
        return f"; did you mean '{'--' if flags else ''}{ours}'?"
    subject = {"model_name_or_path": ("model", "models"), "train_data": ("data",)}.get(ours or bare, ())
    if any(each in subject for each in positional):
        return f"; it has no flag here: write its name alone, as {subject[0].upper()}"
    return did_you_mean(name, known)
