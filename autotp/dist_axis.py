"""DistAxis: an axis of real ranks, over a torch.distributed process group.

    DistAxis     the raw collectives of `autotp.axis` over a group, and over parts of it
    dist_axes    the axes of a DeviceMesh

Groups of a part of an axis are made by all ranks of the world together: `DistAxis.over_nodes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from autotp.axis import Axis, Finish
from autotp.cost_model.collectives import is_one_call
from autotp.liveness import last_node, lost

_FUNCTIONAL = torch.ops._c10d_functional  # the ops that torch.compile can trace


class DistAxis(Axis):
    """An axis over a process group; gloo has no native reduce-scatter, so it is built there.

    `everyone` are the ranks of all groups of this axis, this one's among them, in one order on all
    ranks of the world: what its two levels are made from.
    """

    def __init__(
        self, name: str, group: ProcessGroup, everyone: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__(name, group.size(), group.rank())
        self.group, self.everyone = group, everyone
        self.group_name: str = group.group_name
        self._sum_locally: bool = torch.distributed.get_backend(group) == "gloo"

    def algorithms(self, kind: str) -> tuple[str, ...]:
        """Return what a kind may be made of here beside its plain algorithm."""
        plain = "exchange" if self._sum_locally and kind == "reduce_scatter" else ""
        return tuple(by for by in super().algorithms(kind) if by != plain)

    def groups(self) -> list[ProcessGroup]:
        """Return the groups that this rank talks in: this axis's own, and those of its levels."""
        parts = [part for levels in self._over.values() for part in levels]
        return [self.group, *(part.group for part in parts if isinstance(part, DistAxis))]

    def _levels(self, members: int) -> tuple[Axis, Axis]:
        assert self.everyone, "an axis that was not told the ranks of its neighbours' groups"
        nodes = [g[k : k + members] for g in self.everyone for k in range(0, self.size, members)]
        places = [g[k::members] for g in self.everyone for k in range(members)]
        return (
            DistAxis(f"{self.name} inside nodes", _own_group(nodes)),
            DistAxis(f"{self.name} between nodes", _own_group(places)),
        )

    def _all_gather(self, x: Tensor) -> Tensor:
        return self._call(*self._started("all_gather", x))

    def _reduce_scatter(self, wire: Tensor) -> Tensor:
        return self._ended("reduce_scatter", self._call(*self._started("reduce_scatter", wire)))

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        return self._call("all_reduce", x, op)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return self._call("all_to_all_single", x, receive, send)

    def begin(self, kind: str, x: Tensor, by: str = "") -> Finish:
        """Begin a collective and return what waits for its end; raises LostRankError, both do.

        One that is made of several calls runs at once.
        """
        if x.is_complex() or torch.compiler.is_compiling() or not is_one_call(kind, by):
            return super().begin(kind, x, by)
        self._count(kind, x, x.nbytes * self.size if kind == "all_gather" else None, by)
        op, given, *rest = self._started(kind, x.contiguous(), by)
        start = getattr(_FUNCTIONAL, op + "_" * (kind == "all_reduce"))  # that one in place
        out = self._or_lost(op, lambda: start(given, *rest, self.group_name))
        return lambda: self._ended(kind, self._or_lost(op, lambda: _wait(out)), by)

    def _begin_permute(self, x: Tensor, send: list[int], receive: list[int]) -> Finish:
        if x.is_complex() or torch.compiler.is_compiling():
            return super()._begin_permute(x, send, receive)
        start = _FUNCTIONAL.all_to_all_single
        out = self._or_lost("permute", lambda: start(x, receive, send, self.group_name))
        return lambda: self._or_lost("permute", lambda: _wait(out))

    def _started(self, kind: str, x: Tensor, by: str = "") -> tuple[Any, ...]:
        """Return torch's op of a kind and its arguments."""
        ones = [1] * self.size
        if kind == "all_gather" and by:
            return "all_to_all_single", x.expand(self.size, *x.shape).contiguous(), ones, ones
        if kind == "all_gather":
            return "all_gather_into_tensor", x.unsqueeze(0), self.size
        if kind == "all_reduce":
            return "all_reduce", x, "sum"
        if self._sum_locally or by:  # gloo's own sends twice the bytes
            return "all_to_all_single", x, ones, ones
        return "reduce_scatter_tensor", x, "sum", self.size

    def _ended(self, kind: str, out: Tensor, by: str = "") -> Tensor:
        """Return the result of a kind from what torch's op returned."""
        if kind != "reduce_scatter":
            return out
        return out.sum(0, dtype=out.dtype) if self._sum_locally or by else out.squeeze(0)

    def _call(self, op: str, x: Tensor, *arguments: Any) -> Tensor:
        """Return what a collective returns, complex numbers sent as pairs.

        Raises LostRankError where a rank does not take part.
        """
        if x.is_complex():  # gloo sends none in an all-to-all
            pairs = torch.view_as_real(x.resolve_conj())
            return torch.view_as_complex(self._call(op, pairs, *arguments))
        start = getattr(_FUNCTIONAL, op)
        if torch.compiler.is_compiling():
            return _wait(start(x, *arguments, self.group_name))
        return self._or_lost(op, lambda: _wait(start(x, *arguments, self.group_name)))

    def _or_lost(self, op: str, run: Callable[[], Tensor]) -> Tensor:
        try:
            return run()
        except RuntimeError as error:
            node = last_node(sys._getframe())
            raise lost(f"{op} on axis {self.name!r}", node, error) from error


def _wait(pending: Tensor) -> Tensor:
    done: Tensor = _FUNCTIONAL.wait_tensor(pending)
    return done


def dist_axes(mesh: DeviceMesh, names: Sequence[str] = ()) -> dict[str, Axis]:
    """Return the axes of a DeviceMesh as this rank sees them, under `names` or the mesh's own."""
    named = tuple(names) or mesh.mesh_dim_names
    assert named is not None, "an unnamed mesh: autotp.grid names its axes first"
    return {
        name: DistAxis(name, mesh.get_group(a), groups_of(mesh, a)) for a, name in enumerate(named)
    }


def groups_of(mesh: DeviceMesh, axis: int) -> list[list[int]]:
    """Return the ranks of every group of an axis of a mesh."""
    groups: list[list[int]] = mesh.mesh.movedim(axis, -1).reshape(-1, mesh.size(axis)).tolist()
    return groups


def _own_group(parts: Sequence[Sequence[int]]) -> ProcessGroup:
    """Return this rank's group of those that divide the world; every rank calls it."""
    made = [(part, dist.new_group(list(part))) for part in parts]
    own: ProcessGroup
    (own,) = [group for part, group in made if dist.get_rank() in part]
    return own
