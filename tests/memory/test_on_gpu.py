"""What only a GPU shows: the optimizer's kernel, its memory, hooks on the autograd thread, the estimate's accuracy."""

import copy

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from amopo_fast.optim import AdamW, update_triton
from amopo_fast.optim.host_states import blocks_of
from amopo_fast.optim.states import moments_of, new_state
from amopo_fast.optim.update import Step, update_
from amopo_fast.prompts.tokens import PairTokens
from amopo_fast.training.config import AMoPOConfig
from amopo_fast.training.dry_run import dry_run, prepare_dry_run
from amopo_fast.training.trainer import AMoPOTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 2**20


@pytest.mark.parametrize("states", ["fp32", "8bit", "4bit"])
def test_kernel_equals_the_plain_update(states):
    torch.manual_seed(0)
    p = torch.randn(1 << 20, device="cuda")
    twin = p.clone()
    own, other = new_state(p, states), new_state(p, states)
    for count in range(1, 4):
        g = torch.randn_like(p) * 10.0 ** torch.randint(-6, 3, (1 << 14,), device="cuda").repeat_interleave(64)
        step = Step(1e-3, 0.9, 0.99, 1e-8, 0.1, count, None)
        update_triton.update_(p, g, *moments_of(own), step, torch.tensor(0.5, device="cuda"))
        update_(twin, g, *moments_of(other), step, torch.tensor(0.5, device="cuda"))
        assert (~torch.isclose(p, twin, rtol=1e-5, atol=1e-6)).float().mean() < 2e-3
        for name, value in other.items():  # so that one differing code does not multiply
            own[name].copy_(value)
        p.copy_(twin)


@pytest.mark.parametrize("states", ["8bit", "4bit"])
def test_a_step_of_the_largest_tensor_allocates_next_to_nothing(states):
    """The head of Qwen2.5-32B, 1.5 GB in bfloat16: torchao's compiled 4-bit step takes 26 bytes per parameter."""
    weight = torch.nn.Parameter(torch.empty(152064, 5120, dtype=torch.bfloat16, device="cuda").normal_(std=0.02))
    optimizer = AdamW([weight], lr=1e-3, states=states, in_backward=True, max_grad_norm=1.0)
    for _ in range(2):
        weight.grad = None
        loss = (weight * 1e-3).sum()
        torch.cuda.synchronize()
        loss.backward()
        optimizer.step()
    state = optimizer.state[weight]
    grad = torch.randn_like(weight)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer._update(weight, grad, torch.tensor(0.5, device="cuda"))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 16 * MIB
    assert all(torch.isfinite(t.float()).all() for t in state.values())


@pytest.mark.parametrize("tied", [False, True])
def test_step_in_backward_equals_fused_adamw_bit_for_bit(tied):
    def model():
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)  # fmt: skip
        return Qwen2ForCausalLM(config).cuda()

    ordinary, inside = model(), model()
    reference = torch.optim.AdamW(ordinary.parameters(), lr=1e-2, fused=True)
    optimizer = AdamW(inside.parameters(), lr=1e-2, in_backward=True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for step in range(4):
            ids = torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(step)).cuda()
            for each, how in ((ordinary, reference), (inside, optimizer)):
                each(input_ids=ids, labels=ids).loss.backward()
                how.step()
                how.zero_grad()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(ordinary.parameters(), inside.parameters(), strict=True))


class Tower(torch.nn.Module):
    """Layers of 16 MiB between an embedding and a head that travel in pieces."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Linear(256, 2048, dtype=torch.bfloat16)
        layers = (torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.Linear(2048, 2048)) for _ in range(8))
        self.layers = torch.nn.ModuleList(layers).bfloat16()
        self.head = torch.nn.Linear(2048, 16384, dtype=torch.bfloat16)

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


@pytest.mark.parametrize("states", ["fp32", "8bit", "4bit"])
def test_states_in_host_memory_equal_those_on_the_device_bit_for_bit(states):
    torch.manual_seed(0)
    models = [Tower().cuda()]
    models.append(copy.deepcopy(models[0]))
    before = torch.cuda.memory_allocated()
    host = AdamW(models[1].parameters(), lr=1e-2, states=states, in_backward=True, host_blocks=blocks_of(models[1]))
    room = sum(len(slot.memory) for slot in host._host._vacant)
    assert torch.cuda.memory_allocated() - before < room + MIB
    device = AdamW(models[0].parameters(), lr=1e-2, states=states, in_backward=True)
    for step in range(6):
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(step)).bfloat16().cuda()
        for model, optimizer in zip(models, (device, host), strict=True):
            model(x).float().square().mean().backward()
            optimizer.step()
    saved = [optimizer.state_dict()["state"] for optimizer in (device, host)]
    for number, state in saved[0].items():
        for name, tensor in state.items():
            other = saved[1][number][name]
            assert torch.equal(tensor.cpu(), other.cpu())
            assert name == "step" or other.device.type == "cpu" and other.is_pinned()
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"weight_precision": "fp32"},
        {"weight_precision": "fp32", "gradient_checkpointing": True},
        {"optim_in_backward": "adamw_8bit", "gradient_checkpointing": True},
        {"optim_in_backward": "adamw_4bit"},
        {"optim_in_backward": "adamw_8bit", "gradient_checkpointing": True, "optimizer_states": "host"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_estimate_is_within_five_percent_of_the_peak(tmp_path, options):
    rng = np.random.default_rng(0)
    pairs = []
    for record in range(8):
        user = rng.integers(0, 32000, 500)
        prompts = tuple(np.concatenate([[k] * 30, user]) for k in range(4))
        pairs.append(PairTokens(record, prompts, rng.integers(0, 32000, 200), rng.integers(0, 32000, 180), False))
    args = AMoPOConfig(output_dir=str(tmp_path), pairs_per_step=2, tokens_per_micro_batch=16384, **options)
    prepare_dry_run(args, str(tmp_path))
    dtype = torch.bfloat16 if "optim_in_backward" in options else torch.float32
    with torch.device("cuda"):
        config = Qwen2Config(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=12,
                             num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=False)  # fmt: skip
        model = Qwen2ForCausalLM(config).to(dtype)
    result = dry_run(AMoPOTrainer(model, args, dimensions=list("abcd"), train_dataset=pairs))
    assert result.prediction.peak == pytest.approx(result.measured, rel=0.05)
