"""How each move is called: its function in `autotp.collectives`, and the arguments for one rank."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from autotp import collectives
from autotp.grid import Coords, Grid
from autotp.layouts import I, Layout, Shard, blocks_in, is_even, kind, local_ranges
from autotp.plan import PlannedMove
from autotp.sizes import length_here, varies

TARGETS: dict[tuple[str, str], Any] = {
    ("I", "R"): collectives.invariant_to_replicate,
    ("R", "I"): collectives.replicate_to_invariant,
    ("P", "I"): collectives.all_reduce,
    ("P", "R"): collectives.all_reduce,
    ("P", "S"): collectives.reduce_scatter,
    ("S", "R"): collectives.all_gather,
    ("S", "I"): collectives.all_gather,
    ("I", "S"): collectives.slice_to_shard,
    ("R", "S"): collectives.slice_to_shard,
    ("I", "P"): collectives.keep_one,
    ("R", "P"): collectives.keep_one,
    ("S", "P"): collectives.pad_to_partial,
    ("S", "S"): collectives.all_to_all,
}
"""The function that makes each move of `autotp.layouts.MOVES`."""


def move_args(
    move: PlannedMove, shape: Sequence[int], grid: Grid, coords: Coords
) -> dict[str, Any]:
    """Return the arguments of the function that makes `move` of a tensor of `shape`, by name.

    Where sizes vary they are Sizes; a length is given where the ranks may hold different ones.
    """
    axis = grid.axis(move.axis)
    before, after = move.before[axis], move.after[axis]
    gathered = functools.partial(_gathered, axis=axis, shape=shape, grid=grid, coords=coords)
    match kind(before), kind(after):
        case ("S", "S"):
            assert isinstance(before, Shard) and isinstance(after, Shard)
            concat_parts, concat_size = gathered(move.before, before.dim)
            return {
                "split_dim": after.dim,
                "concat_dim": before.dim,
                "split_parts": gathered(move.after, after.dim)[0],
                "concat_parts": concat_parts,
                "concat_size": concat_size,
            }
        case ("S", to):
            assert isinstance(before, Shard)
            parts, size = gathered(move.before, before.dim)
            tail = {} if to == "P" else {"to": to}
            return {"dim": before.dim, "parts": parts, "size": size, **tail}
        case (source, "S"):
            assert isinstance(after, Shard)
            parts, _size = gathered(move.after, after.dim)
            tail = {} if source == "P" else {"source": source}
            return {"dim": after.dim, "parts": parts, **tail}
        case (source, "P"):
            return {"source": source}
        case ("P", to):
            return {"to": to}
    return {}


def _gathered(
    layout: Layout, dim: int, axis: int, shape: Sequence[int], grid: Grid, coords: Coords
) -> tuple[tuple[int, ...], int | None]:
    """Return the blocks of `dim`, and its length if uneven, as they are without `axis`'s split."""
    without = tuple(I if a == axis else t for a, t in enumerate(layout))
    if varies([shape[dim]]):
        return (), length_here(shape[dim], without, dim, grid, coords)
    ranges = local_ranges(shape[dim], without, dim, grid, coords)
    parts = [b - a for a, b in blocks_in(ranges, layout, axis)]
    if len(parts) > 1:
        return tuple(parts), None
    return (), None if is_even(shape, layout, grid) else sum(parts)
