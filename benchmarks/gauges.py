"""What a step takes, as all ranks see it: CPU-seconds, wall seconds, bytes sent, peak memory.

spend            one step on two clocks, and by the counters of a private network
in_turns         the steps of several models, round after round, each in an order of its own
Ratio            of two series of rounds: the median, and how far it can be trusted
keep_memory      so that models that take turns find their memory as a model alone does
taken_bytes      the peak that a call reaches over what was resident before
"""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from links import sent_bytes

Step = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU-seconds summed over ranks, wall seconds of the slowest, bytes sent per rank."""

    cpu_s: float
    wall_s: float
    sent_bytes: float


def spend(step: Step) -> Spent:
    """Return what one step takes, the same on all ranks; bytes count only in a private network."""
    dist.barrier()
    sent, wall, cpu = sent_bytes(), time.perf_counter(), time.process_time()
    step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    dist.barrier()
    sent = sent_bytes() - sent
    total = torch.tensor([cpu, float(sent)], dtype=torch.float64)
    slowest = torch.tensor([wall], dtype=torch.float64)
    dist.all_reduce(total)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    per_rank = float(total[1]) / dist.get_world_size() ** 2  # each rank has seen what all sent
    return Spent(float(total[0]), float(slowest), per_rank)


def in_turns(
    steps: Mapping[str, Step], rounds: int, between: Callable[[], None] = lambda: None
) -> dict[str, list[Spent]]:
    """Return what each step took in each round; `between` is called before each round.

    Every round has an order of its own, the same on all ranks: what a step leaves behind, caches
    and garbage, would else always meet the same successor.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in steps}
    shuffled = random.Random(0)
    for _ in range(rounds):
        between()
        for name in shuffled.sample(list(steps), len(steps)):
            spent[name].append(spend(steps[name]))
    return spent


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the ratios within a round, and its standard error (0 for a single round)."""

    median: float
    error: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """Compare two series, round by round.

        The error is 1.25 IQR / (1.35 sqrt(n)), which outliers leave alone. Source: McGill, Tukey,
        Larsen, Variations of box plots, The American Statistician 32 (1978).
        """
        ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
        if len(ratios) == 1:
            return cls(ratios[0], 0.0)
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, 1.25 * (high - low) / 1.35 / math.sqrt(len(ratios)))

    def __str__(self) -> str:
        error = f"\N{PLUS-MINUS SIGN}{self.error:.2f}" if self.error >= 0.005 else ""
        return f"{self.median:.2f}{error}"


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Source: malloc.h."""


def keep_memory() -> None:
    """Let malloc keep what is freed.

    In a loop of one model it does: a step takes no page fault. Where models of different sizes take
    turns it gives pages back and faults them in again, 10,000 in a step of 100 MB: some 5% of it,
    and most for the model that holds most.
    """
    libc = ctypes.CDLL("libc.so.6")
    for what, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_MAX, 0)):
        assert libc.mallopt(what, value)


def resident_bytes() -> float:
    """Return what this process holds, after giving back what it can."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status_bytes("VmRSS")


def reset_peak() -> None:
    """Let `peak_bytes` count from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> float:
    """Return the most that this process held since `reset_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(name))
