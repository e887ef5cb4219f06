"""SilentAxis: an axis whose collectives send nothing and return what has the right shape.

Every collective answers from this rank's own tensor, as though all ranks held that: a gather
repeats it, a sum of integers multiplies it, so that counts add up; a sum of floats returns it as it
is, so that values stay finite. Values mean nothing; shapes, memory and the kernels around are
real. The time that these copies take is kept apart (`CopyClock`): a rank would send meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from autotp.axis import Axis, Finish
from autotp.grid import Coords, Grid


class CopyClock:
    """How long the stand-ins for collectives took on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent_s = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what the block takes: on a GPU what its kernels take."""
        if self._device.type != "cuda":
            start_s = time.perf_counter()
            yield
            self._spent_s += time.perf_counter() - start_s
            return
        pair = (_event(), _event())
        pair[0].record()
        yield
        pair[1].record()
        self._marks.append(pair)

    def take(self) -> float:
        """Return the seconds since the last call; on a GPU, all work must have ended."""
        spent_s: float = self._spent_s + sum(a.elapsed_time(b) for a, b in self._marks) / 1e3
        self._spent_s, self._marks = 0.0, []
        return spent_s


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class SilentAxis(Axis):
    """An axis of ranks that are not there."""

    def __init__(self, name: str, size: int, index: int, clock: CopyClock) -> None:
        super().__init__(name, size, index)
        self.clock = clock

    def _levels(self, members: int) -> tuple[Axis, Axis]:
        node, place = divmod(self.index, members)
        return (
            SilentAxis(f"{self.name} inside nodes", members, place, self.clock),
            SilentAxis(f"{self.name} between nodes", self.size // members, node, self.clock),
        )

    def _all_gather(self, x: Tensor) -> Tensor:
        with self.clock.running():
            return x.new_empty((self.size, *x.shape)).copy_(x)

    def _reduce_scatter(self, wire: Tensor) -> Tensor:
        with self.clock.running():
            received = wire.clone() if wire.device.type == "cpu" else wire  # gloo: see DistAxis
            return self._sum(received[self.index])

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        with self.clock.running():
            return self._sum(x) if op == "sum" else x.clone()

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        rows = sum(receive)
        with self.clock.running():
            if rows == len(x):
                return x.clone()
            if not len(x):
                return x.new_zeros((rows, *x.shape[1:]))
            return x.index_select(0, torch.arange(rows, device=x.device) % len(x))

    def begin(self, kind: str, x: Tensor, by: str = "") -> Finish:
        """Begin and end at once; a sum of floats in its own memory, as a real rank's is."""
        if kind != "all_reduce" or by or not (x.is_floating_point() or x.is_complex()):
            return super().begin(kind, x, by)
        self._count(kind, x)
        return lambda: x

    def _sum(self, x: Tensor) -> Tensor:
        whole_number = not (x.is_floating_point() or x.is_complex())
        return x * self.size if whole_number else x.clone()


def silent_axes(grid: Grid, coords: Coords, clock: CopyClock) -> dict[str, Axis]:
    """Return the axes of `grid` as the rank at `coords` sees them, with nobody at the other end."""
    places = zip(grid.names, grid.sizes, coords, strict=True)
    return {name: SilentAxis(name, size, index, clock) for name, size, index in places}
