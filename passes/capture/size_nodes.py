"""Write varying sizes into a graph: nodes over the sizes of the global inputs, each written once.

`SizeWriter` serves the captured graph and every emitted one: `batch = input_ids.size(0)`, then
whatever an expression is made of. `write_sizes` puts such nodes in place of those that torch.export
left, so that no size is read from a tensor that may be split.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._sympy import functions as torch_functions

from autotp.axis import Axis
from autotp.errors import CaptureError
from autotp.layouts import chunk
from autotp.passes.capture.draws import is_needed
from autotp.passes.program import VaryingDim
from autotp.sizes import ChunkLength, Size, depends_on_values, size, size_of


def chunk_length(size: int, axis: Axis) -> int:
    """Return how much of a dim of `size` this rank holds where `axis` splits it."""
    low, high = chunk(size, axis.size, axis.index)
    return high - low


OPERATORS: dict[type[Any], Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Pow: operator.pow,
    torch_functions.CleanDiv: operator.floordiv,
    torch_functions.FloorDiv: operator.floordiv,
    torch_functions.Max: torch.sym_max,
    torch_functions.Min: torch.sym_min,
    torch_functions.Mod: operator.mod,
    torch_functions.PowByNatural: operator.pow,
    torch_functions.PythonMod: operator.mod,
}
"""How an expression is computed from its arguments, two at a time."""


@dataclass(slots=True)
class SizeWriter:
    """Write sizes as nodes of `graph`, before all that compute: no region of the model is cut.

    `input_of` returns the node of an input, `axis_of` the node that reads an axis.
    """

    graph: fx.Graph
    dims: Sequence[VaryingDim]
    input_of: Callable[[str], fx.Node]
    axis_of: Callable[[str], fx.Node] | None = None
    written: dict[Any, Any] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)

    def write(self, n: object) -> Any:
        """Return the node of a Size; anything else is returned as it is."""
        return self._expression(n.expr) if isinstance(n, Size) else n

    def write_all(self, arguments: Any) -> Any:
        """Return arguments, nested as they may be, with their Sizes written."""
        return map_aggregate(arguments, self.write)

    def _expression(self, expr: Any) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr not in self.written:
            self.written[expr] = self._write(expr)
        return self.written[expr]

    def _create(self, op: str, target: Any, args: tuple[Any, ...], name: str | None = None) -> Any:
        """Create a node after the inputs, the axes and the sizes that are there."""
        at_rest = (n for n in self.graph.nodes if n.op in ("placeholder", "get_attr"))
        with self.graph.inserting_after([*at_rest, *self.nodes][-1]):
            self.nodes.append(self.graph.create_node(op, target, args, name=name))
        return self.nodes[-1]

    def _write(self, expr: Any) -> fx.Node:
        if expr.is_Symbol:
            found = next(d for d in self.dims if d.symbol == expr)
            read = (self.input_of(found.input), found.dim)
            node: fx.Node = self._create("call_method", "size", read, found.name)
            node.meta["val"] = size(found.example, expr)
            return node
        if isinstance(expr, ChunkLength):
            assert self.axis_of is not None, "a captured graph knows no axis"
            whole, axis = expr.args
            here = (self._expression(whole), self.axis_of(str(axis)))
            local: fx.Node = self._create("call_function", chunk_length, here)
            return local
        if type(expr) not in OPERATORS:
            raise CaptureError(
                f"a size depends on the inputs' sizes in a way that cannot be written: {expr}",
                remedy="leave the dims that it depends on out of dynamic",
            )
        commutes = isinstance(expr, sympy.Add | sympy.Mul)
        ordered = sorted(expr.args, key=lambda a: commutes and bool(a.is_Integer))
        terms = map(self._expression, ordered)
        function = OPERATORS[type(expr)]
        made: fx.Node = functools.reduce(functools.partial(self._call, function), terms)
        return made

    def _call(self, function: Callable[..., Any], left: Any, right: Any) -> fx.Node:
        if function is operator.add and isinstance(right, int) and right < 0:
            function, right = operator.sub, -right
        made: fx.Node = self._create("call_function", function, (left, right))
        values = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in (left, right)]
        made.meta["val"] = None if None in values else function(*values)
        return made


def write_sizes(graph: fx.Graph, writer: SizeWriter) -> None:
    """Replace every size of a captured graph, SymInt or Size, by nodes of the writer."""
    for node in list(graph.nodes):
        if node.op == "placeholder":
            continue
        node.args, node.kwargs = (
            map_aggregate(a, functools.partial(_written, writer)) for a in (node.args, node.kwargs)
        )
    graph.eliminate_dead_code(is_impure_node=is_needed)


def _written(writer: SizeWriter, argument: object) -> Any:
    number = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if isinstance(number, torch.SymInt | Size) and not depends_on_values(number):
        return writer.write(size_of(number))
    return argument


def is_size(node: fx.Node) -> bool:
    """Say whether a node is a size that a SizeWriter has written."""
    return isinstance(node.meta.get("val"), Size)
