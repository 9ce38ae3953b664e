"""What the packing tests share: tiny models of every family, pairs, and the separate sequences as the truth."""

import functools

import numpy as np
import torch
from transformers import (
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from amopo_fast.models.miniature import tiny_config
from amopo_fast.prompts.tokens import PairTokens
from amopo_kernels import amopo_loss, reference

V = 64  # tiny_config's vocabulary

# Configurations as they are published, where that matters: windows, softcaps, layer kinds, multipliers.
FAMILIES = {
    "llama": LlamaConfig(num_key_value_heads=8, rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}),
    "mistral": MistralConfig(sliding_window=4096),
    "qwen2": Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=2, num_hidden_layers=4,
                         num_key_value_heads=4, tie_word_embeddings=True),
    "qwen3": Qwen3Config(num_key_value_heads=8),
    "qwen3_moe": Qwen3MoeConfig(),
    "gemma2": Gemma2Config(),
    "gemma3": Gemma3TextConfig(),
    "phi3": Phi3Config(sliding_window=2047, pad_token_id=0),
    "olmo2": Olmo2Config(),
    "granite": GraniteConfig(logits_scaling=8.0, embedding_multiplier=12.0, attention_multiplier=0.1,
                             residual_multiplier=0.22),
    "cohere2": Cohere2Config(),
    "gpt_oss": GptOssConfig(),
    "deepseek_v3": DeepseekV3Config(),
}  # fmt: skip


def tiny_model(family, scale=1.5, config=None):
    """Random weights with attention far from uniform, training mode, float32; config: of a family that is not here."""
    config = tiny_config(config or FAMILIES[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        if family == "gemma2":
            model.set_attn_implementation("eager")  # "sdpa", the default of older transformers, ignores the softcap
        for p in model.parameters():
            p.data += scale * torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.1 * torch.randn_like(p)
    return model.train()


def random_pairs(seed, count, dimensions=3, shared=20, absent=False, vocabulary=V):
    """Pairs whose prompts share a head, whose responses share an opening or are a strict prefix; the last two pairs
    have one prompt; one-token responses."""
    rng = np.random.default_rng(seed)
    pairs = []
    for record in range(count):
        user = rng.integers(1, vocabulary, rng.integers(3, 30))
        head = rng.integers(1, vocabulary, shared)
        prompts = [np.concatenate([head[: shared - k], [k + 1], user]) for k in range(dimensions)]
        if record and record == count - 1:
            prompts = list(pairs[-1].prompts)
        if absent and record == 0:
            prompts[1] = None
        opening = rng.integers(1, vocabulary, 18)
        chosen = np.concatenate([opening, rng.integers(1, vocabulary, rng.integers(1, 12))])
        rejected = (
            np.concatenate([opening, rng.integers(1, vocabulary, rng.integers(1, 12))]) if record % 2 else chosen[:1]
        )
        pairs.append(PairTokens(record, tuple(prompts), chosen, rejected, False))
    return pairs


def sequences_of(pairs):
    """(token ids, prompt length) of every sequence in the kernels' order; None where a dimension is absent."""
    for pair in pairs:
        for prompt in pair.prompts:
            for response in (pair.chosen, pair.rejected):
                yield None if prompt is None else (np.concatenate([prompt, response]), len(prompt))


def separate_stats(model, pairs):
    """Each sequence alone, unpadded, full logits."""
    logps, cu = [], [0]
    for item in sequences_of(pairs):
        if item is None:
            cu.append(cu[-1])
            continue
        ids, prompt = item
        logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0, prompt - 1 : -1].float()
        logps.append(logits.log_softmax(-1).gather(1, torch.from_numpy(ids[prompt:])[:, None])[:, 0])
        cu.append(cu[-1] + len(ids) - prompt)
    return reference.sequence_stats(torch.cat(logps), torch.tensor(cu, dtype=torch.int32))


def loss_and_gradients(model, stats, dimensions=3):
    model.zero_grad()
    noise = torch.randn(stats.length.numel() // (2 * dimensions), dimensions, 2, generator=torch.manual_seed(3))
    loss = amopo_loss(stats, order="alternating", num_dimensions=dimensions, beta=2.0, gamma=0.3, noise=noise).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_error(got, expected):
    """The largest relative error of the loss and of any parameter's gradient; missing gradients count as 1."""
    # A key's bias has no gradient but rounding.
    floor = 1e-3 * max(gradient.norm() for gradient in expected[1].values())
    errors = [abs(got[0] - expected[0]) / abs(expected[0])]
    for name, gradient in expected[1].items():
        other = got[1].get(name)
        zero = torch.zeros_like(gradient)
        errors.append(float(((zero if other is None else other) - gradient).norm() / gradient.norm().clamp(min=floor)))
    return max(errors)


@functools.cache
def expected(family, seed, count):
    """Loss and gradients of the separate sequences, as a plain model gives them."""
    model = tiny_model(family)
    return loss_and_gradients(model, separate_stats(model, random_pairs(seed, count)))
