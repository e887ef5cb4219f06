"""What a plan asks of the dims that vary: every split of a size that depends on them.

A choice that splits a merged dim, or blocks, divides its unit; a plain dim may be cut unevenly, but
leaves no rank empty. Splits that follow from another are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from autotp.dynamic import Dynamic, DynamicDim, DynamicSplit
from autotp.grid import Grid
from autotp.layouts import Layout, Shape, splitters
from autotp.passes.choices import Strategy
from autotp.passes.network import Network
from autotp.passes.program import Program
from autotp.plan import Decision, PlannedMove
from autotp.sizes import Size

Split = tuple[int, tuple[int, ...]]
"""A size and the ranks of the axes that split it, outermost first."""


def requirements(
    program: Program,
    network: Network,
    strategies: Sequence[Strategy],
    decisions: Sequence[Decision],
    moves: Sequence[PlannedMove],
    outputs: Mapping[str, Layout],
    grid: Grid,
) -> Dynamic:
    """Return the named dims of a program and the splits that a plan makes of them."""
    if not program.varying:
        return Dynamic()
    even = dict.fromkeys(s for strategy in strategies for s in _units(strategy, grid))
    held = [
        *((v, c) for d in decisions for v, c in zip(d.reads, d.operands, strict=True)),
        *((v, c) for d in decisions for v, c in zip(d.makes, d.results, strict=True)),
        *((m.value, c) for m in moves for c in (m.before, m.after)),
        *outputs.items(),
    ]
    shapes = {name: value.shape for name, value in network.values.items()}
    plain = dict.fromkeys(s for v, c in held for s in _splits(shapes[v], c, grid))
    splits = [DynamicSplit(program.spell(n), ranks, True) for n, ranks in _strongest(even)]
    splits += [
        DynamicSplit(program.spell(n), ranks, False)
        for n, ranks in plain
        if not any(_follows(n, ranks, other) for other in even)
    ]
    dims = tuple(DynamicDim(v.name, v.least, v.most) for v in program.varying)
    return Dynamic(dims, tuple(sorted(splits, key=lambda s: (s.size, not s.even, s.ranks))))


def _units(strategy: Strategy, grid: Grid) -> Iterator[Split]:
    """Yield the varying units that axes share out."""
    for choice in strategy.choices:
        if isinstance(choice.unit, Size):
            sharing = [a for a, c in enumerate(strategy.choices) if c.name == choice.name]
            yield choice.unit, _ranks(sharing, grid)


def _splits(shape: Shape, layout: Layout, grid: Grid) -> Iterator[Split]:
    """Yield the varying sizes of a tensor that axes split."""
    for dim, n in enumerate(shape):
        ranks = _ranks(splitters(layout, dim), grid)
        if isinstance(n, Size) and ranks:
            yield n, ranks


def _ranks(axes: Iterable[int], grid: Grid) -> tuple[int, ...]:
    return tuple(grid.sizes[a] for a in axes if grid.sizes[a] > 1)


def _strongest(splits: Iterable[Split]) -> list[Split]:
    """Return one split per size: a multiple of all."""
    merged: dict[int, int] = {}
    for n, ranks in splits:
        merged[n] = math.lcm(merged.get(n, 1), math.prod(ranks))
    return [(n, (ranks,)) for n, ranks in merged.items() if ranks > 1]


def _follows(n: int, ranks: Sequence[int], even: Split) -> bool:
    """Say whether a size that is a multiple of an even one can be split as well."""
    unit, divisor = even
    return bool(n % unit == 0) and math.prod(divisor) % math.prod(ranks) == 0
