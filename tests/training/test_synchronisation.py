"""The host waits for the device once in a step, where the guard reads its numbers; between two log lines nowhere else.

What would wait on a GPU is found on a CPU by its calls: reads of values, and moves that are not `non_blocking`.
"""

import collections
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "survival"))
from small_run import small_model, small_trainer  # noqa: E402

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "argwhere",
         "masked_select", "unique", "unique_consecutive", "equal", "allclose", "is_nonzero"}  # fmt: skip
# (function of the tree, call) -> why it is there and no wait on a GPU
ON_A_CPU = {
    ("_sdpa", "tolist"): "the CPU's attention alone splits a row on the host",
    ("check_cu_seqlens", "__int__"): "validate=None reads offsets on a CPU alone",
    ("check_cu_seqlens", "__bool__"): "likewise",
    ("check_labels", "item"): "likewise",
}

class Waits(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.found = collections.Counter()
        self.batch = []  # tensors that come from the host

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        waits = name in READS
        if name == "to":
            of_dtype = len(args) == 2 and isinstance(args[1], torch.dtype)
            waits = not (kwargs.get("non_blocking") or of_dtype) and any(args[0] is one for one in self.batch)
        elif name in ("tensor", "as_tensor"):  # of a number: a copy from the host
            waits = kwargs.get("device") is not None and not isinstance(args[0], torch.Tensor)
        elif name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            waits = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in index)
        if waits:
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
            ours = [frame.name for frame in frames if "/tests/" not in frame.filename]
            self.found[ours[-1] if ours else "?", name] += 1
        return function(*args, **kwargs)


def watched(trainer, names, waits):
    for owner, name in names:
        original = getattr(owner, name)

        def inside(*args, original=original, **kwargs):
            with waits:
                return original(*args, **kwargs)

        setattr(owner, name, inside)


# Of padded rows transformers asks on the host whether their positions are those of one sequence.
@pytest.mark.parametrize("layout, of_a_micro_batch", [("shared", {}), ("separate", {("body", "__bool__"): 1})])
def test_a_step_waits_where_the_guard_reads_its_numbers_and_nowhere_else(layout, of_a_micro_batch, tmp_path):
    waits, micro_batches = Waits(), 0
    run = small_trainer(tmp_path, save_strategy="no", eval_strategy="no", logging_steps=100, num_train_epochs=1,
                        layout=layout)  # fmt: skip
    watched(run, [(run, "training_step"), (run, "_clip_grad_norm"), (run, "_get_grad_norm"),
                  (run.guard, "on_pre_optimizer_step")], waits)  # fmt: skip
    training_step = run.training_step

    def of_batch(model, inputs, *args):
        nonlocal micro_batches
        micro_batches += 1
        plan = inputs["plan"]
        waits.batch = [value for value in [*inputs.values(), *vars(plan).values()] if isinstance(value, torch.Tensor)]
        return training_step(model, inputs, *args)

    run.training_step = of_batch
    run.train()
    assert len(waits.batch) > 8
    found = {where: count for where, count in waits.found.items() if where not in ON_A_CPU}
    expected = {where: count * micro_batches for where, count in of_a_micro_batch.items()}
    assert micro_batches > run.state.global_step
    assert found == {("on_pre_optimizer_step", "tolist"): run.state.global_step, **expected}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_torch_sees_no_other_wait(tmp_path):
    model = small_model(attention_dropout=0.0).to(torch.bfloat16)  # or no backend but SDPA would take it
    run = small_trainer(tmp_path, model=model, save_strategy="no", eval_strategy="no", logging_steps=100,
                        num_train_epochs=1, use_cpu=False)  # fmt: skip
    step, seen = run.training_step, []

    def training_step(*args, **kwargs):
        if run.state.global_step < 2:  # the first ones compile and read
            return step(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen.extend(str(one.message) for one in caught if "synchronizing" in str(one.message))

    run.training_step = training_step
    run.train()
    assert run.state.global_step > 2 and not seen
