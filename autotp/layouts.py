"""Layouts: one type per mesh axis for every tensor, and the moves between them.

    S(d)  shard       a block of dim d          its gradient is S(d)
    R     replicate   the whole tensor          its gradient is P
    I     invariant   the whole tensor          its gradient is I
    P     partial     a term of a sum           its gradient is R

The types are those of the `spmd_types` package. A shard may be blockwise: `parts` are the sizes of
the blocks that lie side by side in the dim (the q, k and v of a fused projection), and every rank
holds its chunk of each block. An outer axis may hold whole blocks of a dim that an inner one splits
inside: the b blocks of s rows of `(b s)` under `S(0), S(0:b*s)`. `MOVES` fixes what each change of
type sends, forward and backward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from autotp.grid import Coords, Grid

Shape = tuple[int, ...]
Range = tuple[int, int]


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """This rank holds a chunk of each of `parts` of `dim`; no parts means one, the whole dim."""

    dim: int
    parts: tuple[int, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.dim >= 0 and len(self.parts) != 1, self
        object.__setattr__(self, "_hash", hash((self.dim, self.parts)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"S({self.dim})" if not self.parts else f"S({self.dim}:{parts_text(self.parts)})"


@dataclass(frozen=True, slots=True)
class Whole:
    """A type without a dim: R, I or P."""

    name: str
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", ord(self.name))  # hash(str) differs in other processes

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return self._hash

    __repr__ = __str__


R = Whole("R")
I = Whole("I")  # noqa: E741 - the field's name for it
P = Whole("P")

AxisType = Shard | Whole
Layout = tuple[AxisType, ...]
"""One type per axis of the grid, in the grid's order. Of two axes on one dim the first is outer."""


def parts_text(parts: tuple[int, ...]) -> str:
    """Write the sizes of blocks: `3*768` when they are equal, else `512|128|128`."""
    return f"{len(parts)}*{parts[0]}" if len(set(parts)) == 1 else "|".join(map(str, parts))


def shard(dim: int, parts: Sequence[int] = ()) -> Shard:
    """Return the shard of `dim` in `parts`, where one part is the plain contiguous shard."""
    return Shard(dim, tuple(parts) if len(parts) > 1 else ())


def parse_type(text: str) -> AxisType:
    """Read what `str` of an axis type writes.

    >>> parse_type("S(1:3*4)"), parse_type("R")
    (Shard(dim=1, parts=(4, 4, 4)), R)
    """
    if text in ("R", "I", "P"):
        return {"R": R, "I": I, "P": P}[text]
    dim, _, blocks = text.removeprefix("S(").removesuffix(")").partition(":")
    if "*" in blocks:
        count, size = map(int, blocks.split("*"))
        return Shard(int(dim), (size,) * count)
    return Shard(int(dim), tuple(int(b) for b in blocks.split("|") if b))


def layout_text(layout: Layout) -> str:
    """Write a layout, one type per axis: `S(0),R`."""
    return ",".join(str(t) for t in layout)


def parse_layout(text: str) -> Layout:
    """Read what `layout_text` writes."""
    return tuple(parse_type(t) for t in text.split(","))


# Which elements a rank holds -------------------------------------------------------------------


def chunk(size: int, ranks: int, index: int) -> Range:
    """Return the half-open range of chunk `index`: torch.chunk's ceil(size / ranks) each."""
    step = -(-size // ranks)
    return min(index * step, size), min((index + 1) * step, size)


def splitters(layout: Layout, dim: int) -> tuple[int, ...]:
    """Return the axes that shard `dim`, outermost first."""
    return tuple(a for a, t in enumerate(layout) if isinstance(t, Shard) and t.dim == dim)


def dim_parts(size: int, layout: Layout, dim: int) -> tuple[int, ...]:
    """Return the sizes of the blocks of `dim`, one block when the shard is plain or absent."""
    for t in layout:
        if isinstance(t, Shard) and t.dim == dim and t.parts:
            return t.parts
    return (size,)


def local_ranges(size: int, layout: Layout, dim: int, grid: Grid, coords: Coords) -> list[Range]:
    """Return the ranges of `dim`, in the whole tensor, that the rank at `coords` holds in order."""
    out = [(0, size)]
    for axis in splitters(layout, dim):
        chunks = []
        for low, high in blocks_in(out, layout, axis):
            a, b = chunk(high - low, grid.sizes[axis], coords[axis])
            chunks.append((low + a, low + b))
        out = chunks
    return out


def blocks_in(ranges: Sequence[Range], layout: Layout, axis: int) -> list[Range]:
    """Cut `ranges` of a dim where a block of the axis that splits it ends."""
    t = layout[axis]
    assert isinstance(t, Shard)
    ends = list(itertools.accumulate(t.parts))
    out: list[Range] = []
    for low, high in ranges:
        cuts = [low, *(end for end in ends if low < end < high), high]
        out += itertools.pairwise(cuts)
    return out


def local_size(size: int, layout: Layout, dim: int, grid: Grid, coords: Coords) -> int:
    """Return how long `dim` is on the rank at `coords`."""
    if not splitters(layout, dim):
        return size
    return sum(b - a for a, b in local_ranges(size, layout, dim, grid, coords))


def local_shape(shape: Sequence[int], layout: Layout, grid: Grid, coords: Coords) -> Shape:
    """Return the shape of what the rank at `coords` holds of a tensor of `shape`."""
    return tuple(local_size(n, layout, d, grid, coords) for d, n in enumerate(shape))


def largest_shape(shape: Sequence[int], layout: Layout, grid: Grid) -> Shape:
    """Return the local shape of rank 0, the largest under ceil chunks; of varying sizes as now."""
    sizes = [int(n) for n in shape]
    ranks = [1] * len(sizes)
    for t, count in zip(layout, grid.sizes, strict=True):
        if isinstance(t, Shard):
            ranks[t.dim] *= count
    if all(n % count == 0 for n, count in zip(sizes, ranks, strict=True)):
        return tuple(n // count for n, count in zip(sizes, ranks, strict=True))
    return local_shape(sizes, layout, grid, (0,) * len(grid.sizes))


def is_valid(shape: Sequence[int], layout: Layout, grid: Grid) -> bool:
    """Say whether a tensor of `shape` can have `layout`: blocks even, no rank left with nothing.

    Outer axes of a dim may hold whole blocks of it, if all blocks are equal.
    """
    for dim in {t.dim for t in layout if isinstance(t, Shard)}:
        if dim >= len(shape) or not _dim_is_valid(int(shape[dim]), layout, dim, grid):
            return False
    return True


def _dim_is_valid(size: int, layout: Layout, dim: int, grid: Grid) -> bool:
    axes = splitters(layout, dim)
    parts = dim_parts(size, layout, dim)
    if len(parts) > 1:
        return _blocks_are_valid(size, layout, parts, axes, grid)
    return is_valid_size(size, [grid.sizes[a] for a in axes])


def is_valid_size(size: int, ranks: Sequence[int]) -> bool:
    """Say whether axes of so many ranks, outermost first, can split a dim and leave none empty."""
    if size % math.prod(ranks) == 0:
        return size > 0
    sizes = {size}
    for count in ranks:
        steps = {n: -(-n // count) for n in sizes}
        last = {n - (count - 1) * step for n, step in steps.items()}
        if min(last) <= 0:
            return False
        sizes = last | set(steps.values() if count > 1 else ())
    return True


def _blocks_are_valid(
    size: int, layout: Layout, parts: tuple[int, ...], axes: Sequence[int], grid: Grid
) -> bool:
    own = [t.parts for a in axes if isinstance(t := layout[a], Shard)]
    outer = next(k for k, p in enumerate(own) if p)
    holders, ranks = (math.prod(grid.sizes[a] for a in on) for on in (axes[:outer], axes[outer:]))
    if outer and (len(set(parts)) > 1 or len(parts) % holders):
        return False
    same = all(p == parts for p in own[outer:])
    return same and sum(parts) == size and all(p % ranks == 0 for p in parts)


def is_even(shape: Sequence[int], layout: Layout, grid: Grid) -> bool:
    """Say whether every rank holds the same number of elements."""
    return all(
        int(n) % math.prod(grid.sizes[a] for a in splitters(layout, d)) == 0
        for d, n in enumerate(shape)
    )


def take_shard(whole: torch.Tensor, layout: Layout, grid: Grid, coords: Coords) -> torch.Tensor:
    """Return what the rank at `coords` holds of `whole`; a partial is all on rank 0 of its axis."""
    out = whole
    for dim, size in enumerate(whole.shape):
        if splitters(layout, dim):
            ranges = local_ranges(size, layout, dim, grid, coords)
            blocks = [out.narrow(dim, a, b - a) for a, b in ranges]
            out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim)
    if any(t is P and coords[a] for a, t in enumerate(layout)):
        out = torch.zeros_like(out)
    return out.contiguous()


def assemble(
    pieces: Mapping[Coords, torch.Tensor], shape: Sequence[int], layout: Layout, grid: Grid
) -> torch.Tensor:
    """Return the whole tensor from every rank's piece: blocks placed, partials summed."""
    first = pieces[(0,) * len(grid.sizes)]
    whole = first.new_zeros(tuple(shape))
    for coords in grid.all_coords():
        if any(c for c, t in zip(coords, layout, strict=True) if t in (R, I)):
            continue  # a copy of what another rank gave
        index = [
            torch.cat([torch.arange(a, b) for a, b in local_ranges(n, layout, d, grid, coords)])
            for d, n in enumerate(shape)
        ]
        if whole.ndim == 0:
            whole += pieces[coords]
        else:
            whole[torch.meshgrid(*index, indexing="ij")] += pieces[coords]
    return whole


# Moves -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Move:
    """What one change of type does on one axis, and what its gradient does on the way back."""

    forward: str
    backward: str


_SHARD = "S"
MOVES: dict[tuple[str, str], Move] = {
    ("I", "R"): Move("none", "all_reduce"),
    ("R", "I"): Move("none", "keep_one"),
    ("P", "I"): Move("all_reduce", "none"),
    ("P", "R"): Move("all_reduce", "all_reduce"),
    ("P", "S"): Move("reduce_scatter", "all_gather"),
    ("S", "R"): Move("all_gather", "reduce_scatter"),
    ("S", "I"): Move("all_gather", "slice"),
    ("I", "S"): Move("slice", "all_gather"),
    ("R", "S"): Move("slice", "pad"),
    ("I", "P"): Move("keep_one", "none"),
    ("R", "P"): Move("keep_one", "keep_one"),
    ("S", "P"): Move("pad", "slice"),
    ("S", "S"): Move("all_to_all", "all_to_all"),
}


def kind(t: AxisType) -> str:
    """Return the letter of an axis type."""
    return _SHARD if isinstance(t, Shard) else t.name


def move_of(before: AxisType, after: AxisType) -> Move | None:
    """Return the move between two types of one axis, or None if there is no single one."""
    if before == after:
        return None
    return MOVES.get((kind(before), kind(after)))


def may_change(layout: Layout, axis: int, after: AxisType) -> bool:
    """Say whether `axis` may change to `after`: it must be innermost on every dim it touches."""
    touched = {t.dim for t in (layout[axis], after) if isinstance(t, Shard)}
    return not any(isinstance(t, Shard) and t.dim in touched for t in layout[axis + 1 :])
