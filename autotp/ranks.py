"""The process group: start it where torchrun asks for one, and check that all ranks agree."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autotp.errors import AutotpError, GridError, RuntimeStateError
from autotp.grid import AUTO, Grid, as_grid, is_open
from autotp.liveness import last_node, lost, watch
from autotp.version import VERSION

T = TypeVar("T")


def ensure_process_group(grid: Any, device_type: str) -> Grid:
    """Return `grid` as a Grid of as many ranks as the process group has.

    Initialises gloo (CPU) or nccl (GPU) from torchrun's environment, unless a group exists. Where
    a group exists first, what is wrong on one rank is raised on all.

    Raises GridError, and RuntimeStateError with the command to run when the process is one of none.
    """
    if not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    if dist.is_initialized():
        watch()
        refuse_disagreement("versions", versions(), "install the same versions on every machine")
    found = together(lambda: _as_grid(grid)) if dist.is_initialized() else _as_grid(grid)
    if not dist.is_initialized():
        if found.world_size > 1:
            raise RuntimeStateError(
                f"grid {found} needs {found.world_size} ranks",
                at=[("process", "was started alone: no process group, no RANK, no WORLD_SIZE")],
                remedy=torchrun(found.world_size),
            )
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    together(lambda: refuse_world(found, dist.get_world_size()))
    return found


def _as_grid(grid: Any) -> Grid:
    """Return `grid` as a Grid; one that is open as one axis of all its ranks."""
    return as_grid(open_ranks(grid) if is_open(grid) else grid)


def open_ranks(grid: Any) -> int:
    """Return the ranks of a grid that is open: as said, or those of the process group.

    Raises GridError for "auto" where there is no process group.
    """
    if grid != AUTO:
        return as_grid(grid).world_size
    if not dist.is_initialized():
        raise GridError(
            'grid="auto" takes all ranks of the process group, and there is none',
            at=[("process", "was started alone: no process group, no RANK, no WORLD_SIZE")],
            remedy=("say how many ranks: grid=4", torchrun(4)),
        )
    return dist.get_world_size()


def refuse_world(grid: Grid, world: int) -> None:
    """Raise GridError unless a process group of `world` ranks has as many as the grid."""
    if world != grid.world_size:
        product = " x ".join(str(s) for s in grid.sizes)
        raise GridError(
            f"grid {grid} needs {grid.world_size} ranks, the process group has {world}",
            at=[("grid", f"{product} = {grid.world_size}"), ("process group", f"{world} ranks")],
            remedy=(
                f"a grid of {world} ranks: {legal_grids(world)}",
                torchrun(grid.world_size),
            ),
        )


def torchrun(ranks: int) -> str:
    """Return the command that starts a script on so many ranks."""
    return f"torchrun --nproc-per-node={ranks} your_script.py"


def legal_grids(world: int) -> str:
    """Write the two-dimensional grids of `world` ranks."""
    return ", ".join(f"({a}, {world // a})" for a in range(1, world + 1) if world % a == 0)


def make_mesh(grid: Grid, device_type: str) -> DeviceMesh:
    """Return the device mesh of a grid; every rank calls it."""
    return init_device_mesh(device_type, grid.sizes, mesh_dim_names=grid.names)


def from_rank_0(value: Any) -> Any:
    """Return rank 0's `value` on every rank."""
    box = [value]
    _exchange(lambda: dist.broadcast_object_list(box, src=0))
    return box[0]


def together(make: Callable[[], T]) -> T:
    """Return this rank's `make()`; where it raises on any rank, raise on all, none left waiting.

    Without a process group there is this rank only.
    """
    value, mine = None, None
    try:
        value = make()
    except Exception as error:
        mine = error
    if dist.is_initialized():
        for rank, other in enumerate(gathered(_portable(mine))):
            if mine is None and other is not None:
                other.add_note(f"raised on rank {rank}")
                raise other
    if mine is not None:
        raise mine
    return cast(T, value)


def _portable(error: Exception | None) -> AutotpError | None:
    """Return an error as other ranks may raise it."""
    if error is None or isinstance(error, AutotpError):
        return error
    rank = dist.get_rank() if dist.is_initialized() else 0
    return RuntimeStateError(
        f"rank {rank} failed, and the others stop with it",
        at=[(f"rank {rank}", f"{type(error).__name__}: {error}")],
        remedy=f"see the traceback of rank {rank}",
    )


def gathered(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order."""
    everyone: list[Any] = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(everyone) > 1:
        _exchange(lambda: dist.all_gather_object(everyone, value))
    return everyone


def _exchange(call: Callable[[], None]) -> None:
    """Exchange objects. Raises LostRankError where a rank does not take part."""
    try:
        call()
    except RuntimeError as error:
        raise lost("an agreement of all ranks", last_node(sys._getframe()), error) from error


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all ranks: they decide plans and programs."""
    return {
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "autotp": VERSION,
    }


LISTED = 3
"""Differences that an error lists for each rank."""


def refuse_disagreement(what: str, mine: Mapping[str, str], remedy: str) -> None:
    """Raise RuntimeStateError on all ranks, naming those whose values differ from most ranks'."""
    everyone = gathered(dict(mine))
    most = max(everyone, key=everyone.count)
    usual = everyone.index(most)
    at = [
        (f"rank {rank}", fact)
        for rank, values in enumerate(everyone)
        for fact in _differences(values, most, usual)
    ]
    if at:
        raise RuntimeStateError(f"the ranks have different {what}", at=at, remedy=remedy)


def _differences(values: Mapping[str, str], usual: Mapping[str, str], rank: int) -> list[str]:
    names = [n for n in {**usual, **values} if values.get(n) != usual.get(n)]
    facts = [
        f"{n}: {values.get(n, 'absent')}, on rank {rank} {usual.get(n, 'absent')}"
        for n in names[:LISTED]
    ]
    return facts + [f"and {len(names) - LISTED} more"] * (len(names) > LISTED)


def digest(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=8).hexdigest()


def checksum(tensor: torch.Tensor) -> str:
    """Return a checksum that costs two reductions where the tensor is; none for a meta tensor."""
    if tensor.is_meta:
        return "meta"
    whole = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = int(torch.hash_tensor(whole.detach()).item())
    total = float(whole.detach().sum(dtype=torch.float64).item())
    return f"{bits:x} {total!r}"


def device_of(parameters: list[torch.Tensor]) -> torch.device:
    """Return the device on which parameters are; those on meta will be on the CPU."""
    kinds = [p.device for p in parameters if not p.is_meta]
    return kinds[0] if kinds else torch.device("cpu")
