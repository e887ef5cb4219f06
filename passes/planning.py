"""From a captured program to a Plan: strategies, search, and the numbers read back as decisions.

`search_plan` is the straight line. What it needs of the search is numbers only; what it returns
holds no fx node, so that it can be saved, sent to other ranks and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Literal

import numpy as np

from autotp.cost_model.cluster import Cluster
from autotp.cost_model.collectives import sent_bytes
from autotp.cost_model.memory import ADAMW_STATES, adamw_scratch_bytes
from autotp.grid import Grid
from autotp.layouts import I, Layout
from autotp.passes.again import Again, Asked, choose, repeats
from autotp.passes.calls import Case, Kept, called
from autotp.passes.choices import Strategy
from autotp.passes.coalesce import Coalesced
from autotp.passes.explain import RunnersUp
from autotp.passes.factors import Factors
from autotp.passes.found import ROUNDS, Found, budget, reader, scheduled, solve_within
from autotp.passes.identity import fingerprint, op_text
from autotp.passes.kept import Copy, kept_by_rings, read_copies
from autotp.passes.lifetimes import peak_bytes
from autotp.passes.moves import Moves
from autotp.passes.network import Network, Op, Value
from autotp.passes.notes import notes_of
from autotp.passes.pins import (
    PinFilter,
    Pins,
    backward_pins,
    check_pins,
    contradiction,
    irreducible,
    layout_pins,
    refuse_misfits,
)
from autotp.passes.pricing import Table
from autotp.passes.product_prices import Prices
from autotp.passes.products import legal
from autotp.passes.program import Program
from autotp.passes.requirements import requirements
from autotp.passes.schedule import Needs, needs_of, schedule
from autotp.passes.schedule_pins import Wanted, split_schedules
from autotp.passes.search.budget import CLOSE
from autotp.passes.search.solve import Solution, solve
from autotp.passes.search_model import Model
from autotp.passes.strategies import Limits, build_model
from autotp.passes.traffic import internal_traffic
from autotp.plan import Decision, Memory, Plan, PlannedMove, Resting
from autotp.progress import stage
from autotp.sizes import examples

Quick = Literal["", "apart", "best"]
"""Which one search is made, where it is to be quick."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with what it was made from, for explanations and for the code generation."""

    plan: Plan
    network: Network
    factors: Factors
    model: Model
    solution: Solution


def search_plan(
    program: Program,
    network: Network,
    factors: Factors,
    grid: Grid,
    cluster: Cluster,
    pins: Pins | None = None,
    rest: Mapping[str, Layout] | None = None,
    sharded_outputs: bool = False,
    quick: Quick = "",
) -> Planned:
    """Return the cheapest plan of `program` on `grid` that the pins allow.

    `rest` fixes the resting layouts of parameters by name: those of a plan for the other mode.
    With `quick` one search is made, each move "apart", a call of its own, or at its "best". No
    smaller plan is asked for where none is small enough, and neither notes nor the most bytes at
    one moment are worked out.

    Raises PinError, and BudgetError where no plan fits the memory of a rank.
    """
    pins, wanted = split_schedules(pins or {}, grid)
    backward = backward_pins(pins, grid)
    pins = layout_pins(pins, grid)
    check_pins(pins, grid, program, network)
    fixed = {node: rest[fqn] for node, fqn in program.params.items() if rest and fqn in rest}
    count = len(program.outputs) if sharded_outputs else 0
    sharded = {o for o in network.outputs[:count] if o} - {*network.outputs[count:]}

    def model_with(pins: Pins) -> Model:
        kept = PinFilter(pins, grid, program.names, program.params)
        limits = Limits(kept.op, kept.rest, fixed, sharded)
        given = network, factors, grid, cluster, program.params, limits
        model = build_model(*given, is_best=quick == "best")
        refuse_misfits(kept)
        return model

    def found_in(model: Model) -> Found:
        given = program, network, factors, model
        asked = backward, wanted, bool(quick)
        read = reader(lambda s: read_plan(*given, s, grid, cluster, *asked))
        solution = solve_within(model.problem, budget(cluster), read, 0 if quick else ROUNDS)
        return Found(model, solution, read)

    with stage("strategies"):
        model = model_with(pins)
    with stage("search"):
        found = found_in(model)
    if not np.isfinite(found.solution.cost_s):
        blamed = irreducible(pins, lambda fewer: _is_possible(model_with(fewer)))
        raise contradiction(blamed, "no plan has all of these")
    with stage("search, moves scheduled"):
        found = scheduled(found, found_in, bool(quick))
    ops = {program.names[op.name]: op.name for op in network.ops}
    runners_up = RunnersUp(found.model, found.solution, ops, budget(cluster), found.read)
    with stage("schedule"):
        wanted.refuse_unmet(found.plan)
        notes = () if quick else notes_of(program, network, factors, grid)
        plan = replace(found.plan, alternatives=runners_up, notes=notes)
    return Planned(plan, network, factors, found.model, found.solution)


def _is_possible(model: Model) -> bool:
    return bool(np.isfinite(solve(model.problem).cost_s))


def read_plan(
    program: Program,
    network: Network,
    factors: Factors,
    model: Model,
    solution: Solution,
    grid: Grid,
    cluster: Cluster,
    backward: Mapping[str, str] | None = None,
    wanted: Wanted | None = None,
    quick: bool = False,
) -> Plan:
    """Return a solution as a Plan; pins say what backward makes again, and how products move."""
    chosen = list(zip(model.variables, solution.choice, strict=True))
    by_op = {v.name: (v.table, k) for v, k in chosen if v.kind == "op"}
    copies = {v.name: v.table.results[0][k] for v, k in chosen if v.kind == "copy"}
    rest = {v.name: v.table.results[0][k] for v, k in chosen if v.kind == "rest"}
    given = program, network, factors
    picked = [by_op[op.name] for op in network.ops]
    ways = _ways(picked)
    decisions = _decisions(*given, ways, picked, grid)
    whole = (I,) * len(grid.sizes)
    sources = {s: rest.get(s, whole) for s in network.sources}
    outputs = _outputs(network, model, decisions, sources, copies, whole)
    params = _resting(*given, model, rest, whole)
    resting = {r.value: r.layout for r in params.values()}
    left = _left(params.values(), budget(cluster))
    asked = Asked(left, backward or {}, CLOSE * solution.cost_s if quick else 0.0)
    apart = _apart(network, model, needs_of(network, decisions, sources, copies, outputs))
    returned = {o: c for o, c in zip(network.outputs, outputs, strict=True) if o and c}
    copies_ = read_copies(network, decisions, apart, sources, rest, returned, model.moves)
    again = choose(copies_, repeats(network, picked, model.moves), _namer(*given[:2]), asked)
    kept = Kept(partial(kept_by_rings, copies_), again.held_bytes, asked.limit_bytes)
    case = Case(network, again.decisions, again.moves, resting, Prices(network, model.moves), kept)
    pairs = partial(legal, network, again.decisions, again.moves, copies, outputs, model.moves)
    moved, priced = called(case, pairs, wanted)
    shards = kept_by_rings(copies_, moved.moves)
    searched_s = sum(model.searched_s(m, network.values[m.value]) for m in apart)
    at_once = _at_once(network, decisions, moved, outputs, rest, params, model.moves, quick)
    return Plan(
        grid=grid,
        cluster=cluster.name,
        train=program.train,
        model=fingerprint(program),
        decisions=again.decisions,
        params=params,
        copies=copies,
        outputs=outputs,
        moves=moved.moves,
        buckets=moved.buckets,
        dynamic=requirements(program, network, ways, decisions, moved.moves, returned, grid),
        internal=_internal(network, decisions, grid),
        memory=_memory(params.values(), again, shards, at_once),
        step_time_s=solution.cost_s + again.ops_s + moved.seconds - searched_s,
        lower_bound_s=solution.lower_bound_s,
        search_s=solution.seconds,
        method=solution.method,
        priced=priced,
        unruled=tuple(network.unruled.items()),
    )


def _apart(network: Network, model: Model, needs: Mapping[str, Needs]) -> tuple[PlannedMove, ...]:
    """Return the moves of a plan, a call each."""
    tables = {v: model.table_of(network.values[v]) for v in needs if v in model.types}
    return schedule(network, needs, tables, model.moves)


def _decisions(
    program: Program,
    network: Network,
    factors: Factors,
    ways: Sequence[Strategy],
    picked: Sequence[tuple[Table, int]],
    grid: Grid,
) -> tuple[Decision, ...]:
    decided = zip(network.ops, ways, picked, strict=True)
    return tuple(_decision(program, network, factors, *of, grid) for of in decided)


def _decision(
    program: Program,
    network: Network,
    factors: Factors,
    op: Op,
    s: Strategy,
    picked: tuple[Table, int],
    grid: Grid,
) -> Decision:
    table, pick = picked
    shapes = tuple(examples(network.values[v].shape) for v in op.results)
    return Decision(
        name=program.names[op.name],
        op=op_text(op),
        choices=tuple(c.name for c in s.choices),
        split=tuple(c.split for c in s.choices),
        operands=s.operands,
        results=s.results,
        reads=op.operands,
        makes=op.results,
        shapes=shapes,
        dims=tuple(
            tuple(factors.dim_name(v, d) for d in range(len(shape)))
            for v, shape in zip(op.results, shapes, strict=True)
        ),
        dtype=str(op.call.results[0].dtype).removeprefix("torch."),
        seconds=float(table.seconds[pick]),
        backward_s=float(table.backward_s[pick]),
        memory_bytes=int(table.memory[pick]),
        axes=grid.names,
        where=program.where.get(op.name, ""),
        free=op.rule.free,
        flops=table.flops,
        region=op.region,
    )


def _ways(picked: Sequence[tuple[Table, int]]) -> list[Strategy]:
    """Return the strategy that each op picked of its table; repeated layers share theirs."""
    spelled = {(table, pick): table.strategies[pick] for table, pick in dict.fromkeys(picked)}
    return [spelled[one] for one in picked]


def _outputs(
    network: Network,
    model: Model,
    decisions: Sequence[Decision],
    sources: Mapping[str, Layout],
    copies: Mapping[str, Layout],
    whole: Layout,
) -> tuple[Layout | None, ...]:
    """Return the layout in which each output is returned."""
    made = {v: c for d in decisions for v, c in zip(d.makes, d.results, strict=True)}
    held = {**sources, **made, **copies}
    return tuple(
        _output_layout(model, network.values[o], held[o], whole) if o else None
        for o in network.outputs
    )


def _output_layout(model: Model, value: Value, made: Layout, whole: Layout) -> Layout:
    """Return the cheapest layout in which the program may return a value."""
    if value.name not in model.types:
        return whole
    table = model.table_of(value)
    allowed = [k for k, c in enumerate(table.layouts) if model.may_return(value.name, c)]
    cheapest = min(allowed, key=lambda k: float(table.seconds[table.number[made], k]))
    return table.layouts[cheapest]


def _resting(
    program: Program,
    network: Network,
    factors: Factors,
    model: Model,
    rest: Mapping[str, Layout],
    whole: Layout,
) -> dict[str, Resting]:
    out = {}
    for name, fqn in program.params.items():
        v = network.values[name]
        layout = rest.get(name, whole)
        held = model.moves.local_bytes(v.shape, v.dtype, layout)
        dtype = str(v.dtype).removeprefix("torch.")
        dims = tuple(factors.dim_name(name, d) for d in range(len(v.shape)))
        out[fqn] = Resting(layout, v.shape, dtype, held, v.grad, name, dims)
    return out


def _left(resting: Collection[Resting], limit: float | None) -> float | None:
    """Return what parameters, gradients and the optimizer's states leave of a limit."""
    trained = sum(r.local_bytes for r in resting if r.trained)
    state = sum(r.local_bytes for r in resting) + (1 + ADAMW_STATES) * trained
    return None if limit is None else limit - state


def _at_once(
    network: Network,
    decisions: Sequence[Decision],
    moved: Coalesced,
    outputs: Sequence[Layout | None],
    rest: Mapping[str, Layout],
    params: Mapping[str, Resting],
    prices: Moves,
    quick: bool,
) -> int | None:
    """Return the most bytes at one moment, beside parameters and states; None if it is quick."""
    if quick:
        return None

    def local_bytes(value: str, layout: Layout) -> int:
        v = network.values[value]
        return prices.local_bytes(v.shape, v.dtype, layout)

    trained = [r.local_bytes for r in params.values() if r.trained]
    scratch = adamw_scratch_bytes(trained, prices.cluster)
    given = moved.moves, moved.buckets, outputs, rest
    return peak_bytes(network, decisions, *given, local_bytes, scratch, prices.cluster.backend)


def _memory(resting: Collection[Resting], again: Again, shards: int, at_once: int | None) -> Memory:
    """Return the memory of a rank; what is made again is taken off the most that is at once.

    `shards` are the bytes of those that rings keep besides. The peak is 0 without `at_once`.
    """
    trained = sum(r.local_bytes for r in resting if r.trained)
    parameters, states = sum(r.local_bytes for r in resting), ADAMW_STATES * trained
    more = shards - again.freed_bytes
    return Memory(
        parameters=parameters,
        gradients=trained,
        optimizer=states,
        activations=again.held_bytes + shards,
        peak=0 if at_once is None else parameters + states + max(trained, at_once + more),
    )


def _namer(program: Program, network: Network) -> Callable[[Copy], list[str]]:
    """Return what names a copy for pins: the path of a parameter, or of the op that made it."""
    made_by = {v: op.name for op in network.ops for v in op.results}

    def names_of(copy: Copy) -> list[str]:
        value, _ = copy
        known = program.params.get(value) or program.names.get(made_by.get(value, ""))
        return [known] if known else []

    return names_of


def _internal(
    network: Network, decisions: Sequence[Decision], grid: Grid
) -> tuple[tuple[str, str, str, Fraction], ...]:
    """Return what local programs send themselves."""
    return tuple(
        (d.name, grid.names[axis], kind, times * sent_bytes(kind, size, grid.sizes[axis]))
        for op, d in zip(network.ops, decisions, strict=True)
        for axis, kind, size, times in internal_traffic(
            op, d.split, d.operands, d.results, grid, network.values[op.results[0]].grad
        )
    )


__all__ = ["Planned", "Quick", "read_plan", "search_plan"]
