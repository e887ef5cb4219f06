"""Moves of parameters that share their collectives: buckets of what one call sends.

In: the moves of a plan in the order of need. Out: the same moves, and the buckets that they share.
Moves alike in axis, collectives, dtype and number of moves before them may share a call. Buckets
are filled in the order in which backward is done with them, so that gradients of one layer leave
together while the layers before it are still to come. A move joins the open bucket if that saves
time: the latency of a call, against the copy into a buffer. A bucket ends where its latency is
small beside its bytes (`Moves.full_bytes`). What is summed of parameters as they rest need not be
waited for before backward ends.

Which moves share, and what they run beside, is not known while the search runs. It takes each for a
call of its own, is then asked with each at the least that it may take (`sharing.best_s`), so that
the cost it finds is a lower bound of every plan, and at last with what plans turn out to pay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autotp.cost_model.collectives import FREE
from autotp.layouts import Layout
from autotp.passes.moves import Moves
from autotp.passes.network import Network
from autotp.passes.schedule import sent_of
from autotp.passes.sharing import may_share
from autotp.plan import AT_ONCE, WHERE_MADE, Bucket, PlannedMove

Key = tuple[str, str, str, torch.dtype, int]
"""What moves of one bucket have in common; the last is how many moves come before them."""


@dataclass(frozen=True, slots=True)
class Coalesced:
    """Moves with the seconds of the calls that they share, and these calls."""

    moves: tuple[PlannedMove, ...]
    buckets: tuple[Bucket, ...]

    @property
    def seconds(self) -> float:
        """What all of them take, but for what is hidden."""
        return sum(m.seconds for m in self.moves) - sum(b.hidden_s for b in self.buckets)


def coalesce(
    moves: Sequence[PlannedMove],
    rest: Mapping[str, Layout],
    network: Network,
    planned: Moves,
) -> Coalesced:
    """Put the moves of parameters, which rest as `rest` says, into buckets."""
    groups: dict[Key, list[int]] = {}
    before = _numbers_before(moves, rest)
    for n in sorted(before, reverse=True):
        m = moves[n]
        if (
            may_share(m.forward, m.backward, m.again)
            and not m.schedule
            and planned.grid.sizes[planned.grid.axis(m.axis)] > 1
        ):
            key = (m.axis, m.forward, m.backward, network.values[m.value].dtype, before[n])
            groups.setdefault(key, []).append(n)
    out, buckets = list(moves), list[Bucket]()
    for key, numbers in groups.items():
        for members in _filled(moves, numbers, planned):
            begins = WHERE_MADE if key[-1] == 0 and key[1] == "none" else AT_ONCE
            if begins or len(members) > 1:
                buckets.append(_bucket(moves, members[::-1], planned, begins))
    for bucket in buckets:
        for n in bucket.moves:
            out[n] = _in_bucket(moves[n], bucket, network, planned)
    buckets.sort(key=lambda b: b.moves)
    return Coalesced(tuple(out), tuple(buckets))


def _numbers_before(moves: Sequence[PlannedMove], rest: Mapping[str, Layout]) -> dict[int, int]:
    """Return, of each move of a parameter, how many come before it from where it rests."""
    steps = {(value, layout): 0 for value, layout in rest.items()}
    out = {}
    for n, m in enumerate(moves):
        if m.value in rest:
            out[n] = steps[m.value, m.before]
            steps.setdefault((m.value, m.after), out[n] + 1)
    return out


def _filled(
    moves: Sequence[PlannedMove], numbers: Sequence[int], planned: Moves
) -> Iterator[list[int]]:
    """Yield the members of each bucket of moves that are alike."""
    members: list[int] = []
    size = 0
    for n in numbers:
        m = moves[n]
        if members and not _is_better(m, size, len(members), planned):
            yield members
            members, size = [], 0
        members.append(n)
        size += m.size_bytes
    if members:
        yield members


def _is_better(m: PlannedMove, size: int, count: int, planned: Moves) -> bool:
    """Say whether a move should join a bucket of `count` moves and `size` bytes."""
    axis = planned.grid.axis(m.axis)
    kinds = [k for k in (m.forward, m.backward) if k not in FREE]
    if any(size + m.size_bytes > planned.full_bytes(k, axis) for k in kinds):
        return False
    apart = _calls_s(m, size, count, planned) + _calls_s(m, m.size_bytes, 1, planned)
    return _calls_s(m, size + m.size_bytes, count + 1, planned) < apart


def _calls_s(m: PlannedMove, size: int, count: int, planned: Moves) -> float:
    """Return the seconds of `count` moves like `m` of together `size` bytes, both ways."""
    axis = planned.grid.axis(m.axis)
    sending = [k for k in (m.forward, m.backward) if k not in FREE]
    price = planned.plain_s if _is_started(m) else planned.kind_s
    calls = sum(price(k, size, axis) for k in (m.forward, m.backward))
    copies = len(sending) * planned.kind_s("pad", size, axis) if count > 1 else 0.0
    return calls + copies


def _bucket(
    moves: Sequence[PlannedMove], members: Sequence[int], planned: Moves, begins: str
) -> Bucket:
    first, size = moves[members[0]], sum(moves[n].size_bytes for n in members)
    seconds = _calls_s(first, size, len(members), planned)
    ways, axis = (first.forward, first.backward), planned.grid.axis(first.axis)
    by, back_by = ("" if _is_started(first) else planned.algorithm(k, size, axis) for k in ways)
    return Bucket(first.axis, *ways, tuple(members), size, seconds, begins, by, back_by)


def _is_started(m: PlannedMove) -> bool:
    """Say whether a shared move starts sums for others to wait for: by the plain algorithm."""
    return m.forward == "none"


def _in_bucket(m: PlannedMove, bucket: Bucket, network: Network, planned: Moves) -> PlannedMove:
    """Return a move with its share of its bucket's seconds, and what it sends by its algorithms."""
    share = m.size_bytes / bucket.size_bytes if bucket.size_bytes else 0.0
    ranks = planned.grid.sizes[planned.grid.axis(m.axis)]
    runs = [(m.forward, bucket.by)] * (1 + m.again) + [(m.backward, bucket.back_by)]
    sent = sent_of(runs, m.size_bytes, ranks, network.values[m.value].dtype.itemsize)
    seconds = bucket.seconds * share
    return replace(m, seconds=seconds, sent=sent, by=bucket.by, back_by=bucket.back_by)
