"""What a user calls: parallelize, plan, check. Who reads `compile_rank` has seen the compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.axis import Axis
from autotp.check import compare, prepare
from autotp.comparison import Report
from autotp.cost_model.cluster import Cluster, by_name
from autotp.errors import AutotpError, PlanError
from autotp.grid import Coords, Grid, as_grid
from autotp.layouts import I, Layout, layout_text
from autotp.module import Compiled, ParallelModule, compile_mode, make_parallel, new_state
from autotp.passes.capture import capture
from autotp.passes.codegen import emit
from autotp.passes.factors import infer_factors
from autotp.passes.network import read_network
from autotp.passes.planning import fingerprint, graph_digest, search_plan
from autotp.passes.verify import verify
from autotp.plan import Plan
from autotp.plan_file import from_json, refuse_other, to_json
from autotp.progress import stage
from autotp.ranks import (
    device_of,
    ensure_process_group,
    from_rank_0,
    make_mesh,
    refuse_disagreement,
    together,
)

Pins = Mapping[str, Mapping[str, str]]


def compile_rank(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    train: bool,
    *,
    grid: Grid,
    coords: Coords,
    axes: Mapping[str, Axis],
    cluster: Cluster,
    plan: Plan | None = None,
    pins: Pins | None = None,
    rest: Mapping[str, Layout] | None = None,
    sharded_outputs: bool = False,
    strict: bool = False,
) -> Compiled:
    """Return the program of this rank: the six steps from a model to its collectives."""
    with stage("capture"):
        program, network = together(lambda: _read(model, args, kwargs, train, strict))
    mine = fingerprint(program)
    refuse_disagreement(
        "models",
        {**mine, "the graph's ops": graph_digest(program)},
        "build the same model, and pass inputs of the same shapes, on every rank",
    )
    with stage("infer factors"):
        factors = together(lambda: infer_factors(network, program.inputs))
    if plan is None:
        plan = _agreed(
            lambda: (
                search_plan(
                    program, network, factors, grid, cluster, pins, rest, sharded_outputs
                ).plan
            )
        )
    refuse_other(plan, mine, grid, train)
    if not sharded_outputs:
        _refuse_sharded(plan)
    refuse_disagreement("plans", {"plan": plan.hash}, "give every rank the same plan and versions")
    with stage("emit and verify"):
        module = emit(program, network, plan, coords, axes)
        verify(module, network, factors, grid)
    return Compiled(program, plan, module)


def parallelize(
    model: nn.Module,
    grid: Any,
    example_inputs: Any = None,
    *,
    cluster: Cluster | str | None = None,
    plan: Plan | None = None,
    pins: Pins | None = None,
    outputs: str = "full",
) -> nn.Module:
    """Make `model` the program of this rank of `grid`, in place, and return it.

    grid            a tuple such as (2, 2), a dict of named axes or a DeviceMesh; as many ranks as
                    the process group has. Without a group, torchrun's environment starts one.
    example_inputs  a tuple (args), a dict (kwargs) or both; None plans at the first call.
    cluster         what prices the plan: a Cluster, its name, or this machine's default.
    plan, pins      a plan to follow, or choices to fix by module-path pattern.
    outputs         "full" returns what the original does, "sharded" DTensors.

    Raises AutotpError: what is not supported is refused by name.
    """
    if outputs not in ("full", "sharded"):
        raise AutotpError(f"outputs={outputs!r}", remedy='outputs="full" or outputs="sharded"')
    if isinstance(model, ParallelModule):
        raise AutotpError(
            f"{type(model).__name__} is parallel already",
            remedy="call autotp.parallelize once, on the original model",
        )
    _refuse_meta(model)
    shape = as_grid(grid)
    device_type = device_of(list(model.parameters())).type
    ensure_process_group(shape, device_type)
    mesh = grid if isinstance(grid, DeviceMesh) else make_mesh(shape, device_type)
    chosen = as_cluster(cluster, device_type)

    planned = {n: r.layout for n, r in plan.params.items()} if plan and plan.grid == shape else None

    def compile_one(
        whole: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], train: bool
    ) -> Compiled:
        state = cast(ParallelModule, whole)._autotp
        return compile_rank(
            whole,
            args,
            kwargs,
            train,
            grid=shape,
            coords=state.coords,
            axes=state.axes,
            cluster=chosen,
            plan=plan if plan is not None and plan.train == train else None,
            pins=None if state.layouts else pins,
            rest=state.layouts or planned,
            sharded_outputs=outputs == "sharded",
        )

    parallel = make_parallel(model, new_state(shape, compile_one, outputs, mesh))
    if example_inputs is not None:
        compile_mode(parallel, *split_inputs(example_inputs))
    return parallel


def _refuse_meta(model: nn.Module) -> None:
    """Raise AutotpError for parameters without values: there is nothing to distribute."""
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    if empty:
        raise AutotpError(
            f"{len(empty)} parameters of {type(model).__name__} are on the meta device",
            at=[(name, "has no values") for name in empty[:3]],
            remedy='model.to_empty(device="cpu") and load weights; autotp.plan needs none',
        )


def plan(
    model: nn.Module,
    grid: Any,
    example_inputs: Any,
    *,
    cluster: Cluster | str | None = None,
    pins: Pins | None = None,
    outputs: str = "full",
) -> Plan:
    """Return the plan of `model` on `grid`: no process group and no weights are needed."""
    args, kwargs = split_inputs(example_inputs)
    chosen = as_cluster(cluster, device_of(list(model.parameters())).type)
    sharded = outputs == "sharded"
    with stage("capture"):
        program = capture(model, args, kwargs, train=model.training)
        network = read_network(program)
    with stage("infer factors"):
        factors = infer_factors(network, program.inputs)
    return search_plan(program, network, factors, as_grid(grid), chosen, pins, None, sharded).plan


def check(
    model: nn.Module,
    grid: Any,
    example_inputs: Any,
    *,
    cluster: Cluster | str | None = None,
    plan: Plan | None = None,
    pins: Pins | None = None,
) -> Report:
    """Run every rank's program in this one process and compare it with `model`.

    Compares all outputs, the loss, every gradient and every parameter after one SGD step. `model`
    and the state of the random generators are left as they were. Arguments as for `parallelize`.
    """
    shape = as_grid(grid)
    with stage("run the original"):
        subject = prepare(model, *split_inputs(example_inputs))
    program, network = subject.program, subject.network
    if plan is None:
        chosen = as_cluster(cluster, device_of(list(model.parameters())).type)
        with stage("plan"):
            plan = search_plan(program, network, subject.factors, shape, chosen, pins).plan
    refuse_other(plan, fingerprint(program), shape, program.train)
    with stage(f"run {shape.world_size} ranks"):
        return compare(subject, plan)


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of example inputs: a tuple, a dict, or (tuple, dict)."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    items = tuple(example_inputs)
    if len(items) == 2 and isinstance(items[0], tuple) and isinstance(items[1], Mapping):
        return items[0], dict(items[1])
    return items, {}


def as_cluster(cluster: Cluster | str | None, device_type: str) -> Cluster:
    """Return a cluster: as given, by name, or the default of the device."""
    if isinstance(cluster, Cluster):
        return cluster
    return by_name(cluster or ("dgx_h100" if device_type == "cuda" else "gloo_loopback"))


def _agreed(make: Callable[[], Plan]) -> Plan:
    """Return rank 0's plan on every rank; an error of rank 0 is raised on all."""
    found = together(lambda: to_json(make()) if dist.get_rank() == 0 else None)
    return from_json(from_rank_0(found))


def _refuse_sharded(plan: Plan) -> None:
    """Raise PlanError if a plan returns pieces of what the caller wants whole."""
    at = [
        (f"output {n}", layout_text(layout))
        for n, layout in enumerate(plan.outputs)
        if layout is not None and any(t is not I for t in layout)
    ]
    if at:
        raise PlanError(
            "the plan returns sharded outputs", at=at, remedy='parallelize with outputs="sharded"'
        )
