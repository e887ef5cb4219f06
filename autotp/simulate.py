"""All ranks of a grid in one process: one thread per rank, collectives through barriers.

Used by `autotp.check` and the tests: the emitted programs run forward, backward and one SGD step
exactly as on a cluster, on pieces of the original parameters. `differences` says how far what all
ranks hold is from a whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from autotp.axis import Axis, run_ranks
from autotp.grid import Coords, Grid
from autotp.layouts import I, Layout, P, assemble, take_shard
from autotp.passes.emit.again import runnable
from autotp.passes.emit.codegen import emit
from autotp.passes.network import Network
from autotp.passes.program import Program
from autotp.plan import Plan

Execute = Callable[[int, fx.GraphModule, Sequence[Tensor]], Sequence[Any]]
"""Run the program of one rank on its placeholders' values; return its flat outputs."""


@dataclass(frozen=True, slots=True)
class RankRun:
    """What one rank holds after a step: outputs, its parameters, and the bytes that it sent.

    gradients   of its parameters by name, and of its inputs by placeholder
    params      its pieces of the parameters, after the SGD step
    """

    outputs: tuple[Any, ...]
    gradients: Mapping[str, Tensor | None]
    params: Mapping[str, Tensor]
    sent: Mapping[tuple[str, str], Fraction]
    module: fx.GraphModule


@dataclass(frozen=True, slots=True)
class GridRun:
    """One step of all ranks: the outputs of each, and whole gradients put together from pieces."""

    ranks: tuple[RankRun, ...]
    gradients: Mapping[str, Tensor | None]


def run_grid(
    program: Program,
    network: Network,
    plan: Plan,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    seed: int = 0,
    backward: Sequence[Tensor | None] | None = None,
    lr: float = 0.0,
    execute: Execute | None = None,
    rng: str = "fast",
) -> GridRun:
    """Run forward, backward and one SGD step on every rank of `plan.grid`.

    `state` holds whole parameters and buffers by name; `backward` the whole gradients of the
    outputs, by default one for the first; `execute` stands in for calling a rank's program.
    `seed` is the step's, and with rng="exact" that of the generator each rank draws from.
    """

    def step(rank: int, axes: dict[str, Axis]) -> RankRun:
        coords = plan.grid.coords(rank)
        module = emit(program, network, plan, coords, axes, rng)
        if module.meta["rng"] is not None:
            module.meta["rng"].step_seed, module.meta["rng"].own = seed, {}
        params = local_params(plan, state, rank)
        own = leaves(inputs)
        values = placeholder_values(program, params, state, own)
        if execute is None:
            outputs = runnable(module, network)(*values)
        else:
            outputs = execute(rank, module, values)
        run_backward(outputs, backward and _local_gradients(plan, backward, coords))
        grads = {name: p.grad for name, p in params.items() if p.requires_grad}
        grads |= {n: x.grad for n, x in zip(program.inputs, own, strict=True) if x.requires_grad}
        outputs = [o.detach().clone() if lr else o for o in outputs]  # before parameters change
        sgd_step(params.values(), lr)
        sent = {(k, a.name): n for a in axes.values() for k, n in a.sent.items() if n}
        return RankRun(tuple(outputs), grads, params, sent, module)

    runs = run_ranks(plan.grid, step)
    return GridRun(tuple(runs), whole_gradients(plan, runs))


# One rank -----------------------------------------------------------------------------------------


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors as leaves of a new graph; one that stands twice stays one."""
    made = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors}
    return [made[id(t)] for t in tensors]


def local_params(plan: Plan, state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return this rank's piece of every parameter, as leaves."""
    coords = plan.grid.coords(rank)
    return {
        name: take_shard(state[name].detach(), r.layout, plan.grid, coords)
        .clone()
        .requires_grad_(r.trained)
        for name, r in plan.params.items()
    }


def placeholder_values(
    program: Program,
    params: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
) -> list[Tensor]:
    """Return the arguments of a graph in the order of its placeholders."""
    given = dict(zip(program.inputs, inputs, strict=True))
    out = []
    for node in program.graph_module.graph.nodes:
        if node.op != "placeholder":
            break
        if node.name in program.params:
            out.append(params[program.params[node.name]])
        elif node.name in program.buffers:
            out.append(state[program.buffers[node.name]])
        elif node.name in program.constants:
            out.append(program.constants[node.name])
        else:
            out.append(given[node.name])
    return out


def run_backward(outputs: Sequence[Any], gradients: Sequence[Tensor | None] | None) -> None:
    """Send gradients back from the outputs: those given, or one from the first that has any."""
    if gradients is None:
        first = next(o for o in outputs if isinstance(o, Tensor) and o.requires_grad)
        torch.autograd.backward(first, torch.ones_like(first))
        return
    pairs = [
        (o, g)
        for o, g in zip(outputs, gradients, strict=False)
        if g is not None and isinstance(o, Tensor) and o.requires_grad
    ]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


def _local_gradients(
    plan: Plan, whole: Sequence[Tensor | None], coords: Coords
) -> list[Tensor | None]:
    return [
        g if g is None or layout is None else take_shard(g, layout, plan.grid, coords)
        for g, layout in zip(whole, plan.outputs, strict=False)
    ]


def sgd_step(params: Iterable[Tensor], lr: float) -> None:
    """Take one step of plain SGD where there is a gradient."""
    with_grad = [p for p in params if p.grad is not None]
    if with_grad and lr:
        torch.optim.SGD(with_grad, lr=lr, foreach=False).step()


# All ranks together -------------------------------------------------------------------------------


def whole_gradients(plan: Plan, runs: Sequence[RankRun]) -> dict[str, Tensor | None]:
    """Put every parameter's gradient together."""
    out: dict[str, Tensor | None] = {}
    for name, r in plan.params.items():
        pieces = {plan.grid.coords(k): run.gradients.get(name) for k, run in enumerate(runs)}
        given = {c: p for c, p in pieces.items() if p is not None}
        complete = len(given) == len(pieces)
        out[name] = assemble(given, r.shape, r.layout, plan.grid) if complete else None
    return out


def differences(
    pieces: Sequence[Tensor], layout: Layout, whole: Tensor, grid: Grid
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, per rank, what it holds (partials summed) and what it should hold of `whole`."""
    expected = tuple(I if t is P else t for t in layout)
    sums: dict[Coords, Tensor] = {}
    for rank, coords in enumerate(grid.all_coords()):
        key = tuple(0 if t is P else c for c, t in zip(coords, layout, strict=True))
        sums[key] = sums[key] + pieces[rank] if key in sums else pieces[rank]
    for coords, piece in sums.items():
        yield piece, take_shard(whole, expected, grid, coords)
