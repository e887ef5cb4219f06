"""The program as the planner sees it: ops that depend on a parameter, and the values between them.

In: a captured Program. Out: a Network. Ops that depend on no parameter (masks, positions, rotary
tables) are not in it: they run whole, and their values are sources like the inputs. `getitem`
nodes disappear: result k of node n is the value `n` (k = 0, single result) or `n.k`.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autotp.errors import RuleError
from autotp.layouts import Shape
from autotp.passes.program import Program
from autotp.passes.rules import Call, Rule, Signature, Tensor, find
from autotp.sizes import examples, shape_of


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor: where it comes from and whether a gradient flows back to it."""

    name: str
    shape: Shape
    dtype: torch.dtype
    grad: bool

    @property
    def size_bytes(self) -> int:
        """The bytes of the whole tensor."""
        return math.prod(examples(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Op:
    """One call that the planner decides: its rule, the values it reads and those it makes.

    region   the checkpoint region in which backward computes it again, if any
    enters   the operands that come into that region with it; parameters are there anyway
    """

    name: str
    call: Call
    rule: Rule
    signature: Signature
    operands: tuple[str, ...]
    results: tuple[str, ...]
    region: str = ""
    enters: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """Ops in graph order, values by name, and who consumes what.

    sources    values that no op makes: parameters, inputs, and what was computed whole
    outputs    values that the program returns, in order; None where it returns no tensor
    unruled    ops without a rule, by target, with the number of their calls
    """

    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    sources: tuple[str, ...]
    outputs: tuple[str | None, ...]
    unruled: Mapping[str, int] = field(default_factory=dict)

    def consumers(self) -> dict[str, list[tuple[int, int]]]:
        """Return, per value, the (op, operand) positions that read it, in graph order."""
        readers: dict[str, list[tuple[int, int]]] = {name: [] for name in self.values}
        for number, op in enumerate(self.ops):
            for position, value in enumerate(op.operands):
                readers[value].append((number, position))
        return readers


def read_network(program: Program) -> Network:
    """Return the ops of `program` that depend on a parameter, with their rules bound."""
    active = active_nodes(program)
    values: dict[str, Value] = {}
    ops: list[Op] = []
    made: set[str] = set()
    unruled: dict[str, int] = {}
    for node in program.graph_module.graph.nodes:
        for name, val in results_of(node):
            values[name] = Value(name, shape_of(val), val.dtype, name_grad(program, node, name))
        if node.op == "call_function" and node.name in active and not is_getitem(node):
            ops.append(_in_region(_op(node, unruled), program, ops))
            made.update(ops[-1].results)
    read = {v for op in ops for v in op.operands}
    outputs = tuple(value_name(a) if isinstance(a, fx.Node) else None for a in output_args(program))
    wanted = read | {o for o in outputs if o} | made
    kept = {n: v for n, v in values.items() if n in wanted or n in program.params}
    sources = tuple(n for n in kept if n not in made)
    if unruled:
        listed = ", ".join(f"{op} ({n} calls)" for op, n in unruled.items())
        warnings.warn(
            f"autotp has no rule for {listed}: run whole on every rank; autotp.rule gives it one",
            stacklevel=3,
        )
    return Network(tuple(ops), kept, sources, outputs, unruled)


def _in_region(op: Op, program: Program, earlier: Sequence[Op]) -> Op:
    """Return `op` with the checkpoint region in which it lies."""
    region = program.regions.get(op.name, "")
    if not region:
        return op
    known = {v for other in reversed(earlier) if other.region == region for v in other.results}
    enters = [k for k, v in enumerate(op.operands) if v not in known and v not in program.params]
    return replace(op, region=region, enters=tuple(enters))


def refuse_unruled(program: Program, network: Network) -> None:
    """Raise RuleError, with every place, for ops that would run whole for want of a rule."""
    at = [
        (program.where.get(op.name) or program.names[op.name], f"{op.call.op} in {name}")
        for op in network.ops
        if str(op.call.op) in network.unruled
        for name in [program.names[op.name]]
    ]
    if at:
        raise RuleError(
            f"strict=True, and {len(network.unruled)} ops have no rule",
            at=at,
            remedy=(
                f"give a rule, such as {example_rule(next(iter(network.unruled)))}",
                "strict=False runs them whole on every rank",
            ),
        )


def example_rule(op: str) -> str:
    """Write how a user gives an op a rule."""
    namespace, name, *_ = op.split(".")
    return f'autotp.rule("{namespace}::{name}", "b ... -> b ...")'


def active_nodes(program: Program) -> set[str]:
    """Return the names of the nodes that depend on a parameter."""
    active = set(program.params)
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and any(a.name in active for a in node.all_input_nodes):
            active.add(node.name)
    return active


def output_args(program: Program) -> list[Any]:
    """Return what the graph returns, flat."""
    (output,) = (n for n in program.graph_module.graph.nodes if n.op == "output")
    return list(output.args[0])


def is_getitem(node: fx.Node) -> bool:
    """Say whether a node takes one result of another."""
    return node.op == "call_function" and node.target is operator.getitem


def value_name(node: fx.Node) -> str:
    """Return the value that a node stands for; a getitem stands for a result of its operand."""
    if is_getitem(node):
        return f"{node.all_input_nodes[0].name}.{node.args[1]}"
    return node.name


def results_of(node: fx.Node) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the values that a node makes, with the fake tensors that stand for them."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor) and not is_getitem(node):
        yield node.name, val
    elif isinstance(val, list | tuple):
        for k, item in enumerate(val):
            if isinstance(item, torch.Tensor):
                yield f"{node.name}.{k}", item


def name_grad(program: Program, node: fx.Node, name: str) -> bool:
    """Say whether gradient flows to a value: a result of many has its getitem's answer."""
    if name == node.name:
        return name in program.requires_grad
    return any(value_name(u) == name and u.name in program.requires_grad for u in node.users)


def _op(node: fx.Node, unruled: dict[str, int]) -> Op:
    call, operands = read_call(node)
    rule = find(node.target)
    if rule is None:
        unruled[str(node.target)] = unruled.get(str(node.target), 0) + 1
        rule = Rule(node.target, _all_whole)
    return Op(
        name=node.name,
        call=call,
        rule=rule,
        signature=rule.signature(call),
        operands=operands,
        results=tuple(name for name, _ in results_of(node)),
    )


def _all_whole(call: Call) -> str:
    tensors = [*(t for t in call.operands), *call.results]
    rows = [
        " ".join(f"[x{i}_{k}]" for k in range(len(t.shape))) if t else ""
        for i, t in enumerate(tensors)
    ]
    count = len(call.operands)
    return ", ".join(rows[:count]) + " -> " + ", ".join(rows[count:])


def read_call(node: fx.Node) -> tuple[Call, tuple[str, ...]]:
    """Return the call of a node with its tensors described, and the names of its operands."""
    operands: list[Tensor | None] = []
    names: list[str] = []
    for argument, value in tensor_slots(node):
        if is_tensor(value):
            val = _val(value)
            operands.append(Tensor(shape_of(val), val.dtype))
            names.append(value_name(value))
        elif "Tensor" in argument:
            operands.append(None)
    args, kwargs = described(node.args), described(node.kwargs)
    results = tuple(Tensor(shape_of(v), v.dtype) for _, v in results_of(node))
    while operands and operands[-1] is None:
        operands.pop()
    return Call(node.target, tuple(args), kwargs, tuple(operands), results), tuple(names)


def described(arguments: Any) -> Any:
    """Return arguments with every node replaced by the shape and dtype of its value, or number."""
    if isinstance(arguments, list | tuple):
        return tuple(described(a) for a in arguments)
    if isinstance(arguments, Mapping):
        return {name: described(a) for name, a in arguments.items()}
    if not isinstance(arguments, fx.Node):
        return arguments
    val = _val(arguments)
    if isinstance(val, torch.SymFloat):
        return float(val.node.hint)
    return Tensor(shape_of(val), val.dtype) if isinstance(val, torch.Tensor) else val


def is_tensor(argument: object) -> bool:
    """Say whether an argument is a node that computes a tensor, and no size."""
    return isinstance(argument, fx.Node) and isinstance(_val(argument), torch.Tensor)


def _val(node: fx.Node) -> Any:
    return node.meta["val"]


def tensor_slots(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """Yield the schema type and the value of every argument that may hold a tensor, lists flat."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        for value in (*node.args, *node.kwargs.values()):
            yield "Any", value
        return
    for position, argument in enumerate(schema.arguments):
        if "Tensor" not in str(argument.type):
            continue
        value = (
            node.args[position]
            if position < len(node.args)
            else node.kwargs.get(argument.name, argument.default_value)
        )
        for item in value if isinstance(value, list | tuple) else [value]:
            yield "Tensor", item
