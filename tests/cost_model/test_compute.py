import numpy as np
import pytest
import torch

from autotp.cost_model.cluster import bandwidth_bound, dgx_a100
from autotp.cost_model.compute import DTYPE_BYTES, dtype_bytes, matmul_flops, op_s


@pytest.mark.parametrize("name", sorted(DTYPE_BYTES))
def test_dtype_bytes_agree_with_torch(name):
    assert dtype_bytes(getattr(torch, name)) == getattr(torch, name).itemsize


def test_the_roofline_takes_the_slower_of_arithmetic_and_memory():
    a100 = dgx_a100()
    flops = matmul_flops(4096, 4096, 4096)
    assert op_s(flops, 0, "bfloat16", a100) == pytest.approx(flops / 312e12 + 5e-6)
    assert op_s(1, 2.039e12, "bfloat16", a100) == pytest.approx(1 + 5e-6)


def test_compute_is_free_on_a_bandwidth_bound_cluster():
    assert op_s(1e12, 1e12, "float32", bandwidth_bound()) == 0


def test_arrays_of_work_give_arrays_of_seconds():
    flops, moved = np.array([1e12, 1.0]), np.array([1.0, 1e12])
    seconds = op_s(flops, moved, "float32", dgx_a100())
    expected = [op_s(x, y, "float32", dgx_a100()) for x, y in zip(flops, moved, strict=True)]
    assert seconds.tolist() == expected
