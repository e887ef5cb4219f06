"""The process group: start it where torchrun asks for one, and check that all ranks agree."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autotp.errors import AutotpError, GridError, RuntimeStateError
from autotp.grid import Grid

T = TypeVar("T")


def ensure_process_group(grid: Grid, device_type: str) -> None:
    """Initialise gloo (CPU) or nccl (GPU) from torchrun's environment, unless a group exists.

    Raises RuntimeStateError, with the command to run, when the process is one of none; GridError
    when the grid does not have as many ranks as the group.
    """
    if not dist.is_initialized():
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
        elif grid.world_size == 1:
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        else:
            raise RuntimeStateError(
                f"grid {grid} needs {grid.world_size} ranks and this process was started alone",
                remedy=f"torchrun --nproc-per-node={grid.world_size} your_script.py",
            )
    world = dist.get_world_size()
    if world != grid.world_size:
        raise GridError(
            f"grid {grid} has {grid.world_size} ranks, the process group {world}",
            remedy=f"a grid of {world}: {legal_grids(world)}, or "
            f"torchrun --nproc-per-node={grid.world_size}",
        )


def legal_grids(world: int) -> str:
    """Write the two-dimensional grids of `world` ranks."""
    return ", ".join(f"({a}, {world // a})" for a in range(1, world + 1) if world % a == 0)


def make_mesh(grid: Grid, device_type: str) -> DeviceMesh:
    """Return the device mesh of a grid; every rank calls it."""
    return init_device_mesh(device_type, grid.sizes, mesh_dim_names=grid.names)


def from_rank_0(value: Any) -> Any:
    """Return rank 0's `value` on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def together(make: Callable[[], T]) -> T:
    """Return this rank's `make()`; where it raises on any rank, raise on all, none left waiting."""
    value, mine = None, None
    try:
        value = make()
    except Exception as error:
        mine = error
    for rank, other in enumerate(_gathered(_portable(mine))):
        if mine is None and other is not None:
            other.add_note(f"raised on rank {rank}")
            raise other
    if mine is not None:
        raise mine
    return cast(T, value)


def _portable(error: Exception | None) -> AutotpError | None:
    if error is None or isinstance(error, AutotpError):
        return error
    return RuntimeStateError(f"{type(error).__name__}: {error}")


def _gathered(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order."""
    everyone: list[Any] = [value] * dist.get_world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def refuse_disagreement(what: str, mine: Mapping[str, str], remedy: str) -> None:
    """Raise RuntimeStateError on all ranks, naming those whose values differ from rank 0's."""
    first, *others = _gathered(dict(mine))
    at = [(f"rank {rank}", _difference(first, o)) for rank, o in enumerate(others, 1) if o != first]
    if at:
        raise RuntimeStateError(f"the ranks have different {what}", at=at, remedy=remedy)


def _difference(first: Mapping[str, str], other: Mapping[str, str]) -> str:
    names = [n for n in {**first, **other} if first.get(n) != other.get(n)]
    here, there = (values.get(names[0], "absent") for values in (other, first))
    more = f", and {len(names) - 1} more" if names[1:] else ""
    return f"{names[0]}: {here}, rank 0 {there}{more}"


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
