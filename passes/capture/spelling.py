"""One spelling per meaning: views are reshapes, conversions `to`, what computes nothing is dropped.

The table at the end says how each op is rewritten. No value or gradient changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from autotp.passes.capture.composites import open_composites
from autotp.passes.capture.draws import dense_strides, draws, free_draws
from autotp.passes.capture.normalise import STRIDE_READERS, carriers, like, source, value_of
from autotp.sizes import shape_of

aten = torch.ops.aten

Rewrite = Callable[[fx.Node], fx.Node | None]
"""From a node to the node that stands for it: a new one, an old one, or none: it is dropped."""


def spell(graph: fx.Graph, seeds: Collection[str]) -> None:
    """Rewrite `graph` in place by the table; `seeds` are the placeholders with gradient."""
    open_composites(graph)
    found = carriers(graph, seeds)
    keep_copies = any(node.target in STRIDE_READERS for node in graph.nodes)
    known = [n for n in graph.nodes if n.target in SPELLINGS]
    copies = [n for n in known if SPELLINGS[n.target] is copied]
    others = [n for n in known if SPELLINGS[n.target] is not copied]
    for node in others if keep_copies else [*others, *reversed(copies)]:
        rewrite = SPELLINGS[node.target]
        if node.target is aten.detach.default and node.args[0] in found:
            continue
        with graph.inserting_before(node):
            new = rewrite(node)
        if new is not None:
            node.replace_all_uses_with(new)
            found |= {new} if node in found else set()
        if new is not node:
            graph.erase_node(node)
    free_draws(graph)


def dropped(node: fx.Node) -> None:
    """Drop `node`, which computes nothing."""


def copied(node: fx.Node) -> fx.Node:
    """Drop a copy, unless it changes the format or parts an output from what the user owns.

    Where a draw reads it, a copy into another order in memory says which number falls where.
    """
    memory_format = node.kwargs.get("memory_format")
    leaves = source(node).op == "placeholder" and any(u.op == "output" for u in node.users)
    plain = memory_format in (None, torch.contiguous_format, torch.preserve_format)
    placed = any(map(draws, node.users)) and reorders(node)
    return source(node) if plain and not leaves and not placed else node


def reorders(node: fx.Node) -> bool:
    """Say whether a copy lies in memory in another order than what it copies."""
    return dense_strides(value_of(node)) != dense_strides(value_of(source(node)))


def reshaped(node: fx.Node) -> fx.Node:
    """Write any view as a reshape with its sizes, since what it reads need not stay contiguous."""
    return resized(node, aten.reshape.default)


def expanded(node: fx.Node) -> fx.Node:
    """Write any expansion as expand with its sizes."""
    return resized(node, aten.expand.default)


def resized(node: fx.Node, op: OpOverload) -> fx.Node:
    """Write `node` as `op` with its sizes, or drop it where they are unchanged."""
    sizes = shape_of(value_of(node))
    if sizes == shape_of(value_of(source(node))):
        return source(node)
    return like(node.graph, op, (source(node), list(sizes)), node)


def same_if_whole(node: fx.Node) -> fx.Node:
    """Drop a slice that takes everything."""
    unchanged = shape_of(value_of(node)) == shape_of(value_of(source(node)))
    return source(node) if unchanged else node


def converted(node: fx.Node) -> fx.Node:
    """Write a change of dtype as `to.dtype`; a change of device stays as it is."""
    old, new = value_of(source(node)), value_of(node)
    if old.device != new.device:
        return node
    if old.dtype == new.dtype:
        return source(node)
    return like(node.graph, aten.to.dtype, (source(node), new.dtype), node)


def copied_from(node: fx.Node) -> fx.Node:
    """Write aten.copy, which has no derivative, as what it computes."""
    target, values = node.args[0], node.args[1]
    assert isinstance(target, fx.Node) and isinstance(values, fx.Node)
    new, old = value_of(node), value_of(values)
    if shape_of(new) != shape_of(old):
        values = like(node.graph, aten.expand.default, (values, list(shape_of(new))), node)
        values.meta["val"] = old.expand(new.shape)
    if new.dtype != old.dtype:
        values = like(node.graph, aten.to.dtype, (values, new.dtype), node)
    return values


def dropped_out(node: fx.Node) -> fx.Node:
    """Drop a dropout that drops nothing."""
    p, train = node.args[1], node.args[2]
    return node if p and train else source(node)


def native_dropped_out(node: fx.Node) -> fx.Node:
    """Write native_dropout whose mask nobody reads as dropout."""
    items = {user.args[1]: user for user in node.users}
    if set(items) - {0} and any(items[i].users for i in set(items) - {0}):
        return node
    args = (source(node), node.args[1], node.args[2] is not False)
    result = like(node.graph, aten.dropout.default, args, node)
    result.meta["val"] = value_of(node)[0]
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(dropped_out(result))
        node.graph.erase_node(user)
    return result


def written_as(op: OpOverload) -> Rewrite:
    """Return the rewrite to another op with the same arguments.

    What is made empty is filled, so that it is the same on all ranks; parts of a split may share
    memory, as nothing writes in place; a lazy conjugate or negative is computed: memory is sent.
    """

    def rewrite(node: fx.Node) -> fx.Node:
        new = like(node.graph, op, node.args, node)
        new.kwargs = node.kwargs
        return new

    return rewrite


def paired(node: fx.Node) -> fx.Node:
    """Write view_as_complex, which asks for pairs side by side in memory, by its two parts."""
    x = source(node)
    parts = [like(node.graph, aten.select.int, (x, -1, k), x) for k in (0, 1)]
    for k, part in enumerate(parts):
        part.meta["val"] = value_of(x).select(-1, k)
    return like(node.graph, aten.complex.default, tuple(parts), node)


def joined(node: fx.Node) -> fx.Node:
    """Leave out of a cat what torch ignores there: empty vectors beside longer tensors."""
    parts: Any = node.args[0]
    kept = [p for p in parts if not is_empty_vector(value_of(p))]
    if len(kept) == len(parts) or any(value_of(p).dtype != value_of(node).dtype for p in kept):
        return node
    return like(node.graph, aten.cat.default, (kept, *node.args[1:]), node) if kept[1:] else kept[0]


def is_empty_vector(value: torch.Tensor) -> bool:
    """Say whether a value has one dim, known to be of no elements."""
    return len(value.shape) == 1 and isinstance(value.shape[0], int) and value.shape[0] == 0


SPELLINGS: dict[Any, Rewrite] = {
    aten._assert_scalar.default: dropped,
    aten._assert_tensor_metadata.default: dropped,
    aten._conj.default: written_as(aten.conj_physical.default),
    aten._neg_view.default: written_as(aten.neg.default),
    aten._to_copy.default: converted,
    aten._unsafe_view.default: reshaped,
    aten.alias.default: source,
    aten.alpha_dropout.default: dropped_out,
    aten.cat.default: joined,
    aten.clone.default: copied,
    aten.contiguous.default: copied,
    aten.copy.default: copied_from,
    aten.detach.default: source,
    aten.dropout.default: dropped_out,
    aten.empty_like.default: written_as(aten.zeros_like.default),
    aten.expand.default: expanded,
    aten.expand_as.default: expanded,
    aten.feature_dropout.default: dropped_out,
    aten.flatten.using_ints: reshaped,
    aten.lift_fresh_copy.default: source,
    aten.native_dropout.default: native_dropped_out,
    aten.new_empty.default: written_as(aten.new_zeros.default),
    aten.reshape.default: reshaped,
    aten.reshape_as.default: reshaped,
    aten.slice.Tensor: same_if_whole,
    aten.squeeze.default: reshaped,
    aten.to.device: converted,
    aten.to.dtype: converted,
    aten.to.dtype_layout: converted,
    aten.to.other: converted,
    aten.type_as.default: converted,
    aten.unflatten.int: reshaped,
    aten.unsafe_chunk.default: written_as(aten.chunk.default),
    aten.unsafe_split.Tensor: written_as(aten.split.Tensor),
    aten.unsafe_split_with_sizes.default: written_as(aten.split_with_sizes.default),
    aten.view.default: reshaped,
    aten.view_as.default: reshaped,
    aten.view_as_complex.default: paired,
}
