"""The most bytes that one rank holds at once in a step, beside its parameters and their states.

A step of n ops has 2 n + 1 moments: each op's forward, each op's backward in reverse, and the
optimizer. Every tensor is a span of moments and a size (`Span`); the peak is the largest sum.

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
from autotp.plan import Bucket, Decision, PlannedMove

LOSSES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd"})
"""Ops that make log-probabilities, and their gradient, as large as what they read."""

BUFFERED = frozenset({"all_gather", "all_to_all", "reduce_scatter"})
"""Collectives whose blocks are put in order by one more copy of their buffer, but along dim 0."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that are held from one moment to another, both included."""

    start: int
    end: int
    size_bytes: int


@dataclass(slots=True)
class _Story:
    """Who makes and reads what, by the number of the op; what is a view of what.

    arrives    of what moves in company, before which op all of it is there
    """

    network: Network
    decisions: Sequence[Decision]
    moves: Sequence[PlannedMove]
    buckets: Sequence[Bucket]
    rest: Mapping[str, Layout]
    made_by: dict[str, int] = field(default_factory=dict)
    readers: dict[Copy, list[int]] = field(default_factory=dict)
    savers: dict[Copy, list[int]] = field(default_factory=dict)
    shows: dict[Copy, Copy] = field(default_factory=dict)
    arrives: dict[Copy, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.network.ops)

    def back(self, op: int) -> int:
        """Return the moment of an op's backward."""
        return 2 * self.count - 1 - op

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
) -> int:
    """Return the most bytes at once; `rest` are the layouts of parameters, which count nothing.

    `optimizer_bytes` are what the optimizer takes for a moment at the end.
    """
    story = _read(_Story(network, decisions, moves, buckets, rest), outputs)
    spans = [
        *_values(story, local_bytes),
        *_gradients(story, local_bytes),
        *_scratch(story, local_bytes),
        Span(2 * story.count, 2 * story.count, optimizer_bytes),
    ]
    change = np.zeros(2 * story.count + 2, dtype=np.int64)
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
            _note(story, story.readers, held, n)
        for held in needed_copies(network, op, d):
            _note(story, story.savers, held, n)
    for output, returned in zip(network.outputs, outputs, strict=True):
        if output and returned is not None:
            _note(story, story.readers, (output, returned), story.count - 1)
    for move in reversed(moves):  # what is moved on is read where that is first read
        if first := story.readers.get(story.origin((move.value, move.after))):
            _note(story, story.readers, (move.value, move.before), first[0])
    for bucket in story.buckets:
        after = [(moves[n].value, moves[n].after) for n in bucket.moves]
        first_of_all = min(story.readers.get(story.origin(held), [0])[0] for held in after)
        story.arrives.update(dict.fromkeys(after, first_of_all))
    return story


def _note(story: _Story, table: dict[Copy, list[int]], held: Copy, op: int) -> None:
    numbers = table.setdefault(story.origin(held), [])
    numbers.append(op)
    numbers.sort()


def _start(story: _Story, held: Copy) -> int:
    """Return where a value is made, or moved: right before the first reader of what moves so."""
    value, layout = held
    maker = story.made_by.get(value)
    if maker is not None and layout in story.decisions[maker].results:
        return maker
    return story.arrives.get(held, story.readers.get(held, [0])[0])


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
            end = story.back(min(n for n in saved if not story.network.ops[n].region))
        elif saved:  # made again when backward comes to the region
            yield Span(story.back(max(saved)), story.back(min(saved)), size)
        yield Span(start, end, size)


def _gradients(story: _Story, local_bytes: Callable[[str, Layout], int]) -> Iterator[Span]:
    for (value, layout), readers in story.readers.items():
        if not story.network.values[value].grad:
            continue
        start, size = story.back(readers[-1]), local_bytes(value, layout)
        if story.rest.get(value) == layout:
            yield Span(start, 2 * story.count, size)
        else:
            yield Span(start, story.back(_start(story, (value, layout))), size)
    for value, layout in story.rest.items():
        if story.network.values[value].grad and (value, layout) not in story.readers:
            yield Span(2 * story.count, 2 * story.count, local_bytes(value, layout))


def _scratch(story: _Story, local_bytes: Callable[[str, Layout], int]) -> Iterator[Span]:
    for n, (op, d) in enumerate(zip(story.network.ops, story.decisions, strict=True)):
        if op.call.op.name().partition("::")[2].partition(".")[0] in LOSSES:
            size = local_bytes(op.operands[0], d.operands[0])
            yield Span(n, n, size)
            if story.network.values[op.results[0]].grad:
                yield Span(story.back(n), story.back(n), size)
    yield from _buffers(story)


def _buffers(story: _Story) -> Iterator[Span]:
    """Yield the buffers of collectives: where what was moved is read, and where that goes back."""
    at = [story.readers.get(story.origin((move.value, move.after)), [0])[0] for move in story.moves]
    shared = {n for bucket in story.buckets for n in bucket.moves}
    for n, move in enumerate(story.moves):
        if n not in shared and not _in_order(move):
            if move.forward in BUFFERED:
                yield Span(at[n], at[n], move.size_bytes)
            if move.backward in BUFFERED:
                yield Span(story.back(at[n]), story.back(at[n]), move.size_bytes)
    for bucket in story.buckets:  # what they share is there when all are, first and last
        move = story.moves[bucket.moves[0]]
        first = story.arrives[move.value, move.after]
        if bucket.forward not in FREE:
            yield Span(first, first, bucket.size_bytes)
        if bucket.backward not in FREE:
            yield Span(story.back(first), story.back(first), bucket.size_bytes)


def _in_order(move: PlannedMove) -> bool:
    """Say whether the blocks of a move's buffer lie in the tensor's own order: along dim 0."""
    changed = zip(move.before, move.after, strict=True)
    shards = [t for pair in changed for t in pair if pair[0] != pair[1] and isinstance(t, Shard)]
    return all(t.dim == 0 and not t.parts for t in shards)
