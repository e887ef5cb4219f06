"""The distributed program: local ops and named collectives, written as one fx graph per rank.

In: a Program, its Network, a Plan, this rank's coordinates and its axes. Out: an fx.GraphModule
that takes the original's placeholders (parameters as local tensors) and returns its flat outputs.
Every size argument is rewritten to its local value; every moved value is moved once; nodes keep the
stack trace of the user's line and carry their layout in `meta["layout"]`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autotp.axis import Axis
from autotp.grid import Coords
from autotp.layouts import Layout
from autotp.passes.capture.draws import draws
from autotp.passes.capture.regions import note_region
from autotp.passes.capture.size_nodes import is_size
from autotp.passes.emit.emitter import Emitter, attribute, node_name, note
from autotp.passes.emit.fused import emit_product, move_within
from autotp.passes.emit.moving import begin_before, drop_unread, enter_region, fetch
from autotp.passes.emit.products import fetch_operands
from autotp.passes.emit.sites import CALLERS, Sites, unread
from autotp.passes.network import Network, Op, is_getitem, is_tensor, output_args, value_name
from autotp.passes.program import Program
from autotp.passes.rules import Call, Tensor
from autotp.plan import Decision, Plan
from autotp.randomness import RandomState
from autotp.sizes import length_here, shape_here, varies

aten = torch.ops.aten


def emit(
    program: Program,
    network: Network,
    plan: Plan,
    coords: Coords,
    axes: Mapping[str, Axis],
    rng: str = "fast",
) -> fx.GraphModule:
    """Return the program of the rank at `coords` under `plan`; `rng` is "fast" or "exact"."""
    e = Emitter(program, network, plan, coords, hubs=plan.copies)
    e.sites = Sites(rng == "exact", plan.grid, coords)
    idle = set() if e.sites.exact else unread(program.graph)
    for move in plan.moves:
        e.moves.setdefault(move.value, []).append(move)
    for bucket in plan.buckets:
        for move in (plan.moves[n] for n in bucket.moves):
            e.buckets[move.value, move.after] = bucket
        e.begins.setdefault(bucket.begins, []).append(bucket)
    ops = {op.name: (op, d) for op, d in zip(network.ops, plan.decisions, strict=True)}
    for node in program.graph_module.graph.nodes:
        enter_region(e, program.regions.get(node.name))
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
    drop_unread(e)
    state = RandomState(exact=e.sites.exact)
    for name, members in plan.levels():
        axes[name].over_nodes(members)  # groups are made here, by all ranks in one order
    root = {name: state if name == "rng" else axes[name] for name in e.attributes}
    module = fx.GraphModule(root, e.graph, class_name=f"Rank{plan.grid.rank(coords)}")
    module.meta["rng"] = state if "rng" in root else None
    return module


def _stands_for_result(node: fx.Node, ops: Mapping[str, object]) -> bool:
    return is_getitem(node) and node.all_input_nodes[0].name in ops


def _emit_placeholder(e: Emitter, node: fx.Node) -> None:
    fqn = e.program.params.get(node.name)
    layout = e.plan.params[fqn].layout if fqn else e.whole
    made = e.graph.placeholder(node.name)
    note(e, node.name, layout, made, node)


def _emit_whole(e: Emitter, node: fx.Node) -> None:
    """Copy an op that depends on no parameter: its operands are whole on every rank."""
    made = e.graph.node_copy(node, lambda n: _whole(e, n))
    if draws(node):
        op: Any = made.target
        made.target, extra = e.sites.whole(node, attribute(e, "rng"))
        made.args = (op, *made.args) if made.target in CALLERS else made.args
        made.kwargs = {**made.kwargs, **extra}
    if is_getitem(node):
        note(e, value_name(node), e.whole, made, node)
        return
    note(e, node.name, e.whole, made, node)


def _whole(e: Emitter, node: fx.Node) -> Any:
    """Return what stands for a node of the captured graph that every rank computes whole."""
    return e.sizes.write(_number(e, node))


def _number(e: Emitter, node: fx.Node) -> Any:
    """Return the Size of a node that is one, else the node that every rank computes whole."""
    return node.meta["val"] if is_size(node) else e.nodes[value_name(node), e.whole]


# Ops ---------------------------------------------------------------------------------------------


def _emit_op(e: Emitter, node: fx.Node, op: Op, decision: Decision) -> None:
    begin_before(e, decision.name)
    if within := move_within(e, op, decision):
        emit_product(e, node, op, decision, within)
        return
    operands, late = fetch_operands(e, op, decision)
    args, kwargs = substitute(node, operands, lambda n: _number(e, n))
    whole = replace(op.call, args=args, kwargs=kwargs)
    local = _localized(e, whole, decision)
    if op.rule.localize:
        args = op.rule.localize(whole, local)
    target, extra = (late, {}) if late else _target(e, node, op, decision)
    if target in CALLERS:
        args = (op.call.op, *args)
    args, kwargs = e.sizes.write_all((args, {**kwargs, **extra}))
    made = e.graph.create_node("call_function", target, args, kwargs, name=node_name(decision.name))
    made = _averaged(e, op, decision, made)
    made.meta["op"], made.meta["decision"] = op, decision
    made.meta["operands"] = tuple(operands)
    if len(op.results) == 1 and op.results[0] == op.name:
        note(e, op.name, decision.results[0], made, node)
        return
    made.meta["results"] = decision.results
    for value, layout in zip(op.results, decision.results, strict=True):
        k = int(value.rpartition(".")[2])
        note(e, value, layout, e.graph.call_function(operator.getitem, (made, k)), node)


def _localized(e: Emitter, call: Call, decision: Decision) -> Call:
    """Return the call with the shapes that this rank holds."""
    operands, layouts = [], iter(decision.operands)
    for t in call.operands:
        operands.append(t and _local_tensor(e, t, next(layouts)))
    results = [_local_tensor(e, t, c) for t, c in zip(call.results, decision.results, strict=True)]
    return replace(call, operands=tuple(operands), results=tuple(results))


def _local_tensor(e: Emitter, t: Tensor, layout: Layout) -> Tensor:
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


def _target(e: Emitter, node: fx.Node, op: Op, decision: Decision) -> tuple[Any, dict[str, Any]]:
    """Return the function that runs locally and the arguments that it takes beside the op's own."""
    if draws(node):
        split = zip(e.grid.names, decision.split, strict=True)
        axes = tuple(attribute(e, axis) for axis, factors in split if factors)
        layouts = decision.operands, decision.results
        return e.sites.split(node, op.rule, layouts, axes, attribute(e, "rng"))
    extra: dict[str, Any] = {}
    for factor in op.rule.own if op.rule.runs(decision.split) else ():
        axes = tuple(attribute(e, a) for a in _splitting(e, decision, factor))
        if axes:
            extra[f"split_{factor}"] = axes
            extra[f"size_{factor}"] = op.signature.sizes[factor]
    return (op.rule.program, extra) if extra else (op.call.op, {})


def _splitting(e: Emitter, decision: Decision, factor: str) -> list[str]:
    return [a for a, split in zip(e.grid.names, decision.split, strict=True) if factor in split]


def _averaged(e: Emitter, op: Op, decision: Decision, made: fx.Node) -> fx.Node:
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


def _local_factor(e: Emitter, op: Op, decision: Decision, factor: str) -> int:
    for dims, layout, t in zip(
        op.signature.operands, decision.operands, [t for t in op.call.operands if t], strict=True
    ):
        for d, dim in enumerate(dims):
            if any(factor in product for product in dim):
                here = length_here(t.shape[d], layout, d, e.grid, e.coords)
                return here * op.signature.sizes[factor] // t.shape[d]
    raise AssertionError(factor)


# Outputs -----------------------------------------------------------------------------------------


def _emit_output(e: Emitter) -> None:
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
