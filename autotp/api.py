"""What a user calls: parallelize, plan, grids, check.

Who reads `compile_rank` has seen the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.axis import Axis
from autotp.calibrate import can_measure, measured_cluster, refuse_unmeasurable
from autotp.check import compare, prepare
from autotp.comparison import Report
from autotp.cost_model.cluster import Cluster
from autotp.dynamic import DynamicInputs
from autotp.errors import AutotpError, PlanError
from autotp.grid import Coords, Grid, as_grid, is_open
from autotp.grid_choice import best_plan, is_undecided, priced, refuse_open
from autotp.grid_table import Grids
from autotp.layouts import I, Layout, layout_text
from autotp.module import Compiled, ParallelModule, State, compile_mode, make_parallel, new_state
from autotp.options import Options
from autotp.passes.capture.varying import given_dims
from autotp.passes.emit.again import runnable
from autotp.passes.emit.codegen import emit
from autotp.passes.emit.verify import verify
from autotp.passes.factors import Factors, infer_factors
from autotp.passes.grids import price_grids
from autotp.passes.identity import fingerprint, graph_digest, refuse_other_ops
from autotp.passes.network import Network
from autotp.passes.planning import search_plan
from autotp.passes.program import Program
from autotp.plan import Plan
from autotp.plan_file import from_json, refuse_other, to_json
from autotp.progress import stage
from autotp.ranks import (
    device_of,
    ensure_process_group,
    from_rank_0,
    make_mesh,
    open_ranks,
    refuse_disagreement,
    refuse_world,
    together,
)
from autotp.reading import MEASURE, as_cluster, inferred, read, split_inputs
from autotp.refusals import refuse_model

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
    cluster: Callable[[], Cluster],
    plan: Plan | None = None,
    pins: Pins | None = None,
    rest: Mapping[str, Layout] | None = None,
    options: Options,
) -> Compiled:
    """Return the program of this rank: the six steps from a model to its collectives.

    `cluster` is asked for on all ranks, and only where a plan is searched.
    """
    with stage("capture"):
        program, network = together(lambda: read(model, args, kwargs, train, options))
    mine = fingerprint(program)
    refuse_disagreement(
        "models",
        {**mine, "the graph's ops": graph_digest(program), "rng": options.rng},
        "build the same model, and pass inputs of the same shapes, on every rank",
    )
    with stage("infer factors"):
        factors = together(lambda: infer_factors(network, program.inputs))
    if plan is None:
        priced = cluster()
        plan = _agreed(
            lambda: (
                search_plan(
                    program, network, factors, grid, priced, pins, rest, options.sharded
                ).plan
            )
        )
    refuse_other(plan, mine, grid, train)
    refuse_other_ops(plan, program, network)
    plan.dynamic.refuse(program.example_sizes)
    if not options.sharded:
        _refuse_sharded(plan)
    refuse_disagreement("plans", {"plan": plan.hash}, "give every rank the same plan and versions")
    with stage("emit and verify"):
        module = together(
            lambda: _emitted(program, network, factors, plan, coords, axes, options.rng)
        )
    return Compiled(program, plan, module)


def _emitted(
    program: Program,
    network: Network,
    factors: Factors,
    plan: Plan,
    coords: Coords,
    axes: Mapping[str, Axis],
    rng: str,
) -> fx.GraphModule:
    """Return the program of one rank, its types checked."""
    module = emit(program, network, plan, coords, axes, rng)
    verify(module, network, factors, plan.grid)
    return runnable(module, network)


def parallelize(
    model: nn.Module,
    grid: Any,
    example_inputs: Any = None,
    *,
    cluster: Cluster | str | None = None,
    plan: Plan | None = None,
    pins: Pins | None = None,
    outputs: str = "full",
    strict: bool = False,
    check_numerics: bool = False,
    rng: str = "fast",
    dynamic: DynamicInputs | None = None,
) -> nn.Module:
    """Make `model` the program of this rank of `grid`, in place, and return it.

    grid            a tuple such as (2, 2), a dict of named axes or a DeviceMesh: all ranks of the
                    group, which torchrun's environment starts; 4 or "auto": the fastest (`grids`).
    example_inputs  a tuple (args), a dict (kwargs) or both; None plans at the first call.
    cluster         what prices the plan: a Cluster, its name, or "measure": this machine, from the
                    cache or timed for a few seconds; the default where there are several ranks.
    plan, pins      a plan to follow, or choices to fix by module-path pattern.
    outputs         "full" returns what the original does, "sharded" DTensors.
    strict          refuse ops without a rule, in place of running them whole with a warning.
    check_numerics  name the first op and rank that make NaN or Inf; slow, for finding faults.
    rng             "fast": masks independent where split; "exact": the single device's masks.
    dynamic         dims that may vary, one size per name: {"input_ids": {0: "batch", 1: "seq"}}.

    Raises AutotpError: what is not supported is refused by name."""
    device = device_of(list(model.parameters()))
    shape = ensure_process_group(grid, device.type)
    options = together(lambda: Options(outputs, strict, check_numerics, rng, dynamic))
    chosen = together(lambda: _accepted(model, cluster, device))
    _refuse_other_calls(grid, shape, model, example_inputs, plan, chosen, options)
    price_by = cache(lambda: measured_cluster(device) if chosen is None else chosen)
    shape, plan = _decided(grid, shape, plan, model, example_inputs, pins, price_by, options)
    mesh = grid if isinstance(grid, DeviceMesh) else make_mesh(shape, device.type)

    def compile_one(
        whole: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], train: bool
    ) -> Compiled:
        state = cast(ParallelModule, whole)._autotp
        is_first = all(c.plan.train != train for c in state.modes.values())
        return compile_rank(
            whole,
            args,
            kwargs,
            train,
            grid=shape,
            coords=state.coords,
            axes=state.axes,
            cluster=price_by,
            plan=plan if plan and plan.train == train and is_first else None,
            pins=None if state.layouts else pins,
            rest=state.layouts or _planned_layouts(plan, shape),
            options=_later(options, whole, args, kwargs) if state.modes else options,
        )

    state = new_state(shape, compile_one, outputs, mesh, check_numerics)
    return _planned(model, state, example_inputs)


def _planned(model: nn.Module, state: State, example_inputs: Any) -> ParallelModule:
    """Return `model` made parallel, and planned where it has inputs to be planned for."""
    parallel = make_parallel(model, state)
    if example_inputs is not None:
        compile_mode(parallel, *split_inputs(example_inputs))
    return parallel


def _planned_layouts(plan: Plan | None, grid: Grid) -> dict[str, Layout] | None:
    """Return how parameters rest in a plan of this grid."""
    return {n: r.layout for n, r in plan.params.items()} if plan and plan.grid == grid else None


def _later(
    options: Options, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Options:
    """Return the options of another mode's capture, whose inputs may lack some that vary."""
    return replace(options, dynamic=given_dims(model, args, kwargs, options.dynamic))


def _accepted(
    model: nn.Module, cluster: Cluster | str | None, device: torch.device
) -> Cluster | None:
    """Return the cluster of a call of parallelize, None for one that is to be measured.

    Raises AutotpError for a model that cannot be accepted.
    """
    if isinstance(model, ParallelModule):
        raise AutotpError(
            f"{type(model).__name__} is parallel already",
            at=[("the model", f"runs on grid {model._autotp.grid}")],
            remedy="call autotp.parallelize once, on the original model",
        )
    refuse_model(model, weights=True)
    if cluster == MEASURE:
        refuse_unmeasurable()
    measured = cluster == MEASURE or (cluster is None and can_measure())
    return None if measured else as_cluster(cluster, device, ranks=1)


def _decided(
    grid: object,
    shape: Grid,
    plan: Plan | None,
    model: nn.Module,
    example_inputs: Any,
    pins: Pins | None,
    cluster: Callable[[], Cluster],
    options: Options,
) -> tuple[Grid, Plan | None]:
    """Return grid and plan as given; of an open grid those that rank 0 finds the fastest."""
    if not is_undecided(grid, shape):
        return shape, plan
    if plan is None:
        together(lambda: refuse_open(grid, example_inputs, pins))
        ranks, chosen = shape.world_size, cluster()
        plan = _agreed(lambda: best_plan(model, ranks, example_inputs, chosen, options))
    together(lambda: refuse_world(plan.grid, shape.world_size))
    return plan.grid, plan


def _refuse_other_calls(
    given: Any,
    grid: Grid,
    model: nn.Module,
    example_inputs: Any,
    plan: Plan | None,
    cluster: Cluster | None,
    options: Options,
) -> None:
    """Raise RuntimeStateError unless all ranks call parallelize alike: the same steps follow."""
    call = {
        "grid": f"{grid} ranks" if is_open(given) else f"{grid} {grid.names}",
        "mode": "train" if model.training else "eval",
        "example_inputs": "none" if example_inputs is None else "given",
        "plan": "none" if plan is None else "given",
        "cluster": "measured" if cluster is None else cluster.name,
        **options.described(),
    }
    refuse_disagreement("calls of autotp.parallelize", call, "make the same call on every rank")


def plan(
    model: nn.Module,
    grid: Any,
    example_inputs: Any,
    *,
    cluster: Cluster | str | None = None,
    pins: Pins | None = None,
    outputs: str = "full",
    strict: bool = False,
    dynamic: DynamicInputs | None = None,
) -> Plan:
    """Return the plan of `model` on `grid`: no process group and no weights are needed.

    Arguments as for `parallelize`; cluster="measure" is what was measured before, and the default
    does not depend on this machine.
    """
    shape = as_grid(open_ranks(grid) if is_open(grid) else grid)
    refuse_model(model, weights=False)
    args, kwargs = split_inputs(example_inputs)
    chosen = as_cluster(cluster, device_of(list(model.parameters())), shape.world_size)
    options = Options(outputs, strict, dynamic=dynamic)
    if is_undecided(grid, shape):
        refuse_open(grid, example_inputs, pins)
        return best_plan(model, shape.world_size, example_inputs, chosen, options)
    found = inferred(model, args, kwargs, options)
    return search_plan(*found, shape, chosen, pins, None, options.sharded).plan


def grids(
    model: nn.Module,
    ranks: int,
    example_inputs: Any,
    *,
    cluster: Cluster | str | None = None,
    outputs: str = "full",
    strict: bool = False,
    dynamic: DynamicInputs | None = None,
) -> Grids:
    """Return what the best plan takes on every grid of `ranks`, the fastest first: print it.

    Every factorisation into one to three axes and every order of the axes is planned: the last axes
    run inside a node. Arguments as for `parallelize`; no process group and no weights are needed.
    """
    refuse_model(model, weights=False)
    count = open_ranks(ranks)
    chosen = as_cluster(cluster, device_of(list(model.parameters())), count)
    options = Options(outputs, strict, dynamic=dynamic)
    return priced(model, count, example_inputs, chosen, options)[1]


def check(
    model: nn.Module,
    grid: Any,
    example_inputs: Any,
    *,
    cluster: Cluster | str | None = None,
    plan: Plan | None = None,
    pins: Pins | None = None,
    rng: str = "fast",
    dynamic: DynamicInputs | None = None,
) -> Report:
    """Run every rank's program in this one process and compare it with `model`.

    Compares all outputs, the loss, every gradient and every parameter after one SGD step. `model`
    and the state of the random generators are left as they were. Arguments as for `parallelize`;
    with rng="exact" dropout stays on and is compared too.
    """
    options = Options(rng=rng, dynamic=dynamic)
    shape = as_grid(open_ranks(grid) if is_open(grid) else grid)
    refuse_model(model, weights=True)
    with stage("run the original"):
        subject = prepare(model, *split_inputs(example_inputs), options.rng, options.dynamic)
    program, network = subject.program, subject.network
    if plan is None:
        chosen = as_cluster(cluster, device_of(list(model.parameters())), shape.world_size)
        found = program, network, subject.factors
        with stage("plan"):
            if is_undecided(grid, shape):
                refuse_open(grid, example_inputs, pins)
                shape = price_grids(*found, shape.world_size, chosen).best
            plan = search_plan(*found, shape, chosen, pins).plan
    elif is_undecided(grid, shape):
        shape = plan.grid
    refuse_other(plan, fingerprint(program), shape, program.train)
    refuse_other_ops(plan, program, network)
    plan.dynamic.refuse(program.example_sizes)
    with stage(f"run {shape.world_size} ranks"):
        return compare(subject, plan)


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
