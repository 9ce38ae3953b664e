"""What the ranks of test_vocabulary_shards.py do: each case on a shard, against float64 on the whole vocabulary."""

import json
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from head_cases import in_float64, problem, relative_error
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from amopo_kernels import linear_cross_entropy, linear_logps, linear_sequence_stats, reference
from amopo_kernels.head.options import OUTPUTS

ROWS, VOCABULARY = 21, 150
SPLITS = {2: [40, 110], 3: [97, 53, 0]}  # ragged; one rank of three has nothing
BACKENDS = ("torch", "fused", "chunked")
CASES = [
    *((backend, mode) for backend in BACKENDS for mode in ("outputs", "frozen", "rows", "cross_entropy")),
    *((backend, "cached") for backend in BACKENDS[1:]),
    ("fused", "float16"), ("torch", "float64"), ("torch", "dtensor"), ("torch", "bad"), ("fused", "bad"),
]  # fmt: skip


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    torch.set_num_threads(1)
    results = {}
    for ranks in (2, 3):
        group = dist.new_group(range(ranks))
        if rank < ranks:
            for backend, mode in CASES:
                try:
                    results[f"{ranks}-{backend}-{mode}"] = case(rank, ranks, group, backend, mode)
                except Exception:
                    results[f"{ranks}-{backend}-{mode}"] = traceback.format_exc()
                    return Path(folder, f"{rank}.json").write_text(json.dumps(results))
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def case(rank, ranks, group, backend, mode):
    """The largest relative error of what the rank has."""
    dtype = {"float16": torch.float16, "float64": torch.float64}.get(mode, torch.float32)
    hidden, weight, labels, bias = problem(ROWS, 16, VOCABULARY, dtype, scale=2, bias=True)
    first = sum(SPLITS[ranks][:rank])
    mine = slice(first, first + SPLITS[ranks][rank])
    if mode == "dtensor":
        mesh = DeviceMesh.from_group(group, "cpu", list(range(ranks)))
        mine = slice(rank * -(-VOCABULARY // ranks), (rank + 1) * -(-VOCABULARY // ranks))
        own, own_bias = (distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (weight, bias))
    else:
        own, own_bias = (x.detach()[mine].clone().requires_grad_(mode != "frozen") for x in (weight, bias))
    labels[:3] = torch.tensor([0, VOCABULARY - 1, first % VOCABULARY if ranks == 1 else 60])
    options = {"softcap": 9.0, "temperature": 0.8}
    given = {"process_group": group, "backend": backend}
    exact = in_float64(hidden, weight, bias)
    if mode == "bad":
        return bad(hidden, own, labels, given)
    if mode == "cached":
        cu_seqlens = torch.arange(ROWS + 1, dtype=torch.int32)
        found = [linear_sequence_stats(hidden, own, labels, cu_seqlens, own_bias, logits_cache_bytes=ROWS * 128 * 4,
                                       **options, **given).logp_sum]  # fmt: skip
        expected = [reference.linear_logps(*exact[:2], labels, exact[2], **options)]
    elif mode == "cross_entropy":
        labels[4] = -100
        classes = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(3)) + 0.2
        loss = {"label_smoothing": 0.2, "z_loss": 1e-2} | options
        found = [linear_cross_entropy(hidden, own, labels, linear_bias=own_bias, weight=classes, **loss, **given)]
        expected = [reference.linear_cross_entropy(*exact[:2], labels, linear_bias=exact[2], weight=classes.double(),
                                                   **loss)]  # fmt: skip
    else:
        labels[[4, 11]] = -100
        outputs = {"frozen": (), "rows": ("entropy",)}.get(mode, OUTPUTS)
        if mode == "rows":  # not read, and each has its temperature
            options["temperature"] = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) + 0.3
            given["validate"] = False
        found = linear_logps(hidden, own, labels, own_bias, outputs=outputs, **options, **given)
        if mode == "rows":
            options["temperature"] = options["temperature"].double()
        expected = reference.linear_logps(*exact[:2], labels, exact[2], outputs=outputs, **options)
        found, expected = ((x,) if torch.is_tensor(x) else x for x in (found, expected))
    errors = {}
    total, wanted = 0, 0
    generator = torch.Generator().manual_seed(4)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        errors[f"output {i}"] = relative_error(a.detach(), b.detach().double())
        if a.requires_grad:
            upstream = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            total, wanted = total + (a * upstream.to(a.dtype)).sum(), wanted + (b * upstream).sum()
    total.backward(), wanted.backward()
    errors["hidden"] = relative_error(hidden.grad, exact[0].grad)
    for name, x, y in (("weight", own, exact[1]), ("bias", own_bias, exact[2])):
        if x.requires_grad and len(y.grad[mine]):
            gradient = x.grad.to_local() if mode == "dtensor" else x.grad
            assert gradient.shape == y.grad[mine].shape
            errors[name] = relative_error(gradient, y.grad[mine])
    return errors


def bad(hidden, weight, labels, given):
    """Labels beyond all ranks' tokens: refused, or NaN in their rows alone."""
    labels[5] = VOCABULARY
    try:
        linear_logps(hidden, weight, labels, **given)
        return "not refused"
    except ValueError as error:
        assert f"labels[5] = {VOCABULARY} is outside the vocabulary of {VOCABULARY} tokens" in str(error)
    logps = linear_logps(hidden, weight, labels, validate=False, **given)
    assert logps.isnan().nonzero().flatten().tolist() == [5]
    return {}
