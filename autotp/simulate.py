"""All ranks of a grid in one process: one thread per rank, collectives through barriers.

Used by `autotp.check` and the tests: the emitted programs run forward and backward exactly as on a
cluster, on pieces of the original parameters, and their gradients are put together again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from autotp.axis import Axis, run_ranks
from autotp.layouts import Layout, assemble, take_shard
from autotp.passes.codegen import emit
from autotp.passes.network import Network
from autotp.passes.program import Program
from autotp.plan import Plan


@dataclass(frozen=True, slots=True)
class RankRun:
    """What one rank returned: outputs, gradients of its parameters by name, and bytes sent."""

    outputs: tuple[Any, ...]
    gradients: Mapping[str, Tensor | None]
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
    backward: Sequence[Tensor] | None = None,
) -> GridRun:
    """Run forward and backward on every rank of `plan.grid`.

    `state` holds whole parameters and buffers by name; `backward` the gradients of the outputs, by
    default one for the first.
    """

    def step(rank: int, axes: dict[str, Axis]) -> RankRun:
        coords = plan.grid.coords(rank)
        module = emit(program, network, plan, coords, axes)
        if module.meta["rng"] is not None:
            module.meta["rng"].step_seed = seed
        local = local_params(plan, state, rank)
        values = placeholder_values(program, local, state, inputs)
        outputs = module(*values)
        run_backward(outputs, backward)
        grads = {name: p.grad for name, p in local.items() if p.requires_grad}
        sent = {(k, a.name): n for a in axes.values() for k, n in a.sent.items() if n}
        return RankRun(tuple(outputs), grads, sent, module)

    runs = run_ranks(plan.grid, step)
    return GridRun(tuple(runs), whole_gradients(plan, runs))


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


def run_backward(outputs: Sequence[Any], gradients: Sequence[Tensor] | None) -> None:
    """Send gradients back from the outputs: those given, or one from the first that has any."""
    floats = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    if gradients is None:
        floats[0].backward(torch.ones_like(floats[0]))  # type: ignore[no-untyped-call]
    else:
        torch.autograd.backward(floats, list(gradients))


def whole_gradients(plan: Plan, runs: Sequence[RankRun]) -> dict[str, Tensor | None]:
    """Put every parameter's gradient together; an invariant one must be equal on all ranks."""
    out: dict[str, Tensor | None] = {}
    for name, r in plan.params.items():
        pieces = {plan.grid.coords(k): run.gradients.get(name) for k, run in enumerate(runs)}
        if any(p is None for p in pieces.values()):
            out[name] = None
            continue
        out[name] = join(pieces, r.shape, r.layout, plan)  # type: ignore[arg-type]
    return out


def join(
    pieces: Mapping[tuple[int, ...], Tensor], shape: Sequence[int], layout: Layout, plan: Plan
) -> Tensor:
    """Return the whole tensor that all ranks hold."""
    return assemble(pieces, shape, layout, plan.grid)
