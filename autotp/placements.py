"""DTensor placements of layouts. The one module that touches torch's private `_StridedShard`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as DShard
from torch.distributed.tensor.placement_types import _StridedShard

from autotp.layouts import AxisType, Layout, Shard


def placement(t: AxisType) -> Placement:
    """Return the DTensor placement of an axis type; equal blocks are a strided shard."""
    if not isinstance(t, Shard):
        return Replicate()
    if not t.parts:
        return DShard(t.dim)
    assert len(set(t.parts)) == 1, t
    return _StridedShard(t.dim, split_factor=len(t.parts))


def as_dtensor(local: Tensor, layout: Layout, shape: Sequence[int], mesh: DeviceMesh) -> DTensor:
    """Return the DTensor of `shape` of which this rank holds `local`."""
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        local,
        mesh,
        [placement(t) for t in layout],
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def as_parameter(
    local: Tensor, layout: Layout, shape: Sequence[int], mesh: DeviceMesh, trained: bool
) -> nn.Parameter:
    """Return the DTensor parameter of which this rank holds `local`."""
    return nn.Parameter(as_dtensor(local, layout, shape, mesh), requires_grad=trained)
