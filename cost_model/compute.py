"""Compute: seconds of one operator on one rank, from its flops and the bytes it moves.

op_s            overhead + max(flops / rate, bytes / bandwidth)
matmul_flops    2 m n k
tensor_bytes    elements times the size of the dtype
"""

from __future__ import annotations

import numpy as np

from autotp.cost_model.cluster import Cluster, dtype_name
from autotp.cost_model.collectives import Amount

DTYPE_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}


def dtype_bytes(dtype: object) -> int:
    """Return the bytes of one element of `dtype`, a name or a torch.dtype."""
    return DTYPE_BYTES[dtype_name(dtype)]


def tensor_bytes(elements: int, dtype: object) -> int:
    """Return the bytes of `elements` of `dtype`."""
    return elements * dtype_bytes(dtype)


def matmul_flops(m: int, n: int, k: int, batch: int = 1) -> int:
    """Return the flops of `batch` products [m, k] [k, n]: a multiply and an add per term."""
    return 2 * batch * m * n * k


def op_s(
    flops: Amount,
    bytes_moved: Amount,
    dtype: object,
    cluster: Cluster,
    *,
    narrowest: int | None = None,
    function: bool = False,
    attention: bool = False,
) -> Amount:
    """Return the seconds of one operator: the slower of arithmetic and memory, and its overhead.

    `bytes_moved` counts each operand read and each result written once. `narrowest` is the
    smallest dim of a product, `function` says that each element takes an exp or the like, and
    `attention` that the flops are those of attention.

    Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance
    model for multicore architectures".
    """
    reached = cluster.matmul_flops_per_s(dtype, narrowest)
    arithmetic_s = flops / (cluster.attention_rate(dtype) if attention else reached)
    rate = cluster.pointwise_bytes_per_s if function else cluster.stream_rate(bytes_moved)
    memory_s = bytes_moved / rate
    return _slower(arithmetic_s, memory_s) + cluster.op_overhead_s


def _slower(a: Amount, b: Amount) -> Amount:
    return np.maximum(a, b) if isinstance(a, np.ndarray) else max(a, b)
