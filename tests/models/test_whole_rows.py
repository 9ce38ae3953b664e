"""Recurrent layers over a whole row at once: fla's functions are stood in for by one of the same signature."""

import inspect
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from packing_cases import largest_error, loss_and_gradients, random_pairs, separate_stats, tiny_model
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3NextConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from amopo_fast.models import recurrent, whole_rows  # noqa: E402
from amopo_fast.models.architecture import language_model_of  # noqa: E402
from amopo_fast.models.attention import PackedRow  # noqa: E402
from amopo_fast.models.check import Trial, prepare_model  # noqa: E402
from amopo_fast.models.miniature import tiny_config  # noqa: E402
from amopo_fast.models.scoring import score  # noqa: E402
from amopo_fast.packing.plan import Layout, _paths, build_plan  # noqa: E402
from amopo_fast.packing.states import HISTORY  # noqa: E402
from amopo_fast.packing.trie import Sequences, build_trie  # noqa: E402
from amopo_kernels import SequenceStats  # noqa: E402
from model_types import empty_model  # noqa: E402

calls = Counter()


def stand_in(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
             cu_seqlens=None, cu_seqlens_cpu=None, **kwargs):  # fmt: skip
    """chunk_gated_delta_rule and chunk_kda of flash-linear-attention 0.6 as documented, token by token.

    q, k (B, T, H, K), v (B, T, HV, V), beta (B, T, HV), g of the same or (B, T, HV, K), states (N, HV, K, V):

        S_t = exp(g_t) S_(t-1);  S_t += k_t beta_t (v_t - k_t S_t);  o_t = scale q_t S_t
    """
    if cu_seqlens is None:
        cu_seqlens = torch.arange(q.shape[0] + 1) * q.shape[1]
    else:
        assert q.shape[0] == 1 and cu_seqlens.dtype == torch.int64 and torch.equal(cu_seqlens, cu_seqlens_cpu)
        assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
        calls[len(cu_seqlens) - 1] += 1
    lengths, shape = cu_seqlens.diff().tolist(), v.shape
    assert min(lengths) > 0
    # Behind a node's end g and beta are 0: its state stays.
    q, k, v, g, beta = (pad_sequence(x.flatten(0, 1).split(lengths), True) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // q.shape[2], 2) for x in (q * q.shape[-1] ** -0.5, k))
    decay = (g[..., None] if g.dim() == 3 else g).exp()[..., None]
    state = q.new_zeros(*k[:, 0].shape, v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        state = state * decay[:, t]
        missing = (v[:, t] - (k[:, t, :, None] @ state)[..., 0, :]) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * missing[..., None, :]
        outputs.append((q[:, t, :, None] @ state)[..., 0, :])
    output = torch.cat([out[:length] for out, length in zip(torch.stack(outputs, 1), lengths, strict=True)])
    return output.reshape(shape), state if output_final_state else None


GATED = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
KIMI = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
SCANS = {"qwen3_next": GATED, "qwen3_5_text": GATED, "olmo_hybrid": GATED, "lara_mini": GATED, "kimi_linear": KIMI,
         "bailing_hybrid": KIMI}  # fmt: skip


def with_kernels(monkeypatch, name, scan=stand_in):
    """The trial of a type, its truth computed; from here on its scans are `scan`."""
    calls.clear()
    whole_rows._judged.clear()
    model = language_model_of(empty_model("causal", name))
    torch.manual_seed(0)
    trial = Trial(model)
    for each in SCANS[name]:
        monkeypatch.setattr(sys.modules[type(model).__module__], each, scan)
    return trial


@pytest.mark.parametrize(
    "name", [each if each == "qwen3_next" else pytest.param(each, marks=pytest.mark.slow) for each in SCANS]
)
def test_nodes_of_a_depth_in_one_call_are_the_separate_sequences(name, monkeypatch):
    trial = with_kernels(monkeypatch, name)
    trial.check(Layout.STATES)
    assert trial.error < 1e-11
    names = {kind.__name__ for kind in trial.recurrent}
    layers = sum(type(module).__name__ in names for module in trial.tiny.modules())
    # A call a layer for the 2 roots and the 7 branches of `check_pairs`, and the trial's for three levels of 2 nodes.
    assert calls == {7: layers, 2: layers + 3}


SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in ("raises", "is not finite")]


@pytest.mark.parametrize("fault", ["ignores the states", *SLOW])
def test_kernels_that_fail_on_nodes_run_in_batches(fault, monkeypatch, caplog):
    def broken(*args, initial_state=None, cu_seqlens=None, **kwargs):
        if cu_seqlens is None:
            return stand_in(*args, initial_state=initial_state, **kwargs)
        if fault == "raises":
            raise RuntimeError("no kernel image")
        output, state = stand_in(*args, initial_state=None, cu_seqlens=cu_seqlens, **kwargs)
        return (output.log() if fault == "is not finite" else output), state

    broken.__signature__ = inspect.signature(stand_in)
    trial = with_kernels(monkeypatch, "qwen3_next", broken)
    modes = {name: module.training for name, module in trial.tiny.named_modules()}
    trial.check(Layout.STATES)
    assert trial.error < 1e-11
    assert "runs in padded batches, as its kernels fail on nodes" in caplog.text
    assert modes == {name: module.training for name, module in trial.tiny.named_modules()}


def test_a_function_without_cu_seqlens_runs_in_batches(monkeypatch):
    monkeypatch.setattr(recurrent, "over_whole_row", None)
    model = language_model_of(empty_model("causal", "qwen3_next"))
    Trial(model).check(Layout.STATES)


class TestFunctionsOverNodes:
    """Random ragged tries, down to nodes of a token that are shorter than the convolution."""

    K, V = 3, 5

    @pytest.fixture(params=range(4))
    def row(self, request):
        rng = np.random.default_rng(request.param)
        sequences = [rng.integers(0, 2, rng.integers(2, 25)) for _ in range(12)]  # two letters: many forks
        lengths = np.array([len(each) for each in sequences])
        ends = np.cumsum(lengths)
        whole = Sequences(np.concatenate(sequences), ends - lengths, lengths - 1, lengths, 1)
        trie = build_trie(whole, 1)
        assert trie.path_nodes.max() > 4 and (trie.length == 1).sum() > 2
        paths, *_ = _paths(trie, whole, Layout.STATES)
        return PackedRow(paths, "sdpa")

    def over_paths(self, row, function, *tensors):
        """`function` of every node's whole path, of which its own tokens' results are kept."""
        paths, outputs = row.paths, []
        queries, keys = paths.cu_seqlens_q.tolist(), paths.cu_seqlens_k.tolist()
        for node in range(len(queries) - 1):
            path = paths.kv_indices[keys[node] : keys[node + 1]]
            outputs.append(function(*(x[:, path] for x in tensors))[:, queries[node] - queries[node + 1] :])
        return torch.cat(outputs, 1)

    def same(self, found, expected, tensors):
        weights = torch.randn_like(found)
        gradients = [torch.autograd.grad((each * weights).sum(), tensors) for each in (found, expected)]
        for a, b in ((found, expected), *zip(*gradients, strict=True)):
            assert (a - b).norm() < 1e-12 * b.norm()

    def draw(self, row, *shape):
        tokens = row.paths.position_ids.shape[1]
        return torch.randn(1, tokens, *shape, dtype=torch.float64, requires_grad=True)

    @pytest.mark.parametrize("width", [3, 4, HISTORY + 1])
    def test_a_convolution(self, row, width):
        torch.manual_seed(0)
        x, weight = self.draw(row, 5), torch.randn(5, 1, width, dtype=torch.float64, requires_grad=True)

        def convolution(x, weight):
            return torch.nn.functional.conv1d(x, weight, padding=width - 1, groups=5)[..., : x.shape[-1]]

        found = whole_rows._convolve(convolution, row, x.transpose(1, 2), weight).transpose(1, 2)
        expected = self.over_paths(row, lambda x: convolution(x.transpose(1, 2), weight).transpose(1, 2), x)
        self.same(found, expected, (x, weight))

    def test_a_scan(self, row):
        torch.manual_seed(0)
        q, k, v, g, beta = (self.draw(row, 2, *last) for last in ((self.K,), (self.K,), (self.V,), (), ()))
        g, beta = (each.detach().requires_grad_() for each in (-g.exp(), beta.sigmoid()))
        inputs = (q, k, v, g, beta)
        calls.clear()
        found, state = whole_rows._scan(stand_in, row, q, k, v, g=g, beta=beta, initial_state=None,
                                        output_final_state=False, use_qk_l2norm_in_kernel=True)  # fmt: skip
        assert state is None and calls.total() == len(row.paths.states.levels)

        def alone(q, k, v, g, beta):
            return stand_in(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]

        self.same(found, self.over_paths(row, alone, *inputs), inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-2), (torch.bfloat16, 0.1)])
def test_fla_on_this_gpu(dtype, error):
    """fla's own kernels: heads of 32, as they take no narrower ones."""
    pytest.importorskip("fla")
    config = tiny_config(Qwen3NextConfig())
    config.linear_key_head_dim = config.linear_value_head_dim = 32
    pairs = random_pairs(3, 3)
    model = tiny_model("qwen3_next", config=config)
    wanted = loss_and_gradients(model, separate_stats(model, pairs))
    whole_rows._judged.clear()
    prepare_model(model).to("cuda", dtype)
    plan = build_plan(pairs, Layout.STATES, min_node_tokens=4).to("cuda")
    stats = SequenceStats(*(field.cpu() for field in score(model, plan)))
    loss, gradients = loss_and_gradients(model, stats)
    assert list(whole_rows._judged.values()) == [True]
    assert largest_error((loss, {name: each.float().cpu() for name, each in gradients.items()}), wanted) < error
