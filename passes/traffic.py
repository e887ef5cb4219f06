"""What local programs send themselves: inside a split softmax, norm, loss or attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from autotp.grid import Grid
from autotp.layouts import Layout, largest_shape
from autotp.passes.network import Op
from autotp.passes.rules import Call, Tensor


def internal_traffic(
    op: Op,
    split: Sequence[tuple[str, ...]],
    operands: Sequence[Layout],
    results: Sequence[Layout],
    grid: Grid,
    training: bool,
) -> Iterator[tuple[int, str, int, int]]:
    """Yield (axis, collective, bytes, times) of all that the op's program sends on one rank.

    In a checkpoint region what it sends forward is sent again when backward recomputes it.
    """
    if op.rule.traffic is None or not op.rule.runs(split):
        return
    axes: dict[str, list[int]] = {}
    for axis, factors in enumerate(split):
        together = (" ".join(factors),) if len(factors) > 1 else ()
        for factor in (*factors, *together):
            axes.setdefault(factor, []).append(axis)
    local = local_call(op.call, operands, results, grid)
    ranks = {f: tuple(grid.sizes[a] for a in on) for f, on in axes.items()}
    for m in op.rule.traffic(local, ranks):
        if training or not m.backward:
            on = axes.get(m.factor, [])
            for axis in on if m.level is None else on[m.level : m.level + 1]:
                again = bool(op.region) and training and not m.backward
                yield axis, m.kind, m.size_bytes, m.times * (1 + again)


def local_call(
    call: Call, operands: Sequence[Layout], results: Sequence[Layout], grid: Grid
) -> Call:
    """Return a call with the shapes that the largest rank holds."""
    layouts = iter(operands)
    return replace(
        call,
        operands=tuple(t and _local(t, next(layouts), grid) for t in call.operands),
        results=tuple(_local(t, c, grid) for t, c in zip(call.results, results, strict=True)),
    )


def _local(t: Tensor, layout: Layout, grid: Grid) -> Tensor:
    return Tensor(largest_shape(t.shape, layout, grid), t.dtype)
