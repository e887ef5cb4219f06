"""Measure this machine on the live process group: what `autotp.cost_model.calibration` fits.

    measure     run every job in turn, round after round, until the time is used
    Measuring   the same, a round when it is asked for: beside what else is timed
    shapes_of   the groups of ranks whose collectives are timed: one of each class of link

All ranks do the same at the same time, as they do in training: rates are those of a rank whose
neighbours are busy. Jobs are interleaved, so that a burst of other work meets all of them a little
instead of one of them badly. All ranks get rank 0's result.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from autotp.cost_model.calibration import (
    AttentionTiming,
    Late,
    Measured,
    Overlap,
    ProductTiming,
    Seconds,
    StreamTiming,
    UpdateTiming,
    typical,
)
from autotp.cost_model.compute import matmul_flops
from autotp.cost_model.levels import fits
from autotp.cost_model.link_fit import Timing
from autotp.dist_axis import DistAxis
from autotp.measure_jobs import (
    CHAIN,
    DTYPES,
    PILOT,
    SLOW_FLOPS_PER_S,
    Job,
    collective_jobs,
    compute_jobs,
    late_jobs,
    overlap_jobs,
    product_jobs,
    update_jobs,
)
from autotp.ranks import from_rank_0, gathered

PASSES = 3
"""Ops that a link of the chain runs: one forward, two backward."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure, over buffers of which sizes.

    At least `rounds` rounds are made, and at most ten times as many.
    """

    seconds: float
    sizes: tuple[int, ...]
    rounds: int = 5


QUICK = Effort(2.0, (2**12, 2**17, 2**19, 2**22), rounds=3)
THOROUGH = Effort(30.0, tuple(2**k for k in range(12, 25, 2)), rounds=5)

Samples = Mapping[Hashable, Seconds]
"""The typical seconds of each job."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Groups of `ranks`, `stride` apart, with `members` in each node: all of them at once."""

    stride: int
    ranks: int
    members: int

    def group(self, rank: int) -> list[int]:
        """Return the ranks of the group of `rank`."""
        block = rank - rank % (self.stride * self.ranks)
        first = block + rank % self.stride
        return [first + self.stride * k for k in range(self.ranks)]


def shapes_of(world: int, ranks_per_node: int) -> list[Shape]:
    """Return one shape of group for each class of link that a grid of `world` ranks can have.

    >>> [(s.stride, s.ranks, s.members) for s in shapes_of(4, 2)]
    [(1, 2, 2), (2, 2, 1), (1, 4, 2)]
    """
    nodes = world // ranks_per_node
    inside = [Shape(1, n, n) for n in _divisors(ranks_per_node) if n > 1]
    outside = [
        Shape(ranks_per_node // members, members * d, members)
        for members in _divisors(ranks_per_node)
        for d in _divisors(nodes)
        if d > 1
    ]
    return inside + outside


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def measure(effort: Effort, device: torch.device) -> Measured:
    """Return what was measured, the same on all ranks; every rank of the process group calls it."""
    measuring = Measuring(effort.sizes, device)
    measuring.repeat(effort)
    found = measuring.found()
    measuring.leave()
    return found


class Measuring:
    """All jobs of a process group: every rank makes it, and asks for as many rounds as the others.

    sizes   the bytes of the buffers that collectives are timed over
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        world, self._node = dist.get_world_size(), ranks_per_node()
        self._axes = [(s, _axis(s)) for s in shapes_of(world, self._node)]
        last = self._axes[-1][1]
        fast, ratio, between = _pilot(last, device)
        self._rounds = _Rounds(device)
        for shape, axis in self._axes:
            self._rounds.jobs += collective_jobs(axis, shape.members, sizes, device)
        self._rounds.jobs += compute_jobs(device, fast)
        self._rounds.jobs += update_jobs(init_device_mesh(device.type, (world,)))
        self._rounds.jobs += overlap_jobs(last, OVERLAPPED, device, ratio)
        self._rounds.jobs += late_jobs(last, device, between)

    def repeat(self, effort: Effort) -> None:
        """Run rounds until the time is used; one more comes first, to warm up."""
        self._rounds.repeat(effort)

    def again(self) -> None:
        """Run one more round."""
        self._rounds.again()

    def found(self) -> Measured:
        """Return what all rounds so far say, the same on all ranks."""
        device, node = self._rounds.device, self._node
        cores = _cores(node) if device.type == "cpu" else 0.0
        found = _measured(self._rounds.typical(), node, _memory_bytes(device, node))
        agreed: Measured = from_rank_0(replace(found, cores=cores))
        return agreed

    def leave(self) -> None:
        """Free the groups that were timed."""
        for _, axis in self._axes:
            _leave(axis)


OVERLAPPED = 2**20
"""Bytes of the all-reduce that runs beside products."""

MOST_PRODUCTS = 32
"""Beside one collective: a pilot of two rounds may be far off, and no more would be hidden."""

BETWEEN_S = 0.02
"""What a rank computes between two collectives of training, about.

Source: four ranks on two cores; collectives take 0.3 ms more of CPU after 3.5 ms of products than
after one another, and 0.7 to 1.1 ms more after 10 to 40.
"""

MOST_BETWEEN = 1024
"""Products before one collective."""


def _axis(shape: Shape) -> DistAxis:
    """Return this rank's group of a shape; each group is made by its own ranks."""
    group = dist.new_group(shape.group(dist.get_rank()), use_local_synchronization=True)
    everyone = dict.fromkeys(tuple(shape.group(r)) for r in range(dist.get_world_size()))
    axis = DistAxis(f"stride {shape.stride}", group, [*everyone])
    if fits(shape.members, shape.ranks):
        axis.over_nodes(shape.members)
    return axis


def _leave(axis: DistAxis) -> None:
    """Free a group's communicators; a group of gloo has none, and stays.

    torch names such a group by its ranks and by how many groups live: the next one of these ranks
    would get the name again, and with it the addresses that this one left in the store.
    """
    if dist.get_backend(axis.group) != "gloo":
        for group in axis.groups():
            dist.destroy_process_group(group)


def _pilot(axis: DistAxis, device: torch.device) -> tuple[list[str], int, int]:
    """Return the dtypes that are fast here, and two counts of products.

    Those that take as long as a collective, and as what training computes between two of them. On
    CPUs the CPU clock tells what products take: other work must not make a dtype look emulated.
    """
    pilot = _Rounds(device, overlap_jobs(axis, OVERLAPPED, device, 1))
    pilot.jobs += late_jobs(axis, device, 1)
    for dtype in DTYPES:
        pilot.jobs += product_jobs(dtype, (PILOT,) * 3, device)
    pilot.repeat(Effort(0.0, (), rounds=2))
    found = pilot.typical()
    flops = matmul_flops(PILOT, PILOT, PILOT)
    tried = {d: found[d, (PILOT,) * 3, 0] for d in DTYPES}

    def taken_s(products: Seconds) -> float:
        return products.cpu_s if device.type == "cpu" else products.seconds

    fast = [d for d in DTYPES if flops > SLOW_FLOPS_PER_S * taken_s(tried[d])]
    alone = [found["overlap", what].seconds for what in ("collective", "product")]
    ratio = min(MOST_PRODUCTS, max(1, round(alone[0] / alone[1])))
    between = min(MOST_BETWEEN, max(1, round(BETWEEN_S / taken_s(found["late", "product"]))))
    agreed: tuple[list[str], int, int] = from_rank_0((fast, ratio, between))
    return agreed


# Rounds ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Rounds:
    """Jobs that all ranks of the process group run in turn, and what each round of them took."""

    device: torch.device
    jobs: list[Job] = field(default_factory=list)
    taken: list[list[Seconds]] = field(default_factory=list)

    def repeat(self, effort: Effort) -> None:
        """Run rounds until the time is used; the first only warms up."""
        start = time.perf_counter()
        self._round()
        for made in range(10 * effort.rounds):
            left = effort.seconds - (time.perf_counter() - start)
            if made >= effort.rounds and not from_rank_0(left > 0):
                break
            self.again()

    def again(self) -> None:
        """Run one more round."""
        self.taken.append(self._round())

    def typical(self) -> Samples:
        """Return the typical seconds of each job."""
        everyone = gathered(self.taken)
        return {job.key: _typical(everyone, k) for k, job in enumerate(self.jobs)}

    def _round(self) -> list[Seconds]:
        return [self._sample(job) for job in self.jobs]

    def _sample(self, job: Job) -> Seconds:
        dist.barrier()
        if job.before is None:
            return self._timed(job.run, job.calls)
        taken = []
        for _ in range(job.calls):
            job.before()
            taken.append(self._timed(job.run))
        return Seconds(
            sum(s.seconds for s in taken) / job.calls, sum(s.cpu_s for s in taken) / job.calls
        )

    def _timed(self, run: Callable[[], object], calls: int = 1) -> Seconds:
        """Return what one of so many calls takes."""
        self._synchronize()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            run()
        self._synchronize()
        spent = time.perf_counter() - start, time.process_time() - cpu
        return Seconds(spent[0] / calls, spent[1] / calls)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _typical(everyone: Sequence[Sequence[Sequence[Seconds]]], job: int) -> Seconds:
    """Return a job's typical seconds: in each round the mean over ranks."""
    rounds = [[ranks[job] for ranks in one] for one in zip(*everyone, strict=True)]
    return Seconds(
        typical([sum(s.seconds for s in ranks) / len(ranks) for ranks in rounds]),
        typical([sum(s.cpu_s for s in ranks) / len(ranks) for ranks in rounds]),
    )


def _measured(found: Samples, node: int, memory_bytes: float) -> Measured:
    """Sort the samples of all jobs by what they are of."""
    collectives, streams, updates, attention = [], [], [], []
    products: dict[tuple[str, tuple[int, int, int]], list[Seconds]] = {}
    for key, s in found.items():
        match key:
            case (str(kind), int(ranks), int(members), int(size), str(by)):
                collectives.append(Timing(kind, ranks, members, size, s.seconds, s.cpu_s, by))
            case (str(dtype), tuple() as shape, int(_)):
                products.setdefault((dtype, shape), []).append(s)
            case ("attention", str(dtype), int(flops)):
                attention.append(AttentionTiming(dtype, flops, s.seconds, s.cpu_s))
            case (str(), int(count), int(size)):
                updates.append(UpdateTiming(count, size, s.seconds, s.cpu_s))
            case (str(name), int(size)):
                streams.append(StreamTiming(name, size, s.seconds, s.cpu_s))
    overhead, calls = found["overhead"], CHAIN * PASSES
    return Measured(
        backend=str(dist.get_backend()),
        world_size=dist.get_world_size(),
        ranks_per_node=node,
        collectives=tuple(collectives),
        products=tuple(_product(*key, passes) for key, passes in products.items()),
        streams=tuple(streams),
        op_overhead=Seconds(overhead.seconds / calls, overhead.cpu_s / calls),
        overlap=Overlap(*(found["overlap", what] for what in ("collective", "product", "both"))),
        late=Late(*(found["late", what] for what in ("alone", "after", "product", "turn"))),
        memory_bytes=memory_bytes,
        updates=tuple(updates),
        attention=tuple(attention),
    )


def _product(dtype: str, shape: tuple[int, int, int], passes: Sequence[Seconds]) -> ProductTiming:
    first, second, third = passes
    return ProductTiming(
        dtype,
        shape,
        (first.seconds, second.seconds, third.seconds),
        (first.cpu_s, second.cpu_s, third.cpu_s),
    )


# The machine -----------------------------------------------------------------------------------


def ranks_per_node() -> int:
    """Return how many consecutive ranks share a node: torchrun's count, else by host names.

    1 where nodes have different numbers of ranks: every axis then crosses nodes.
    """
    hosts = gathered((os.environ.get("LOCAL_WORLD_SIZE", ""), platform.node()))
    given = {local for local, _ in hosts}
    if len(given) == 1 and "" not in given:
        counts = {int(given.pop())}
    else:
        counts = {len(list(run)) for _, run in groupby(host for _, host in hosts)}
    count = counts.pop()
    return count if not counts and len(hosts) % count == 0 else 1


def _cores(node: int) -> float:
    """Return the cores of a node for each of its ranks, as far as they may use them."""
    if not hasattr(os, "sched_getaffinity"):
        return (os.cpu_count() or 1) / node
    usable = gathered(sorted(os.sched_getaffinity(0)))[:node]
    return len({core for cores in usable for core in cores}) / node


def _memory_bytes(device: torch.device, node: int) -> float:
    """Return what one rank may hold: its GPU's memory, or its share of the node's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float(min(physical, int(text)) if text.isdigit() else physical) / node
