"""Attention backends: each adapter maps its arguments rightly (a fake library computes them by SDPA), refuses by name
what it lacks, and the fallback equals plain attention over every segment."""

import inspect
import logging

import pytest
import torch
from packing_cases import expected, largest_error, loss_and_gradients, random_pairs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils

from amopo_fast.models import attention_backends, scoring
from amopo_fast.models.attention_backends import BACKENDS, FLASH, AttentionNeeds, attend, choose_backend
from amopo_fast.models.check import prepare_model
from amopo_fast.models.scoring import score
from amopo_fast.packing.plan import build_plan

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NEEDS = AttentionNeeds("cuda", (9, 0), torch.bfloat16, 128)


def segments(heads=4, kv_heads=2, dim=16, value_dim=16, dtype=torch.float32, device="cpu", seed=0, times=1):
    """q, k, v and offsets of four segments: as many queries as keys, fewer, one, and a long path."""
    generator = torch.Generator().manual_seed(seed)
    lengths_q, lengths_k = torch.tensor([7, 3, 1, 12]) * times, torch.tensor([7, 10, 5, 30]) * times
    cu_q, cu_k = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).int().to(device) for x in (lengths_q, lengths_k))
    sizes = ((int(cu_q[-1]), heads, dim), (int(cu_k[-1]), kv_heads, dim), (int(cu_k[-1]), kv_heads, value_dim))
    q, k, v = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    return q, k, v, cu_q, cu_k, 12 * times, 30 * times


def plainly(q, k, v, cu_q, cu_k, max_q, max_k, *, scaling, window=None, softcap=None, sinks=None):
    """The definition, one query at a time, in float64."""
    out = []
    groups = q.shape[1] // k.shape[1]
    for b in range(len(cu_q) - 1):
        queries, keys, values = (
            x[c[b] : c[b + 1]].double() for x, c in ((q, cu_q), (k, cu_k), (v, cu_k))
        )
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
        for i in range(len(queries)):
            last = len(keys) - len(queries) + i
            first = 0 if window is None else max(0, last - window + 1)
            scores = torch.einsum("hd,khd->hk", queries[i], keys[first : last + 1]) * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None]], 1)
            weights = scores.softmax(-1)[:, : last + 1 - first]
            out.append(torch.einsum("hk,khd->hd", weights, values[first : last + 1]))
    return torch.stack(out)


OPTIONS = [{}, {"window": 4}, {"window": 100}, {"softcap": 0.5}, {"softcap": 0.5, "window": 6}]


@pytest.mark.parametrize("heads, kv_heads, value_dim", [(4, 4, 16), (4, 2, 16), (4, 1, 8)])
@pytest.mark.parametrize("options", [*OPTIONS, {"sinks": True}, {"sinks": True, "window": 4}])
def test_sdpa_is_the_definition(options, heads, kv_heads, value_dim):
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 2, heads)
    inputs = segments(heads, kv_heads, value_dim=value_dim)
    got = attend("sdpa", *inputs, scaling=0.3, **options)
    torch.testing.assert_close(got.double(), plainly(*inputs, scaling=0.3, **options), rtol=1e-5, atol=1e-5)


# The libraries' functions, in the shape of each version that is supported; they compute by SDPA and note their inputs.


def fake_flash(seen, **lacks):
    def run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap):
        assert causal and q.shape[-1] == v.shape[-1] and cu_seqlens_q.dtype == torch.int32
        seen.append({"max": (max_seqlen_q, max_seqlen_k), "window": window, "softcap": softcap})
        # flash-attn: query i sees keys i - left to i; with causal the right side is 0 whatever is given
        keys = None if window == (-1, -1) else window[0] + 1
        cap = softcap or None
        return attend(
            "sdpa", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scaling=softmax_scale, window=keys,
            softcap=cap,
        )  # fmt: skip

    def version_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                  causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                  return_attn_probs=False, block_table=None):  # fmt: skip
        assert dropout_p == 0.0
        return run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
                   softcap)  # fmt: skip

    def version_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                  softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
                  num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
        return run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
                   softcap)  # fmt: skip

    def version_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
                  seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
                  learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False):  # fmt: skip
        assert window_size == (None, None)
        out = run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, (-1, -1),
                  softcap)  # fmt: skip
        return out, None  # with the log-sum-exp

    return {"flash_attention_2": version_2, "flash_attention_3": version_3, "flash_attention_4": version_4}


def fake_varlen(seen, version):
    def run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
        assert window_size[1] == 0 and query.shape[-1] == value.shape[-1]
        seen.append({"max": (max_q, max_k), "window": window_size, "kv_heads": key.shape[1]})
        keys = None if window_size[0] == -1 else window_size[0] + 1
        return attend("sdpa", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scaling=scale, window=keys)

    def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                   window_size=(-1, -1)):  # fmt: skip
        return run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                   window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
                   num_splits=None):  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        return run(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)

    return {"2.11": torch_2_11, "2.13": torch_2_13}[version]


@pytest.fixture
def libraries(monkeypatch):
    """Fakes in the place of the flash-attn packages and of varlen_attn; yields what they were called with."""
    seen = []

    def load(implementation, *args, **kwargs):
        return None, fake_flash(seen)[implementation], None, None, None

    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", load)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    varlen = fake_varlen(seen, "2.13")
    monkeypatch.setattr(attention_backends, "_varlen_function", lambda: (varlen, True))
    yield seen
    modeling_flash_attention_utils._loaded_implementation = None


@pytest.mark.parametrize("value_dim", [16, 8])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", [*FLASH, "varlen"])
def test_adapters_pass_everything_on(libraries, backend, options, value_dim):
    inputs = segments(value_dim=value_dim)
    lacking = {"flash_attention_4": ("window", "softcap"), "varlen": ("softcap",)}.get(backend, ())
    refused = [name for name in options if name in lacking]
    if refused:
        with pytest.raises(ValueError, match=f"'{backend}' cannot run this layer: it has no"):
            attend(backend, *inputs, scaling=0.3, **options)
        return
    got = attend(backend, *inputs, scaling=0.3, **options)
    torch.testing.assert_close(got.double(), plainly(*inputs, scaling=0.3, **options), rtol=1e-5, atol=1e-5)
    (call,) = libraries
    assert call["max"] == (12, 30)


@pytest.mark.parametrize("window", [None, 4])
def test_varlen_of_torch_2_11_gets_grouped_heads_as_they_are(monkeypatch, window):
    seen = []
    varlen = fake_varlen(seen, "2.11")
    monkeypatch.setattr(attention_backends, "_varlen_function", lambda: (varlen, False))
    inputs = segments()
    got = attend("varlen", *inputs, scaling=0.3, window=window)
    torch.testing.assert_close(got.double(), plainly(*inputs, scaling=0.3, window=window), rtol=1e-5, atol=1e-5)
    assert seen[0]["kv_heads"] == 2


def test_the_installed_varlen_attn_takes_grouped_heads():
    """Its checks of shapes, on tensors without data: what is computed, the GPU tests say."""
    *tensors, cu_q, cu_k, max_q, max_k = segments()
    q, k, v = (x.to("meta", torch.bfloat16).requires_grad_() for x in tensors)
    out = attend("varlen", q, k, v, cu_q.to("meta"), cu_k.to("meta"), max_q, max_k, scaling=0.3)
    gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    assert q.shape[1] == 2 * k.shape[1]


def test_the_installed_varlen_attn_takes_what_the_adapter_gives():
    function, takes_gqa = attention_backends._varlen_function()
    given = {"scale", "window_size"} | ({"enable_gqa"} if takes_gqa else set())
    parameters = inspect.signature(function).parameters
    assert given <= parameters.keys()
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("backend", [*FLASH, "varlen"])
def test_whole_models_through_the_adapters(libraries, monkeypatch, backend, family):
    """A model on a backend that is not here: loss and gradients are the separate sequences'."""
    lacks = {"flash_attention_4": ("mistral", "gemma2"), "varlen": ("gemma2",)}.get(backend, ())
    model = prepare_model(tiny_model(family))
    plan = build_plan(random_pairs(2, 2), min_node_tokens=4)
    monkeypatch.setattr(scoring, "choose_backend", lambda requested, needs: backend)
    if family in lacks:
        with pytest.raises(ValueError, match="cannot run this layer"):
            score(model, plan)
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = loss_and_gradients(model, score(model, plan))
    assert largest_error(got, expected(family, 2, 2)) < 1e-5
    assert len(libraries) >= 2 * model.config.num_hidden_layers  # forward and recomputation


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_memory_grows_with_the_row_and_not_with_its_square(family):
    largest, rows = [], []
    for count in (2, 16):
        model = prepare_model(tiny_model(family))
        plan = build_plan(random_pairs(0, count))
        with LargestTensor() as mode:
            score(model, plan).logp_sum.sum().backward()
        largest.append(mode.numel)
        rows.append(plan.num_tokens)
    assert rows[1] > 6 * rows[0]
    assert largest[1] / largest[0] <= 1.3 * rows[1] / rows[0]
    assert largest[1] < rows[1] ** 2


# The rule of "auto".


def pretend(monkeypatch, *installed):
    choose_backend.cache_clear()
    monkeypatch.setattr(attention_backends, "_installed", lambda name: name in (*installed, "varlen", "sdpa"))


@pytest.mark.parametrize(
    "installed, changes, backend",
    [
        (FLASH, {}, "flash_attention_4"),
        (FLASH, {"capability": (8, 0)}, "flash_attention_3"),
        (FLASH, {"capability": (10, 0), "window": True}, "flash_attention_2"),
        (FLASH, {"window": True}, "flash_attention_3"),
        (FLASH, {"head_dim": 256}, "flash_attention_3"),
        (FLASH, {"dropout": True}, "flash_attention_2"),
        (FLASH, {"softcap": True, "capability": (10, 0)}, "flash_attention_2"),
        (FLASH, {"head_dim": 512}, "sdpa"),
        (FLASH, {"head_dim": 100}, "sdpa"),
        (FLASH, {"sinks": True}, "sdpa"),
        (FLASH, {"device": "cpu", "capability": None}, "sdpa"),
        (FLASH, {"dtype": torch.float32}, "sdpa"),
        ((), {}, "varlen"),
        ((), {"window": True}, "varlen"),
        ((), {"softcap": True}, "sdpa"),
        ((), {"dropout": True}, "sdpa"),
        ((), {"capability": (7, 5)}, "sdpa"),
        ((), {"head_dim": 256}, "varlen"),
    ],
)
def test_auto(monkeypatch, installed, changes, backend):
    pretend(monkeypatch, *installed)
    assert choose_backend("auto", AttentionNeeds(**{**vars(NEEDS), **changes})) == backend


def test_the_choice_is_logged_once(monkeypatch, caplog):
    pretend(monkeypatch)
    with caplog.at_level(logging.INFO, logger="amopo_fast.models.attention_backends"):
        for _ in range(3):
            choose_backend("auto", NEEDS)
    assert [record.message for record in caplog.records] == ["attention backend: varlen (head dim 128, torch.bfloat16)"]


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("flash", {}, "choose one of auto, flash_attention_4"),
        ("flash_attention_3", {}, "it is not installed"),
        ("varlen", {"device": "cpu", "capability": None}, "it needs CUDA tensors, these are on 'cpu'"),
        ("varlen", {"dtype": torch.float32}, "bfloat16 and float16 only"),
        ("varlen", {"softcap": True}, "it has no softcap"),
        ("varlen", {"head_dim": 512}, "head dim 512 is above 256"),
        ("varlen", {"sinks": True}, "it has no attention sinks"),
        ("flash_attention_2", {"capability": (7, 5)}, r"needs compute capability 8.0"),
    ],
)
def test_a_requested_backend_that_cannot_is_refused_by_name(monkeypatch, name, changes, message):
    pretend(monkeypatch, "flash_attention_2")
    with pytest.raises(ValueError, match=message):
        choose_backend(name, AttentionNeeds(**{**vars(NEEDS), **changes}))


def test_the_needs_of_models():
    from amopo_fast.models.architecture import attention_needs

    cpu = torch.device("cpu")
    needs = {family: attention_needs(tiny_model(family), cpu) for family in ("llama", "gemma2", "gpt_oss", "qwen2")}
    assert needs["llama"] == AttentionNeeds("cpu", None, torch.float32, 16)
    assert needs["gemma2"].window and needs["gemma2"].softcap and not needs["gemma2"].sinks
    assert needs["gpt_oss"].sinks and needs["qwen2"].window
    assert attention_needs(tiny_model("deepseek_v3"), cpu).head_dim == 24
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_needs(tiny_model("llama"), cpu).dtype == torch.bfloat16


def test_under_autocast_attention_runs_in_the_autocast_dtype(monkeypatch):
    seen = []
    from amopo_fast.models import attention

    original = attention.attend

    def spy(backend, q, k, v, *args, **kwargs):
        seen.append({q.dtype, k.dtype, v.dtype})
        return original(backend, q, k, v, *args, **kwargs)

    monkeypatch.setattr(attention, "attend", spy)
    for family in ("llama", "qwen3", "gemma3"):
        model = prepare_model(tiny_model(family))
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logp_sum = score(model, build_plan(random_pairs(0, 1))).logp_sum
        logp_sum.sum().backward()
        assert seen and all(dtypes == {torch.bfloat16} for dtypes in seen)


# On a GPU: the real libraries against SDPA in float32, and whether they repeat.


@pytest.mark.gpu
@CUDA
def test_varlen_gives_the_same_bits_with_deterministic_algorithms():
    """Paths of several blocks of keys, whose shares of a query's gradient are added in any order else."""
    *tensors, cu_q, cu_k, max_q, max_k = segments(dim=64, value_dim=64, dtype=torch.bfloat16, device="cuda", times=100)
    leaves = [x.requires_grad_() for x in tensors]
    torch.use_deterministic_algorithms(True)  # with warn_only torch keeps the fast backward pass
    try:
        runs = [
            torch.autograd.grad(
                attend("varlen", *leaves, cu_q, cu_k, max_q, max_k, scaling=0.125).float().square().sum(), leaves
            )
            for _ in range(5)
        ]  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
def test_real_backends_equal_sdpa(backend, options, dim):
    needs = AttentionNeeds(
        "cuda", torch.cuda.get_device_capability(), torch.bfloat16, dim, "window" in options, "softcap" in options
    )
    try:
        choose_backend(backend, needs)
    except ValueError as error:
        pytest.skip(str(error))
    *tensors, cu_q, cu_k, max_q, max_k = segments(dim=dim, value_dim=dim, dtype=torch.bfloat16, device="cuda")
    results = {}
    for name, dtype in ((backend, torch.bfloat16), ("sdpa", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = attend(name, *leaves, cu_q, cu_k, max_q, max_k, scaling=dim**-0.5, **options)
        gradients = torch.autograd.grad((out.float() * torch.linspace(-1, 1, dim, device="cuda")).sum(), leaves)
        results[name] = [out, *gradients]
    for got, wanted in zip(*results.values(), strict=True):
        assert (got.float() - wanted.float()).norm() <= 1e-2 * wanted.float().norm()
