"""DTensor placements of layouts, and the way between a DTensor and its local tensor.

The one module that touches what torch keeps private: `_StridedShard`, `_spec`, `_local_tensor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


class _Local(torch.autograd.Function):
    """Hand out the local tensor of a DTensor parameter; its gradient rests as the parameter does.

    `DTensor.to_local` does the same, and works out the gradient's shape and stride every time.
    """

    @staticmethod
    def forward(ctx: Any, whole: DTensor) -> Tensor:
        ctx.spec = whole._spec
        return whole._local_tensor.view_as(whole._local_tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> DTensor:
        held = gradient.contiguous()
        return DTensor(held, ctx.spec, requires_grad=held.requires_grad)  # type: ignore[no-untyped-call]


def local_tensor(parameter: Tensor) -> Tensor:
    """Return the local tensor of a DTensor parameter, differentiably."""
    assert isinstance(parameter, DTensor), type(parameter)
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return parameter._local_tensor
    out: Tensor = _Local.apply(parameter)  # type: ignore[no-untyped-call]
    return out


def local_part(t: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor: the tensor itself, which no gradient watches."""
    assert isinstance(t, DTensor), type(t)
    return t._local_tensor


def rests_like(t: Tensor, parameter: Tensor) -> bool:
    """Say whether both are DTensors that rest alike, each rank with its own part or the whole."""
    if not (isinstance(t, DTensor) and isinstance(parameter, DTensor)):
        return False
    mine, theirs = t._spec, parameter._spec
    if mine is not theirs and (mine.mesh, mine.placements) != (theirs.mesh, theirs.placements):
        return False
    return not any(p.is_partial() for p in mine.placements)


def as_part_of(local: Tensor, parameter: Tensor) -> DTensor:
    """Return the DTensor that rests like a parameter and of which this rank holds `local`."""
    assert isinstance(parameter, DTensor), type(parameter)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def whole(leaf: Any) -> Any:
    """Return a DTensor as a whole tensor, which all ranks must ask for, and all else as it is."""
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf
