"""What capture hands to the other passes: one functional graph and where each of its values lives.

`Program` holds the graph, the owners of its placeholders and outputs, and the names that plans use.
`InputGuards` check what the user passes against what was captured and flatten it; `OutputSpec`
gives the outputs the structure that the original model returns. Nothing here knows of layouts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autotp.errors import InputError
from autotp.sizes import evaluate, expression, shape_of


@dataclass(frozen=True, slots=True)
class TensorType:
    """The dtype and shape of a tensor input, and whether its gradient was planned.

    A dim that may vary has a name in place of a size.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    requires_grad: bool = False

    def __str__(self) -> str:
        grad = " with requires_grad" if self.requires_grad else ""
        shape = ", ".join(map(str, self.shape))
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}]{grad}"


@dataclass(frozen=True, slots=True)
class VaryingDim:
    """A named dim: its symbol in the captured sizes, an input and a dim where it is read.

    example, least, most   the size of the example, and those that the captured graph can take
    """

    name: str
    symbol: Any
    input: str
    dim: int
    example: int
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Absent:
    """Stands for an argument that was not given."""

    def __str__(self) -> str:
        return "absent"


ABSENT = Absent()


@dataclass(frozen=True, slots=True)
class InputGuards:
    """Check that inputs are those of the capture, and flatten them.

    `leaves`: name -> TensorType, or the captured constant; the tensors in the graph's order.
    `defaults`: what an argument that is not given is equal to.
    """

    signature: inspect.Signature
    leaves: Mapping[str, object]
    defaults: Mapping[str, object]

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors of a call in the graph's order.

        Raises: InputError, which lists every leaf that differs.
        """
        given = name_leaves(self.signature, args, kwargs)
        types = {name: type_of(value) for name, value in given.items()}
        problems = [
            (name, f"{describe(types.get(name, ABSENT))}, planned {describe(planned)}")
            for name in {**self.leaves, **types}
            if not fits(
                self._or_default(types, name), planned := self._or_default(self.leaves, name)
            )
        ]
        if problems:
            raise InputError(
                "the inputs are not those that were planned for",
                at=problems,
                remedy=(
                    "pass inputs like the example inputs, or plan again with these",
                    'name the dims that vary: dynamic={"input_ids": {0: "batch", 1: "seq"}}',
                ),
            )
        refuse_unequal(self.named_sizes(given))
        return [given[n] for n, leaf in self.leaves.items() if isinstance(leaf, TensorType)]

    def named_sizes(self, given: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """Return, by named dim and input, the sizes of the leaves of a call."""
        found: dict[str, dict[str, int]] = {}
        for name, leaf in self.leaves.items():
            for dim, size in enumerate(leaf.shape if isinstance(leaf, TensorType) else ()):
                if isinstance(size, str):
                    found.setdefault(size, {})[f"dim {dim} of {name}"] = given[name].shape[dim]
        return found

    def _or_default(self, leaves: Mapping[str, object], name: str) -> object:
        return leaves.get(name, self.defaults.get(name, ABSENT))


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The structure that the model returns; `constants` are its leaves that are no tensors."""

    spec: pytree.TreeSpec
    constants: Mapping[int, object]

    def unflatten(self, tensors: Sequence[Tensor]) -> Any:
        """Return `tensors`, the user's outputs of the graph, as the original model would."""
        rest = iter(tensors)
        count = self.spec.num_leaves
        leaves = [self.constants[i] if i in self.constants else next(rest) for i in range(count)]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True, slots=True)
class Program:
    """A captured model: its functional graph, and what its placeholders and outputs are.

    The graph's output is a flat tuple: the user's tensors (`outputs`), then the new values of
    mutated buffers (`mutations`). Keys are names of fx nodes unless said otherwise.
    """

    graph_module: fx.GraphModule
    params: dict[str, str]  # placeholder -> fully qualified name, canonical
    tied: dict[str, str]  # every other qualified name of a tied parameter -> the canonical one
    buffers: dict[str, str]  # placeholder -> fully qualified name
    constants: dict[str, Tensor]  # placeholder -> lifted constant
    inputs: tuple[str, ...]  # placeholders of the user's tensors, in flattened order
    outputs: tuple[str, ...]  # nodes of the user's tensors, in flattened order
    mutations: dict[str, str]  # output node -> buffer to write back
    input_guards: InputGuards
    out_spec: OutputSpec
    requires_grad: frozenset[str]
    names: dict[str, str]  # every node -> its name in a plan, unique
    where: dict[str, str]  # node -> "file.py:line" of the user's code
    train: bool
    varying: tuple[VaryingDim, ...] = ()  # the named dims, in the order they were given
    regions: dict[str, str] = field(default_factory=dict)  # node -> its checkpoint region

    @property
    def graph(self) -> fx.Graph:
        """The graph of `graph_module`."""
        return self.graph_module.graph

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Check a call's arguments and return their tensors in the order of `inputs`.

        Raises: InputError.
        """
        return self.input_guards.flatten(args, kwargs)

    @property
    def example_sizes(self) -> dict[str, int]:
        """The sizes of the named dims in the example, by name."""
        return {v.name: v.example for v in self.varying}

    def sizes_of(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Return the sizes of the named dims in the tensors of a call, by name."""
        given = dict(zip(self.inputs, tensors, strict=True))
        return {v.name: given[v.input].shape[v.dim] for v in self.varying}

    def output_shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Return the shapes of `outputs` where the named dims have these sizes."""
        values = {node.name: node.meta["val"] for node in self.graph.nodes if "val" in node.meta}
        return [
            tuple(evaluate(self.spell(n), sizes) for n in shape_of(values[name]))
            for name in self.outputs
        ]

    def spell(self, size: int) -> str:
        """Write a size of the captured graph by the names of dims."""
        return str(
            expression(size).xreplace({v.symbol: sympy.Symbol(v.name) for v in self.varying})
        )

    def unflatten_outputs(self, tensors: Sequence[Tensor]) -> Any:
        """Return the values of `outputs` in the structure that the original model returns."""
        return self.out_spec.unflatten(tensors)


def name_leaves(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return every leaf of a call under its name, however it was passed.

    >>> name_leaves(inspect.signature(lambda x, batch: 0), (1,), {"batch": {"ids": [2, 3]}})
    {'x': 1, "batch['ids'][0]": 2, "batch['ids'][1]": 3}
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the model cannot be called so: {error}", remedy=f"forward{signature}"
        ) from error
    arguments = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    return {
        name + pytree.keystr(path): leaf
        for name, value in arguments.items()
        for path, leaf in pytree.tree_flatten_with_path(value)[0]
    }


def type_of(value: object, names: Mapping[int, str] | None = None) -> object:
    """Return the TensorType of a tensor, with the names of its dims, or any other leaf as it is."""
    if not isinstance(value, Tensor):
        return value
    grad = value.requires_grad and torch.is_grad_enabled()
    shape = tuple((names or {}).get(d, n) for d, n in enumerate(value.shape))
    return TensorType(value.dtype, shape, grad)


def fits(given: object, planned: object) -> bool:
    """Say whether a leaf may stand for the captured one; a gradient less is no harm."""
    if isinstance(given, TensorType) and isinstance(planned, TensorType):
        same = given.dtype == planned.dtype and len(given.shape) == len(planned.shape)
        sizes = zip(given.shape, planned.shape, strict=False)
        same = same and all(isinstance(n, str) or m == n for m, n in sizes)
        return same and given.requires_grad <= planned.requires_grad
    return type(given) is type(planned) and given == planned


def refuse_unequal(sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Raise InputError where a named dim has several sizes; `sizes` by name and place."""
    at = [
        (name, ", ".join(f"{n} is {place}" for place, n in found.items()))
        for name, found in sizes.items()
        if len(set(found.values())) > 1
    ]
    if at:
        raise InputError(
            "dims of one name have different sizes", at=at, remedy="give them different names"
        )


def describe(leaf: object) -> str:
    """Write a leaf as an error shows it."""
    return str(leaf) if isinstance(leaf, TensorType | Absent) else repr(leaf)
