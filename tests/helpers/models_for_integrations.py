"""Small causal LMs whose heads differ: tied, with a softcap, with a scale, both before and after it."""

import torch
import transformers

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}  # fmt: skip
KINDS = {
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "untied": ("Qwen2", {"tie_word_embeddings": False}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 3.0}),
    "scaled": ("Cohere", {"logit_scale": 0.3}),
    "divided": ("Granite", {"logits_scaling": 5.0}),
    "multiplied": ("HyperCLOVAX", {"logits_scaling": 0.4}),
}


def tiny_model(kind, seed=0):
    name, options = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SIZES | options | {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
    })  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1:
                x.mul_(8)  # logits with a spread
    return model


def add_lora(model, *modules, seed=5, **options):
    """PEFT around a model, with B that is not 0."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    modules = list(modules) or ["q_proj", "v_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_B" in name:
                x.normal_(std=0.3)
    return model
