"""This machine as a cluster: from the cache, or measured on the live process group and kept there.

    calibrated         all ranks of the process group get one Calibration
    measured_cluster   its cluster: what `parallelize` plans for where none is given
    cached_cluster     without a process group: what was measured before for so many ranks
    table              a calibration as a person reads it

A plan depends on what was measured, and a second measurement never gives the same figures: the
cache is what makes plans stable from run to run.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from autotp.calibration_file import Calibration, Identity, cache_path, load, plain, save
from autotp.cost_model.calibration import fit
from autotp.cost_model.cluster import Cluster, Link
from autotp.cost_model.collectives import PLAIN
from autotp.cost_model.link_fit import way_of
from autotp.errors import CalibrationError
from autotp.measure import QUICK, Effort, measure, ranks_per_node
from autotp.notation import bytes_text
from autotp.progress import stage
from autotp.ranks import from_rank_0, together
from autotp.version import VERSION

MEASURABLE = tuple(sorted(set(PLAIN) - {"ring"}))
"""The backends whose collectives can be timed: "ring" is the textbook's."""


def can_measure() -> bool:
    """Say whether there is a process group of several ranks whose collectives take their time."""
    return dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() in MEASURABLE


def measured_cluster(device: torch.device) -> Cluster:
    """Return this machine's cluster, the same on all ranks, measured briefly where it is not kept.

    Raises CalibrationError where there is nothing to measure.
    """
    return calibrated(device, hint="; pass cluster= to plan without").cluster


def calibrated(
    device: torch.device, effort: Effort = QUICK, force: bool = False, hint: str = ""
) -> Calibration:
    """Return the kept calibration of this process group, or measure and keep it.

    Every rank calls it; with `force` it is measured anew. Rank 0 says on standard error what it
    measures, why, and where it is kept. Raises CalibrationError where there is nothing to measure.
    """
    together(refuse_unmeasurable)
    identity = from_rank_0(identity_of(device, ranks_per_node()))
    path = cache_path(identity)
    mine = _kept(path, identity, force) if dist.get_rank() == 0 else ""
    kept: Calibration | str = from_rank_0(mine)
    if isinstance(kept, Calibration):
        return kept
    _say(f"{kept}: measuring {identity.backend} on {identity.world_size} ranks{hint}")
    start = time.perf_counter()
    with stage("measure this machine"):
        measured = measure(effort, device)
    cluster = fit(measured, f"measured_{identity.backend}")
    spent = time.perf_counter() - start
    made = Calibration(identity, cluster, spent, plain(measured))
    if dist.get_rank() == 0:
        _keep(made, path)
    agreed: Calibration = from_rank_0(made)
    return agreed


def calibrate_rank(effort: Effort, force: bool) -> Calibration:
    """Return the calibration of torchrun's ranks, of which this is one: on GPUs where there are."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return calibrated(device, effort, force)


def _kept(path: Path, identity: Identity, force: bool) -> Calibration | str:
    """Return the kept calibration, or why there is none."""
    if force:
        return "measuring anew was asked for"
    if not path.exists():
        return "this machine was not calibrated"
    try:
        return load(path, identity)
    except CalibrationError as error:
        return f"{error.what} ({'; '.join(f'{place}: {fact}' for place, fact in error.at)})"


def _keep(calibration: Calibration, path: Path) -> None:
    """Save a calibration; a folder that cannot be written to costs the next run its time only."""
    try:
        save(calibration, path)
    except OSError as error:
        _say(f"cannot keep it: {error}; it will be measured again")
        return
    _say(f"measured in {calibration.seconds:.1f} s, kept in {path}")


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"autotp: {text}", file=sys.stderr, flush=True)


def refuse_unmeasurable() -> None:
    """Raise CalibrationError where there is nothing to measure."""
    if can_measure():
        return
    facts = [("process group", "there is none")]
    if dist.is_initialized():
        ranks, backend = dist.get_world_size(), dist.get_backend()
        facts = [("process group", f"{ranks} ranks"), ("backend", str(backend))]
    raise CalibrationError(
        f"to measure takes two ranks or more that talk over {' or '.join(MEASURABLE)}",
        at=facts,
        remedy=("cluster= a name or a Cluster", "autotp calibrate --ranks 4"),
    )


def cached_cluster(ranks: int, device: torch.device) -> Cluster:
    """Return what was measured here before on so many ranks of one node.

    Raises CalibrationError where nothing was kept, or where it cannot be trusted.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    identity = _identity(device, backend, ranks, ranks, THREADS)
    path = cache_path(identity)
    if not path.exists():
        raise CalibrationError(
            f"{ranks} ranks were not measured on this machine",
            at=[("file", f"{path} does not exist")],
            remedy=f"autotp calibrate --ranks {ranks}",
        )
    return load(path, identity).cluster


# What it holds for -----------------------------------------------------------------------------


def identity_of(device: torch.device, node: int) -> Identity:
    """Return the identity of this rank's process group, with `node` ranks on each node."""
    threads = torch.get_num_threads()
    return _identity(device, str(dist.get_backend()), dist.get_world_size(), node, threads)


THREADS = 1
"""Of each rank, where torchrun or `autotp.launch` starts several on a node."""


def _identity(device: torch.device, backend: str, ranks: int, node: int, threads: int) -> Identity:
    return Identity(
        machine=platform.node(),
        processor=_processor(device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        device=device.type,
        backend=backend,
        world_size=ranks,
        ranks_per_node=node,
        threads=threads,
        torch=str(torch.__version__),
        autotp=VERSION,
    )


def _processor(device: torch.device) -> str:
    """Return the model of the GPU, or of the CPU where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


# As a person reads it --------------------------------------------------------------------------


def table(calibration: Calibration) -> str:
    """Return what was measured, in a page of text."""
    i, c = calibration.identity, calibration.cluster
    head = f"{i.backend} on {i.world_size} ranks of {i.machine} ({i.processor}, {i.cores} cores,"
    lines = [
        f"{head} {i.threads} threads per rank), torch {i.torch}",
        *_link_lines("in a node", c.intra),
    ]
    if c.inter != c.intra:
        lines += _link_lines("between nodes", c.inter)
    for members, link in c.crossings:
        lines += _link_lines(f"{members} in each node", link)
    ladders = dict(c.narrow_flops_per_s)
    for dtype, rate in c.flops_per_s:
        narrow = [f"{r / 1e9:.1f} at {w}" for w, r in ladders.get(dtype, ())]
        told = f"  by narrowest dim: {', '.join(narrow)}" if narrow else ""
        lines.append(f"products of {dtype:<9} {rate / 1e9:9.1f} GFLOP/s{told}")
    for dtype, rate in c.attention_flops_per_s:
        lines.append(f"attention, {dtype:<10} {rate / 1e9:9.1f} GFLOP/s")
    reached = [f"{r / 1e9:.1f} at {bytes_text(n)}" for n, r in c.stream_bytes_per_s]
    told = f"  by what an op reads and writes: {', '.join(reached)}" if reached else ""
    lines.append(f"memory                {c.memory_bandwidth_bytes_per_s / 1e9:9.1f} GB/s{told}")
    lines.append(f"functions             {c.function_bytes_per_s / 1e9:9.1f} GB/s")
    rate = c.update_bytes_per_s / 1e9
    lines.append(
        f"AdamW                 {rate:9.2f} GB/s  and {c.update_s * 1e6:.0f} us a parameter"
    )
    lines.append(f"one op                {c.op_overhead_s * 1e6:9.1f} us")
    lines.append(f"a call after products {c.intra.call_s * 1e3:8.2f} ms more")
    lines.append(f"hidden beside products {c.overlap:8.0%}")
    return "\n".join(lines)


def _link_lines(where: str, link: Link) -> Iterator[str]:
    yield f"{where:<33} ranks    a step     sent"
    for r in link.rates:
        seconds, rate = r.latency_s * 1e6, r.bandwidth_bytes_per_s / 1e9
        yield f"  {way_of(r.kind, r.by):<31} {r.ranks:5} {seconds:6.0f} us {rate:6.2f} GB/s"
