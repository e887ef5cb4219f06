"""Axis: one axis of the grid as one rank sees it, with the raw collectives along it.

    Axis         what they have in common; `autotp.dist_axis` has that of real ranks
    ThreadAxis   simulated ranks: one thread each, in one process (`run_ranks`)

Nothing here is differentiable: `autotp.collectives` gives each move its backward. Every axis counts
what it sends, forward and backward, by the formula that the cost model prices with.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor

from autotp.algorithms import gather, permuted, reduce, scatter
from autotp.cost_model.collectives import OTHERS, level_bytes, sent_bytes, wire_bytes_by
from autotp.cost_model.levels import fits, members_of, nodes_of
from autotp.errors import RuntimeStateError
from autotp.grid import Coords, Grid

Result = TypeVar("Result")
Finish = Callable[[], Tensor]
"""Waits for the end of what was begun, and returns its result."""


class Axis(ABC):
    """The ranks that differ only in their index on one axis of the grid, and this rank's index.

    A *wire* is a contiguous tensor whose dim 0 numbers the ranks: what each sends or receives.
    """

    def __init__(self, name: str, size: int, index: int) -> None:
        self.name, self.size, self.index = name, size, index
        self._over: dict[int, tuple[Axis, Axis]] = {}
        self.reset_sent()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.index} of {self.size})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self  # a copied graph still talks to the same ranks

    # What was sent ---------------------------------------------------------------------------

    @property
    def sent(self) -> dict[str, Fraction]:
        """The bytes this rank has sent, by kind of collective; not counted inside torch.compile."""
        out: dict[str, Fraction] = {}
        for (kind, by), n in self._whole_bytes.items():
            out[kind] = out.get(kind, Fraction(0)) + sent_bytes(kind, n, self.size, by)
        return out

    @property
    def sent_between(self) -> dict[str, Fraction]:
        """The part of the bytes sent that algorithms of two levels have sent between nodes."""
        out: dict[str, Fraction] = {}
        for (kind, by), n in self._whole_bytes.items():
            if members := members_of(by):
                sent = level_bytes(kind, n, self.size, members)[1]
                out[kind] = out.get(kind, Fraction(0)) + sent
        return out

    @property
    def calls(self) -> dict[str, int]:
        """How often this rank has called each kind of collective."""
        return dict(self._calls)

    def reset_sent(self) -> None:
        """Count from zero again."""
        self._whole_bytes: dict[tuple[str, str], int] = {}
        self._calls: dict[str, int] = {}

    def _count(self, kind: str, x: Tensor, size_bytes: int | None = None, by: str = "") -> None:
        if not torch.compiler.is_compiling():
            n = x.nbytes if size_bytes is None else size_bytes
            n = wire_bytes_by(kind, by, n, self.size, x.itemsize)
            self._whole_bytes[kind, by] = self._whole_bytes.get((kind, by), 0) + n
            self._calls[kind] = self._calls.get(kind, 0) + 1

    # The collectives, by the plain algorithm or by another -------------------------------------

    def algorithms(self, kind: str) -> tuple[str, ...]:
        """Return what a kind may be made of here beside its plain algorithm."""
        return OTHERS.get(kind, ())

    def over_nodes(self, members: int) -> tuple[Axis, Axis]:
        """Return the axes of two levels, where each node has so many consecutive ranks of this one.

        The first is of the ranks of this rank's node, the second of those at its place in each
        node. They are made once, by all ranks of the grid together. Raises RuntimeStateError where
        the ranks do not fill several nodes.
        """
        if not fits(members, self.size):
            raise RuntimeStateError(
                f"axis {self.name!r} has no two levels by {nodes_of(members)!r}",
                at=[("ranks", f"{self.size}: not several nodes of {members} ranks, several each")],
                remedy="plan again, for this grid",
            )
        if members not in self._over:
            self._over[members] = self._levels(members)
        return self._over[members]

    @abstractmethod
    def _levels(self, members: int) -> tuple[Axis, Axis]: ...

    def all_gather(self, x: Tensor, by: str = "") -> Tensor:
        """Return the wire of every rank's `x`, which must have one shape on all of them."""
        self._count("all_gather", x, x.nbytes * self.size, by)
        return gather(self, x.contiguous(), by)

    def reduce_scatter(self, wire: Tensor, by: str = "") -> Tensor:
        """Return the sum over ranks of the block that is addressed to this one."""
        self._count("reduce_scatter", wire, by=by)
        return scatter(self, wire.contiguous(), by)

    def all_reduce(self, x: Tensor, op: str = "sum", by: str = "") -> Tensor:
        """Return the sum (or `max`) of every rank's `x`, as a new tensor."""
        self._count("all_reduce", x, by=by)
        if op != "sum":
            return self._all_reduce(x.contiguous(), op)
        return reduce(self, x.contiguous(), by)

    def begin(self, kind: str, x: Tensor, by: str = "") -> Finish:
        """Begin an all_gather, a reduce_scatter or an all_reduce of `x`, and use it up.

        Return what waits for the end and returns the result.
        """
        out: Tensor = getattr(self, kind)(x, by=by)
        return lambda: out

    def all_to_all(
        self,
        x: Tensor,
        send: Sequence[int] | None = None,
        receive: Sequence[int] | None = None,
        counted: int | None = None,
    ) -> Tensor:
        """Send consecutive rows of `x` to each rank and return the rows received, in rank order.

        Without the numbers of rows, `x` is a wire. The bytes counted are those of an even exchange
        of `x`, or of as many bytes as are given: where data says how many rows go where.
        """
        self._count("all_to_all", x, counted)
        even = [x.shape[0] // self.size] * self.size
        return self._all_to_all(x.contiguous(), list(send or even), list(receive or even))

    def permute(self, x: Tensor, by: int = 1) -> Tensor:
        """Send `x` to the rank that is `by` further on, round the end; return what came in.

        All ranks must bring one shape.
        """
        self._count("permute", x)
        return permuted(self, x.contiguous(), by)

    # As a backend runs them --------------------------------------------------------------------

    @abstractmethod
    def _all_gather(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _reduce_scatter(self, wire: Tensor) -> Tensor: ...

    @abstractmethod
    def _all_reduce(self, x: Tensor, op: str) -> Tensor: ...

    @abstractmethod
    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor: ...

    def _begin_permute(self, x: Tensor, send: list[int], receive: list[int]) -> Finish:
        out = self._all_to_all(x, send, receive)
        return lambda: out


# Simulated ranks -------------------------------------------------------------------------------


class _RankLostError(RuntimeStateError):
    """Another rank stopped, so this one cannot go on."""


class _Meeting:
    """A barrier of `ranks` threads that also shows what each brought.

    Unlike threading.Barrier it may be closed while threads still leave their last round.
    """

    def __init__(self, ranks: int) -> None:
        self.slots: list[Any] = [None] * ranks
        self._changed = threading.Condition()
        self._arrived = self._round = 0
        self._closed = ""
        self._parts: dict[tuple[int, ...], _Meeting] = {}
        self._gone: dict[int, str] = {}

    def wait(self) -> None:
        """Block until all have come, or raise because one never will."""
        with self._changed:
            this_round = self._round
            self._arrived += 1
            if self._arrived == len(self.slots):
                self._arrived, self._round = 0, this_round + 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._round != this_round or self._closed)
            if self._round == this_round:
                raise _RankLostError(self._closed)

    def leave(self, index: int, reason: str) -> None:
        """Raise in everyone who waits for a full round with one rank, now and later."""
        with self._changed:
            self._gone[index] = reason
            self._closed = self._closed or reason
            self._changed.notify_all()
            for members, part in self._parts.items():
                if index in members:
                    part.leave(members.index(index), reason)

    def part(self, members: tuple[int, ...]) -> _Meeting:
        """Return the meeting of some of the ranks."""
        with self._changed:
            if members not in self._parts:
                self._parts[members] = _Meeting(len(members))
                for place, index in enumerate(members):
                    if index in self._gone:
                        self._parts[members].leave(place, self._gone[index])
            return self._parts[members]


class ThreadAxis(Axis):
    """An axis of simulated ranks; each runs in its own thread, its backward included."""

    def __init__(self, name: str, index: int, meeting: _Meeting) -> None:
        super().__init__(name, len(meeting.slots), index)
        self.meeting = meeting

    def _levels(self, members: int) -> tuple[Axis, Axis]:
        node, place = divmod(self.index, members)
        first = self.index - place
        inside = self.meeting.part(tuple(range(first, first + members)))
        between = self.meeting.part(tuple(range(place, self.size, members)))
        return (
            ThreadAxis(f"{self.name} inside nodes", place, inside),
            ThreadAxis(f"{self.name} between nodes", node, between),
        )

    def _all_gather(self, x: Tensor) -> Tensor:
        return self._meet("all_gather", x, x, torch.stack)

    def _reduce_scatter(self, wire: Tensor) -> Tensor:
        def mine(wires: list[Tensor]) -> Tensor:
            return torch.stack([w[self.index] for w in wires]).sum(0, dtype=wire.dtype)

        return self._meet("reduce_scatter", wire, wire, mine)

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        def total(terms: list[Tensor]) -> Tensor:
            terms_ = torch.stack(terms)
            return terms_.amax(0) if op == "max" else terms_.sum(0, dtype=x.dtype)

        return self._meet(f"all_reduce {op}", x, x, total)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        def mine(messages: list[Sequence[Tensor]]) -> Tensor:
            return torch.cat([m[self.index] for m in messages])

        return self._meet("all_to_all", x[:0], torch.split(x, send), mine)

    def _meet(self, what: str, x: Tensor, bring: Any, combine: Callable[..., Tensor]) -> Tensor:
        """Show `bring` to the others and combine what all show, before anyone goes on."""
        slots = self.meeting.slots
        slots[self.index] = (f"{what} of {x.dtype} {list(x.shape)}", bring)
        self.meeting.wait()
        brought = list(slots)
        self._check_same([text for text, _ in brought])
        out = combine([value for _, value in brought])
        self.meeting.wait()
        return out

    def _check_same(self, texts: list[str]) -> None:
        if len(set(texts)) > 1:
            raise RuntimeStateError(
                f"the ranks of axis {self.name!r} call different collectives",
                at=[(f"index {i}", text) for i, text in enumerate(texts)],
            )


def run_ranks(grid: Grid, fn: Callable[[int, dict[str, Axis]], Result]) -> list[Result]:
    """Run `fn(rank, axes)` on every rank of `grid`, one thread each, and return their results.

    Raises what the first rank to fail raised; the others are stopped at their next collective.
    """
    axes = _thread_axes(grid)
    results: dict[int, Result] = {}
    failures: dict[int, BaseException] = {}
    grad_enabled = torch.is_grad_enabled()

    def work(rank: int) -> None:
        reason = f"rank {rank} finished without taking part"
        try:
            # Backward stays in this thread on every device: ranks must not share a worker.
            with (
                torch.autograd.set_multithreading_enabled(False),
                torch.set_grad_enabled(grad_enabled),
            ):
                results[rank] = fn(rank, {**axes[rank]})
        except BaseException as error:
            failures[rank] = error
            reason = f"rank {rank} raised {type(error).__name__}: {error}"
        for axis in axes[rank].values():
            axis.meeting.leave(axis.index, reason)

    threads = [threading.Thread(target=work, args=(r,), daemon=True) for r in axes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise _root_failure(failures)
    return [results[rank] for rank in axes]


def _thread_axes(grid: Grid) -> dict[int, dict[str, ThreadAxis]]:
    meetings: dict[tuple[int, Coords], _Meeting] = {}
    out: dict[int, dict[str, ThreadAxis]] = {}
    for rank, coords in enumerate(grid.all_coords()):
        out[rank] = {}
        for a, (name, size) in enumerate(zip(grid.names, grid.sizes, strict=True)):
            others = coords[:a] + coords[a + 1 :]
            meeting = meetings.setdefault((a, others), _Meeting(size))
            out[rank][name] = ThreadAxis(name, coords[a], meeting)
    return out


def _root_failure(failures: dict[int, BaseException]) -> BaseException:
    """Return the failure that stopped the others, with the rank it happened on."""
    own = {r: e for r, e in failures.items() if not isinstance(e, _RankLostError)} or failures
    rank = min(own)
    own[rank].add_note(f"raised on simulated rank {rank}")
    return own[rank]
