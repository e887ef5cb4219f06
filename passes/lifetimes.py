"""The most bytes that one rank holds at once in a step, beside its parameters and their states.

A step of n ops has 4 n + 1 moments: before each op what moves to it, then the op; backward the same
in reverse; and the optimizer. Every tensor is a span of moments and a size (`Span`); the peak is
the largest sum.

    values      from their maker to their last reader, or to the backward of the first op that keeps
                them; a copy in another layout from its move on; views lie in what they show
    gradients   from the backward of the last reader to that of the maker; of parameters to the end
    scratch     what a loss makes inside, the buffer of a collective, which moves may share, the
                optimizer's temporaries
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from autotp.cost_model.collectives import FREE
from autotp.layouts import Layout, Shard
from autotp.passes.kept import Copy, needed_copies
from autotp.passes.network import Network
from autotp.plan import AT_ONCE, WHERE_MADE, Bucket, Decision, PlannedMove

LOSSES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd"})
"""Ops that make log-probabilities, and their gradient, as large as what they read."""

BUFFERED = frozenset({"all_gather", "all_to_all", "reduce_scatter"})
"""Collectives whose blocks are put in order by one more copy of their buffer, but along dim 0."""

EXCHANGED = frozenset({"reduce_scatter"})
"""Collectives that gloo makes of an exchange, which receives what it sends, and local sums."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that are held from one moment to another, both included."""

    start: int
    end: int
    size_bytes: int


@dataclass(slots=True)
class _Story:
    """When what is made and read, by the moment of forward; what is a view of what.

    received   the collectives that receive in a buffer of their own
    savers     the ops, by number, whose backward needs it
    arrives    of what moves in company, when all of it does
    """

    network: Network
    decisions: Sequence[Decision]
    moves: Sequence[PlannedMove]
    buckets: Sequence[Bucket]
    rest: Mapping[str, Layout]
    received: frozenset[str]
    made_by: dict[str, int] = field(default_factory=dict)
    readers: dict[Copy, list[int]] = field(default_factory=dict)
    savers: dict[Copy, list[int]] = field(default_factory=dict)
    shows: dict[Copy, Copy] = field(default_factory=dict)
    arrives: dict[Copy, int] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The moment of the optimizer."""
        return 4 * len(self.network.ops)

    def back(self, moment: int) -> int:
        """Return when backward does what forward did at a moment."""
        return self.end - 1 - moment

    def origin(self, held: Copy) -> Copy:
        """Return whose bytes these are: what a view shows, what a move of nothing leaves."""
        while held in self.shows:
            held = self.shows[held]
        return held


def peak_bytes(
    network: Network,
    decisions: Sequence[Decision],
    moves: Sequence[PlannedMove],
    buckets: Sequence[Bucket],
    outputs: Sequence[Layout | None],
    rest: Mapping[str, Layout],
    local_bytes: Callable[[str, Layout], int],
    optimizer_bytes: int,
    backend: str,
) -> int:
    """Return the most bytes at once; `rest` are the layouts of parameters, which count nothing.

    `optimizer_bytes` are what the optimizer takes for a moment at the end.
    """
    received = EXCHANGED if backend == "gloo" else frozenset[str]()
    story = _read(_Story(network, decisions, moves, buckets, rest, received), outputs)
    spans = [
        *_values(story, local_bytes),
        *_gradients(story, local_bytes),
        *_scratch(story, local_bytes),
        Span(story.end, story.end, optimizer_bytes),
    ]
    change = np.zeros(story.end + 2, dtype=np.int64)
    for span in spans:
        change[span.start] += span.size_bytes
        change[span.end + 1] -= span.size_bytes
    return int(change.cumsum().max())


def _read(story: _Story, outputs: Sequence[Layout | None]) -> _Story:
    """Fill in who makes and reads what; `outputs` are the layouts that the program returns."""
    network, decisions, moves = story.network, story.decisions, story.moves
    for move in moves:
        if move.forward == "none":
            story.shows[move.value, move.after] = (move.value, move.before)
    for n, (op, d) in enumerate(zip(network.ops, decisions, strict=True)):
        for value, layout in zip(op.results, d.results, strict=True):
            story.made_by[value] = n
            if op.rule.free and op.operands:
                story.shows[value, layout] = (op.operands[0], d.operands[0])
    for n, (op, d) in enumerate(zip(network.ops, decisions, strict=True)):
        for held in zip(op.operands, d.operands, strict=True):
            _note(story, story.readers, held, _runs(n))
        for held in needed_copies(network, op, d):
            _note(story, story.savers, held, n)
    for output, returned in zip(network.outputs, outputs, strict=True):
        if output and returned is not None:
            _note(story, story.readers, (output, returned), _runs(len(network.ops) - 1))
    for move in reversed(moves):
        after = story.origin((move.value, move.after))
        if after in story.readers:
            _note(story, story.readers, (move.value, move.before), _moved_at(story, after))
    for bucket in story.buckets:
        company = [(moves[n].value, moves[n].after) for n in bucket.moves]
        together = min(_moved_at(story, story.origin(held)) for held in company)
        story.arrives.update(dict.fromkeys(company, together))
    return story


def _runs(op: int) -> int:
    """Return when an op runs, by its number: what moves to it does right before."""
    return 2 * op + 1


def _moved_at(story: _Story, held: Copy) -> int:
    """Return when a copy is made by a move: right before it is first read."""
    first = story.readers.get(held, [0])[0]
    return story.arrives.get(held, first - first % 2)


def _note(story: _Story, table: dict[Copy, list[int]], held: Copy, number: int) -> None:
    numbers = table.setdefault(story.origin(held), [])
    numbers.append(number)
    numbers.sort()


def _start(story: _Story, held: Copy) -> int:
    """Return when a copy is made, by an op or by a move."""
    value, layout = held
    maker = story.made_by.get(value)
    if maker is not None and layout in story.decisions[maker].results:
        return _runs(maker)
    return _moved_at(story, held)


def _values(story: _Story, local_bytes: Callable[[str, Layout], int]) -> Iterator[Span]:
    made = {
        story.origin(held)
        for op, d in zip(story.network.ops, story.decisions, strict=True)
        for held in zip(op.results, d.results, strict=True)
    }
    for held in dict.fromkeys([*story.readers, *story.savers, *sorted(made, key=str)]):
        value, layout = held
        if story.rest.get(value) == layout:
            continue
        start = _start(story, held)
        end = max([start, *story.readers.get(held, [])])
        size = local_bytes(value, layout)
        saved = story.savers.get(held, [])
        regions = {story.network.ops[n].region for n in saved}
        if saved and "" in regions:
            first = min(n for n in saved if not story.network.ops[n].region)
            end = story.back(_runs(first))
        elif saved:  # made again when backward comes to the region
            yield Span(story.back(_runs(max(saved))), story.back(_runs(min(saved))), size)
        yield Span(start, end, size)


def _gradients(story: _Story, local_bytes: Callable[[str, Layout], int]) -> Iterator[Span]:
    for (value, layout), readers in story.readers.items():
        if not story.network.values[value].grad:
            continue
        start, size = story.back(readers[-1]), local_bytes(value, layout)
        if story.rest.get(value) == layout:
            yield Span(start, story.end, size)
        else:
            yield Span(start, story.back(_start(story, (value, layout))), size)
    for value, layout in story.rest.items():
        if story.network.values[value].grad and (value, layout) not in story.readers:
            yield Span(story.end, story.end, local_bytes(value, layout))


def _scratch(story: _Story, local_bytes: Callable[[str, Layout], int]) -> Iterator[Span]:
    for n, (op, d) in enumerate(zip(story.network.ops, story.decisions, strict=True)):
        if op.call.op.name().partition("::")[2].partition(".")[0] in LOSSES:
            size = local_bytes(op.operands[0], d.operands[0])
            moments = [_runs(n)]
            if story.network.values[op.results[0]].grad:
                moments.append(story.back(_runs(n)))
            yield from (Span(moment, moment, size) for moment in moments)
    yield from _buffers(story)


def _buffers(story: _Story) -> Iterator[Span]:
    """Yield the buffers of collectives, each where it moves forward or back."""
    shared = {n for bucket in story.buckets for n in bucket.moves}
    for n, move in enumerate(story.moves):
        if n in shared:
            continue
        moment = _moved_at(story, story.origin((move.value, move.after)))
        apart = 0 if _in_order(move) else move.size_bytes
        for at, kind in ((moment, move.forward), (story.back(moment), move.backward)):
            yield Span(at, at, (kind in BUFFERED) * apart)
            yield Span(at, at, (kind in story.received) * move.size_bytes)
        if (move.forward, move.backward) == ("none", "all_reduce"):  # the sum beside its term
            yield Span(story.back(moment), story.back(moment), move.size_bytes)
    for bucket in story.buckets:
        yield from _shared_buffers(story, bucket)


def _shared_buffers(story: _Story, bucket: Bucket) -> Iterator[Span]:
    """Yield the buffers of a call for several moves: there when all are, and while it is begun."""
    move = story.moves[bucket.moves[0]]
    moment = story.arrives[move.value, move.after]
    members = [story.moves[n] for n in bucket.moves]
    apart = sum(m.size_bytes for m in members if not _in_order(m))
    for at, kind in ((moment, bucket.forward), (story.back(moment), bucket.backward)):
        copies = (kind not in FREE) + (kind in story.received)
        yield Span(at, at, copies * bucket.size_bytes + (kind in BUFFERED) * apart)
    if bucket.forward in FREE or bucket.begins in (AT_ONCE, WHERE_MADE):
        return
    begun = [d.name for d in story.decisions].index(bucket.begins)
    yield Span(2 * begun, moment - 1, bucket.size_bytes)
    if bucket.backward not in FREE:
        copies = 1 + (bucket.backward in story.received)
        yield Span(story.back(moment) + 1, story.back(2 * begun), copies * bucket.size_bytes)


def _in_order(move: PlannedMove) -> bool:
    """Say whether the blocks of a move's buffer lie in the tensor's own order: along dim 0."""
    changed = zip(move.before, move.after, strict=True)
    shards = [t for pair in changed for t in pair if pair[0] != pair[1] and isinstance(t, Shard)]
    return all(t.dim == 0 and not t.parts for t in shards)
