"""Whole tensors cut into the ranks' pieces by a layout, and pieces held against the whole.

The terms of a partial are random: nothing may depend on what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from autotp.grid import Coords, Grid
from autotp.layouts import AxisType, I, Layout, P, R, assemble, local_shape, take_shard

Pieces = Mapping[Coords, Tensor]
Closeness = Callable[[Tensor, Tensor], Tensor]
Mismatch = tuple[str, str]
"""Where, and what is wrong there."""


def dual(layout: Layout) -> Layout:
    """Return the layout of a value's gradient: R and P are each other's, S and I their own."""
    swapped: dict[AxisType, AxisType] = {R: P, P: R}
    return tuple(swapped.get(t, t) for t in layout)


def pieces_of(whole: Tensor, layout: Layout, grid: Grid) -> Pieces:
    """Cut `whole` into what each rank holds; the terms of a partial are random and sum to it."""
    plain = tuple(I if t is P else t for t in layout)
    pieces = {c: take_shard(whole, plain, grid, c) for c in grid.all_coords()}
    for axis, t in enumerate(layout):
        if t is P:
            pieces = _in_terms(pieces, axis, grid)
    return {c: pieces[_first_copy(c, layout)] for c in pieces}


def _in_terms(pieces: Pieces, axis: int, grid: Grid) -> dict[Coords, Tensor]:
    """Replace equal pieces along an axis by random terms with that sum."""
    out: dict[Coords, Tensor] = {}
    for coords, piece in pieces.items():
        if coords[axis]:
            continue
        others = [(*coords[:axis], k, *coords[axis + 1 :]) for k in range(1, grid.sizes[axis])]
        terms = {c: _random_like(piece) for c in others}
        out |= terms | {coords: piece - sum(terms.values())}
    return {c: out[c] for c in pieces}


def _random_like(x: Tensor) -> Tensor:
    drawn = x.is_floating_point() or x.is_complex()
    return torch.randn_like(x) if drawn else torch.randint_like(x, -9, 9)


def _first_copy(coords: Coords, layout: Layout) -> Coords:
    return tuple(0 if t in (R, I) else c for c, t in zip(coords, layout, strict=True))


def mismatches(
    what: str, pieces: Pieces, whole: Tensor, layout: Layout, grid: Grid, close: Closeness
) -> Iterator[Mismatch]:
    """Yield the first reason why `pieces` are not `whole` under `layout`."""
    for coords, piece in pieces.items():
        shape = local_shape(whole.shape, layout, grid, coords)
        if tuple(piece.shape) != shape or piece.dtype != whole.dtype:
            yield what, f"rank {coords}: {piece.dtype} {list(piece.shape)}, wanted {list(shape)}"
            return
        if not close(piece, pieces[_first_copy(coords, layout)]).all():
            yield what, f"rank {coords} differs from its copies"
            return
    joined = assemble(pieces, whole.shape, layout, grid)
    wrong = (~close(joined, whole)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        yield what, f"{joined[at].item():.6g}, wanted {whole[at].item():.6g}, at {list(at)}"


def is_close(a: Tensor, b: Tensor) -> Tensor:
    """Compare what was computed in float64."""
    return torch.isclose(a, b, rtol=1e-9, atol=1e-10, equal_nan=a.is_floating_point())


def is_roughly_close(a: Tensor, b: Tensor) -> Tensor:
    """Compare what was computed in less."""
    return torch.isclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=a.is_floating_point())
