"""Rules of ops that cut out or put in parts of a tensor: the dims that are cut are whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotp.passes.rules.table import Call, rule
from autotp.passes.rules.view import bracket, dims_of, shape_of

aten = torch.ops.aten


def spread(call: Call, first: int, second: int) -> tuple[str, str]:
    """Name a tensor of which two dims are whole, and what has one in their place, at the end."""
    dims = dims_of(call)
    whole = {call.arg(first, 0) % len(dims), call.arg(second, 1) % len(dims)}
    rest = [n for d, n in enumerate(dims) if d not in whole]
    return " ".join(bracket(dims, whole)), " ".join([*rest, "[k]"])


def diagonal(call: Call) -> str:
    """The two dims are whole, their diagonal stands at the end."""
    return " -> ".join(spread(call, 2, 3))


def put_diagonal(call: Call) -> str:
    """The two dims are whole, the diagonal that is put in has one, at the end."""
    left, right = spread(call, 3, 4)
    return f"{left}, {right} -> {left}"


def on_diagonal(call: Call) -> str:
    """The last dim is whole and becomes two."""
    dims, rank = dims_of(call), len(call.results[0].shape)
    at = {call.arg(2, -2) % rank, call.arg(3, -1) % rank}
    rest = iter(dims[:-1])
    right = [f"[k{d}]" if d in at else next(rest) for d in range(rank)]
    return f"{' '.join([*dims[:-1], '[k]'])} -> {' '.join(right)}"


def put_slice(call: Call) -> str:
    """The dim is whole in both."""
    return put_at(call, ["[s]"])


def put_select(call: Call) -> str:
    """The dim is whole; what is put in lacks it."""
    return put_at(call, [])


def put_at(call: Call, name: Sequence[str]) -> str:
    """Write a sentence in which the second operand has `name` for the dim at argument 2."""
    dims = dims_of(call)
    at = call.arg(2, 0) % len(dims)
    left = " ".join(bracket(dims, {at}))
    return f"{left}, {' '.join([*dims[:at], *name, *dims[at + 1 :]])} -> {left}"


def windows(call: Call) -> str:
    """The dim is whole and becomes the number of windows; their size stands at the end."""
    dims = dims_of(call)
    at = call.arg(1) % len(dims)
    right = ["[n]" if d == at else name for d, name in enumerate(dims)]
    return f"{' '.join(bracket(dims, {at}))} -> {' '.join([*right, '[w]'])}"


def turned(call: Call) -> str:
    """The two dims in whose plane it turns are whole."""
    dims = dims_of(call)
    whole = {d % len(shape_of(call)) for d in call.arg(2, (0, 1))}
    right = [f"[{n}_]" if d in whole else n for d, n in enumerate(dims)]
    return f"{' '.join(bracket(dims, whole))} -> {' '.join(right)}"


rule(aten.diag_embed.default, on_diagonal, linear="all", saves=())
rule(aten.diagonal.default, diagonal, linear="all", saves=(), free=True)
rule(aten.diagonal_scatter.default, put_diagonal, linear="all", saves=())
rule(aten.rot90.default, turned, linear="all", saves=())
rule(aten.select_scatter.default, put_select, linear="all", saves=())
rule(aten.slice_scatter.default, put_slice, linear="all", saves=())
rule(aten.trace.default, "[i] [j] -> ", linear="all", saves=())
rule(aten.unfold.default, windows, linear="all", saves=(), free=True)
