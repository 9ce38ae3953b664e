"""On a GPU: streams and events order the copies of streamed layers, whichever of them is late.

Every slot holds NaN from the moment on at which a fetch may overwrite it, and copies or computation are held back by
milliseconds: what does not wait for them reads NaN, or weights of another step.
"""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from amopo_fast.models.streaming import stream_weights
from amopo_fast.optim import AdamW
from amopo_fast.optim.host_memory import Transfers
from amopo_fast.optim.host_states import blocks_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
V, CYCLES = 512, 5_000_000  # about 3 ms
SIZES = dict(vocab_size=V, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def made(device):
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, num_hidden_layers=6, tie_word_embeddings=False)
    config._attn_implementation = "eager"  # whose backward pass gives the same bits
    model = Qwen2ForCausalLM(config).bfloat16().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device)


def train(model, optimizer, steps=4):
    losses = []
    for step in range(steps):
        ids = torch.randint(0, V, (2, 64), generator=torch.Generator().manual_seed(step)).cuda()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # the host runs ahead
    return torch.stack(losses).tolist()


def held_back(monkeypatch, late, model):
    """Poison the slots, and delay what `late` names."""
    fetch, write_back = Transfers.fetch, Transfers.write_back

    def poisoned_fetch(self, pairs, after):
        pairs, after = list(pairs), list(after)
        for event in filter(None, after):
            self._fetching.wait_event(event)
        with torch.cuda.stream(self._fetching):
            for slot, _ in pairs:
                slot.fill_(255)  # NaN in bfloat16
            if late == "fetch":
                torch.cuda._sleep(CYCLES)
        return fetch(self, pairs, after)

    def late_write_back(self, pairs, after):
        with torch.cuda.stream(self._writing):
            if late == "write-back":
                torch.cuda._sleep(CYCLES)
        return write_back(self, pairs, after)

    monkeypatch.setattr(Transfers, "fetch", poisoned_fetch)
    monkeypatch.setattr(Transfers, "write_back", late_write_back)
    if late == "computation":
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: torch.cuda._sleep(CYCLES))


@pytest.mark.parametrize("late", ["nothing", "fetch", "write-back", "computation"])
@pytest.mark.parametrize("slots", [2, 3, 6])
def test_streamed_weights_and_states_equal_resident_ones_whatever_is_late(monkeypatch, late, slots):
    device = torch.device("cuda")
    resident = made(device)
    options = dict(lr=1e-2, states="8bit", in_backward=True, max_grad_norm=0.5)
    expected = train(resident, AdamW(resident.parameters(), **options))
    streamed = made("cpu")
    stream_weights(streamed, device, slots=slots)
    streamed.to(device)
    optimizer = AdamW(streamed.parameters(), **options, device=device, host_blocks=blocks_of(streamed))
    held_back(monkeypatch, late, streamed)
    assert train(streamed, optimizer) == expected
    saved = streamed.state_dict()
    for name, value in resident.state_dict().items():
        assert torch.equal(value.cpu(), saved[name].cpu()), name
    blocks = [parameter for name, parameter in streamed.named_parameters() if ".layers." in name]
    assert all(parameter.device.type == "cpu" and parameter.is_pinned() for parameter in blocks)


@pytest.mark.parametrize("lost", ["ready", "free", "written"])
def test_an_event_that_is_not_waited_for_shows(monkeypatch, lost):
    """The test above can fail: without one of the three events of a slot or layer, with its copy late."""
    device = torch.device("cuda")
    resident, streamed = made(device), made("cpu")
    options = dict(lr=1e-2, states="8bit", in_backward=True)
    expected = train(resident, AdamW(resident.parameters(), **options))
    stream_weights(streamed, device, slots=2)
    streamed.to(device)
    optimizer = AdamW(streamed.parameters(), **options, device=device)
    held_back(monkeypatch, {"ready": "fetch", "free": "computation", "written": "write-back"}[lost], streamed)
    if lost == "ready":
        monkeypatch.setattr(Transfers, "wait_for", lambda self, event: None)
    else:
        poisoned = Transfers.fetch
        kept = {"free": lambda after: after[1:], "written": lambda after: ()}[lost]
        monkeypatch.setattr(Transfers, "fetch", lambda self, pairs, after: poisoned(self, pairs, kept(after)))
    assert train(streamed, optimizer) != expected
