"""What DTensor computes without moving an operand: the only place that knows torch's private names.

A call runs for each of two ranks of a fake process group on the pieces of its operands. Whoever
asks for a redistribution is refused, so what is returned was computed where the operands lie.
"""

import contextlib
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    _dispatch,
    _redistribute,
    debug,
)
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree

from autotp.grid import Grid
from autotp.layouts import I, P, shard
from autotp.passes.pieces import pieces_of

PAIR = Grid(("col",), (2,))


class MovedError(Exception):
    """DTensor would redistribute an operand."""


def refuse(*args, **kwargs):
    raise MovedError


@contextlib.contextmanager
def fake_ranks():
    """Yield a mesh of two ranks in one process, on which nothing may be redistributed."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with (
            mock.patch.object(_dispatch, "redistribute_local_tensor", refuse),
            mock.patch.object(_redistribute, "redistribute_local_tensor", refuse),
            sdpa_kernel(SDPBackend.MATH),
            implicit_replication(),
            torch.no_grad(),
        ):
            yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def as_rank(mesh, rank):
    """Be a rank of the mesh: what was cached for the other holds local shapes of its own."""
    debug._clear_python_sharding_prop_cache()
    debug._clear_fast_path_sharding_prop_cache()
    with mock.patch.object(mesh, "_coordinate_on_dim", (rank,)):
        yield


def tensors_of(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def cut(whole, kind):
    """Return what each rank holds of a tensor."""
    pieces = pieces_of(whole.detach(), (kind,), PAIR)
    return pieces[0,].contiguous(), pieces[1,].contiguous()


def run(mesh, op, args, kwargs, types, pieces):
    """Return a rank's results of a call on `pieces` of `types`, or None if one would move."""
    given = zip(types, pieces, strict=True)

    def place(x):
        return _placed(mesh, x, *next(given)) if isinstance(x, Tensor) else x

    try:
        made = op(*pytree.tree_map(place, args), **pytree.tree_map(place, kwargs))
    except Exception:  # whatever it raises, it does not compute the call where it lies
        return None
    return tensors_of(made)


def _placed(mesh, whole, kind, piece):
    return DTensor.from_local(
        piece, mesh, [placement(kind)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def placement(kind):
    """Return DTensor's placement of one of our types."""
    if kind is P:
        return Partial()
    return Replicate() if kind is I else Shard(kind.dim)


def text(result):
    """Name the placement of a result as this page does."""
    if not isinstance(result, DTensor):
        return "local"
    (found,) = result.placements
    if type(found) is Shard:
        return str(shard(found.dim))
    if isinstance(found, Partial):
        return "P" if _how(found) == "sum" else f"P({_how(found)})"
    return "R" if isinstance(found, Replicate) else str(_in_blocks(result, found))


def _in_blocks(result, strided):
    """Return a strided shard in our words: a chunk of each of its blocks."""
    count = strided.split_factor
    return shard(strided.dim, (result.shape[strided.dim] // count,) * count)


def _how(partial):
    """Name what reduces the terms of a partial."""
    power = getattr(partial, "norm_type", None)
    return partial.reduce_op if power is None else f"norm {power:g}"


def joined(ranks, k):
    """Join what the ranks hold of result `k`, or return None where the ranks differ in a copy."""
    first, second = (made[k] for made in ranks)
    kind = text(first)
    if kind == "local":
        return first
    (found,), pieces = first.placements, [first.to_local(), second.to_local()]
    if isinstance(found, Shard):
        return torch.cat(pieces, found.dim) if _fit(*pieces, found.dim) else None
    if isinstance(found, Partial):
        return _reduced(pieces, _how(found)) if pieces[0].shape == pieces[1].shape else None
    if isinstance(found, Replicate):
        return pieces[0] if _same(*pieces) else None
    blocks = [x.unflatten(found.dim, (found.split_factor, -1)) for x in pieces]
    return torch.cat(blocks, found.dim + 1).flatten(found.dim, found.dim + 1)


def _fit(a, b, dim):
    return a.ndim == b.ndim and all(
        m == n for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if d != dim
    )


def _reduced(pieces, how):
    stacked = torch.stack([p.double() if p.dtype is torch.bool else p for p in pieces])
    if how in ("max", "min"):
        return getattr(torch, f"a{how}")(stacked, 0)
    if how.startswith("norm"):
        return torch.linalg.vector_norm(stacked, float(how.split()[1]), 0)
    return stacked.prod(0) if how == "product" else stacked.sum(0) / (2 if how == "avg" else 1)


def _same(a, b):
    return a.shape == b.shape and torch.allclose(a, b, equal_nan=True)


def is_right(ranks, wholes):
    """Say whether the ranks together hold the results of the call on whole operands."""
    if {len(made) for made in ranks} != {len(wholes)}:
        return False
    for k, whole in enumerate(wholes):
        found = joined(ranks, k)
        if found is None or found.shape != whole.shape:
            return False
        if not torch.allclose(found.to(whole.dtype), whole, 1e-4, 1e-6, equal_nan=True):
            return False
    return True
