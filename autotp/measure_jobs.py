"""What is timed to calibrate: collectives, products, attention, streams, updates, overlap.

A Job is a call to repeat and the name under which its seconds are found again. All ranks make the
same jobs in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from autotp.cost_model.compute import matmul_flops
from autotp.cost_model.levels import STAGES, fits, nodes_of
from autotp.dist_axis import DistAxis
from autotp.layouts import I
from autotp.optimizers import watch_optimizers
from autotp.placements import as_dtensor, as_parameter

DTYPES = ("float32", "bfloat16", "float16", "float64")

PILOT = 128
"""The side of the products that tell which dtypes are worth a ladder."""

SLOW_FLOPS_PER_S = 2e10
"""Below it a dtype is emulated: its products are timed at the pilot's size alone.

Source: two cores of an AMD EPYC, one thread: float16 1 to 4, float32 90 GFLOP/s.
"""

LATE_BYTES = 2**12
"""Of the exchange that is timed after products: next to nothing is sent."""

TURNS = 4
"""Of products and an exchange in one sample: each meets the ranks in another order."""

CHAIN = 32
"""Tiny ops in a row, so that their backward's start does not count."""


SMALL_UPDATES = 16
"""Parameters in one step of the optimizer, so that its start does not count."""


@dataclass(frozen=True, slots=True)
class Job:
    """A call, how often it is made for one sample, and its name.

    before   what comes before each call, and is not timed
    """

    key: Hashable
    run: Callable[[], object]
    calls: int = 1
    before: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Ladder:
    """The sizes of compute on a kind of device: narrow dims, the other dims, bytes of streams.

    stream_bytes   of each buffer that is copied or added, from what caches hold to what none does
    large_bytes    of those of functions and of the optimizer's large parameter
    heads          of attention with as many queries and keys as `side`
    """

    narrow: tuple[int, ...]
    side: int
    stream_bytes: tuple[int, ...]
    large_bytes: int
    heads: int


LADDERS = {
    "cpu": Ladder((1, 8, 32, 128, 512), 512, (2**18, 2**20, 2**22, 2**24), 2**22, heads=1),
    "cuda": Ladder((16, 64, 256, 1024, 4096), 4096, (2**22, 2**26), 2**26, heads=16),
}

HEAD_DIM = 64
"""Of the attention that is timed."""


def collective_jobs(
    axis: DistAxis, members: int, sizes: Sequence[int], device: torch.device
) -> Iterator[Job]:
    """Yield every kind by every algorithm over whole buffers of `sizes` bytes.

    The key is (kind, ranks, members, bytes, algorithm).
    """
    whole = torch.ones(max(sizes) // 4 + axis.size, device=device)
    for size in sizes:
        count = max(1, size // 4 // axis.size)
        wire = whole[: count * axis.size].view(axis.size, count)
        calls = max(2, min(8, 2**20 // size))
        runs: dict[str, Callable[..., object]] = {
            "all_gather": partial(axis.all_gather, wire[0]),
            "all_reduce": partial(axis.all_reduce, wire),
            "all_to_all": partial(axis.all_to_all, wire),
            "permute": partial(axis.permute, wire),
            "reduce_scatter": partial(axis.reduce_scatter, wire),
        }
        for kind, run in runs.items():
            yield Job((kind, axis.size, members, wire.nbytes, ""), run, calls)
            levels = (nodes_of(members),) if kind in STAGES and fits(members, axis.size) else ()
            for by in (*axis.algorithms(kind), *levels):
                named = partial(run, by=by)
                yield Job((kind, axis.size, members, wire.nbytes, by), named, calls)


def compute_jobs(device: torch.device, fast: Sequence[str]) -> Iterator[Job]:
    """Yield products of every dtype, ladders of the `fast` ones, streams and a chain of tiny ops.

    The keys are (dtype, shape, pass), ("attention", dtype, flops), (stream, bytes) and "overhead".
    """
    ladder = LADDERS[device.type]
    for dtype in DTYPES:
        if dtype not in fast:
            yield from product_jobs(dtype, (PILOT,) * 3, device)
            continue
        for narrow in ladder.narrow:
            yield from product_jobs(dtype, (narrow, ladder.side, ladder.side), device)
            if narrow < ladder.side:
                yield from product_jobs(dtype, (ladder.side, narrow, ladder.side), device)
        yield _attention_job(dtype, (1, ladder.heads, ladder.side, HEAD_DIM), device)
    for size_bytes in ladder.stream_bytes:
        yield from _stream_jobs(size_bytes, device)
    x = torch.ones(ladder.large_bytes // 4, device=device)
    y = x.clone().requires_grad_()
    # Backward of a function is priced as two more passes over what forward reads and writes.
    yield Job(("gelu", 6 * x.nbytes), partial(_function, y, x))
    yield Job("overhead", partial(_tiny_ops, torch.ones(8, device=device, requires_grad=True)), 4)


def product_jobs(dtype: str, shape: tuple[int, int, int], device: torch.device) -> Iterator[Job]:
    """Yield the three products of a linear of `shape` (rows, made, contracted)."""
    rows, made, contracted = shape
    x, weight, grad = (
        _operand(size, dtype, device)
        for size in ((rows, contracted), (made, contracted), (rows, made))
    )
    calls = max(1, min(8, 2**23 // (rows * made * contracted)))
    yield Job((dtype, shape, 0), partial(F.linear, x, weight), calls)
    yield Job((dtype, shape, 1), partial(torch.mm, grad, weight), calls)
    yield Job((dtype, shape, 2), partial(torch.mm, grad.t(), x), calls)


def _attention_job(dtype: str, shape: tuple[int, int, int, int], device: torch.device) -> Job:
    """Return causal attention of `shape` (batch, heads, queries, dim), forward and backward.

    Its flops are counted as those of an op are: both products whole, backward twice as much.
    """
    batch, heads, rows, dim = shape
    q, k, v = (_operand(shape, dtype, device).requires_grad_() for _ in range(3))
    grad = torch.ones_like(q)

    def run() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), grad)

    flops = 3 * 2 * matmul_flops(rows, rows, dim, batch * heads)
    return Job(("attention", dtype, flops), run)


def _operand(size: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    """Return what a product reads: random, as a GPU multiplies equal numbers faster than others."""
    return torch.randn(size, dtype=getattr(torch, dtype), device=device)


def _stream_jobs(size_bytes: int, device: torch.device) -> Iterator[Job]:
    x = torch.ones(size_bytes // 4, device=device)
    y = x.clone()
    calls = max(1, min(16, 2**22 // size_bytes))
    yield Job(("copy", 2 * x.nbytes), partial(y.copy_, x), calls)
    yield Job(("add", 3 * x.nbytes), partial(torch.add, x, y), calls)


def update_jobs(mesh: DeviceMesh) -> Iterator[Job]:
    """Yield steps of AdamW on small parameters and on a large one, as `parallelize` makes them.

    The key is ("update", parameters, bytes of each).
    """
    watch_optimizers()  # so that they step as they do in training
    for count, size_bytes in ((SMALL_UPDATES, 32), (1, LADDERS[mesh.device_type].large_bytes)):
        parameters = [_updated(size_bytes // 4, mesh) for _ in range(count)]
        yield Job(("update", count, size_bytes), torch.optim.AdamW(parameters).step)


def _updated(elements: int, mesh: DeviceMesh) -> nn.Parameter:
    """Return a parameter with its gradient."""
    x = torch.ones(elements, device=mesh.device_type)
    parameter = as_parameter(x, (I,), x.shape, mesh, trained=True)
    parameter.grad = as_dtensor(x.clone(), (I,), x.shape, mesh)
    return parameter


def _function(x: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(F.gelu(x), x, grad)


def _tiny_ops(x: Tensor) -> None:
    y = x
    for _ in range(CHAIN):
        y = y * x
    torch.autograd.grad(y, x, x.detach())


def overlap_jobs(axis: DistAxis, size_bytes: int, device: torch.device, ratio: int) -> list[Job]:
    """Return a collective alone, `ratio` products alone, and both at once."""
    wire = torch.ones(size_bytes // 4, device=device)
    multiply = _products(LADDERS[device.type].side // 2, ratio, device)

    def start() -> Tensor:
        out: Tensor = torch.ops._c10d_functional.all_reduce(wire, "sum", axis.group_name)
        return out

    def both() -> None:
        pending = start()
        multiply()
        torch.ops._c10d_functional.wait_tensor(pending)

    return [
        Job(("overlap", "collective"), lambda: torch.ops._c10d_functional.wait_tensor(start())),
        Job(("overlap", "product"), multiply),
        Job(("overlap", "both"), both),
    ]


def late_jobs(axis: DistAxis, device: torch.device, count: int) -> list[Job]:
    """Return a small exchange alone, and after `count` products: its part, they, and both."""
    wire = torch.ones(axis.size, LATE_BYTES // 4 // axis.size, device=device)
    multiply = _products(LADDERS[device.type].side, count, device)

    def exchange() -> None:
        axis.all_to_all(wire)

    def turn() -> None:
        multiply()
        exchange()

    return [
        Job(("late", "alone"), exchange, TURNS),
        Job(("late", "after"), exchange, TURNS, before=multiply),
        Job(("late", "product"), multiply, TURNS),
        Job(("late", "turn"), turn, TURNS),
    ]


def _products(side: int, count: int, device: torch.device) -> Callable[[], None]:
    x = _operand((side, side), "float32", device)

    def multiply() -> None:
        for _ in range(count):
            torch.mm(x, x)

    return multiply
