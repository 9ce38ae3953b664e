"""The update of one tensor: torchao's arithmetic, the Triton kernel against it, rounding, compiling."""

import contextlib

import pytest
import torch

from amopo_fast.optim import update_triton
from amopo_fast.optim.states import Moment, moment_bytes, moments_of, new_state, quantisation_map, storage
from amopo_fast.optim.update import PIECE, Step, round_stochastically, rounding_seed, update_

KINDS = ["fp32", "8bit", "4bit"]


def hyper(count, seed=None, weight_decay=0.1):
    return Step(1e-3, 0.9, 0.99, 1e-8, weight_decay, count, seed)


def gradients(n, steps=3):
    # Blocks of very different size: a wrong scale or a block boundary off by one shows.
    size = 10.0 ** torch.randint(-6, 3, (n // 64 + 1,)).repeat_interleave(64)[:n]
    return [torch.randn(n) * size for _ in range(steps)]


def test_maps_are_torchaos():
    optim = pytest.importorskip("torchao.optim")
    for states, module in (("8bit", optim.subclass_8bit), ("4bit", optim.subclass_4bit)):
        for signed, theirs in ((True, module.get_qmap_signed()), (False, module.get_qmap_unsigned())):
            own = quantisation_map(states, signed, torch.device("cpu"))
            assert torch.equal(own, torch.tensor(theirs, dtype=torch.float32)), (states, signed)


def test_the_dynamic_map_is_the_papers():
    """Values worked out by hand: in 4 bits the decades 0.1..1, 0.01..0.1 and 0.001..0.01 have 4, 2 and 1 parts."""
    four = [0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1]
    expected = torch.tensor([-x for x in four[-2:0:-1]] + four)
    torch.testing.assert_close(quantisation_map("4bit", True, torch.device("cpu")), expected)
    linear = quantisation_map("4bit", False, torch.device("cpu"))
    assert linear.tolist() == [i / 16 for i in range(1, 17)]
    for signed in (True, False):
        eight = quantisation_map("8bit", signed, torch.device("cpu"))
        assert len(eight) == len(eight.unique()) == 256 and eight[-1] == 1 and (eight == 0).sum() == 1
        assert (eight < 0).sum() == (127 if signed else 0)
        smallest = eight[eight > 0].min().item()  # the middle of 1e-7..1e-6, of half of that without a sign
        assert smallest == pytest.approx(5.5e-7 if signed else 3.25e-7)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("signed", [True, False])
def test_a_moment_is_stored_as_the_nearest_value_of_its_map(kind, signed):
    torch.manual_seed(0)
    values = torch.randn(8192) * 10.0 ** torch.randint(-9, 3, (32,)).repeat_interleave(256)
    values[:512] = 0
    if not signed:
        values = values.square()
    state = new_state(values, kind)
    moment = moments_of(state)[0 if signed else 1]
    moment.write(values)
    block = 256 if kind == "8bit" else 128
    scale = values.double().view(-1, block).abs().amax(-1, keepdim=True).clip(1e-12)
    wanted = values.double().view(-1, block) / scale
    distance = (wanted[..., None] - moment.map.double()).abs().amin(-1)
    stored = (moment.read().double().view(-1, block) / scale - wanted).abs()
    torch.testing.assert_close(stored, distance, rtol=0, atol=2e-7)
    assert stored.max() > 1e-3  # something was rounded


@pytest.mark.parametrize("kind", KINDS)
def test_update_is_torchaos(kind):
    pytest.importorskip("torchao")
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    torch.manual_seed(0)
    shape = (64, 128)
    p = torch.randn(shape)
    reference = p.clone()
    state = new_state(p, kind)
    if kind == "fp32":
        moments = [torch.zeros(shape), torch.zeros(shape)]
    else:
        cls, block = (OptimState8bit, 256) if kind == "8bit" else (OptimState4bit, 128)
        moments = [cls.zeros(shape, signed, block) for signed in (True, False)]
    for count, g in enumerate(gradients(p.numel()), 1):
        update_(p.view(-1), g, *moments_of(state), hyper(count))
        single_param_adam(reference, g.view(shape), torch.tensor(float(count)), *moments, None, torch.tensor(1e-3),
                          0.9, 0.99, 0.1, 1e-8, True, False)  # fmt: skip
        torch.testing.assert_close(p, reference, rtol=1e-6, atol=1e-6)
        for own, theirs in zip(moments_of(state), moments, strict=True):
            if kind == "fp32":
                assert torch.equal(own.read(), theirs.view(-1))
            else:
                assert torch.equal(own.codes, theirs.codes.view(-1)) and torch.equal(own.scale, theirs.scale)
                assert torch.equal(own.read(), theirs.dequantize().view(-1))
    assert (p - reference).abs().max() < 1e-5 < (p - torch.zeros_like(p)).abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [4096, 4096 + 768, 1000])
def test_kernel_equals_the_plain_update(kind, dtype, numel):
    torch.manual_seed(numel)
    p = torch.randn(numel).to(dtype)
    twin = p.clone()
    states = [new_state(p, kind), new_state(p, kind)]
    kind = storage(numel, kind)
    for count, g in enumerate(gradients(numel), 1):
        scale = torch.tensor(0.37) if count == 2 else None
        update_triton.update_(p, g.to(dtype), *moments_of(states[0]), hyper(count), scale)
        update_(twin, g.to(dtype), *moments_of(states[1]), hyper(count), scale)
        # A last-bit difference may move a code by one: few elements, by one step of the map.
        for own, other in zip(*map(moments_of, states), strict=True):
            torch.testing.assert_close(own.scale, other.scale, rtol=1e-6, atol=0)
            differing = ~torch.isclose(own.read(), other.read(), rtol=1e-5, atol=0)
            assert differing.float().mean() < 2e-3, (kind, count)
        close = torch.isclose(p.float(), twin.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert (~close).float().mean() < 2e-3
        for name, value in states[1].items():  # so that one differing code does not multiply
            states[0][name].copy_(value)
        p.copy_(twin)


def test_pieces_and_whole_agree(monkeypatch):
    torch.manual_seed(0)
    results = []
    for piece in (PIECE, 1024):
        monkeypatch.setattr("amopo_fast.optim.update.PIECE", piece)
        torch.manual_seed(1)
        p = torch.randn(8192)
        state = new_state(p, "4bit")
        for count, g in enumerate(gradients(8192), 1):
            update_(p, g, *moments_of(state), hyper(count))
        results.append([p, *state.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("update", [update_, update_triton.update_])
def test_pieces_of_a_parameter_in_any_order_are_the_whole(update, monkeypatch):
    monkeypatch.setattr("amopo_fast.optim.update.PIECE", 4096)
    torch.manual_seed(0)
    whole = torch.randn(3 * 4096).bfloat16()
    parts, states = whole.clone(), [new_state(whole, "8bit") for _ in range(2)]
    for count, g in enumerate(gradients(3 * 4096), 1):
        step = hyper(count, seed=rounding_seed(1, count, 0))
        update(whole, g, *moments_of(states[0]), step)
        for first in (8192, 0, 4096):
            moments = [moment.slice(first, first + 4096) for moment in moments_of(states[1])]
            update(parts[first : first + 4096], g[first : first + 4096], *moments, step, first=first)
    assert torch.equal(whole, parts)
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.parametrize("kernel", [False, True])
def test_rounding_is_unbiased_between_neighbours_and_repeats(kernel):
    value, numel = 1.0 + 2**-8 * 0.3, 1 << 14  # 0.15 of the way to the next bfloat16, 1 + 2^-7
    neighbours = torch.tensor([1.0, 1.0 + 2**-7])

    def rounded(seed):
        p = torch.ones(numel, dtype=torch.bfloat16)
        if not kernel:
            return round_stochastically(torch.full((numel,), value), torch.Generator().manual_seed(seed))
        # One AdamW step of a constant gradient moves every weight by lr: 1 -> value.
        step = Step(1 - value, 0.9, 0.99, 0.0, 0.0, 1, seed)
        update_triton.update_(p, torch.ones(numel), *moments_of(new_state(p, "fp32")), step)
        return p

    p = rounded(rounding_seed(3, 1, 0))
    assert torch.equal(p.float().unique(), neighbours)
    share = (p > 1).float()
    assert abs(share.mean() - 0.15) < 5 * (0.15 * 0.85 / numel) ** 0.5
    lag = (share[:-1] - 0.15) * (share[1:] - 0.15)
    assert abs(lag.mean()) < 5 * 0.15 * 0.85 / numel**0.5  # neighbours are independent
    assert torch.equal(p, rounded(rounding_seed(3, 1, 0)))
    for other in ((4, 1, 0), (3, 2, 0), (3, 1, 1)):
        assert not torch.equal(p, rounded(rounding_seed(*other)))


NOT_FINITE = [0x7FFFFFFF, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0xFF800001, 0x7F800000, 0xFF800000]  # NaN, infinities


def from_bits(patterns):
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def test_rounding_keeps_every_pattern_that_is_not_finite():
    """0x7fffffff is the NaN that CUDA makes; a carry would leave -0 of it, and infinity of 0x7f800001."""
    values = from_bits(NOT_FINITE).repeat_interleave(512)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0)).float()
    assert torch.equal(rounded.isnan(), values.isnan())
    assert torch.equal(rounded[values.isinf()], values[values.isinf()])


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, under the interpreter
def test_the_kernel_keeps_nan_and_overflows_to_infinity():
    nan = [pattern for pattern in NOT_FINITE if from_bits([pattern]).isnan()]
    g = torch.cat([from_bits(nan).repeat_interleave(512), torch.ones(1536)])
    p = torch.full(g.shape, -2e38, dtype=torch.bfloat16)
    step = Step(3e38, 0.9, 0.99, 0.0, 0.0, 1, rounding_seed(0, 1, 0))  # a weight moves by lr
    update_triton.update_(p, g, *moments_of(new_state(p, "fp32")), step)
    assert p[: 512 * len(nan)].isnan().all()
    assert (p[512 * len(nan) :] == -torch.inf).all()


def test_the_kernel_is_launched_on_the_parameters_device(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.clear()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(list(entered))

    launched = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(update_triton, "_adamw_kernel", Kernel())
    p = torch.randn(4096)
    update_triton.update_(p, p, *moments_of(new_state(p, "8bit")), hyper(1))
    assert len(launched) == 1 and launched[0][0] is p


def test_bytes_of_states():
    for kind in KINDS:
        for shape in ((100,), (4096,), (4097,), (300, 256)):
            p = torch.empty(shape)
            actual = sum(t.numel() * t.element_size() for t in new_state(p, kind).values())
            assert moment_bytes(p.numel(), kind) == actual, (kind, shape)
    assert isinstance(moments_of(new_state(torch.empty(4096), "4bit"))[0], Moment)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", [update_, update_triton.update_])
def test_a_scale_that_is_nan_leaves_everything_as_it_is(kind, update):
    n = 5 * 256 + 24 * (kind == "fp32")
    parameter = torch.randn(n).bfloat16()
    state = new_state(parameter, kind)
    update(parameter, torch.randn(n), *moments_of(state), hyper(1, seed=2**62), torch.tensor(1.0))
    before = [parameter.clone(), *(tensor.clone() for tensor in state.values())]
    gradient = torch.randn(n)
    gradient[3] = float("inf")
    update(parameter, gradient, *moments_of(state), hyper(2, seed=2**62), torch.tensor(float("nan")))
    assert all(map(torch.equal, before, [parameter, *state.values()]))
    update(parameter, torch.randn(n), *moments_of(state), hyper(2, seed=2**62), torch.tensor(0.5))
    assert not torch.equal(before[0], parameter)


@pytest.mark.parametrize("states", KINDS)
def test_in_backward_nothing_changes_after_a_gradient_that_is_not_finite(states):
    from amopo_fast.optim import AdamW

    layers = [torch.nn.Parameter(torch.randn(70, 64)) for _ in range(4)]
    optimizer = AdamW(layers, lr=0.1, states=states, in_backward=True)
    before = [layer.detach().clone() for layer in layers]
    x = torch.randn(3, 64)
    for number, layer in enumerate(layers):
        x = (x @ layer.T)[:, :64]
        if number == 1:
            layer.register_hook(lambda grad: grad * float("inf"))
    x.sum().backward()
    assert [bool(done) for done in optimizer.applied().values()] == [True, True, False, False]
    assert [torch.equal(a, b) for a, b in zip(before, layers, strict=True)] == [True, True, False, False]
    assert optimizer.grad_norm().isfinite().item() is False
