"""Which dims of the inputs may vary: what a user declares, and what torch.export makes of it.

export_varying  export with the declared dims, within the ranges that the model can take
varying_dims    the named dims of an exported program, with their symbols and ranges
refusal         torch.export's own words on dims that cannot vary, by name
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from autotp.dynamic import DynamicInputs
from autotp.errors import CaptureError, InputError
from autotp.passes.program import VaryingDim, name_leaves, refuse_unequal
from autotp.sizes import size_of

LEAST = 2
"""Sizes 0 and 1 are other programs to torch.export: dims of one element broadcast."""


Ranges = Mapping[str, Mapping[str, int]]
"""The least and most ("min" and "max") that named dims may be."""


def export_varying(
    run: Callable[[Any], ExportedProgram],
    leaves: Mapping[str, Any],
    dynamic: DynamicInputs,
) -> ExportedProgram:
    """Return what `run` exports where dims of the `leaves`, given by name, vary as `dynamic` says.

    A first export may find ranges that the model can take; it is done again within these.

    Raises: InputError for what the example inputs cannot vary in, CaptureError for dims that the
    model holds to a size.
    """
    if not dynamic:
        return run(None)
    refuse_undeclarable(leaves, dynamic)
    ranges: Ranges = {}
    while True:
        try:
            return run(declared(leaves, dynamic, ranges))
        except CaptureError as error:
            said = str(error.__cause__)
            narrower = {**ranges, **ranges_found(said, ranges)}
            if narrower == ranges:
                raise refusal(said, dynamic) or error from error.__cause__
            ranges = narrower


def given_dims(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: DynamicInputs | None,
) -> DynamicInputs:
    """Return those of the dims that inputs of this call have: an evaluation may have no labels."""
    leaves = name_leaves(inspect.signature(model.forward), args, kwargs)
    given = {name for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return {name: dims for name, dims in (dynamic or {}).items() if name in given}


def refuse_undeclarable(leaves: Mapping[str, Any], dynamic: DynamicInputs) -> None:
    """Raise InputError for what the example inputs cannot vary in."""
    problems = [p for name, dims in dynamic.items() for p in _problems(leaves, name, dims)]
    if problems:
        raise InputError(
            "dynamic names what cannot vary",
            at=problems,
            remedy='dynamic={"input": {dim: "name"}}, with sizes of at least 2 in the example',
        )
    sizes: dict[str, dict[str, int]] = {}
    for name, dims in dynamic.items():
        for dim, label in dims.items():
            sizes.setdefault(label, {})[f"dim {dim} of {name}"] = leaves[name].shape[dim]
    refuse_unequal(sizes)


def declared(leaves: Mapping[str, Any], dynamic: DynamicInputs, ranges: Ranges) -> Any:
    """Return the varying dims as a ShapesCollection, as torch.export wants them."""
    labels = {label for dims in dynamic.values() for label in dims.values()}
    made: dict[str, Any] = {label: Dim(label, **ranges.get(label, {})) for label in sorted(labels)}
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for name, dims in dynamic.items():
        shapes[leaves[name]] = {dim: made[label] for dim, label in dims.items()}
    return shapes


def _problems(
    leaves: Mapping[str, Any], name: str, dims: Mapping[int, str]
) -> Iterator[tuple[str, str]]:
    leaf = leaves.get(name)
    if not isinstance(leaf, Tensor):
        known = ", ".join(n for n, value in leaves.items() if isinstance(value, Tensor))
        yield name, f"is no tensor of the example inputs: {known}"
        return
    for dim, label in dims.items():
        if not 0 <= dim < leaf.ndim:
            yield name, f"has no dim {dim} in {list(leaf.shape)}"
        elif not label.isidentifier():
            yield name, f"{label!r} is no name for dim {dim}"
        elif leaf.shape[dim] < LEAST:
            yield name, f"dim {dim}, {label}, is {leaf.shape[dim]}"


def varying_dims(
    exported: ExportedProgram, placeholders: Mapping[str, str], dynamic: DynamicInputs
) -> tuple[VaryingDim, ...]:
    """Return the named dims, each where it is read first; `placeholders` of the leaves by name.

    Raises: CaptureError for dims that the model holds to a size.
    """
    values = {n.name: n.meta["val"] for n in exported.graph.find_nodes(op="placeholder")}
    found: dict[str, VaryingDim] = {}
    fixed: list[tuple[str, str]] = []
    for leaf, dims in dynamic.items():
        for dim, label in dims.items():
            n = values[placeholders[leaf]].shape[dim]
            if not isinstance(n, torch.SymInt) or not n.node.expr.is_Symbol:
                fixed.append((label, f"dim {dim} of {leaf} is always {n}"))
            elif label not in found:
                found[label] = _dim(exported, label, n, placeholders[leaf], dim)
    fixed += _held_together(found.values(), values)
    if fixed:
        raise _cannot_vary(fixed)
    return tuple(found.values())


def _held_together(
    dims: Iterable[VaryingDim], values: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield what an export takes for granted of several dims at once: it checks each alone only."""
    names = {dim.symbol: sympy.Symbol(dim.name) for dim in dims}
    sizes = [n for dim in dims for n in values[dim.input].shape if isinstance(n, torch.SymInt)]
    for guard in sizes[0].node.shape_env.guards if sizes else ():
        fact = sizes[0].node.shape_env.simplify(guard.expr)
        if len(fact.free_symbols & names.keys()) > 1:
            used = sorted(str(names[s]) for s in fact.free_symbols & names.keys())
            yield ", ".join(used), f"torch.export: {fact.xreplace(names)}"


def _dim(
    exported: ExportedProgram, label: str, n: torch.SymInt, placeholder: str, dim: int
) -> VaryingDim:
    given = exported.range_constraints[n.node.expr]
    upper = given.upper
    most = int(upper) if isinstance(upper, sympy.Integer | int) else None
    least = max(LEAST, int(given.lower))
    return VaryingDim(label, n.node.expr, placeholder, dim, int(size_of(n)), least, most)


def ranges_found(said: str, before: Ranges) -> Ranges:
    """Return the ranges that torch.export suggests, if ranges are all that it suggests.

    A guard that leaves out the largest size alone is a range as well.
    """
    suggested = said.partition("Suggested fixes:")[2].partition("\n\n")[0].split("\n")
    found = [re.fullmatch(r"(\w+) = Dim\('\w+', (.*)\)", s.strip()) for s in suggested if s.strip()]
    ranges = {
        match[1]: {end: int(n) for end, n in re.findall(r"(min|max)=(\d+)", match[2])}
        for match in found
        if match
    }
    excluded = re.findall(r"values of (\w+) = .* satisfy the generated guard .* != (\d+)", said)
    for name, n in excluded:
        limits = before.get(name, {})
        if limits.get("max") == int(n):
            ranges[name] = {**limits, "max": int(n) - 1}
    return ranges if all(found) else {}


def refusal(said: str, dynamic: DynamicInputs) -> CaptureError | None:
    """Return what torch.export says of dims that cannot vary, if that is its error."""
    names = {label for dims in dynamic.values() for label in dims.values()}
    facts = re.findall(r"^\s*- Not all values of (\w+) = .*?\b(\w+ the generated .*)$", said, re.M)
    facts += re.findall(r"^\s*- .*? (\w+) = .*? because \1 (was inferred .*)$", said, re.M)
    facts += re.findall(r"^\s*- You marked (\w+) as dynamic but your code (.*?)\. ", said, re.M)
    at = dict.fromkeys((name, f"torch.export: {fact}") for name, fact in facts if name in names)
    return _cannot_vary(list(at)) if at else None


def _cannot_vary(at: list[tuple[str, str]]) -> CaptureError:
    return CaptureError(
        "the model holds dims to a size that dynamic lets vary",
        at=at,
        remedy="take the size from x.shape, not len(x) or a number; or leave it out of dynamic",
    )
