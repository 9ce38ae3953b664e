"""Every tensor argument of every public function: its type, dtype, device and shape, refused in the same words."""

import pytest
import torch
from torch import nn

from amopo_kernels import (
    BackendUnavailableError,
    gather_rows,
    inverse_index,
    linear_logps,
    linear_sequence_stats,
    segment_sum_rows,
    sequence_stats,
)

HIDDEN, WEIGHT, BIAS = torch.randn(5, 6), torch.randn(40, 6), torch.randn(40)
LABELS, CU_SEQLENS = torch.tensor([1, 2, 3, 4, 39]), torch.tensor([0, 2, 5], dtype=torch.int32)
ROWS = torch.tensor([1, 0, 1])
ORDER, OFFSETS = inverse_index(ROWS, 5)
TEMPERATURE = torch.ones(5)
CALLS = {
    "linear_logps": (linear_logps, {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "bias": BIAS,
                                    "temperature": TEMPERATURE}),
    "linear_sequence_stats": (linear_sequence_stats, {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS,
                                                      "cu_seqlens": CU_SEQLENS, "bias": BIAS}),
    "sequence_stats": (sequence_stats, {"logps": -TEMPERATURE, "cu_seqlens": CU_SEQLENS}),
    "gather_rows": (gather_rows, {"x": HIDDEN, "indices": ROWS, "order": ORDER, "offsets": OFFSETS}),
    "segment_sum_rows": (segment_sum_rows, {"values": HIDDEN[:3], "order": ORDER, "offsets": OFFSETS}),
}  # fmt: skip
ARGUMENTS = [(function, name) for function, (_, arguments) in CALLS.items() for name in arguments]


def call(function, **changes):
    function, arguments = CALLS[function]
    return function(**arguments | changes)


@pytest.mark.parametrize("function", CALLS)
def test_the_arguments_themselves_are_taken(function):
    call(function)


@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_a_tensor_elsewhere_is_refused(function, name):
    """On a GPU, memory of another device was read as if it were there."""
    with pytest.raises(ValueError, match="is on (meta|cpu), the other arguments on (cpu|meta)"):
        call(function, **{name: CALLS[function][1][name].to("meta")})


@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_no_tensor_no_dtype_no_shape_of_its_own(function, name):
    good = CALLS[function][1][name]
    if name != "temperature":
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
            call(function, **{name: good.tolist()})
    with pytest.raises(TypeError, match=f"{name} must be (floating point|int)"):
        call(function, **{name: good.bool()})
    with pytest.raises(ValueError, match=f"{name}|indices"):
        call(function, **{name: good[..., None, None] if good.dim() < 2 else good[0, 0]})


@pytest.mark.parametrize("function", ["linear_logps", "linear_sequence_stats"])
def test_a_module_is_no_weight(function):
    with pytest.raises(TypeError, match=r"weight is a module \(Linear\); pass its tensors, such as weight.weight"):
        call(function, weight=nn.Linear(6, 40))


@pytest.mark.parametrize("function", ["linear_logps", "linear_sequence_stats"])
def test_sizes_of_the_head(function):
    for changes, message in [
        ({"hidden": HIDDEN[:, :0], "weight": WEIGHT[:, :0]}, r"must be \(V, H\) without a size of 0, got \(40, 0\)"),
        ({"weight": WEIGHT[:0]}, r"without a size of 0, got \(0, 6\)"),
        ({"hidden": HIDDEN[:, :5]}, "the last sizes must agree"),
        ({"bias": BIAS[:7]}, r"bias must be \(40,\), got \(7,\)"),
        ({"labels": LABELS[:4]}, r"labels must be \(5,\), got \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(function, **changes)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["temperature", "softcap"])
def test_numbers_that_are_no_temperature_and_no_cap(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got"):
        call("linear_logps", **{name: value})


def test_a_temperature_is_a_number_or_one_of_each_row():
    with pytest.raises(TypeError, match="temperature must be a number or a tensor like labels, got str"):
        call("linear_logps", temperature="0.7")
    with pytest.raises(ValueError, match=r"temperature must be \(5,\), got \(1,\)"):
        call("linear_logps", temperature=torch.ones(1))
    with pytest.raises(ValueError, match="temperature requires a gradient, which is not computed"):
        call("linear_logps", temperature=torch.ones(5, requires_grad=True))


def test_outputs_are_named():
    with pytest.raises(ValueError, match="outputs has 'logits'; choose among entropy, lse, mean_logit, top1"):
        call("linear_logps", outputs=("logits",))
    with pytest.raises(ValueError, match="name everything in outputs"):
        call("linear_logps", outputs=("lse",), return_entropy=True)


@pytest.mark.parametrize("backend", ["auto", "torch", "fused"])
def test_tensors_without_values_are_refused(backend):
    with pytest.raises(BackendUnavailableError, match="on meta and hold no values"):
        linear_logps(*(x.to("meta") for x in (HIDDEN, WEIGHT, LABELS)), backend=backend)
