"""The layers of a plan: which ops repeat, and which op each move belongs to.

A layer is a run of ops whose names share a path up to one integer, such as `transformer.h.3`;
layers in a row that choose the same, on the same shapes, are one Section. A move stands with the op
that makes its value, a parameter's with the op that reads it first; an input's belongs to no layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autotp.plan import Decision, Plan, PlannedMove

Placed = Mapping[str, tuple[PlannedMove, ...]]
"""Moves by the name of their op; under "" those of inputs, and those only of results."""


@dataclass(frozen=True, slots=True)
class Section:
    """Ops in a row: one layer of several alike, or ops that do not repeat.

    prefix   what the first layer's names begin with, such as `transformer.h.0.`
    name     the pattern of all layers, such as `transformer.h.{0..11}`; empty outside of layers
    layers   the ops of each layer
    """

    name: str
    prefix: str
    layers: tuple[tuple[Decision, ...], ...]

    @property
    def ops(self) -> tuple[Decision, ...]:
        """The ops of the first layer, which stand for all."""
        return self.layers[0]


def sections(plan: Plan, placed: Placed) -> list[Section]:
    """Return the ops of a plan in order, layers that are alike folded."""
    return list(_merge_single(_fold(plan, placed, plan.decisions, 0)))


def place_moves(plan: Plan) -> dict[str, tuple[PlannedMove, ...]]:
    """Return the moves that stand with each op, those of inputs and of results under "".

    Between a stack of layers and what follows it, a move stands with its reader, so that the last
    layer is like the others.
    """
    made = {v: d.name for d in plan.decisions for v in d.makes}
    params = {r.value for r in plan.params.values()}
    read: dict[str, str] = {}
    for d in plan.decisions:
        for v in d.reads:
            read.setdefault(v, d.name)
    placed: dict[str, list[PlannedMove]] = {}
    for move in plan.moves:
        maker, reader = made.get(move.value, ""), read.get(move.value, "")
        leaves = _stack(maker) is not None and _stack(maker) != _stack(reader)
        at = reader if move.value in params or leaves else maker
        placed.setdefault(at, []).append(move)
    return {name: tuple(moves) for name, moves in placed.items()}


def _stack(name: str) -> str | None:
    """Return the path of the stack of layers that an op is in, None if it is in none."""
    found = _layer(name, 0)
    return None if found is None else found[0]


def _layer(name: str, depth: int) -> tuple[str, int] | None:
    """Return the path before integer number `depth` of a name, and that integer."""
    parts = name.split(".")
    places = [k for k, part in enumerate(parts) if part.isdigit()]
    if depth >= len(places):
        return None
    k = places[depth]
    return "".join(f"{part}." for part in parts[:k]), int(parts[k])


def _fold(plan: Plan, placed: Placed, ops: Sequence[Decision], depth: int) -> Iterator[Section]:
    """Yield sections of `ops`, by the outermost integer that repeats anywhere."""
    if all(_layer(d.name, depth) is None for d in ops):
        yield Section("", "", (tuple(ops),))
        return
    runs: list[tuple[tuple[str, int] | None, tuple[Decision, ...]]] = [
        (key, tuple(run)) for key, run in itertools.groupby(ops, lambda d: _layer(d.name, depth))
    ]
    seen = [_signature(plan, placed, run, key) for key, run in runs]
    start = 0
    while start < len(runs):
        stop = start + 1
        while stop < len(runs) and _continues(runs[stop - 1][0], runs[stop][0]):
            if seen[stop] != seen[start]:
                break
            stop += 1
        key, ops_here = runs[start]
        if key is None or stop == start + 1:
            yield from _fold(plan, placed, ops_here, depth + 1)
        else:
            name = f"{key[0]}{{{key[1]}..{key[1] + stop - start - 1}}}"
            yield Section(name, f"{key[0]}{key[1]}.", tuple(run for _, run in runs[start:stop]))
        start = stop


def _continues(one: tuple[str, int] | None, two: tuple[str, int] | None) -> bool:
    return one is not None and two is not None and two == (one[0], one[1] + 1)


def _merge_single(found: Iterator[Section]) -> Iterator[Section]:
    """Join sections that do not repeat."""
    for repeats, group in itertools.groupby(found, lambda s: bool(s.name)):
        if repeats:
            yield from group
        else:
            yield Section("", "", (tuple(d for s in group for d in s.ops),))


def _signature(
    plan: Plan, placed: Placed, ops: Sequence[Decision], layer: tuple[str, int] | None
) -> Hashable:
    """Describe a run of ops and its moves free of names that differ between layers."""
    prefix = "" if layer is None else f"{layer[0]}{layer[1]}"
    params = {r.value: name for name, r in plan.params.items()}
    slots: dict[str, Hashable] = {}
    rows: list[Hashable] = []
    for d in ops:
        for v in d.reads:
            path = params.get(v, "")
            inside = path.startswith(f"{prefix}.")
            slots.setdefault(v, path.removeprefix(prefix) if inside else ("from", len(slots)))
        for k, v in enumerate(d.makes):
            slots[v] = (len(rows), k)
        rows.append(
            (
                d.name.removeprefix(prefix),
                (d.op, d.choices, d.split, d.operands, d.results, d.shapes, d.dtype),
                (d.region.removeprefix(prefix), d.again),
                tuple(slots[v] for v in d.reads),
                tuple(_move_signature(m, slots) for m in placed.get(d.name, ())),
                tuple(row[1:] for row in plan.internal if row[0] == d.name),
            )
        )
    return tuple(rows)


def _move_signature(m: PlannedMove, slots: Mapping[str, Hashable]) -> Hashable:
    ends = m.axis, m.before, m.after, m.forward, m.backward
    return slots[m.value], ends, m.size_bytes, m.again
