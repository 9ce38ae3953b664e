"""A vocabulary that is sharded over 2 and 3 processes (gloo), on every backend, against float64 on one."""

import json

import children
import pytest
import ranks_with_shards
import torch
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from amopo_kernels import ShardedTensorError, linear_logps

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo, and Triton's interpreter on the CPU")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    children.start_processes(ranks_with_shards.run, (str(folder),), nprocs=3)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("backend, mode", ranks_with_shards.CASES)
def test_every_rank_has_what_one_would_have(results, ranks, backend, mode):
    tolerance = {"float64": 1e-11, "float16": 1e-3}.get(mode, 2e-5)
    for rank in range(ranks):
        errors = results[rank][f"{ranks}-{backend}-{mode}"]
        assert isinstance(errors, dict), errors
        assert all(error < tolerance for error in errors.values()), errors


def test_what_a_dtensor_means_must_be_said(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        hidden, labels = torch.randn(3, 4), torch.tensor([0, 1, 5])
        weight = distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)])
        with pytest.raises(ShardedTensorError, match="weight is a DTensor. If FSDP shards it .* process_group="):
            linear_logps(hidden, weight, labels)
        group = mesh.get_group()
        found = linear_logps(hidden, weight, labels, process_group=group)
        torch.testing.assert_close(found, linear_logps(hidden, weight.full_tensor(), labels))
        with pytest.raises(ShardedTensorError, match=r"with process_group it must be Shard\(0\) over that group"):
            linear_logps(hidden, distribute_tensor(torch.randn(6, 4), mesh, [Shard(1)]), labels, process_group=group)
        other = torch.distributed.new_group([0])
        with pytest.raises(ShardedTensorError, match="over that group"):
            linear_logps(hidden, weight, labels, process_group=other)
    finally:
        torch.distributed.destroy_process_group()
