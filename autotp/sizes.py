"""Sizes that vary after planning: numbers of the example that know what they are made of.

A `Size` is the int that the example inputs give, with its expression over the dims that vary. The
planner reads the int; what is emitted writes the expression. Sizes are equal where they are equal
for every input, and one divides another only where it always does; order is the example's.

    size          an int, or a Size where its expression varies
    length_here   how long a dim is on one rank
    evaluate      what an expression is under given sizes
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch.utils._sympy import functions as torch_functions

from autotp.grid import Coords, Grid
from autotp.layouts import Layout, Shape, chunk, local_size, splitters

Function: type[Any] = sympy.Function


class ChunkLength(Function):  # type: ignore[misc]
    """The size of this rank's chunk of a dim, split over an axis: ChunkLength(size, axis)."""

    is_integer = True
    is_positive = True


class Size(int):
    """An int of the example inputs with its expression over the dims that vary."""

    expr: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and bool(self.expr == other.expr)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.expr)

    def __repr__(self) -> str:
        return str(self.expr)

    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, Any]]:
        return (int(self),), {}

    def __add__(self, other: Any) -> Any:
        return _combine(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return _combine(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return _combine(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _combine(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return _combine(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return _combine(operator.mul, other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _combine(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _combine(operator.floordiv, other, self)

    def __mod__(self, other: Any) -> Any:
        return _remainder(self, other)

    def __rmod__(self, other: Any) -> Any:
        return _remainder(other, self)


def size(example: int, expr: Any) -> int:
    """Return `example` as a Size of this expression, or as an int where it never varies."""
    expr = sympy.expand(expr)
    if expr.is_Integer:
        return int(expr)
    made = Size(example)
    made.expr = expr
    return made


def depends_on_values(n: object) -> bool:
    """Say whether a number of the capture is known only when the graph runs."""
    return isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool) and n.node.hint is None


def size_of(n: int | torch.SymInt) -> int:
    """Return a size of a captured tensor as an int or a Size."""
    return size(int(n.node.hint), n.node.expr) if isinstance(n, torch.SymInt) else n


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a captured tensor, its varying sizes as Sizes."""
    return tuple(map(size_of, tensor.shape))


def varies(sizes: Iterable[object]) -> bool:
    """Say whether any of these sizes may vary."""
    return any(isinstance(n, Size) for n in sizes)


def examples(sizes: Iterable[int]) -> tuple[int, ...]:
    """Return the numbers that the example inputs give to these sizes."""
    return tuple(int(n) for n in sizes)


def expression(n: int) -> Any:
    """Return the expression of a size."""
    return n.expr if isinstance(n, Size) else sympy.Integer(n)


def length_here(n: int, layout: Layout, dim: int, grid: Grid, coords: Coords) -> int:
    """Return how long a dim of size `n` is on the rank at `coords`.

    A size that varies is a plain chunk on every axis that splits it: layouts' blocks do not vary.
    """
    if not isinstance(n, Size):
        return local_size(n, layout, dim, grid, coords)
    for axis in splitters(layout, dim):
        low, high = chunk(int(n), grid.sizes[axis], coords[axis])
        n = size(high - low, ChunkLength(expression(n), sympy.Symbol(grid.names[axis])))
    return n


def shape_here(shape: Iterable[int], layout: Layout, grid: Grid, coords: Coords) -> Shape:
    """Return the shape of what the rank at `coords` holds of a tensor of `shape`."""
    return tuple(length_here(n, layout, d, grid, coords) for d, n in enumerate(shape))


def _combine(op: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    if not (isinstance(left, int) and isinstance(right, int)):
        return NotImplemented
    terms = expression(left), expression(right)
    exact = op is not operator.floordiv
    expr = op(*terms) if exact else torch_functions.FloorDiv(*terms)
    return size(op(int(left), int(right)), expr)


def _remainder(left: Any, right: Any) -> Any:
    """Return the remainder of the example, but 0 only where there never is one."""
    if not (isinstance(left, int) and isinstance(right, int)):
        return NotImplemented
    whole = torch_functions.FloorDiv(expression(left), expression(right)) * expression(right)
    if sympy.expand(expression(left) - whole) == 0:
        return 0
    return int(left) % int(right) or 1


# As text, in a plan ------------------------------------------------------------------------------

_OPERATORS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.Sub: operator.sub,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}


def evaluate(text: str, sizes: Mapping[str, int]) -> int:
    """Return what an expression such as `(batch - 1)//2` is. Raises ValueError for other text.

    >>> evaluate("batch*(seq - 1)", {"batch": 4, "seq": 6})
    20
    """
    return _value(ast.parse(text, mode="eval").body, sizes)


def names_in(text: str) -> list[str]:
    """Return the names of the dims in an expression, sorted."""
    nodes = [n.id for n in ast.walk(ast.parse(text, mode="eval")) if isinstance(n, ast.Name)]
    return sorted(set(nodes) - set(_FUNCTIONS))


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand, sizes))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Call(func=ast.Name(id=name), args=given) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(g, sizes) for g in given))
    raise ValueError(f"{ast.unparse(node)} is no size")
