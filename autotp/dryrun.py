"""What one rank of a cluster will need and take, told on one device: `autotp.dryrun`.

The model is captured and planned without weights; only one rank's parameters are made, of local
shapes and at random, and its program takes real steps on `SilentAxis`. Kernels, memory and compute
time are real; what is sent, and its time, is predicted; values mean nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autotp.cost_model.cluster import CLUSTERS, Cluster
from autotp.dryrun_report import DryRun, Measured, Predicted, Sent
from autotp.dynamic import DynamicInputs
from autotp.errors import AutotpError, GridError
from autotp.grid import Grid, as_grid, is_open
from autotp.grid_choice import is_undecided, refuse_open
from autotp.notation import bytes_text, memory_text
from autotp.options import Options
from autotp.passes.factors import Factors
from autotp.passes.grids import price_grids
from autotp.passes.identity import fingerprint, refuse_other_ops
from autotp.passes.moves import Moves
from autotp.passes.network import Network
from autotp.passes.pins import Pins
from autotp.passes.planning import search_plan
from autotp.passes.program import Program
from autotp.passes.traffic import internal_traffic
from autotp.plan import Plan, PlannedMove
from autotp.plan_file import refuse_other
from autotp.progress import stage
from autotp.rank_program import alone, peak, timed
from autotp.ranks import device_of, open_ranks
from autotp.reading import as_cluster, inferred, split_inputs
from autotp.refusals import refuse_model
from autotp.silent_axis import CopyClock, silent_axes

Found = tuple[Program, Network, Factors]
STEPS = 5
"""Steps that are timed."""


def dryrun(
    model: nn.Module,
    grid: Any,
    example_inputs: Any,
    *,
    rank: int = 0,
    cluster: Cluster | str | None = None,
    plan: Plan | None = None,
    pins: Pins | None = None,
    device: torch.device | str | None = None,
    steps: int = STEPS,
    dynamic: DynamicInputs | None = None,
) -> DryRun:
    """Run one rank's program of any grid alone, and set what it takes beside the prediction.

    rank      which rank of the grid
    cluster   what prices the plan; by default dgx_h100 on a GPU, gloo_loopback elsewhere
    plan      a plan to follow, such as Plan.load(path); its prices stay those it was made with
    device    where to run: by default the GPU if there is one
    steps     how many steps are timed, after two that warm up

    Other arguments as for `parallelize`. `model` may be on the meta device, and so may the inputs:
    no weights are read, and the whole model is never allocated. Raises AutotpError."""
    refuse_model(model, weights=False)
    where = _device(device)
    shape = as_grid(open_ranks(grid) if is_open(grid) else grid)
    args, kwargs = split_inputs(example_inputs)
    beside = device_of(list(model.parameters()))
    args, kwargs = tree_map(lambda x: _beside(x, beside), (args, kwargs))
    found = inferred(model, args, kwargs, Options(dynamic=dynamic))
    chosen = _cluster(cluster, plan, where, shape.world_size)
    if plan is None:
        if is_undecided(grid, shape):
            refuse_open(grid, example_inputs, pins)
            shape = price_grids(*found, shape.world_size, chosen).best
        plan = search_plan(*found, shape, chosen, pins).plan
    shape = plan.grid if is_open(grid) else shape
    _refuse_plan(plan, found, shape)
    _refuse_rank(rank, shape)
    _refuse_too_large(plan, where)
    inputs = _inputs(found[0], example_inputs)
    measured = _measured(found, plan, rank, dict(_buffers(model)), inputs, where, steps)
    return DryRun(
        model=type(model).__name__,
        rank=rank,
        plan=plan,
        memory_bytes=chosen.memory_bytes,
        predicted=predicted(found[1], plan, chosen),
        measured=measured,
    )


def _beside(leaf: Any, device: torch.device) -> Any:
    """Return an input as the capture wants it: beside a model without weights, without values."""
    return leaf.to("meta") if isinstance(leaf, Tensor) and device.type == "meta" else leaf


def _inputs(program: Program, example_inputs: Any) -> list[Tensor]:
    """Return the tensors of the example inputs, with their values."""
    return program.flatten_inputs(*split_inputs(example_inputs))


def _buffers(model: nn.Module) -> Mapping[str, Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))


# The choices --------------------------------------------------------------------------------------


def _device(given: torch.device | str | None) -> torch.device:
    """Return where to run. Raises AutotpError for a device that is not there."""
    device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and not torch.cuda.is_available()
    ):
        raise AutotpError(
            f"a dry run cannot run on {device}",
            at=[("device", "there is no GPU" if device.type == "cuda" else "is no cpu or cuda")],
            remedy='device="cpu"',
        )
    return device


def _cluster(
    given: Cluster | str | None, plan: Plan | None, device: torch.device, ranks: int
) -> Cluster:
    """Return what prices: as given, else the plan's own. Raises AutotpError if that is unknown."""
    if given is None and plan is not None:
        if plan.cluster not in CLUSTERS:
            raise AutotpError(
                f"the plan was made for {plan.cluster}, which is known here by no name",
                at=[("cluster", "not given")],
                remedy="pass the cluster that the plan was made for: its links and its memory",
            )
        given = plan.cluster
    return as_cluster(given, device, ranks)


def _refuse_plan(plan: Plan, found: Found, grid: Grid) -> None:
    program, network, _ = found
    refuse_other(plan, fingerprint(program), grid, program.train)
    refuse_other_ops(plan, program, network)
    plan.dynamic.refuse(program.example_sizes)


def _refuse_rank(rank: int, grid: Grid) -> None:
    if not 0 <= rank < grid.world_size:
        raise GridError(
            f"grid {grid} has no rank {rank}",
            at=[("rank", f"{rank}, of {grid.world_size} ranks")],
            remedy=f"rank=0 to rank={grid.world_size - 1}",
        )


def _refuse_too_large(plan: Plan, device: torch.device) -> None:
    """Raise AutotpError where the host's memory would not hold the rank: it would be killed."""
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cpu" and plan.memory.at_once > free_bytes:
        raise _too_large(plan, f"the host has {bytes_text(free_bytes)} free")


def _too_large(plan: Plan, fact: str) -> AutotpError:
    return AutotpError(
        f"one rank of grid {plan.grid} does not fit this device",
        at=[("predicted", memory_text(plan.memory)), ("device", fact)],
        remedy=("a larger grid, or a smaller batch", "autotp.plan predicts without running"),
    )


# The two columns ----------------------------------------------------------------------------------


def predicted(network: Network, plan: Plan, cluster: Cluster) -> Predicted:
    """Return what a plan takes by its own prices, what is sent told apart by kind and axis."""
    params, names = {r.value for r in plan.params.values()}, plan.grid.names
    moves = Moves(plan.grid, cluster, params=params)
    seconds: dict[tuple[str, str], float] = {}

    def add(kind: str, axis: str, spent_s: float) -> None:
        seconds[kind, axis] = seconds.get((kind, axis), 0.0) + spent_s

    for move in plan.moves:
        axis = names.index(move.axis)
        prices = {kind: moves.kind_s(kind, move.size_bytes, axis) for kind, _ in move.sent}
        called_s = move.seconds - _put_s(move, network, moves)
        for kind, price in prices.items():
            add(kind, move.axis, called_s * price / sum(prices.values()))
    for op, d in zip(network.ops, plan.decisions, strict=True):
        trained = network.values[op.results[0]].grad
        inside = internal_traffic(op, d.split, d.operands, d.results, plan.grid, trained)
        for axis, kind, size, times in inside:
            add(kind, names[axis], times * moves.plain_s(kind, size, axis))
    sent = plan.sent()
    rows = [Sent(*key, s, sent.get(key, Fraction(0))) for key, s in sorted(seconds.items())]
    hidden_s = sum(bucket.hidden_s for bucket in plan.buckets)
    compute_s = plan.step_time_s + hidden_s - sum(seconds.values())
    return Predicted(compute_s, tuple(rows), plan.memory)


def _put_s(move: PlannedMove, network: Network, moves: Moves) -> float:
    """Return the part of a move's seconds that is compute: the copies around its collectives."""
    if move.schedule:
        return 0.0
    axis = moves.grid.axis(move.axis)
    ends = move.before[axis], move.after[axis]
    apart = moves.apart(move.value, network.values[move.value].shape, ends)
    return moves.put_s(move.kinds, move.size_bytes, axis, apart)


def _measured(
    found: Found,
    plan: Plan,
    rank: int,
    state: Mapping[str, Tensor],
    inputs: list[Tensor],
    device: torch.device,
    steps: int,
) -> Measured:
    coords, clock = plan.grid.coords(rank), CopyClock(device)
    axes = silent_axes(plan.grid, coords, clock)
    with _fitting(plan), torch.enable_grad():
        with stage(f"make rank {rank}"):
            ready = alone(found, plan, coords, axes, state, inputs, device)
        with stage(f"run {steps} steps"):
            phases = timed(ready, clock, steps)
            peak_bytes, flops = peak(ready)
    gpu = device.type == "cuda"
    return Measured(
        device=torch.cuda.get_device_name(device) if gpu else "cpu",
        phases=phases,
        peak_bytes=peak_bytes,
        at_rest_bytes=ready.at_rest,
        flops=flops,
    )


@contextmanager
def _fitting(plan: Plan) -> Iterator[None]:
    """Refuse by name what the GPU's memory does not hold."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _too_large(plan, str(error).partition(". ")[0]) from error
