"""Products and the moves beside them: which pairs may be one call, and which of them are.

    legal      the schedules that a product and one move may take together
    fuse       the moves of a plan, those beside products with the schedule that is pinned

A pair is a gather of an operand that only the product reads, or the scatter of a result that only
the move reads. By `ring` the exchange hides behind the product, as much as the cluster is measured
to hide, for a call and a message per rank; by `panels` what is gathered is never whole, and is
gathered again in backward. Types, and so the search, are those of the two apart. Nothing is fused
that is not asked for: what a ring gains was not measured on enough links to choose it by its price.
The memory of a plan is counted as though each operand were gathered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autotp.cost_model.compute import op_s
from autotp.layouts import Layout, P, R, Shard, is_even, splitters
from autotp.passes.moves import Moves
from autotp.passes.network import Network, Op
from autotp.passes.pricing import PASSES, RESULT
from autotp.passes.schedule import sent_of
from autotp.plan import Decision, Plan, PlannedMove
from autotp.products import SCHEDULES, panels_of
from autotp.sizes import varies

aten = torch.ops.aten

ONCE = "once"
"""What is asked for to keep a move and its product apart."""

Wanted = Callable[[str, str, tuple[str, ...]], str | None]
"""From an op's name, an axis and the legal schedules the one that is asked for, None if none is."""


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


@dataclass(frozen=True, slots=True)
class Fused:
    """Moves with their schedules.

    busy   the ops, by number, beside which a ring runs already
    """

    moves: tuple[PlannedMove, ...]
    busy: frozenset[int] = frozenset()


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
                panels = panels_of(_chunk(network, m, planned))
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


def _chunk(network: Network, m: PlannedMove, planned: Moves) -> int:
    """Return the length of the dim that moves, on one rank, where it is a shard."""
    t, layout = _shard(m, planned.grid.axis(m.axis))
    size = int(network.values[m.value].shape[t.dim])
    for a in splitters(layout, t.dim):
        size //= planned.grid.sizes[a]
    return size


def products_that_move(plan: Plan) -> set[tuple[str, str, str]]:
    """Return the products of a plan that make a move themselves: name, axis and schedule."""
    within = [m for m in plan.moves if m.schedule]
    return {
        (d.name, m.axis, m.schedule)
        for m in within
        for d in plan.decisions
        if m.value in d.makes or (m.value, m.after) in zip(d.reads, d.operands, strict=True)
    }


# What is chosen ----------------------------------------------------------------------------------


def fuse(
    network: Network,
    decisions: Sequence[Decision],
    moves: Sequence[PlannedMove],
    pairs: Iterable[Pair],
    planned: Moves,
    wanted: Wanted,
) -> Fused:
    """Give each product, with one of its moves at most, the schedule that is asked for."""
    chosen: dict[int, tuple[Pair, str]] = {}
    for pair in pairs:
        asked = wanted(decisions[pair.op].name, moves[pair.move].axis, pair.schedules)
        if asked not in (None, ONCE) and pair.op not in chosen:
            chosen[pair.op] = (pair, asked)
    return _fused(network, decisions, moves, chosen.values(), planned)


def _fused(
    network: Network,
    decisions: Sequence[Decision],
    moves: Sequence[PlannedMove],
    chosen: Collection[tuple[Pair, str]],
    planned: Moves,
) -> Fused:
    out, busy = list(moves), set[int]()
    for pair, how in chosen:
        m, op = moves[pair.move], network.ops[pair.op]
        again = how == "panels" and _gathers_again(network, op, pair.slot)
        runs = [(m.forward, "")] * (1 + again) + [(m.backward, "")]
        ranks = planned.grid.sizes[planned.grid.axis(m.axis)]
        sent = sent_of(runs, m.size_bytes, ranks, network.values[m.value].dtype.itemsize)
        seconds = m.seconds + _added_s(network, decisions, moves, pair, how, planned)
        if how == "ring":
            busy.add(pair.op)
        out[pair.move] = replace(
            m, seconds=seconds, sent=sent, again=again, by="", back_by="", schedule=how
        )
    return Fused(tuple(out), frozenset(busy))


def _gathers_again(network: Network, op: Op, slot: int) -> bool:
    """Say whether backward needs what panels gathered: for the gradient of the other factor."""
    found = roles(op)
    assert found is not None
    if slot == RESULT or not network.values[op.results[0]].grad:
        return False
    other = found.weight if slot == found.x else found.x
    return network.values[op.operands[other]].grad


def _added_s(
    network: Network,
    decisions: Sequence[Decision],
    moves: Sequence[PlannedMove],
    pair: Pair,
    how: str,
    planned: Moves,
) -> float:
    """Return the seconds that a schedule adds to those of the move and the product apart.

    A ring's messages run beside the products of n - 1 of n blocks: that share of the shorter is
    hidden which was measured. Backward makes one product beside what it scatters and two beside
    what it gathers.
    """
    m, op, d = moves[pair.move], network.ops[pair.op], decisions[pair.op]
    axis = planned.grid.axis(m.axis)
    ranks = planned.grid.sizes[axis]
    training = network.values[op.results[0]].grad
    product_s = d.seconds / (PASSES if training else 1)
    call_s = float(op_s(0, 0, torch.float32, planned.cluster))
    blocks = ranks if how == "ring" else panels_of(_chunk(network, m, planned))
    calls = (blocks - 1) * call_s * (PASSES if training else 1)
    kinds = [k for k in (m.forward, m.backward) if k != "none"]
    if how == "panels":
        again = [m.forward] if _gathers_again(network, op, pair.slot) else []
        each = sum(planned.plain_s(k, m.size_bytes // blocks, axis) for k in [*kinds, *again])
        return each * blocks + calls - m.seconds
    ring_s = (ranks - 1) * planned.plain_s("permute", m.size_bytes // ranks, axis)
    beside = [product_s, (1 if pair.slot != RESULT else 2) * product_s][: len(kinds)]
    share = planned.cluster.overlap * (ranks - 1) / ranks
    hidden = sum(min(ring_s * ranks / (ranks - 1), p) * share for p in beside)
    return ring_s * len(kinds) + calls - hidden - m.seconds
