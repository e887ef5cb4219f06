"""What local programs send themselves: the all-reduces inside a split softmax, norm or loss."""

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
) -> Iterator[tuple[int, int]]:
    """Yield (axis, size in bytes) of every all-reduce that the op's program makes on one rank."""
    if op.rule.traffic is None or not any(f in op.rule.split for factors in split for f in factors):
        return
    local = local_call(op.call, operands, results, grid)
    for factor, size_bytes, backward in op.rule.traffic(local, frozenset(sum(split, ()))):
        if backward and not training:
            continue
        for axis, factors in enumerate(split):
            if factor in factors:
                yield axis, size_bytes


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
