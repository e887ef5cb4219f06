"""The moves of a plan, in the order in which the emitted program needs them.

In: the layouts in which every value is made, shared and read. Out: for each value, the moves that
bring it to all of these, each made once however many readers it serves. A move stands right before
its first reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from autotp.cost_model.collectives import sent_bytes, wire_bytes_by
from autotp.grid import Grid
from autotp.layouts import Layout
from autotp.passes.move_table import MoveTable
from autotp.passes.moves import Moves, Step
from autotp.passes.network import Network, Value
from autotp.passes.pricing import is_recomputed
from autotp.plan import Decision, PlannedMove


@dataclass(frozen=True, slots=True)
class Needs:
    """In which layout a value is made, which its readers share, and which they read, in order.

    again   those that are first read where backward recomputes
    """

    made: Layout
    shared: Layout | None
    read: tuple[Layout, ...]
    again: frozenset[Layout] = frozenset()


def needs_of(
    network: Network,
    decisions: Sequence[Decision],
    sources: Mapping[str, Layout],
    copies: Mapping[str, Layout],
    outputs: Sequence[Layout | None],
) -> dict[str, Needs]:
    """Return the layouts of every value, in graph order of their first reader."""
    made = dict(sources)
    read: dict[str, list[Layout]] = {}
    again: dict[str, dict[Layout, bool]] = {}
    for op, decision in zip(network.ops, decisions, strict=True):
        made.update(zip(decision.makes, decision.results, strict=True))
        for value, layout in zip(decision.reads, decision.operands, strict=True):
            read.setdefault(value, []).append(layout)
            again.setdefault(value, {}).setdefault(layout, is_recomputed(network, op))
    for output, returned in zip(network.outputs, outputs, strict=True):
        if output and returned is not None:
            read.setdefault(output, []).append(returned)
    return {
        value: Needs(
            made[value],
            copies.get(value),
            tuple(dict.fromkeys(layouts)),
            frozenset(c for c, recomputed in again.get(value, {}).items() if recomputed),
        )
        for value, layouts in read.items()
    }


def schedule(
    network: Network, needs: Mapping[str, Needs], tables: Mapping[str, MoveTable], moves: Moves
) -> tuple[PlannedMove, ...]:
    """Return every move of the program, each once, in the order of need."""
    made_by = {v: op.name for op in network.ops for v in op.results}
    out: list[PlannedMove] = []
    for name, need in needs.items():
        value, table = network.values[name], tables.get(name)
        reached = {need.made}
        for before, after, again in _hops(need):
            if before != after:
                assert table is not None
                path = moves.path(table, before, after, value.shape, value.dtype)
                of = made_by.get(name, name)
                out += _unmade(value, of, before, path, reached, moves, again)
    return tuple(out)


def _hops(need: Needs) -> Iterable[tuple[Layout, Layout, bool]]:
    hub = need.shared if need.shared is not None else need.made
    moved = next((c for c in need.read if c != need.made), hub)
    yield need.made, hub, moved in need.again
    for layout in need.read:
        yield hub, layout, layout in need.again


def _unmade(
    value: Value,
    of: str,
    before: Layout,
    path: Sequence[Step],
    reached: set[Layout],
    moves: Moves,
    again: bool,
) -> list[PlannedMove]:
    """Return the moves of a path after the last layout on it that is there already."""
    out: list[PlannedMove] = []
    at = before
    for step in path:
        to = (*at[: step.axis], step.after, *at[step.axis + 1 :])
        out.append(_planned(value, of, (at, to), step, moves, again))
        if to in reached:
            out.clear()
        at = to
    reached.update(m.after for m in out)
    return out


def _planned(
    value: Value,
    of: str,
    ends: tuple[Layout, Layout],
    step: Step,
    moves: Moves,
    again: bool,
) -> PlannedMove:
    grid: Grid = moves.grid
    before, after = ends
    backward = step.backward if value.grad else "none"
    ways = [moves.algorithm(k, step.size_bytes, step.axis) for k in (step.forward, backward)]
    runs = [(step.forward, ways[0])] * (1 + again) + [(backward, ways[1])]
    kinds = [kind for kind, _ in runs]
    apart = moves.apart(value.name, value.shape, (step.before, step.after))
    return PlannedMove(
        value=value.name,
        of=of,
        axis=grid.names[step.axis],
        before=before,
        after=after,
        forward=step.forward,
        backward=backward,
        size_bytes=step.size_bytes,
        seconds=moves.move_s(kinds, step.size_bytes, step.axis, apart),
        sent=sent_of(runs, step.size_bytes, grid.sizes[step.axis], value.dtype.itemsize),
        again=again,
        by=ways[0],
        back_by=ways[1],
    )


def sent_of(
    runs: Sequence[tuple[str, str]], size_bytes: int, ranks: int, itemsize: int
) -> tuple[tuple[str, Fraction], ...]:
    """Return what collectives over one buffer send, each by its algorithm, summed by kind."""
    sent: dict[str, Fraction] = {}
    for kind, by in runs:
        wire = wire_bytes_by(kind, by, size_bytes, ranks, itemsize)
        if size := sent_bytes(kind, wire, ranks, by):
            sent[kind] = sent.get(kind, Fraction(0)) + size
    return tuple(sent.items())
