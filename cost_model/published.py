"""Figures that others measured and published, as data with their sources. No figure is ours.

OPTIMUS_WEAK_SCALING   Megatron beside Optimus (SUMMA), 4 to 64 GPUs, in sequences per second
RTX_5000_NODES         the machine of that run, as far as it is known
"""

from __future__ import annotations

from dataclasses import dataclass

from autotp.cost_model.cluster import Cluster, Link


@dataclass(frozen=True, slots=True)
class Throughput:
    """Sequences per second of both schemes on so many ranks."""

    ranks: int
    megatron: float
    optimus: float


OPTIMUS_WEAK_SCALING = (
    Throughput(4, 2.94, 2.52),
    Throughput(16, 1.38, 1.41),
    Throughput(36, 0.88, 1.31),
    Throughput(64, 0.64, 0.95),
)
"""Weak scaling of training: the model grows with the ranks.

Source: Xu, Li, Gong and You 2021, "An Efficient 2D Method for Training Super-Large Deep Learning
Models", arXiv 2104.05343; four Quadro RTX 5000 per node.
"""


def rtx_5000_nodes() -> Cluster:
    """Return nodes of four Quadro RTX 5000, for ratios only.

    Known: four of them per node (arXiv 2104.05343). By NVIDIA's datasheet of the card: 11.2 TFLOP/s
    in float32, 448 GB/s, 16 GB, PCI Express 3.0 x16. Assumed: 12 of its 15.75 GB/s are reached,
    one 56 Gb/s network adapter per node that its four ranks share, 10 us a step inside
    a node and 20 us between nodes.
    """
    return Cluster(
        name="rtx_5000_nodes",
        backend="nccl",
        ranks_per_node=4,
        intra=Link(10e-6, 12e9),
        inter=Link(20e-6, 56e9 / 8 / 4),
        flops_per_s=(("float32", 11.2e12),),
        memory_bandwidth_bytes_per_s=448e9,
        memory_bytes=16e9,
        op_overhead_s=5e-6,
    )
