"""The distributed program: local ops and named collectives, written as one fx graph per rank.

In: a Program, its Network, a Plan, this rank's coordinates and its axes. Out: an fx.GraphModule
that takes the original's placeholders (parameters as local tensors) and returns its flat outputs.
Every size argument is rewritten to its local value; every moved value is moved once; nodes keep the
stack trace of the user's line and carry their layout in `meta["layout"]`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autotp.axis import Axis
from autotp.grid import Coords, Grid
from autotp.layouts import (
    AxisType,
    I,
    Layout,
    Shard,
    kind,
)
from autotp.passes.capture.draws import draws
from autotp.passes.capture.regions import note_region
from autotp.passes.capture.size_nodes import SizeWriter, is_size
from autotp.passes.emit.move_calls import TARGETS, move_args
from autotp.passes.emit.sites import CALLERS, Sites, unread
from autotp.passes.emit.together_calls import shared_call
from autotp.passes.network import Network, Op, is_getitem, is_tensor, output_args, value_name
from autotp.passes.program import Program
from autotp.passes.rules import Call, Tensor
from autotp.plan import Bucket, Decision, Plan, PlannedMove
from autotp.randomness import RandomState
from autotp.sizes import length_here, shape_here, varies

aten = torch.ops.aten
Key = tuple[str, Layout]


@dataclass(slots=True)
class _Emitter:
    program: Program
    network: Network
    plan: Plan
    coords: Coords
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[Key, fx.Node] = field(default_factory=dict)
    attributes: dict[str, fx.Node] = field(default_factory=dict)
    moves: dict[str, list[PlannedMove]] = field(default_factory=dict)
    buckets: dict[Key, Bucket] = field(default_factory=dict)
    entered: set[str] = field(default_factory=set)
    hubs: Mapping[str, Layout] = field(default_factory=dict)
    made: dict[str, Layout] = field(default_factory=dict)
    sites: Sites = field(init=False)
    sizes: SizeWriter = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = SizeWriter(
            self.graph,
            self.program.varying,
            lambda name: self.nodes[name, self.whole],
            lambda name: _attribute(self, name),
        )

    @property
    def grid(self) -> Grid:
        return self.plan.grid

    @property
    def whole(self) -> Layout:
        return (I,) * len(self.grid.sizes)


def emit(
    program: Program,
    network: Network,
    plan: Plan,
    coords: Coords,
    axes: Mapping[str, Axis],
    rng: str = "fast",
) -> fx.GraphModule:
    """Return the program of the rank at `coords` under `plan`; `rng` is "fast" or "exact"."""
    e = _Emitter(program, network, plan, coords, hubs=plan.copies)
    e.sites = Sites(rng == "exact", plan.grid, coords)
    idle = set() if e.sites.exact else unread(program.graph)
    for move in plan.moves:
        e.moves.setdefault(move.value, []).append(move)
    for bucket in plan.buckets:
        for move in (plan.moves[n] for n in bucket.moves):
            e.buckets[move.value, move.after] = bucket
    ops = {op.name: (op, d) for op, d in zip(network.ops, plan.decisions, strict=True)}
    for node in program.graph_module.graph.nodes:
        _enter_region(e, program.regions.get(node.name))
        last = next(reversed(e.graph.nodes), None)
        if node.name in idle:
            continue
        if node.op == "placeholder":
            _emit_placeholder(e, node)
        elif node.name in ops:
            _emit_op(e, node, *ops[node.name])
        elif node.op == "call_function" and not (_stands_for_result(node, ops) or is_size(node)):
            _emit_whole(e, node)
        if node.name in program.regions:
            note_region(e.graph, last, program.regions[node.name])
    _emit_output(e)
    state = RandomState(exact=e.sites.exact)
    root = {name: state if name == "rng" else axes[name] for name in e.attributes}
    module = fx.GraphModule(root, e.graph, class_name=f"Rank{plan.grid.rank(coords)}")
    module.meta["rng"] = state if "rng" in root else None
    return module


def _stands_for_result(node: fx.Node, ops: Mapping[str, object]) -> bool:
    return is_getitem(node) and node.all_input_nodes[0].name in ops


def _emit_placeholder(e: _Emitter, node: fx.Node) -> None:
    fqn = e.program.params.get(node.name)
    layout = e.plan.params[fqn].layout if fqn else e.whole
    made = e.graph.placeholder(node.name)
    _note(e, node.name, layout, made, node)


def _emit_whole(e: _Emitter, node: fx.Node) -> None:
    """Copy an op that depends on no parameter: its operands are whole on every rank."""
    made = e.graph.node_copy(node, lambda n: _whole(e, n))
    if draws(node):
        op: Any = made.target
        made.target, extra = e.sites.whole(node, _attribute(e, "rng"))
        made.args = (op, *made.args) if made.target in CALLERS else made.args
        made.kwargs = {**made.kwargs, **extra}
    if is_getitem(node):
        _note(e, value_name(node), e.whole, made, node)
        return
    _note(e, node.name, e.whole, made, node)


def _whole(e: _Emitter, node: fx.Node) -> Any:
    """Return what stands for a node of the captured graph that every rank computes whole."""
    return e.sizes.write(_number(e, node))


def _number(e: _Emitter, node: fx.Node) -> Any:
    """Return the Size of a node that is one, else the node that every rank computes whole."""
    return node.meta["val"] if is_size(node) else e.nodes[value_name(node), e.whole]


def _note(e: _Emitter, value: str, layout: Layout, made: fx.Node, origin: fx.Node) -> None:
    e.nodes[value, layout] = made
    e.made[value] = layout
    made.meta["layout"] = layout
    made.meta["value"] = value
    for key in ("stack_trace", "nn_module_stack"):
        if key in origin.meta:
            made.meta[key] = origin.meta[key]


def _attribute(e: _Emitter, name: str) -> fx.Node:
    """Return the node that reads an axis, or the random state, placed before all ops."""
    if name not in e.attributes:
        last = [n for n in e.graph.nodes if n.op in ("placeholder", "get_attr")][-1]
        with e.graph.inserting_after(last):
            e.attributes[name] = e.graph.create_node("get_attr", name, name=name)
    return e.attributes[name]


# Ops ---------------------------------------------------------------------------------------------


def _emit_op(e: _Emitter, node: fx.Node, op: Op, decision: Decision) -> None:
    operands = [
        fetch(e, v, layout) for v, layout in zip(op.operands, decision.operands, strict=True)
    ]
    args, kwargs = substitute(node, operands, lambda n: _number(e, n))
    whole = replace(op.call, args=args, kwargs=kwargs)
    local = _localized(e, whole, decision)
    if op.rule.localize:
        args = op.rule.localize(whole, local)
    target, extra = _target(e, node, op, decision)
    if target in CALLERS:
        args = (op.call.op, *args)
    args, kwargs = e.sizes.write_all((args, {**kwargs, **extra}))
    made = e.graph.create_node(
        "call_function", target, args, kwargs, name=_node_name(decision.name)
    )
    made = _averaged(e, op, decision, made)
    made.meta["op"], made.meta["decision"] = op, decision
    made.meta["operands"] = tuple(operands)
    if len(op.results) == 1 and op.results[0] == op.name:
        _note(e, op.name, decision.results[0], made, node)
        return
    made.meta["results"] = decision.results
    for value, layout in zip(op.results, decision.results, strict=True):
        k = int(value.rpartition(".")[2])
        _note(e, value, layout, e.graph.call_function(operator.getitem, (made, k)), node)


def _node_name(name: str) -> str:
    return name.replace(".", "_") or "root"


def _localized(e: _Emitter, call: Call, decision: Decision) -> Call:
    """Return the call with the shapes that this rank holds."""
    operands, layouts = [], iter(decision.operands)
    for t in call.operands:
        operands.append(t and _local_tensor(e, t, next(layouts)))
    results = [_local_tensor(e, t, c) for t, c in zip(call.results, decision.results, strict=True)]
    return replace(call, operands=tuple(operands), results=tuple(results))


def _local_tensor(e: _Emitter, t: Tensor, layout: Layout) -> Tensor:
    return Tensor(shape_here(t.shape, layout, e.grid, e.coords), t.dtype)


def substitute(
    node: fx.Node, operands: Sequence[fx.Node], number: Callable[[fx.Node], Any] = lambda n: n
) -> tuple[Any, dict[str, Any]]:
    """Return a node's arguments with its tensors replaced, one by one in the schema's order.

    `number` returns what stands for an operand that is no tensor.
    """
    rest = iter(operands)

    def change(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [change(v) for v in value]
        if isinstance(value, fx.Node):
            return next(rest) if is_tensor(value) else number(value)
        return value

    names = [a.name for a in getattr(getattr(node.target, "_schema", None), "arguments", ())]
    args = tuple(change(a) for a in node.args)
    order = sorted(node.kwargs, key=lambda k: names.index(k) if k in names else len(names))
    kwargs = {k: change(node.kwargs[k]) for k in order}
    return args, {k: kwargs[k] for k in node.kwargs}


def _target(e: _Emitter, node: fx.Node, op: Op, decision: Decision) -> tuple[Any, dict[str, Any]]:
    """Return the function that runs locally and the arguments that it takes beside the op's own."""
    if draws(node):
        split = zip(e.grid.names, decision.split, strict=True)
        axes = tuple(_attribute(e, axis) for axis, factors in split if factors)
        layouts = decision.operands, decision.results
        return e.sites.split(node, op.rule, layouts, axes, _attribute(e, "rng"))
    extra: dict[str, Any] = {}
    for factor in op.rule.own if op.rule.runs(decision.split) else ():
        axes = tuple(_attribute(e, a) for a in _splitting(e, decision, factor))
        if axes:
            extra[f"split_{factor}"] = axes
            extra[f"size_{factor}"] = op.signature.sizes[factor]
    return (op.rule.program, extra) if extra else (op.call.op, {})


def _splitting(e: _Emitter, decision: Decision, factor: str) -> list[str]:
    return [a for a, split in zip(e.grid.names, decision.split, strict=True) if factor in split]


def _averaged(e: _Emitter, op: Op, decision: Decision, made: fx.Node) -> fx.Node:
    """Scale a local mean by this rank's share of what is averaged."""
    if not (op.rule.average and op.rule.average(op.call)):
        return made
    share: Any = 1.0
    for factor in op.signature.factors():
        if op.signature.summed(factor) and _splitting(e, decision, factor):
            here, whole = _local_factor(e, op, decision, factor), op.signature.sizes[factor]
            if varies([here, whole]):
                part = e.graph.call_function(operator.truediv, e.sizes.write_all((here, whole)))
                made = e.graph.call_function(aten.mul.Tensor, (made, part))
            else:
                share *= here / whole
    return made if share == 1.0 else e.graph.call_function(aten.mul.Tensor, (made, share))


def _local_factor(e: _Emitter, op: Op, decision: Decision, factor: str) -> int:
    for dims, layout, t in zip(
        op.signature.operands, decision.operands, [t for t in op.call.operands if t], strict=True
    ):
        for d, dim in enumerate(dims):
            if any(factor in product for product in dim):
                here = length_here(t.shape[d], layout, d, e.grid, e.coords)
                return here * op.signature.sizes[factor] // t.shape[d]
    raise AssertionError(factor)


# Moves -------------------------------------------------------------------------------------------


def fetch(e: _Emitter, value: str, layout: Layout) -> fx.Node:
    """Return the node that holds `value` in `layout`, moving it there once."""
    if (value, layout) not in e.nodes:
        if value in e.hubs and layout != e.hubs[value]:
            fetch(e, value, e.hubs[value])
        for move in _route(e, value, layout):
            if (value, move.after) in e.buckets and (value, move.after) not in e.nodes:
                _emit_bucket(e, e.buckets[value, move.after])
            if (value, move.after) not in e.nodes:
                source = e.nodes[value, move.before]
                made = _emit_move(e, move, source)
                made.meta.update(layout=move.after, value=value, move=move)
                e.nodes[value, move.after] = made
    return e.nodes[value, layout]


def _route(e: _Emitter, value: str, layout: Layout) -> list[PlannedMove]:
    """Return the planned moves that lead from a layout that is there to `layout`."""
    back = {m.after: m for m in reversed(e.moves.get(value, []))}
    route: list[PlannedMove] = []
    at = layout
    while (value, at) not in e.nodes:
        assert at in back, (value, layout)
        route.append(back[at])
        at = back[at].before
    return route[::-1]


def _emit_move(e: _Emitter, move: PlannedMove, source: fx.Node) -> fx.Node:
    axis = e.grid.axis(move.axis)
    before, after = move.before[axis], move.after[axis]
    args = move_args(move, e.network.values[move.value].shape, e.grid, e.coords)
    target = TARGETS[kind(before), kind(after)]
    kwargs = {k: e.sizes.write(v) for k, v in args.items() if v not in ((), None)}
    return e.graph.create_node(
        "call_function",
        target,
        (source, _attribute(e, move.axis)),
        kwargs,
        name=_move_name(e, move),
    )


def _move_name(e: _Emitter, move: PlannedMove) -> str:
    axis = e.grid.axis(move.axis)
    ends = f"{_label(move.before[axis])}_to_{_label(move.after[axis])}"
    return f"{_node_name(_value_label(e, move.value))}_{ends}"


def _emit_bucket(e: _Emitter, bucket: Bucket) -> None:
    """Make all moves of a bucket by one call."""
    moves = [e.plan.moves[n] for n in bucket.moves]
    sources = [fetch(e, m.value, m.before) for m in moves]
    args = [move_args(m, e.network.values[m.value].shape, e.grid, e.coords) for m in moves]
    call = shared_call(e.graph, bucket, sources, _attribute(e, bucket.axis), args)
    for k, move in enumerate(moves):
        made = e.graph.create_node(
            "call_function", operator.getitem, (call, k), name=_move_name(e, move)
        )
        made.meta.update(layout=move.after, value=move.value, move=move)
        e.nodes[move.value, move.after] = made


def _enter_region(e: _Emitter, region: str | None) -> None:
    """Make the buckets of what a checkpoint region reads before it: others share them."""
    if region is None or region in e.entered:
        return
    e.entered.add(region)
    for op, decision in zip(e.network.ops, e.plan.decisions, strict=True):
        if e.program.regions.get(op.name) == region:
            for move in (m for v in decision.reads for m in e.moves.get(v, [])):
                key = move.value, move.after
                if key in e.buckets and key not in e.nodes:
                    _emit_bucket(e, e.buckets[key])


def _label(t: AxisType) -> str:
    return f"S{t.dim}" if isinstance(t, Shard) else str(t)


def _value_label(e: _Emitter, value: str) -> str:
    node, _, k = value.partition(".")
    return e.program.params.get(node, e.program.names.get(node, node)) + (f"_{k}" if k else "")


# Outputs -----------------------------------------------------------------------------------------


def _emit_output(e: _Emitter) -> None:
    out: list[Any] = []
    for argument, layout in zip(output_args(e.program), e.plan.outputs, strict=True):
        if not isinstance(argument, fx.Node) or layout is None:
            out.append(argument)
            continue
        out.append(fetch(e, value_name(argument), layout))
    e.graph.output(tuple(out))


def program_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield the nodes of an emitted program that compute or move something."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            yield node
