"""Hardware as data: links, compute rates and memory of one rank. Knows no model.

Link        what one rank sees of its axis: seconds per step, bytes per second, by collective
Cluster     ranks per node, the link inside a node and between nodes, compute, memory
link        which of them an axis of a grid runs on (`Cluster.link`)
by_name     the clusters that are known here; every constant carries its source
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autotp.cost_model.levels import fits, members_of
from autotp.errors import AutotpError


@dataclass(frozen=True, slots=True)
class Rate:
    """What one collective `kind` was measured to reach, where it differs from its link.

    `ranks` is the size of the group it was measured on; 0 stands for any. `by` is the algorithm,
    where it is not the one that the backend runs for the kind when none is asked for.
    """

    kind: str
    latency_s: float
    bandwidth_bytes_per_s: float
    ranks: int = 0
    by: str = ""

    def __post_init__(self) -> None:
        assert self.latency_s >= 0 and self.bandwidth_bytes_per_s > 0, self


@dataclass(frozen=True, slots=True)
class Link:
    """Give the seconds per step and the bytes per second that each rank of a group can send.

    `call_s` is paid once per collective. `sum_bytes_per_s` is how fast a rank reads what it sums
    itself. `rates` hold what a kind reaches instead of the link's own figures. `low_latency` is a
    second protocol over the same wire: the faster of the two is taken for each message. `levels`
    are the two links that it is made of, where it has equal parts of a group in several nodes.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    call_s: float = 0.0
    sum_bytes_per_s: float = math.inf
    rates: tuple[Rate, ...] = ()
    low_latency: Link | None = None
    levels: Levels | None = None

    def __post_init__(self) -> None:
        assert self.latency_s >= 0 and self.bandwidth_bytes_per_s > 0, self

    def rate(self, kind: str, ranks: int = 0, by: str = "") -> Rate:
        """Return what `kind` by an algorithm reaches on this link in a group of `ranks`.

        Where that size was not measured, the largest below it counts, else the smallest.
        """
        own = Rate(kind, self.latency_s, self.bandwidth_bytes_per_s)
        found = sorted(
            (r for r in self.rates if (r.kind, r.by) == (kind, by)), key=lambda r: r.ranks
        )
        below = [r for r in found if r.ranks <= ranks]
        return (below[-1:] or found[:1] or [own])[0]

    def measured(self, kind: str) -> tuple[str, ...]:
        """Return the algorithms, beside the backend's plain one, whose rates are known."""
        return tuple(sorted({r.by for r in self.rates if r.kind == kind and r.by}))


@dataclass(frozen=True, slots=True)
class Levels:
    """The links inside a node and between nodes of a group with `members` ranks in each node.

    To put the whole buffer in order takes one op, which reads and writes `copy_bytes_per_s`.
    """

    members: int
    inside: Link
    between: Link
    op_s: float
    copy_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Describe nodes of equal ranks: how they are linked, compute and remember.

    `flops_per_s` pairs a dtype's name with the rate of a large matrix product in it. `inter` is
    the share of the node's network that one rank has. What calibration adds, where it ran:

    crossings              the link of groups with so many members in each node, where measured
    narrow_flops_per_s     by dtype, what products reach whose narrowest dim has this size
    stream_bytes_per_s     what ops reach that read and write so many bytes: caches hold few
    function_bytes_per_s   what exp, tanh and their like read and write; 0: as fast as memory
    attention_flops_per_s  by dtype, of attention's products both ways; unlisted: as products
    overlap                share that is hidden of the shorter of a collective and a product
    update_s, update_bytes_per_s
                           what AdamW takes for each parameter, and how fast it passes over the
                           parameter's own bytes; 0: as fast as memory allows
    """

    name: str
    backend: str
    ranks_per_node: int
    intra: Link
    inter: Link
    flops_per_s: tuple[tuple[str, float], ...]
    memory_bandwidth_bytes_per_s: float
    memory_bytes: float
    op_overhead_s: float
    crossings: tuple[tuple[int, Link], ...] = ()
    narrow_flops_per_s: tuple[tuple[str, tuple[tuple[int, float], ...]], ...] = ()
    stream_bytes_per_s: tuple[tuple[int, float], ...] = ()
    function_bytes_per_s: float = 0.0
    attention_flops_per_s: tuple[tuple[str, float], ...] = ()
    overlap: float = 0.0
    update_s: float = 0.0
    update_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        assert self.ranks_per_node >= 1 and self.flops_per_s and 0 <= self.overlap <= 1, self

    def link(self, grid_sizes: Sequence[int], axis: int) -> Link:
        """Return the link of `axis`: ranks are numbered row-major, the last axes inside a node.

        An axis whose stride * size ranks fit a node stays inside; any other one crosses nodes.
        One with as many of its ranks, several, in each node has two levels.
        """
        stride = math.prod(grid_sizes[axis + 1 :])
        if stride * grid_sizes[axis] <= self.ranks_per_node:
            return self.intra
        members = max(1, self.ranks_per_node // stride)
        measured = dict(self.crossings).get(members)
        link = measured or crossing(self.intra, self.inter, grid_sizes[axis], members)
        if self.ranks_per_node % stride or not fits(members, grid_sizes[axis]):
            return _one_level(link)
        return link if measured else replace(link, levels=self._levels(members))

    def _levels(self, members: int) -> Levels:
        costs = self.op_overhead_s, self.memory_bandwidth_bytes_per_s
        return Levels(members, self.intra, self.inter, *costs)

    def place(self, grid_sizes: Sequence[int], axis: int) -> str:
        """Say where `axis` runs: "inside" a node, "between" nodes, or "across" both."""
        stride = math.prod(grid_sizes[axis + 1 :])
        if stride * grid_sizes[axis] <= self.ranks_per_node:
            return "inside"
        return "between" if self.ranks_per_node // stride < 2 else "across"

    def matmul_flops_per_s(self, dtype: object, narrowest: int | None = None) -> float:
        """Return the matmul rate of `dtype` (a name or a torch.dtype), float32's if unlisted.

        `narrowest` is the smallest of the three dims of the product, where it is known.
        """
        rates = dict(self.flops_per_s)
        name = dtype_name(dtype) if dtype_name(dtype) in rates else "float32"
        ladder = dict(self.narrow_flops_per_s).get(name)
        if narrowest is None or not ladder:
            return rates.get(name, self.flops_per_s[0][1])
        sizes, reached = zip(*ladder, strict=True)
        return float(np.interp(math.log2(max(1, narrowest)), np.log2(sizes), reached))

    def attention_rate(self, dtype: object) -> float:
        """Return the flops per second of attention in `dtype`, its exponentials included."""
        reached = dict(self.attention_flops_per_s)
        return reached.get(dtype_name(dtype)) or self.matmul_flops_per_s(dtype)

    def stream_rate(self, bytes_moved: Any) -> Any:
        """Return the bytes per second of an op that reads and writes so many: numbers or arrays."""
        if not self.stream_bytes_per_s:
            return self.memory_bandwidth_bytes_per_s
        sizes, reached = zip(*self.stream_bytes_per_s, strict=True)
        found = np.interp(np.log2(np.maximum(1.0, bytes_moved)), np.log2(sizes), reached)
        return found if isinstance(bytes_moved, np.ndarray) else float(found)

    @property
    def pointwise_bytes_per_s(self) -> float:
        """What exp, tanh and their like read and write."""
        return self.function_bytes_per_s or self.memory_bandwidth_bytes_per_s


def dtype_name(dtype: object) -> str:
    """Return the name of a dtype given as a name or as a torch.dtype: `float32`."""
    return str(dtype).removeprefix("torch.")


def _one_level(link: Link) -> Link:
    """Return a link without what was measured of two levels: nodes have uneven parts of a group."""
    rates = tuple(r for r in link.rates if not members_of(r.by))
    return link if rates == link.rates else replace(link, rates=rates)


def crossing(intra: Link, inter: Link, ranks: int, members: int) -> Link:
    """Return the link of a group of `ranks` that has `members` of them in each node.

    Ring: only nodes - 1 of its ranks - 1 steps leave a node, and `members` rings, one per network
    card, share the load. All-to-all: of the ranks - 1 blocks that a rank sends, ranks - members
    leave through its own card.

    Source: NCCL src/graph/tuning.cc (nsteps - nInterSteps at intraLat, nInterSteps at interLat);
    the bandwidths by counting what leaves a node.
    """
    if members == 1:
        return inter
    nodes = -(-ranks // members)
    outside = (nodes - 1) / (ranks - 1)
    latency_s = (1 - outside) * intra.latency_s + outside * inter.latency_s
    ring = min(intra.bandwidth_bytes_per_s, members * inter.bandwidth_bytes_per_s)
    exchange = inter.bandwidth_bytes_per_s * (ranks - 1) / (ranks - members)
    pair = (intra.low_latency, inter.low_latency)
    return Link(
        latency_s,
        ring,
        call_s=max(intra.call_s, inter.call_s),
        sum_bytes_per_s=min(intra.sum_bytes_per_s, inter.sum_bytes_per_s),
        rates=(Rate("all_to_all", latency_s, min(intra.bandwidth_bytes_per_s, exchange)),),
        low_latency=crossing(pair[0], pair[1], ranks, members) if pair[0] and pair[1] else None,
    )


# The clusters ----------------------------------------------------------------------------------


def bandwidth_bound(
    bandwidth_bytes_per_s: float = 1e9,
    *,
    latency_s: float = 0.0,
    flops_per_s: float = math.inf,
    memory_bytes: float = math.inf,
) -> Cluster:
    """Return a synthetic cluster on which, by default, only bytes sent cost anything."""
    link = Link(latency_s, bandwidth_bytes_per_s)
    return Cluster(
        name="bandwidth_bound",
        backend="ring",
        ranks_per_node=2**31,
        intra=link,
        inter=link,
        flops_per_s=(("float32", flops_per_s),),
        memory_bandwidth_bytes_per_s=math.inf,
        memory_bytes=memory_bytes,
        op_overhead_s=0.0,
    )


GLOO_RATES = (
    Rate("all_gather", 1.03e-3, 5.1e8),
    Rate("all_reduce", 7.6e-4, 1.02e9),
    Rate("all_to_all", 4.5e-4, 6.0e8),
    Rate("reduce_scatter", 5.8e-4, 5.5e8),
)
"""Seconds per step and bytes sent per second.

Source: benchmarks/measure_gloo.py, torch 2.13.0, two cores of an AMD EPYC under four ranks of one
thread each; per cell the median over three runs of its median of five, 4 KiB to 16 MiB, groups of
two and four; least squares on relative errors, reduce_scatter without its sum. Other work ran
beside it: the same cell differed between runs by a factor of 1.5 to 2.3 in the median, 3.2 at
worst; these rates meet the medians within 1.75. Good for ratios, not for absolute times.
"""


def gloo_loopback() -> Cluster:
    """Return gloo over loopback: four one-thread ranks on two cores that other work shares.

    Compute is what a rank reaches while the other three compute too (alone it reaches twice that
    in matmul, 1.0e11 float32 and 2.2e11 bfloat16, and 5.1e10 bytes per second of copying).
    The overhead is that of a recorded add of eight floats.

    Source: as for GLOO_RATES. float16 and float64 were not measured: bfloat16's, half float32's.
    """
    link = Link(7.6e-4, 6.0e8, sum_bytes_per_s=1.28e10, rates=GLOO_RATES)
    return Cluster(
        name="gloo_loopback",
        backend="gloo",
        ranks_per_node=64,
        intra=link,
        inter=link,
        flops_per_s=(
            ("float32", 5.0e10),
            ("bfloat16", 1.1e11),
            ("float16", 1.1e11),
            ("float64", 2.5e10),
        ),
        memory_bandwidth_bytes_per_s=1.43e10,
        memory_bytes=6e9,
        op_overhead_s=1.8e-6,
    )


def nccl_link(
    bandwidth_bytes_per_s: float, *, simple_step_s: float, low_latency_step_s: float
) -> Link:
    """Return a link under NCCL's rings: protocol Simple, with LL for short messages.

    LL carries a flag beside each word and reaches a quarter of the bandwidth. Trees and NVLink
    SHARP are left out: they shorten small all-reduces over many nodes and speed up those of a
    whole H100 node by a third.

    Source: NCCL src/graph/tuning.cc, baseLat Ring (LL 6.6 us, Simple 8.4 us) and, for LL, busBw/4.
    """
    low = Link(low_latency_step_s, bandwidth_bytes_per_s / 4, call_s=6.6e-6)
    return Link(simple_step_s, bandwidth_bytes_per_s, call_s=8.4e-6, low_latency=low)


def _nvlink(bandwidth_bytes_per_s: float) -> Link:
    """Source: NCCL src/graph/tuning.cc, hwLat NVLINK Ring: LL 0.6 us, Simple 3.4 us a step."""
    return nccl_link(bandwidth_bytes_per_s, simple_step_s=3.4e-6, low_latency_step_s=0.6e-6)


def _network(bandwidth_bytes_per_s: float) -> Link:
    """Source: NCCL src/graph/tuning.cc, hwLat NET Ring: LL 2.7 us, Simple 14.0 us a step."""
    return nccl_link(bandwidth_bytes_per_s, simple_step_s=14.0e-6, low_latency_step_s=2.7e-6)


CUDA_OP_OVERHEAD_S = 5e-6
"""What one eager operator costs the host at least, before its kernel.

Source: 5 to 25 us of dispatch and launch per operator on an H100 host,
jiahuanglin.xyz/all_lessons/gpu_kernel_serving/18_pytorch_to_kernel.html; the lower end, because
launches run ahead of the device.
"""


def dgx_a100() -> Cluster:
    """Return nodes of 8 A100-SXM4-80GB. Compute and memory rates are peaks, not reached in full.

    Source: NVIDIA A100 80GB datasheet: dense bf16 and fp16 312, fp32 19.5 (no TF32, PyTorch's
    default), fp64 tensor 19.5 TFLOP/s; 80 GB at 2,039 GB/s. NVLink: 235 GB/s, as NCCL's tuning.cc
    caps compute capability 8.0. Network: DGX A100 user guide, a 200 Gb/s ConnectX-6 per GPU.
    """
    return Cluster(
        name="dgx_a100",
        backend="nccl",
        ranks_per_node=8,
        intra=_nvlink(235e9),
        inter=_network(25e9),
        flops_per_s=(
            ("float32", 19.5e12),
            ("bfloat16", 312e12),
            ("float16", 312e12),
            ("float64", 19.5e12),
        ),
        memory_bandwidth_bytes_per_s=2.039e12,
        memory_bytes=80e9,
        op_overhead_s=CUDA_OP_OVERHEAD_S,
    )


def dgx_h100() -> Cluster:
    """Return nodes of 8 H100-SXM5-80GB. Compute and memory rates are peaks, not reached in full.

    Source: NVIDIA H100 datasheet and architecture whitepaper, SXM5: dense bf16 and fp16 989.4, fp32
    66.9, fp64 tensor 66.9 TFLOP/s; 80 GB at 3.35 TB/s. NVLink: 370 GB/s effective of 450, by
    github.com/NVIDIA/nccl-tests issue 212. Network: DGX H100 user guide, 400 Gb/s per GPU.
    """
    return Cluster(
        name="dgx_h100",
        backend="nccl",
        ranks_per_node=8,
        intra=_nvlink(370e9),
        inter=_network(50e9),
        flops_per_s=(
            ("float32", 66.9e12),
            ("bfloat16", 989.4e12),
            ("float16", 989.4e12),
            ("float64", 66.9e12),
        ),
        memory_bandwidth_bytes_per_s=3.35e12,
        memory_bytes=80e9,
        op_overhead_s=CUDA_OP_OVERHEAD_S,
    )


CLUSTERS: dict[str, Callable[[], Cluster]] = {
    "bandwidth_bound": bandwidth_bound,
    "dgx_a100": dgx_a100,
    "dgx_h100": dgx_h100,
    "gloo_loopback": gloo_loopback,
}


def by_name(name: str) -> Cluster:
    """Return the cluster called `name`.

    Raises AutotpError for a name that is not in CLUSTERS.
    """
    if name not in CLUSTERS:
        raise AutotpError(
            f"no cluster is called {name!r}", remedy=f"one of {', '.join(sorted(CLUSTERS))}"
        )
    return CLUSTERS[name]()
