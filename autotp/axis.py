"""Axis: one axis of the grid as one rank sees it, with the raw collectives along it.

    DistAxis     real ranks over a torch.distributed process group
    ThreadAxis   simulated ranks: one thread each, in one process (`run_ranks`)

Nothing here is differentiable: `autotp.collectives` gives each move its backward. Every axis counts
what it sends, forward and backward, by the formula that the cost model prices with.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from autotp.algorithms import gather, permuted, reduce, scatter
from autotp.cost_model.collectives import OTHERS, is_one_call, sent_bytes, wire_bytes_by
from autotp.errors import RuntimeStateError
from autotp.grid import Coords, Grid
from autotp.liveness import last_node, lost

Result = TypeVar("Result")
Finish = Callable[[], Tensor]
"""Waits for the end of what was begun, and returns its result."""


class Axis(ABC):
    """The ranks that differ only in their index on one axis of the grid, and this rank's index.

    A *wire* is a contiguous tensor whose dim 0 numbers the ranks: what each sends or receives.
    """

    def __init__(self, name: str, size: int, index: int) -> None:
        self.name, self.size, self.index = name, size, index
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


# Real ranks ------------------------------------------------------------------------------------

_FUNCTIONAL = torch.ops._c10d_functional  # the ops that torch.compile can trace


class DistAxis(Axis):
    """An axis over a process group; gloo has no native reduce-scatter, so it is built there."""

    def __init__(self, name: str, group: ProcessGroup) -> None:
        super().__init__(name, group.size(), group.rank())
        self.group = group
        self.group_name: str = group.group_name
        self._sum_locally: bool = torch.distributed.get_backend(group) == "gloo"

    def algorithms(self, kind: str) -> tuple[str, ...]:
        """Return what a kind may be made of here beside its plain algorithm."""
        plain = "exchange" if self._sum_locally and kind == "reduce_scatter" else ""
        return tuple(by for by in super().algorithms(kind) if by != plain)

    def _all_gather(self, x: Tensor) -> Tensor:
        return self._call(*self._started("all_gather", x))

    def _reduce_scatter(self, wire: Tensor) -> Tensor:
        return self._ended("reduce_scatter", self._call(*self._started("reduce_scatter", wire)))

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        return self._call("all_reduce", x, op)

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return self._call("all_to_all_single", x, receive, send)

    def begin(self, kind: str, x: Tensor, by: str = "") -> Finish:
        """Begin a collective and return what waits for its end; raises LostRankError, both do.

        One that is made of several calls runs at once.
        """
        if x.is_complex() or torch.compiler.is_compiling() or not is_one_call(kind, by):
            return super().begin(kind, x, by)
        self._count(kind, x, x.nbytes * self.size if kind == "all_gather" else None, by)
        op, given, *rest = self._started(kind, x.contiguous(), by)
        start = getattr(_FUNCTIONAL, op + "_" * (kind == "all_reduce"))  # that one in place
        out = self._or_lost(op, lambda: start(given, *rest, self.group_name))
        return lambda: self._ended(kind, self._or_lost(op, lambda: _wait(out)), by)

    def _begin_permute(self, x: Tensor, send: list[int], receive: list[int]) -> Finish:
        if x.is_complex() or torch.compiler.is_compiling():
            return super()._begin_permute(x, send, receive)
        start = _FUNCTIONAL.all_to_all_single
        out = self._or_lost("permute", lambda: start(x, receive, send, self.group_name))
        return lambda: self._or_lost("permute", lambda: _wait(out))

    def _started(self, kind: str, x: Tensor, by: str = "") -> tuple[Any, ...]:
        """Return torch's op of a kind and its arguments."""
        ones = [1] * self.size
        if kind == "all_gather" and by:
            return "all_to_all_single", x.expand(self.size, *x.shape).contiguous(), ones, ones
        if kind == "all_gather":
            return "all_gather_into_tensor", x.unsqueeze(0), self.size
        if kind == "all_reduce":
            return "all_reduce", x, "sum"
        if self._sum_locally or by:  # gloo's own sends twice the bytes
            return "all_to_all_single", x, ones, ones
        return "reduce_scatter_tensor", x, "sum", self.size

    def _ended(self, kind: str, out: Tensor, by: str = "") -> Tensor:
        """Return the result of a kind from what torch's op returned."""
        if kind != "reduce_scatter":
            return out
        return out.sum(0, dtype=out.dtype) if self._sum_locally or by else out.squeeze(0)

    def _call(self, op: str, x: Tensor, *arguments: Any) -> Tensor:
        """Return what a collective returns, complex numbers sent as pairs.

        Raises LostRankError where a rank does not take part.
        """
        if x.is_complex():  # gloo sends none in an all-to-all
            pairs = torch.view_as_real(x.resolve_conj())
            return torch.view_as_complex(self._call(op, pairs, *arguments))
        start = getattr(_FUNCTIONAL, op)
        if torch.compiler.is_compiling():
            return _wait(start(x, *arguments, self.group_name))
        return self._or_lost(op, lambda: _wait(start(x, *arguments, self.group_name)))

    def _or_lost(self, op: str, run: Callable[[], Tensor]) -> Tensor:
        try:
            return run()
        except RuntimeError as error:
            node = last_node(sys._getframe())
            raise lost(f"{op} on axis {self.name!r}", node, error) from error


def _wait(pending: Tensor) -> Tensor:
    done: Tensor = _FUNCTIONAL.wait_tensor(pending)
    return done


def dist_axes(mesh: DeviceMesh, names: Sequence[str] = ()) -> dict[str, Axis]:
    """Return the axes of a DeviceMesh as this rank sees them, under `names` or the mesh's own."""
    named = tuple(names) or mesh.mesh_dim_names
    assert named is not None, "an unnamed mesh: autotp.grid names its axes first"
    return {name: DistAxis(name, mesh.get_group(a)) for a, name in enumerate(named)}


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

    def close(self, reason: str) -> None:
        """Raise in everyone who waits for a full round, now and later."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()


class ThreadAxis(Axis):
    """An axis of simulated ranks; each runs in its own thread, its backward included."""

    def __init__(self, name: str, index: int, meeting: _Meeting) -> None:
        super().__init__(name, len(meeting.slots), index)
        self.meeting = meeting

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
            axis.meeting.close(reason)

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
