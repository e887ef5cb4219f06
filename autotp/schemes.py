"""Published schemes as pins: the choices that make the compiler emit each of them.

    pins = autotp.schemes.megatron(model, grid, example_inputs)
    model = autotp.parallelize(model, grid, example_inputs, pins=pins)

A scheme gives each axis of the grid a role: the dims that the axis splits, in order of preference,
wherever they occur. Which dim is which follows from the model's graph (`read_anatomy`), so that no
model needs a case of its own. Ops that only change a view are left to the search. On a grid of
several axes the schemes of two axes give the first its own role and share the other between the
rest; those of one axis use all axes as one. Where a model does not fit, planning raises PinError.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from autotp.api import Pins
from autotp.grid import Grid, as_grid
from autotp.layouts import Layout, Shard, is_valid
from autotp.passes.anatomy import Anatomy, Product, read_anatomy, root_of
from autotp.passes.capture.model import capture
from autotp.passes.choices import AxisChoice, Typing, axis_choices, split_ways
from autotp.passes.factors import Factors, infer_factors
from autotp.passes.network import Network, Op, read_network
from autotp.passes.pins import BACKWARD, fits, matches
from autotp.passes.program import Program
from autotp.passes.strategies import can_rest, is_owned
from autotp.reading import split_inputs

Role = tuple[str, ...]
"""What an axis splits, by preference.

inner      what lies between two linears of a block: heads, the MLP's width; and the vocabulary
stream     the hidden dim, which every block reads and adds to
batch      the first dim of the hidden states that no op needs whole
sequence   the last one
ring       the sequence of queries and that of keys, on one axis
made       the dim that a linear or an embedding makes, its weight's own
narrow     the dim that a linear contracts, where it is wider than what it makes
I, R       nothing: every rank has the same
"""

TENSOR: Role = ("inner", "I")
TENSOR_SEQUENCE: Role = ("inner", "sequence", "I")
BATCH: Role = ("batch", "R")
HIDDEN: Role = ("stream", "I")
RING: Role = ("ring", "sequence", "R")
COLUMNS: Role = ("made", "inner", "stream", "I")
COLUMNS_ABT: Role = ("narrow", *COLUMNS)


@dataclass(frozen=True, slots=True)
class Scheme:
    """The role of the first axis, that of the others, and how parameters rest.

    rest   "read": as their op reads them, invariant where it reads them whole
           "blocks": a weight also on the axis along which its op gathers it
           "sharded": on every axis that can shard them
    again  whether backward gathers them again instead of keeping what forward gathered
    """

    first: Role
    others: Role
    rest: str = "read"
    again: bool = False

    def role(self, axis: int, axes: int) -> Role:
        """Return the role of an axis; a grid of one axis is the last."""
        return self.first if axis == 0 and axes > 1 else self.others


SCHEMES: dict[str, Scheme] = {
    "batch_x_tensor": Scheme(BATCH, TENSOR),
    "data_parallel": Scheme(BATCH, BATCH),
    "fsdp": Scheme(BATCH, BATCH, rest="sharded"),
    "fsdp_again": Scheme(BATCH, BATCH, rest="sharded", again=True),
    "megatron": Scheme(TENSOR, TENSOR),
    "megatron_sp": Scheme(TENSOR_SEQUENCE, TENSOR_SEQUENCE),
    "ring_attention": Scheme(BATCH, RING),
    "summa": Scheme(BATCH, COLUMNS, rest="blocks"),
    "summa_abt": Scheme(BATCH, COLUMNS_ABT, rest="blocks"),
    "weight_stationary": Scheme(HIDDEN, TENSOR),
}


def batch_x_tensor(model: nn.Module, grid: Any, example_inputs: Any) -> Pins:
    """Return the pins of data parallelism over the first axis and `megatron` over the others."""
    return scheme_pins("batch_x_tensor", model, grid, example_inputs)


def data_parallel(model: nn.Module, grid: Any, example_inputs: Any) -> Pins:
    """Return the pins that split the batch over all axes and repeat the parameters."""
    return scheme_pins("data_parallel", model, grid, example_inputs)


def fsdp(model: nn.Module, grid: Any, example_inputs: Any, again: bool = False) -> Pins:
    """Return the pins that split the batch, and gather each sharded parameter where it is used.

    With `again` what was gathered is not kept: backward gathers it once more, as FSDP does.

    Source: Rajbhandari et al. 2020, "ZeRO", stage 3.
    """
    return scheme_pins("fsdp_again" if again else "fsdp", model, grid, example_inputs)


def megatron(model: nn.Module, grid: Any, example_inputs: Any) -> Pins:
    """Return the pins of column and row linears, split heads and a split vocabulary, on all axes.

    Source: Shoeybi et al. 2019, "Megatron-LM".
    """
    return scheme_pins("megatron", model, grid, example_inputs)


def megatron_sp(model: nn.Module, grid: Any, example_inputs: Any) -> Pins:
    """Return the pins of `megatron` with the sequence split between the blocks.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformers".
    """
    return scheme_pins("megatron_sp", model, grid, example_inputs)


def ring_attention(model: nn.Module, grid: Any, example_inputs: Any) -> Pins:
    """Return the pins that split the batch over the first axis and the sequence over the others.

    Keys and values travel round a ring; parameters are repeated.

    Source: Li et al. 2021, "Sequence Parallelism: Long Sequence Training from System Perspective".
    """
    return scheme_pins("ring_attention", model, grid, example_inputs)


def summa(model: nn.Module, grid: Any, example_inputs: Any) -> Pins:
    """Return the pins of 2D SUMMA: every linear is C = A B, all three in blocks.

    Source: van de Geijn and Watts 1997, "SUMMA"; Xu et al. 2021, "Optimus".
    """
    return scheme_pins("summa", model, grid, example_inputs)


def summa_abt(model: nn.Module, grid: Any, example_inputs: Any) -> Pins:
    """Return the pins of `summa` with each linear that narrows (fc2) as C = A B^T.

    Its wide input stays in place, and its partial results are reduced and scattered.
    """
    return scheme_pins("summa_abt", model, grid, example_inputs)


def weight_stationary(model: nn.Module, grid: Any, example_inputs: Any) -> Pins:
    """Return the pins of blocks of weights that never move: partial results are all-reduced.

    Source: Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 3.2.
    """
    return scheme_pins("weight_stationary", model, grid, example_inputs)


def scheme_pins(name: str, model: nn.Module, grid: Any, example_inputs: Any) -> Pins:
    """Return the pins of the scheme called `name`."""
    args, kwargs = split_inputs(example_inputs)
    program = capture(model, args, kwargs, train=model.training)
    network = read_network(program)
    factors = infer_factors(network, program.inputs)
    return pins_of(SCHEMES[name], program, network, factors, as_grid(grid))


def pins_of(
    scheme: Scheme, program: Program, network: Network, factors: Factors, grid: Grid
) -> Pins:
    """Return the pins of a scheme for a captured model, folded over its repeated layers."""
    anatomy = read_anatomy(program, network, factors)
    axes = [a for a, size in enumerate(grid.sizes) if size > 1]
    chosen = {
        op.name: {a: _choice(scheme.role(a, len(grid.sizes)), op, anatomy) for a in axes}
        for op in network.ops
        if not op.rule.free
    }
    pins = {
        program.names[op]: {grid.names[a]: word for a, (_, word) in by_axis.items() if word}
        for op, by_axis in chosen.items()
    }
    types = {op: {a: c for a, (c, _) in by_axis.items()} for op, by_axis in chosen.items()}
    for value, fqn in program.params.items():
        pins[fqn] = _rest(scheme.rest, value, types, anatomy, grid)
        if scheme.again:
            pins[fqn] |= {BACKWARD: "again"}
    return fold({name: pin for name, pin in pins.items() if pin}, list(program.names.values()))


# From roles to pins -------------------------------------------------------------------------------


def _choice(role: Role, op: Op, anatomy: Anatomy) -> tuple[AxisChoice | None, str]:
    """Return the first choice of an op that the role asks for, and its spelling in a pin."""
    choices = _choices(op, anatomy)
    by_name = {c.name: c for c in choices}
    for word in role:
        for name in _wanted(word, op, anatomy):
            if name in by_name:
                return by_name[name], _spell(by_name[name], choices)
    return None, ""


def _choices(op: Op, anatomy: Anatomy) -> list[AxisChoice]:
    values = anatomy.network.values
    typing = Typing.of([values[v] for v in op.operands], [values[v] for v in op.results])
    return axis_choices(op, typing, anatomy.factors)


def _wanted(word: str, op: Op, anatomy: Anatomy) -> Iterator[str]:
    """Yield the names of the choices that a word of a role means for an op."""
    product = anatomy.products.get(op.name)
    ways = split_ways(op, anatomy.factors)
    if word in ("made", "narrow"):
        if product and (word == "made" or _narrows(op, product, anatomy)):
            factor = product.made if word == "made" else product.contracted
            yield from (name for name, way in ways.items() if factor in way)
    elif word == "ring":
        for name in ["+".join(group) for group in op.rule.groups(op.call)]:
            if all(w.atom in anatomy.dims["sequence"] for w in ways.get(name, {}).values()):
                yield name
    elif word in anatomy.dims:
        for name, way in ways.items():
            if any(w.atom in anatomy.dims[word] for w in way.values()):
                yield name
    elif word == "I" or product or not _is_scalar(op, anatomy):
        yield word


def _narrows(op: Op, product: Product, anatomy: Anatomy) -> bool:
    """Say whether a linear leads back to the stream from something wider."""
    sizes = op.signature.sizes
    back = root_of(op, product.made, anatomy.factors) in anatomy.dims["stream"]
    return back and not product.is_lookup and sizes[product.contracted] > sizes[product.made]


def _is_scalar(op: Op, anatomy: Anatomy) -> bool:
    return all(anatomy.network.values[v].shape == () for v in op.operands)


def _spell(choice: AxisChoice, choices: Sequence[AxisChoice]) -> str:
    """Return a word that fits this choice and no other."""
    words = (choice.name, *choice.split)
    return next((w for w in words if sum(fits(c, w) for c in choices) == 1), choice.name)


def _rest(
    how: str,
    value: str,
    chosen: Mapping[str, Mapping[int, AxisChoice | None]],
    anatomy: Anatomy,
    grid: Grid,
) -> dict[str, str]:
    """Return the pins of a parameter's resting layout; none where its readers disagree, or lack."""
    layouts = _resting(value, anatomy, grid)
    if not layouts:
        return {}
    split = [c for c in layouts if len([t for t in c if isinstance(t, Shard)]) == _most(layouts)]
    if how == "sharded":
        return _words(["S" if isinstance(t, Shard) else "I" for t in split[0]], grid)
    readers = [
        (op, k) for op in anatomy.network.ops for k, v in enumerate(op.operands) if v == value
    ]
    read = {_read(op, k, chosen.get(op.name, {}), grid) for op, k in readers}
    if how == "blocks" and any(op.name in anatomy.products for op, _ in readers):
        if len(read) > 1:
            return _words(["S"] * len(grid.sizes), grid) if _most(layouts) == _axes(grid) else {}
        read = {_blocks(words, len(anatomy.network.values[value].shape)) for words in read}
    words = read.pop() if len(read) == 1 else None
    if words is None or not any(_is_called(c, words) for c in layouts):
        return {}
    return _words(words, grid)


def _resting(value: str, anatomy: Anatomy, grid: Grid) -> list[Layout]:
    """Return every layout in which a parameter may rest."""
    v, types = anatomy.network.values[value], dict[Any, None]()
    for op in anatomy.network.ops:
        for k in [k for k, name in enumerate(op.operands) if name == value]:
            types.update(dict.fromkeys(c.operands[k] for c in _choices(op, anatomy)))
    alone = [t for t in types if str(t) == "I"]
    per_axis = [list(types) if size > 1 else alone for size in grid.sizes]
    return [
        c
        for c in itertools.product(*per_axis)
        if is_owned(c) and can_rest(c) and is_valid(v.shape, c, grid)
    ]


def _most(layouts: Iterable[Layout]) -> int:
    return max(sum(isinstance(t, Shard) for t in c) for c in layouts)


def _axes(grid: Grid) -> int:
    return sum(size > 1 for size in grid.sizes)


def _read(
    op: Op, position: int, chosen: Mapping[int, AxisChoice | None], grid: Grid
) -> tuple[str, ...]:
    """Return, per axis, the type in which an op reads a parameter: `S(d)`, or I where whole."""
    choices = [chosen.get(a) for a in range(len(grid.sizes))]
    types = [c.operands[position] if c else None for c in choices]
    return tuple(f"S({t.dim})" if isinstance(t, Shard) else "I" for t in types)


def _blocks(words: tuple[str, ...], dims: int) -> tuple[str, ...]:
    """Shard what is whole on the first axis along the dim that no axis shards."""
    left = [f"S({d})" for d in range(dims) if f"S({d})" not in words]
    return (left[-1], *words[1:]) if words[0] == "I" and left and dims > 1 else words


def _is_called(layout: Layout, words: Sequence[str]) -> bool:
    names = [f"S({t.dim})" if isinstance(t, Shard) else str(t) for t in layout]
    return names == list(words)


def _words(words: Sequence[str], grid: Grid) -> dict[str, str]:
    return {
        name: word
        for name, size, word in zip(grid.names, grid.sizes, words, strict=True)
        if size > 1
    }


def fold(pins: Mapping[str, Mapping[str, str]], unpinned: Sequence[str]) -> Pins:
    """Write equal pins of repeated layers as one pattern, where it matches nothing else."""
    groups: dict[str, list[str]] = {}
    for name in pins:
        parts = ["*" if part.isdigit() else part for part in name.split(".")]
        groups.setdefault(".".join(parts), []).append(name)
    every = dict.fromkeys([*pins, *unpinned])
    out: dict[str, Mapping[str, str]] = {}
    for pattern, names in groups.items():
        same = all(pins[n] == pins[names[0]] for n in names)
        if len(names) > 1 and same and [n for n in every if matches(pattern, n)] == names:
            out[pattern] = pins[names[0]]
        else:
            out.update({n: pins[n] for n in names})
    return out
