"""Products and the moves beside them: which pairs may be one call.

    legal      the schedules that a product and one move may take together
    movable    the values that products may move, by which collectives

A pair is a gather of an operand that only the product reads, or the scatter of a result that only
the move reads: what others read too is moved once for all of them, before the product. By `ring`
the exchange runs beside the product; by `panels` what is moved is never whole, and what was
gathered is gathered again in backward. Types are those of the two apart.
`passes.product_prices` says what either takes, `passes.calls` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from autotp.layouts import Layout, P, R, Shard, is_even, splitters
from autotp.passes.moves import Moves
from autotp.passes.network import Network, Op
from autotp.passes.pricing import RESULT
from autotp.plan import Decision, Plan, PlannedMove
from autotp.products import SCHEDULES, panels_of
from autotp.sizes import varies

aten = torch.ops.aten

ONCE = "once"
"""What is asked for to keep a move and its product apart."""

Within = tuple[PlannedMove, int]
"""The move that a product makes itself, and of which of its operands or of its RESULT."""


@dataclass(frozen=True, slots=True)
class Roles:
    """Which operands of a product are x, the weight and the bias, and how the weight lies."""

    x: int
    weight: int
    bias: int | None
    transposed: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """A product, by number, and a move of its operand `slot`, or of its result."""

    op: int
    move: int
    slot: int
    schedules: tuple[str, ...]


def roles(op: Op) -> Roles | None:
    """Return what the operands of a plain product are, None for an op that is no such product."""
    plain = not op.call.kwargs
    if op.call.op is aten.linear.default:
        return Roles(0, 1, 2 if len(op.operands) == 3 else None, transposed=True)
    if op.call.op is aten.mm.default:
        return Roles(0, 1, None, transposed=False)
    if op.call.op is aten.addmm.default and plain and len(op.call.args) == 3:
        return Roles(1, 2, 0, transposed=False)
    return None


# What is legal -----------------------------------------------------------------------------------


def legal(
    network: Network,
    decisions: Sequence[Decision],
    moves: Sequence[PlannedMove],
    copies: Mapping[str, Layout],
    outputs: Sequence[Layout | None],
    planned: Moves,
) -> Iterator[Pair]:
    """Yield the pairs of a plan that one call may make, and by which schedules."""
    readers = _readers(network, decisions, moves, copies, outputs)
    moved: dict[str, list[int]] = {}
    for k, m in enumerate(moves):
        moved.setdefault(m.value, []).append(k)
    for n, (op, d) in enumerate(zip(network.ops, decisions, strict=True)):
        if roles(op) is None or op.region or d.again:
            continue
        values = dict.fromkeys((*op.operands, op.results[0]))
        for k, m in ((k, moves[k]) for v in values for k in moved.get(v, ())):
            slot = pair_slot(op, d, m)
            if slot is None or m.again or not _is_even(network, m, planned):
                continue
            at = (m.value, m.before if slot == RESULT else m.after)
            if readers[at] == 1 and d.split[planned.grid.axis(m.axis)]:
                panels = panels_of(chunk_of(network, m, planned))
                schedules = tuple(s for s in SCHEDULES if s != "panels" or panels > 1)
                yield Pair(n, k, slot, schedules)


def pair_slot(op: Op, d: Decision, m: PlannedMove) -> int | None:
    """Return the operand of a product that a move gathers for it, or RESULT; None for no pair."""
    found = roles(op)
    if found is None:
        return None
    axis = d.axes.index(m.axis)
    ends = m.before[axis], m.after[axis]
    if m.value == op.results[0]:
        fits = ends[0] is P and isinstance(ends[1], Shard) and not ends[1].parts
        return RESULT if fits and m.before == d.results[0] else None
    for slot in (found.x, found.weight):
        if op.operands[slot] == m.value and d.operands[slot] == m.after:
            return (
                slot if isinstance(ends[0], Shard) and not ends[0].parts and ends[1] is R else None
            )
    return None


def _readers(
    network: Network,
    decisions: Sequence[Decision],
    moves: Sequence[PlannedMove],
    copies: Mapping[str, Layout],
    outputs: Sequence[Layout | None],
) -> dict[tuple[str, Layout], int]:
    """Return how often a value is read in a layout: by ops, by moves, as shared or returned."""
    out: dict[tuple[str, Layout], int] = {}

    def read(value: str, layout: Layout) -> None:
        out[value, layout] = out.get((value, layout), 0) + 1

    for d in decisions:
        for value, layout in zip(d.reads, d.operands, strict=True):
            read(value, layout)
    for m in moves:
        read(m.value, m.before)
    for value, layout in copies.items():
        read(value, layout)
    for output, returned in zip(network.outputs, outputs, strict=True):
        if output and returned is not None:
            read(output, returned)
    return out


def _shard(m: PlannedMove, axis: int) -> tuple[Shard, Layout]:
    """Return the shard that a move leaves or makes, and the layout that has it."""
    layout = m.before if isinstance(m.before[axis], Shard) else m.after
    t = layout[axis]
    assert isinstance(t, Shard)
    return t, layout


def _is_even(network: Network, m: PlannedMove, planned: Moves) -> bool:
    """Say whether all ranks hold equal plain chunks of the dim that moves."""
    t, layout = _shard(m, planned.grid.axis(m.axis))
    shape = network.values[m.value].shape
    others = [layout[a] for a in splitters(layout, t.dim)]
    plain = not any(isinstance(o, Shard) and o.parts for o in others)
    alone = planned.grid.sizes[planned.grid.axis(m.axis)] > 1
    return plain and alone and not varies(shape) and is_even(shape, layout, planned.grid)


def chunk_of(network: Network, m: PlannedMove, planned: Moves) -> int:
    """Return the length of the dim that moves, on one rank, where it is a shard."""
    t, layout = _shard(m, planned.grid.axis(m.axis))
    size = int(network.values[m.value].shape[t.dim])
    for a in splitters(layout, t.dim):
        size //= planned.grid.sizes[a]
    return size


def movable(network: Network) -> dict[str, frozenset[str]]:
    """Return by which collectives, forward, products may move a value that they read or make."""
    out: dict[str, frozenset[str]] = {}
    for op in network.ops:
        found = None if op.region else roles(op)
        if found is not None:
            for slot in (found.x, found.weight):
                value = op.operands[slot]
                out[value] = out.get(value, frozenset()) | {"all_gather"}
            made = op.results[0]
            out[made] = out.get(made, frozenset()) | {"reduce_scatter"}
    for output in network.outputs:
        out.pop(output or "", None)
    return out


def moves_within(op: Op, d: Decision, moves: Iterable[PlannedMove]) -> Within | None:
    """Return which of these moves a product makes itself."""
    for m in moves:
        slot = pair_slot(op, d, m) if m.schedule else None
        if slot is not None:
            return m, slot
    return None


def products_that_move(plan: Plan) -> set[tuple[str, str, str]]:
    """Return the products of a plan that make a move themselves: name, axis and schedule."""
    within = [m for m in plan.moves if m.schedule]
    return {
        (d.name, m.axis, m.schedule)
        for m in within
        for d in plan.decisions
        if (m.value, m.before if m.forward == "reduce_scatter" else m.after)
        in zip((*d.makes, *d.reads), (*d.results, *d.operands), strict=True)
    }
