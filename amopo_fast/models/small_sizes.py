"""Sizes of a miniature by the names that transformers' configurations give them.

Flags, activation functions, scalings and numbers of a kind (shared experts, cycles, ...) stay as they are. Every size
at which attention or a recurrence changes what it does (a window, a chunk, a top-k) is shorter than the trial's
sequences, so that one that is ignored shows.
"""

from __future__ import annotations

VOCABULARY = 64
TOKENS = VOCABULARY - 5  # of a padded vocabulary
HEADS, HEAD_DIM = 4, 16
HIDDEN = HEADS * HEAD_DIM
_INNER = 2 * HIDDEN  # of state-space layers: heads times channels
_STATE_HEADS = 2  # some models loop over them in Python
_WINDOW = 12

_WIDTHS = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": TOKENS,
    "decoder_vocab_size": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "word_embed_proj_dim": HIDDEN,
    "pronunciation_vocab_size": VOCABULARY,
    "pronunciation_embed_dim": 16,
    "shape_vocab_size": VOCABULARY,
    "shape_embed_dim": 16,
    "embedding_size": HIDDEN,
    "embedding_dim": HIDDEN,
    "input_embedding_size": HIDDEN,
    "output_embedding_size": HIDDEN,
    "d_model": HIDDEN,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "shared_intermediate_size": 24,
    "dense_intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 24,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "n_inner": 48,
    "dff": 48,
    "dim_ff": 48,
    "d_inner": 48,
    "laurel_rank": 8,
    "adapter_rank": 8,
    "router_hidden_size": 16,
    "gated_norm_rank": 8,
    "hc_lowrank": 8,
    "loop_gate_rank": 8,
    "block_multiple_of": 16,
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 97,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 4,
}
_EXPERTS = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
}
_HEADS = {
    "head_dim": HEAD_DIM,
    "dim_head": HEAD_DIM,
    "d_head": HEAD_DIM,
    "kv_channels": HEAD_DIM,
    "attention_head_dim": HEAD_DIM,
    "num_kv_heads": HEADS,
    "kv_n_heads": 2,
    "num_query_groups": HEADS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "num_encoder_attention_heads": HEADS,
    "num_decoder_attention_heads": HEADS,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": HEAD_DIM,
    "swa_v_head_dim": HEAD_DIM,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "index_n_heads": 16,  # with fewer, scores of exactly 0 are likely, and a top-k among them is arbitrary
    "index_head_dim": 16,
    "d_rel": 4,
    "attn_logit_softcapping": 1.0,  # low enough to show where it is ignored
}
_STATES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 16,
    "mamba_n_heads": _STATE_HEADS,
    "mamba_num_heads": _STATE_HEADS,
    "n_mamba_heads": _STATE_HEADS,
    "num_heads": _INNER // HEAD_DIM,
    "mamba_d_head": _INNER // _STATE_HEADS,
    "mamba_head_dim": _INNER // _STATE_HEADS,
    "mamba_headdim": _INNER // _STATE_HEADS,
    "mamba_d_ssm": _INNER,
    "mamba_n_groups": 2,
    "mamba_ngroups": 2,
    "n_groups": 2,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_expand": 2,
    "expand": 2,
    "mamba_dt_rank": 8,
    "time_step_rank": 8,
}
# Lengths along the sequence.
_LENGTHS = {
    "sliding_window": _WINDOW,
    "sliding_window_size": _WINDOW,
    "attention_window_size": _WINDOW,
    "window_size": _WINDOW,
    "local_attention": 2 * _WINDOW,  # to both sides
    "rel_extent": _WINDOW,
    "index_topk": 8,
    "index_block_size": 4,
    "index_kpool": 4,
    "index_topk_blocks": 2,
    "index_local_blocks": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "lsh_attn_chunk_length": 8,
    "local_attn_chunk_length": 8,
    "floor_scale": 8,
    "log_scaling_n_floor": 8,
    "context_length": 64,
}
_LAYERS = {
    "encoder_layers": 1,
    "num_encoder_layers": 1,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "n_input_layers": 1,
    "n_recurrent_layers": 2,
    "n_output_layers": 1,
    "num_layers_per_stack": 2,
    "loop_num_passes": 2,
    "n_layers_per_attn_res_block": 2,
}
SIZES = {**_WIDTHS, **_EXPERTS, **_HEADS, **_STATES, **_LENGTHS, **_LAYERS}

BOUNDS = ("loop_layer_index_start", "loop_layer_index_end")  # places of layers

SIDE_SIZES = {
    "num_hidden_layers": 1,
    "depth": 1,
    "num_layers": 1,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_blocks": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_heads": 2,
    "vocab_size": VOCABULARY,
}

# Of a tower that timm builds, whatever its architecture is.
TIMM_TOWER = {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}}

WITHOUT_CHANCE = ("dropout", "pdrop", "layerdrop", "jitter_noise", "drop_path_rate")  # parts of names, set to 0
