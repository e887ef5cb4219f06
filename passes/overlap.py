"""What runs beside what: moves that are begun early, and how much of their time is hidden.

In: the moves of a plan and the buckets that they share. Out: more buckets, of one move each; of
each where it begins, and the seconds hidden. A bucket that begins early runs beside the ops between
there and its first reader, forward and backward:

    shards of parameters         begin as many ops before their reader as hide the all-gather, at
                                   most AHEAD gathers before; the reduce-scatter is awaited as late
    parameters as they rest      begin before all ops; their gradients are awaited last
    activations of products      begin where they are made; the sum of their gradients runs beside
                                   the gradients of the products' weights (`autotp.late`)

An op hides one collective at a time. Of what runs side by side the cluster hides a share of the
shorter (`Cluster.overlap`, measured): where that is zero nothing begins early, but for gradients
that are awaited in any case.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autotp.cost_model.collectives import is_one_call
from autotp.layouts import Layout
from autotp.passes.coalesce import Coalesced
from autotp.passes.kept import Copy
from autotp.passes.moves import Moves
from autotp.passes.network import Network, Op
from autotp.passes.products import Roles, roles
from autotp.passes.sharing import may_hide
from autotp.plan import AT_ONCE, WHERE_MADE, Bucket, Decision, PlannedMove
from autotp.sizes import varies

AHEAD = 8
"""Readers of other gathers between the begin of a gather and its end: those of about one layer."""

PAIR_OPS = 8
"""What two calls for one move cost in Python, a late weight among them, in overheads of an op.

Source: 145 us more than one call, where a pass of an op takes 17.6 us: CPU, both under load.
"""

Busy = Mapping[int, tuple[float, float]]
"""Products that make a move themselves, by number: the seconds that it runs beside them already,
forward and backward."""

OF_WEIGHT = 1 / 2
"""The share of a product's backward that makes the gradient of its weight."""


def overlap(
    found: Coalesced,
    rest: Mapping[str, Layout],
    network: Network,
    decisions: Sequence[Decision],
    planned: Moves,
    busy: Busy,
) -> Coalesced:
    """Begin early what may be, and note what is hidden; `rest` says how parameters rest."""
    if not planned.cluster.overlap:
        return found
    reads: dict[str, list[tuple[int, Layout]]] = {}
    makers: dict[str, int] = {}
    for n, d in enumerate(decisions):
        makers.update(dict.fromkeys(d.makes, n))
        for value, layout in zip(d.reads, d.operands, strict=True):
            reads.setdefault(value, []).append((n, layout))
    given = network, decisions, planned, reads, makers, busy
    program = _Program(found.moves, rest, *given, *_chains(found))
    products = sorted(program.of_products(), key=program.first_reader)
    params = [*found.buckets, *program.of_parameters()]
    params.sort(key=program.first_reader)
    idle = _Idle.of(decisions, busy)
    made = [program.beside_products(b, idle) for b in products]
    made += program.before_readers([b for b in params if program.is_gather(b)], idle)
    made += [program.beside_backward(b, idle) for b in params if not program.is_gather(b)]
    made = sorted((b for b in made if b.begins or len(b.moves) > 1), key=lambda b: b.moves)
    return replace(found, buckets=tuple(made))


def _chains(found: Coalesced) -> tuple[dict[Copy, list[int]], dict[int, Bucket]]:
    """Return the moves that start from each copy, and the call that a move shares, if it does."""
    onward: dict[Copy, list[int]] = {}
    for n, m in enumerate(found.moves):
        onward.setdefault((m.value, m.before), []).append(n)
    return onward, {n: b for b in found.buckets for n in b.moves}


def late_roles(
    op: Op, network: Network, params: Collection[str], moves: Iterable[PlannedMove]
) -> Roles | None:
    """Return the roles of a product whose weight's gradient may be made late; None for another op.

    It is a trained parameter, and not made again: what makes its gradient late would hold it.
    """
    found = roles(op)
    if found is None or op.call.kwargs:
        return None
    weight = op.operands[found.weight]
    is_trained = weight in params and network.values[weight].grad
    is_held = is_trained and not any(m.again and m.value == weight for m in moves)
    return found if is_held else None


@dataclass(frozen=True, slots=True)
class _Idle:
    """The seconds of each op beside which nothing runs yet, forward and backward."""

    forward: list[float]
    backward: list[float]

    @classmethod
    def of(cls, decisions: Sequence[Decision], busy: Busy) -> _Idle:
        """Return the seconds of all ops, but for those that are busy already."""
        idle = cls([d.seconds - d.backward_s for d in decisions], [d.backward_s for d in decisions])
        for op, (forward_s, backward_s) in busy.items():
            idle.forward[op] = max(0.0, idle.forward[op] - forward_s)
            idle.backward[op] = max(0.0, idle.backward[op] - backward_s)
        return idle


def _hide(
    idle: list[float], wanted: float, ops: Iterable[int], share: float = 1.0
) -> tuple[float, int | None]:
    """Take up to `wanted` seconds of ops, a share of each; return what was taken, and the last."""
    taken, last = 0.0, None
    for n in ops:
        if taken >= wanted:
            break
        part = min(wanted - taken, idle[n] * share)
        if part > 0:
            idle[n] -= part
            taken, last = taken + part, n
    return taken, last


@dataclass(frozen=True, slots=True)
class _Program:
    """The moves and ops of a plan, in the order of need: which ops read a value, which makes it.

    onward, shared   see `_chains`
    firsts           the first readers of calls, by their moves, as far as they were asked for
    """

    moves: Sequence[PlannedMove]
    rest: Mapping[str, Layout]
    network: Network
    decisions: Sequence[Decision]
    planned: Moves
    reads: Mapping[str, Sequence[tuple[int, Layout]]]
    makers: Mapping[str, int]
    busy: Busy
    onward: Mapping[Copy, Sequence[int]]
    shared: Mapping[int, Bucket]
    firsts: dict[tuple[int, ...], int] = field(default_factory=dict)

    # Which may begin early ----------------------------------------------------------------------

    def of_products(self) -> Iterable[Bucket]:
        """Yield a bucket for each move that may be hidden of activations that products read."""
        return (self._alone(n, m) for n, m in self._apart() if self._feeds_products(m))

    def of_parameters(self) -> Iterable[Bucket]:
        """Yield a bucket for each move that may be hidden of a parameter as it rests."""
        return (self._alone(n, m) for n, m in self._apart() if self.rest.get(m.value) == m.before)

    def _apart(self) -> Iterable[tuple[int, PlannedMove]]:
        """Yield the moves that may run beside ops, and share no call."""
        for n, m in enumerate(self.moves):
            ranks = self.planned.grid.sizes[self.planned.grid.axis(m.axis)]
            may = ranks > 1 and not m.schedule and may_hide(m.forward, m.backward, m.again)
            if may and n not in self.shared:
                yield n, m

    def _alone(self, n: int, m: PlannedMove) -> Bucket:
        ways = m.axis, m.forward, m.backward
        return Bucket(*ways, (n,), m.size_bytes, m.seconds, AT_ONCE, m.by, m.back_by)

    def is_gather(self, bucket: Bucket) -> bool:
        """Say whether a bucket gathers shards of parameters as they rest."""
        moves = (self.moves[n] for n in bucket.moves)
        rests = all(self.rest.get(m.value) == m.before for m in moves)
        return rests and bucket.forward != "none"

    def _feeds_products(self, m: PlannedMove) -> bool:
        """Say whether a move brings activations, outside of regions, to products of parameters."""
        if m.value in self.rest or varies(self.network.values[m.value].shape):
            return False
        near = [*self.readers(m), *([self.makers[m.value]] if m.value in self.makers else [])]
        return not any(self.decisions[n].region for n in near) and bool(self._late_products(m))

    def _late_products(self, m: PlannedMove) -> list[int]:
        ops = ((n, self.network.ops[n]) for n in self.readers(m) if n not in self.busy)
        return [n for n, op in ops if self._is_late(op, m.value)]

    def _is_late(self, op: Op, value: str) -> bool:
        found = late_roles(op, self.network, self.rest, self.moves)
        return found is not None and op.operands[found.x] == value

    def readers(self, m: PlannedMove) -> list[int]:
        """Return the ops that read what a move makes, else those that read what it moves."""
        reads = self.reads.get(m.value, [])
        return [n for n, layout in reads if layout == m.after] or [n for n, _ in reads]

    def first_reader(self, bucket: Bucket) -> int:
        """Return the first op before which a bucket must be there: what reads what it makes.

        Or what a call makes of it later, for other tensors too: in backward their gradients all
        come before those of the bucket.
        """
        if bucket.moves not in self.firsts:
            every = (self._first_reader_of(n) for n in bucket.moves)
            self.firsts[bucket.moves] = min(every, default=len(self.decisions))
        return self.firsts[bucket.moves]

    def _first_reader_of(self, n: int) -> int:
        m = self.moves[n]
        ops = self.readers(m)
        for then in self.onward.get((m.value, m.after), ()):
            call = self.shared.get(then)
            ops = [*ops, self.first_reader(call) if call else self._first_reader_of(then)]
        return min(ops, default=len(self.decisions))

    # What they run beside -----------------------------------------------------------------------

    def beside_products(self, b: Bucket, idle: _Idle) -> Bucket:
        """Begin where it is made what products read."""
        ops = self._late_products(self.moves[b.moves[0]])
        return self._early(b, WHERE_MADE, self._beside(b, idle, ops, OF_WEIGHT))

    def beside_backward(self, b: Bucket, idle: _Idle) -> Bucket:
        """Await last the gradients of parameters, if they are awaited."""
        if b.begins == AT_ONCE:
            return b
        ops = range(self.first_reader(b) - 1, -1, -1)
        return replace(b, hidden_s=self.planned.cluster.overlap * self._beside(b, idle, ops))

    def before_readers(self, gathers: Sequence[Bucket], idle: _Idle) -> list[Bucket]:
        """Begin gathers, which come in the order of need, before their readers."""
        out, readers = [], [0]
        for b in gathers:
            first = self.first_reader(b)
            if first != readers[-1]:
                readers.append(first)
            limit = readers[max(0, len(readers) - 1 - AHEAD)]
            before = range(first - 1, limit - 1, -1)
            taken, last = _hide(idle.forward, self._call_s(b.forward, b), before)
            begins = self._outside_regions(last, first)
            if begins is not None:
                taken += self._beside(b, idle, range(first - 1, begins - 1, -1))
                b = self._early(b, self.decisions[begins].name, taken)
            out.append(b)
        return out

    def _outside_regions(self, op: int | None, end: int) -> int | None:
        """Return the first op from `op` on, before `end`, that lies in no checkpoint region."""
        if op is None:
            return None
        return next((n for n in range(op, end) if not self.decisions[n].region), None)

    def _early(self, b: Bucket, begins: str, beside_s: float) -> Bucket:
        """Begin a bucket early if that hides more than the second call takes."""
        if not (is_one_call(b.forward, b.by) and is_one_call(b.backward, b.back_by)):
            return b
        cluster = self.planned.cluster
        hidden_s = cluster.overlap * beside_s - PAIR_OPS * cluster.op_overhead_s
        return replace(b, begins=begins, hidden_s=hidden_s) if hidden_s > 0 else b

    def _beside(self, b: Bucket, idle: _Idle, ops: Iterable[int], share: float = 1.0) -> float:
        """Take the seconds of ops whose backward runs while that of a bucket is on its way."""
        return _hide(idle.backward, self._call_s(b.backward, b), ops, share)[0]

    def _call_s(self, kind: str, b: Bucket) -> float:
        return self.planned.kind_s(kind, b.size_bytes, self.planned.grid.axis(b.axis))
