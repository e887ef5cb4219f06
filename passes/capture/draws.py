"""Random draws of a captured graph: which nodes draw, and that none of them is lost.

    draws          whether a node draws when it runs
    hold_draws     give every draw a reader, so that no pass drops one that nobody reads
    release_draws  take those readers away
    without_seeding    refuse a forward that sets the generator's state
    free_draws     let a draw whose numbers do not depend on what it reads read a blank of the shape

Each draw moves torch's default generator on: one that is lost would shift all that follow it. The
order in memory of what is read decides which number falls where: a blank has the original's.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from autotp.errors import CaptureError

aten = torch.ops.aten

SHAPE_READERS = {
    aten.bernoulli.p, aten.cauchy.default, aten.exponential.default, aten.geometric.default,
    aten.log_normal.default, aten.normal_functional.default, aten.rand_like.default,
    aten.randint_like.default, aten.randint_like.low_dtype, aten.randn_like.default,
    aten.random.default, aten.random.to, aten.uniform.default,
}  # fmt: skip
"""Draws that read of their operand its shape and its order in memory only."""

torch.library.define("autotp::hold", "(Tensor x) -> ()")
HOLD = torch.ops.autotp.hold.default
torch.fx.node.has_side_effect(HOLD)


@torch.library.impl("autotp::hold", "CompositeExplicitAutograd")
def _hold(x: Tensor) -> None:
    """Read `x` and do nothing."""


def draws(node: fx.Node) -> bool:
    """Say whether `node` draws random numbers when it runs: a dropout of nothing does not."""
    op = node.target
    if not isinstance(op, OpOverload) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    given: dict[str, Any] = {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(op._schema.arguments)
    }
    train = given.get("train", given.get("training", True))
    if train is False or given.get("dropout_p", 1.0) == 0:
        return False
    if "dropout" in given:  # between the layers of a recurrent network
        return bool(given["dropout"]) and given.get("num_layers", 2) > 1
    return not ("train" in given and given.get("p") == 0)


def is_needed(node: fx.Node) -> bool:
    """Say whether dead code elimination must leave `node` where it is."""
    return node.op in ("placeholder", "output") or draws(node)


SEEDING = (
    (torch, "manual_seed"), (torch, "seed"), (torch, "set_rng_state"),
    (torch.random, "fork_rng"), (torch.random, "manual_seed"), (torch.random, "set_rng_state"),
)  # fmt: skip
"""What moves torch's default generator and leaves no node in a graph."""


@contextmanager
def without_seeding(line: Callable[[], str]) -> Iterator[None]:
    """Refuse a forward that seeds torch's default generator; torch itself may.

    `line` says where the user's code is.
    """

    def refuse(name: str, seed: Callable[..., Any]) -> Callable[..., Any]:
        def refusing(*args: Any, **kwargs: Any) -> Any:
            if f"{os.sep}torch{os.sep}" in sys._getframe(1).f_code.co_filename:
                return seed(*args, **kwargs)
            raise CaptureError(
                "the forward sets the state of torch's random generator: it would be lost",
                at=[(line(), name)],
                remedy="seed before the model is called",
            )

        return refusing

    with ExitStack() as stack:
        for module, name in SEEDING:
            seed = getattr(module, name)
            stack.enter_context(mock.patch.object(module, name, refuse(name, seed)))
        yield


def hold_draws(root: fx.GraphModule) -> None:
    """Let every draw of a graph and of its regions be read."""
    for module in root.modules():
        if isinstance(module, fx.GraphModule):
            for node in [n for n in module.graph.nodes if draws(n)]:
                hold(module.graph, node)
            module.recompile()


def hold(graph: fx.Graph, node: fx.Node) -> None:
    """Let one draw be read."""
    value: Any = node.meta.get("val")
    with graph.inserting_after(node):
        if isinstance(value, list | tuple):
            node = graph.call_function(operator.getitem, (node, 0))
            node.meta["val"] = value[0]
    with graph.inserting_after(node):
        graph.call_function(HOLD, (node,)).meta["val"] = None


def release_draws(graph: fx.Graph) -> None:
    """Take away what `hold_draws` put in."""
    for node in list(graph.nodes):
        if node.target is HOLD:
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)


def free_draws(graph: fx.Graph) -> None:
    """Let draws that nobody reads, and those that read a shape only, read a blank."""
    graph.eliminate_dead_code(is_impure_node=is_needed)
    for node in list(graph.nodes):
        if draws(node) and (node.target in SHAPE_READERS or not node.users):
            for operand in dict.fromkeys(node.all_input_nodes):
                if is_static(operand):
                    with graph.inserting_before(node):
                        node.replace_input_with(operand, blank(graph, operand, node))
    graph.eliminate_dead_code(is_impure_node=is_needed)


def is_static(operand: fx.Node) -> bool:
    """Say whether an operand is a tensor of known sizes."""
    value = operand.meta.get("val")
    return isinstance(value, Tensor) and all(type(n) is int for n in value.shape)


def dense_strides(value: Tensor) -> tuple[int, ...]:
    """Return the strides of a new tensor like `value`."""
    bare = torch.empty_strided(value.shape, value.stride(), device="meta")
    return tuple(torch.empty_like(bare).stride())


def blank(graph: fx.Graph, like: fx.Node, reader: fx.Node) -> fx.Node:
    """Insert, where `reader` is, ones whose shape, type and order in memory are those of `like`."""
    value: Any = like.meta["val"]
    strides = dense_strides(value)
    with value.fake_mode:
        order = sorted(range(value.ndim), key=lambda d: (-strides[d], d))
        back = [order.index(d) for d in range(value.ndim)]
        ones = torch.ones([value.shape[d] for d in order], dtype=value.dtype, device=value.device)
        made = graph.call_function(
            aten.ones.default,
            (list(ones.shape),),
            {"dtype": value.dtype, "device": value.device},
        )
        made.meta = {**reader.meta, "val": ones}
        if back != sorted(back):
            made = graph.call_function(aten.permute.default, (made, back))
            made.meta = {**reader.meta, "val": ones.permute(back)}
    return made
