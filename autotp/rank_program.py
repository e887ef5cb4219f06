"""One rank's program as something to run alone: its tensors, its step, and what a step takes.

    alone      a plan's program of one rank, on stand-ins for all values and silent axes
    timed      medians of repeated steps, by phase, copies in place of collectives taken off
    peak       the most bytes that a step holds at once, and its flops

The step is the usual loop's: gradients set to None, forward, backward from the loss, AdamW.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from autotp.axis import Axis
from autotp.grid import Coords
from autotp.live_bytes import LiveBytes
from autotp.passes.emit.again import runnable
from autotp.passes.emit.codegen import emit
from autotp.passes.emit.verify import verify
from autotp.passes.factors import Factors
from autotp.passes.network import Network
from autotp.passes.program import Program
from autotp.plan import Plan
from autotp.silent_axis import CopyClock
from autotp.stand_ins import arguments, retarget

WARM_UPS = 2
"""Steps before any is timed: the first makes the optimizer's states and loads kernels."""


Lap = Callable[[str], None]
"""Is told the name of each phase as it ends."""


@dataclass(slots=True)
class RankProgram:
    """A rank's graph and all that it reads.

    written      the buffers that a step renews, `outputs` how many results come before them
    base_bytes   what the device's allocator held before the program was there
    """

    module: fx.GraphModule
    arguments: tuple[Tensor, ...]
    params: Mapping[str, Tensor]
    written: tuple[Tensor, ...]
    outputs: int
    optimizer: torch.optim.Optimizer | None
    device: torch.device
    base_bytes: int

    def step(self, lap: Lap = lambda phase: None) -> None:
        """Take one step, forward alone without an optimizer."""
        self.forget_gradients()
        loss = self._forward()
        lap("forward")
        if self.optimizer and loss is not None:
            torch.autograd.backward(loss, torch.ones_like(loss))
            lap("backward")
            self.optimizer.step()
            lap("optimizer")

    def forget_gradients(self) -> None:
        """Set all gradients to None."""
        if self.optimizer:
            self.optimizer.zero_grad()

    def _forward(self) -> Tensor | None:
        """Run the graph, renew buffers, and keep only what backward begins at."""
        with nullcontext() if self.optimizer else torch.no_grad():
            values = self.module(*self.arguments)
        with torch.no_grad():
            for buffer, value in zip(self.written, values[self.outputs :], strict=True):
                buffer.copy_(value)
        given = (v for v in values[: self.outputs] if isinstance(v, Tensor) and v.requires_grad)
        return next(given, None)

    @property
    def at_rest(self) -> int:
        """The bytes of what lives between steps: arguments, and the optimizer's states."""
        states = self.optimizer.state.values() if self.optimizer else ()
        tensors = [*self.arguments, *(t for state in states for t in state.values())]
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        return sum(storages.values())


def alone(
    found: tuple[Program, Network, Factors],
    plan: Plan,
    coords: Coords,
    axes: Mapping[str, Axis],
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    device: torch.device,
) -> RankProgram:
    """Return the program of the rank at `coords`, ready to step; `state` are buffers by name."""
    program, network, factors = found
    base_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    module = emit(program, network, plan, coords, axes)
    verify(module, network, factors, plan.grid)
    retarget(module, device)
    values = dict(arguments(program, plan, coords, state, inputs, device))
    params = {fqn: values[node] for node, fqn in program.params.items()}
    written = {fqn: values[node] for node, fqn in program.buffers.items()}
    trained = [p for p in params.values() if p.requires_grad]
    return RankProgram(
        module=runnable(module, network),
        arguments=tuple(values.values()),
        params=params,
        written=tuple(written[fqn] for fqn in program.mutations.values()),
        outputs=len(program.outputs),
        optimizer=_adamw(trained, device) if plan.train and trained else None,
        device=device,
        base_bytes=base_bytes,
    )


def _adamw(trained: list[Tensor], device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW as it steps on a real rank: see `autotp.optimizers`."""
    return torch.optim.AdamW(trained, fused=True if device.type == "cpu" else None)


def timed(rank: RankProgram, clock: CopyClock, steps: int) -> dict[str, float]:
    """Return the median seconds of each phase, without what the silent collectives copied."""
    for _ in range(WARM_UPS):
        rank.step()
    rows = [_phases(rank, clock) for _ in range(steps)]
    return {phase: statistics.median(row[phase] for row in rows) for phase in rows[0]}


def _phases(rank: RankProgram, clock: CopyClock) -> dict[str, float]:
    spent: dict[str, float] = {}
    start_s = 0.0

    def now() -> float:
        if rank.device.type == "cuda":
            torch.cuda.synchronize(rank.device)
        return time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal start_s
        end_s = now()
        spent[phase] = end_s - start_s - clock.take()
        start_s = end_s

    start_s = now()
    clock.take()
    rank.step(lap)
    return spent


def peak(rank: RankProgram) -> tuple[int, int]:
    """Return the most bytes that a step holds, what rests included, and the step's flops.

    On a GPU as its allocator counts them, else by the tensors that live between operators.
    """
    counter, live = FlopCounterMode(display=False), LiveBytes()
    gpu = rank.device.type == "cuda"
    rank.forget_gradients()
    if gpu:
        torch.cuda.reset_peak_memory_stats(rank.device)
    with nullcontext() if gpu else live:
        rank.step()
    held = torch.cuda.max_memory_allocated(rank.device) - rank.base_bytes if gpu else live.peak
    with counter:  # by itself: it keeps gradients
        rank.step()
    return held if gpu else rank.at_rest + held, counter.get_total_flops()
