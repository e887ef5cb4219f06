"""What a model's graph says about its dims: which are the hidden dim, the batch, or inside a block.

In: a Network and its Factors. Out: an Anatomy, from which the schemes know what to split. Nothing
here knows a model's name: a linear that reads the hidden states makes an inner dim (heads,
the width of an MLP), one that contracts an inner dim leads back to the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autotp.passes.factors import Factors
from autotp.passes.network import Network, Op
from autotp.passes.program import Program


@dataclass(frozen=True, slots=True)
class Product:
    """A linear or a lookup: the operand that is its weight, what it contracts and what it makes."""

    weight: int
    contracted: str
    made: str
    is_lookup: bool


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The dims of a model by what they are for, and its products with weights by op."""

    network: Network
    factors: Factors
    products: Mapping[str, Product]
    dims: Mapping[str, frozenset[int]]


def read_anatomy(program: Program, network: Network, factors: Factors) -> Anatomy:
    """Find the stream, the dims inside the blocks, and the dims of batch and sequence.

    A linear that reads the stream makes an inner dim (column), one that contracts an inner dim goes
    back to the stream (row). Without residual sums, columns and rows alternate.
    """
    products = find_products(program, network)
    stream, inner = _residual_dims(network, factors, products), set[int]()
    residual = bool(stream)
    for op in network.ops:
        product = products.get(op.name)
        if product is None or product.is_lookup:
            continue
        root = root_of(op, product.contracted, factors)
        if inner.intersection(_atoms(op, product.contracted, factors)):
            stream |= set() if residual else {root_of(op, product.made, factors)}
        elif root in stream or not residual:
            stream.add(root)
            inner.update(_atoms(op, product.made, factors)[:1])
    inner.update(_vocabulary(program, network, factors, products))
    tokens = _token_dims(network, factors, products, stream)
    splittable = [t for t in tokens if t not in factors.atoms.whole] or tokens
    batch = splittable[:1]
    return Anatomy(
        network,
        factors,
        products,
        {
            "inner": frozenset(inner - stream),
            "stream": frozenset(stream),
            "batch": frozenset(batch),
            "sequence": frozenset([t for t in tokens if t not in batch][-1:] or batch),
        },
    )


def find_products(program: Program, network: Network) -> dict[str, Product]:
    """Return the ops that multiply activations by a weight, and those that look rows up in one."""
    weights = set(program.params)
    out = {}
    for op in network.ops:
        if weights.issuperset(op.operands):
            weights.update(op.results)
        found = list(_products(op, weights))
        if found:
            out[op.name] = found[0]
    return out


def _products(op: Op, weights: set[str]) -> Iterator[Product]:
    sig = op.signature
    names = [[f for dim in dims for p in dim for f in p] for dims in sig.operands]
    for k, value in enumerate(op.operands):
        rest = {f for j, row in enumerate(names) if j != k and j not in sig.added for f in row}
        summed = [f for f in names[k] if sig.summed(f) and f not in sig.whole]
        made = [f for f in names[k] if not sig.summed(f) and f not in rest]
        if value in weights and summed and made:
            shared = [f for f in summed if f in rest]
            if shared or op.rule.split.get(summed[0]) == "P":
                yield Product(k, (shared or summed)[0], made[0], not shared)


def root_of(op: Op, factor: str, factors: Factors) -> int:
    """Return the dim that a factor of an op is."""
    return factors.atoms.find(factors.of_op[op.name, factor])


def _atoms(op: Op, factor: str, factors: Factors) -> list[int]:
    return [way.atom for way in factors.ways(op.name, factor)]


def _value_dims(network: Network, factors: Factors, value: str) -> list[int]:
    count = len(network.values[value].shape)
    return [factors.atoms.find(factors.of_value[value, d]) for d in range(count)]


def _residual_sums(network: Network, products: Mapping[str, Product]) -> Iterator[Op]:
    """Yield the sums of a value and of what further products made of it: depths differ."""
    depth: dict[str, int] = {}
    for op in network.ops:
        depths = [depth.get(v, 0) for v in op.operands]
        depth.update(dict.fromkeys(op.results, max(depths, default=0) + (op.name in products)))
        shapes = {network.values[v].shape for v in op.operands}
        is_sum = op.rule.linear_in(op.call) == "all" and len(op.operands) == 2
        if is_sum and len(shapes) == 1 and len(set(depths)) == 2:
            yield op


def _residual_dims(network: Network, factors: Factors, products: Mapping[str, Product]) -> set[int]:
    """Return the dims that products both make and contract, and that are summed between them."""
    ops = [op for op in network.ops if op.name in products]
    made = {root_of(op, products[op.name].made, factors) for op in ops}
    contracted = {root_of(op, products[op.name].contracted, factors) for op in ops}
    summed = {
        dim
        for op in _residual_sums(network, products)
        for dim in _value_dims(network, factors, op.results[0])
    }
    return made & contracted & summed


def _vocabulary(
    program: Program, network: Network, factors: Factors, products: Mapping[str, Product]
) -> Iterator[int]:
    """Yield the looked-up dims of tables whose indices the user gives: not those of positions."""
    for op in network.ops:
        product = products.get(op.name)
        if product is None or not product.is_lookup:
            continue
        if any(_given(program, v) for k, v in enumerate(op.operands) if k != product.weight):
            yield root_of(op, product.contracted, factors)


def _given(program: Program, value: str) -> bool:
    """Say whether a value is an input, or a view or copy of one."""
    nodes = {n.name: n for n in program.graph_module.graph.nodes}
    node = nodes.get(value)
    while node is not None and node.name not in program.inputs:
        before = node.all_input_nodes
        same = len(before) == 1 and before[0].meta["val"].numel() == node.meta["val"].numel()
        node = before[0] if same else None
    return node is not None


def _token_dims(
    network: Network, factors: Factors, products: Mapping[str, Product], stream: set[int]
) -> list[int]:
    """Return the dims of the stream that count tokens, in order."""
    sums = [op.results[0] for op in _residual_sums(network, products)]
    read = [op.operands[0] for op in network.ops if op.name in products]
    for value in (*sums, *read):
        dims = _value_dims(network, factors, value)
        if stream.intersection(dims) and len(dims) > 1:
            return [d for d in dims if d not in stream]
    return []
