"""Make an exported graph functional and spell each thing in one way; no value or gradient changes.

    open_regions   no_grad regions become plain nodes behind `detach`; `detach_` becomes `detach`
    functionalise  in-place ops, buffer write-backs and autocast regions become plain ops, by torch
    carriers       the nodes whose value carries gradient

torch's functionalisation drops no_grad regions and `detach_`: wrong gradients, no error. So both
are rewritten before it runs, and it runs only where something is left for it to do.
"""

from __future__ import annotations

import operator
import os
import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

from autotp.errors import CaptureError

aten = torch.ops.aten

NO_GRADIENT = {
    aten.bernoulli.default, aten.bernoulli.p, aten.detach.default, aten.empty_like.default,
    aten.full_like.default, aten.new_empty.default, aten.new_full.default, aten.new_ones.default,
    aten.new_zeros.default, aten.ones_like.default, aten.rand_like.default,
    aten.randn_like.default, aten.zeros_like.default,
}  # fmt: skip
"""Ops whose float result has no gradient whatever they read."""
BATCH_NORM = aten._native_batch_norm_legit_functional.default
HIDDEN_WRITES: dict[Any, int] = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}
"""Ops that write running statistics unseen by their schema -> the argument that makes them."""
STRIDE_READERS = {aten.as_strided.default, aten.as_strided_scatter.default, aten.view.dtype}
"""Ops that see strides: beside them a copy is not a no-op."""

Nodes = set[fx.Node]


def value_of(node: fx.Node) -> Any:
    """Return the fake tensor, or tensors, that `node` computes."""
    return node.meta.get("val")


def source(node: fx.Node) -> fx.Node:
    """Return the first operand of `node`."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def user_line(node: fx.Node) -> str:
    """Return "file.py:line" of the user's code that made `node`, or "" where none is known."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return pick_line([(path, int(line)) for path, line in frames])


def pick_line(frames: Collection[tuple[str, int]]) -> str:
    """Return the last frame outside libraries, else the last one outside torch."""
    here = os.path.dirname(__file__)
    outside = [
        (path, line)
        for path, line in frames
        if f"{os.sep}torch{os.sep}" not in path and path[0] != "<" and os.path.dirname(path) != here
    ]
    own = [f for f in outside if "site-packages" not in f[0]]
    chosen = (own or outside or [("", 0)])[-1]
    return f"{os.path.basename(chosen[0])}:{chosen[1]}" if chosen[0] else ""


# ---- what carries gradient


def carriers(graph: fx.Graph, seeds: Collection[str]) -> Nodes:
    """Return the nodes whose value carries gradient, given the placeholders that do."""
    found: Nodes = set()
    for node in graph.nodes:
        if node.name in seeds if node.op == "placeholder" else carries(node, found):
            found.add(node)
    return found


def carries(node: fx.Node, found: Nodes) -> bool:
    """Say whether `node` hands on the gradient of an operand in `found`."""
    if node.op != "call_function" or node.target in NO_GRADIENT:
        return False
    if node.target is operator.getitem and node.args[1] != 0 and source(node).target is BATCH_NORM:
        return False
    return any_float(value_of(node)) and not found.isdisjoint(node.all_input_nodes)


def any_float(value: Any) -> bool:
    """Say whether a value, or one of several, can carry gradient; an unknown one can."""
    if isinstance(value, list | tuple):
        return any(map(any_float, value))
    is_tensor = isinstance(value, Tensor)
    return value is None or (is_tensor and (value.is_floating_point() or value.is_complex()))


# ---- before torch's functionalisation


def open_regions(gm: fx.GraphModule, seeds: Collection[str], in_autocast: bool = False) -> None:
    """Rewrite no_grad regions and `detach_` of `gm` in place, also within autocast regions.

    Raises: CaptureError where an in-place write would bypass autograd.
    """
    found: Nodes = set()
    node = next(iter(gm.graph.nodes))
    while node.op != "output":
        if is_region(node, "wrap_with_set_grad_enabled"):
            node = inline(gm, node, 1, found if not node.args[0] else set())
            continue
        if is_region(node, "wrap_with_autocast") and not node.args[2] and not in_autocast:
            node = inline(gm, node, 4, set())
            continue
        if is_region(node, "wrap_with_autocast"):
            open_body(gm, node, found)
        elif node.target is aten.detach_.default:
            detach_from_here(node)
        refuse_hidden_write(node, found)
        if node.name in seeds if node.op == "placeholder" else carries(node, found):
            found.add(node)
        node = node.next
    gm.graph.eliminate_dead_code()
    gm.recompile()


def is_region(node: fx.Node, name: str) -> bool:
    """Say whether `node` calls the region of that name."""
    return isinstance(node.target, HigherOrderOperator) and str(node.target) == name


def body_of(gm: fx.GraphModule, attr: Any) -> fx.GraphModule:
    """Return the body of a region."""
    body = getattr(gm, attr.target)
    assert isinstance(body, fx.GraphModule)
    return body


def open_body(gm: fx.GraphModule, region: fx.Node, found: Nodes) -> None:
    """Open what lies within an autocast region, which itself is left to torch."""
    body = body_of(gm, region.args[4])
    inner = body.graph.find_nodes(op="placeholder")
    pairs = zip(inner, region.args[5:], strict=True)
    open_regions(body, {node.name for node, arg in pairs if arg in found}, in_autocast=True)


def inline(gm: fx.GraphModule, region: fx.Node, at: int, cut: Nodes) -> fx.Node:
    """Replace `region` by the nodes of its body, operands in `cut` detached; return the first."""
    body = body_of(gm, region.args[at])
    operands = iter(region.args[at + 1 :])
    before = region.prev
    made: dict[fx.Node, Any] = {}
    with gm.graph.inserting_before(region):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                operand = made[node] = next(operands)
                if isinstance(operand, fx.Node) and operand in cut:
                    place = next(n for n in body.graph.nodes if n.op == "call_function")
                    made[node] = like(gm.graph, aten.detach.default, (operand,), place)
                    made[node].meta["val"] = value_of(operand)
            elif node.op == "get_attr":
                made[node] = gm.graph.get_attr(adopt(gm, getattr(body, node.target)))
            elif node.op != "output":
                made[node] = gm.graph.node_copy(node, lambda n: made[n])
            else:
                results = fx.map_arg(node.args[0], lambda n: made[n])
    for item in list(region.users):
        item.replace_all_uses_with(results[item.args[1]])
        gm.graph.erase_node(item)
    gm.graph.erase_node(region)
    return before.next


def adopt(gm: fx.GraphModule, module: torch.nn.Module) -> str:
    """Add `module` to `gm` under a free name and return the name."""
    name = next(n for i in range(len(gm._modules) + 1) if not hasattr(gm, n := f"region_{i}"))
    gm.add_submodule(name, module)
    return name


def like(graph: fx.Graph, op: OpOverload, args: tuple[Any, ...], node: fx.Node) -> fx.Node:
    """Insert `op(*args)`, whose value, line and module are those of `node`."""
    new = graph.call_function(op, args)
    new.meta = dict(node.meta)
    return new


def detach_from_here(node: fx.Node) -> None:
    """Make `x.detach_()` the value of x for everything after it."""
    source = node.all_input_nodes[0]
    node.target = aten.detach.default
    source.replace_all_uses_with(node, delete_user_cb=lambda user: user > node)


def is_mutable(node: fx.Node) -> bool:
    """Say whether `node` writes in place."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def refuse_hidden_write(node: fx.Node, found: Nodes) -> None:
    """Refuse an in-place write, past autograd, to a value that carries gradient."""
    if not is_mutable(node):
        return
    alias: Any = node.args[0]
    while isinstance(alias, fx.Node) and is_alias(alias):
        if alias.target is aten.detach.default and alias.args[0] in found:
            raise CaptureError(
                "an in-place write past autograd changes a differentiable value",
                at=[(user_line(node) or node.name, str(node.target))],
                remedy="write out of place: y = torch.where(...), y = x * mask, ...",
            )
        alias = alias.args[0]


def is_alias(node: fx.Node) -> bool:
    """Say whether the result of `node` shares the memory of its first operand."""
    if not isinstance(node.target, OpOverload) or not node.args:
        return node.target is operator.getitem
    return any(r.alias_info is not None for r in node.target._schema.returns)


# ---- torch's functionalisation


DRAWS_IN_PLACE = {
    aten.alpha_dropout_.default: aten.alpha_dropout.default,
    aten.dropout_.default: aten.dropout.default,
    aten.feature_dropout_.default: aten.feature_dropout.default,
}
"""In-place ops that torch takes apart, after which they are known no more -> what they compute."""


def draw_out_of_place(graph: fx.Graph) -> None:
    """Let a dropout in place make a new tensor, where nothing later reads the old one's memory."""
    for node in list(graph.nodes):
        if node.target in DRAWS_IN_PLACE and is_last_reader(node):
            node.target = DRAWS_IN_PLACE[node.target]
            for user in [u for u in source(node).users if u > node]:
                user.replace_input_with(source(node), node)


def is_last_reader(node: fx.Node) -> bool:
    """Say whether the memory that `node` writes is read later by its operand's name only."""
    base = source(node)
    while base.op == "call_function" and is_alias(base):
        base = source(base)
    family = {base}
    for other in graph_after(base):
        if is_alias(other) and other is not node and not family.isdisjoint(other.all_input_nodes):
            family.add(other)
    readers = (user for member in family - {source(node)} for user in member.users)
    return base.op == "call_function" and not any(user > node for user in readers)


def graph_after(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the calls that follow a node."""
    return (n for n in node.graph.nodes if n > node and n.op == "call_function")


def functionalise(exported: ExportedProgram) -> ExportedProgram:
    """Return `exported` without in-place ops and regions; itself where it has none."""
    draw_out_of_place(exported.graph)
    if not any(map(needs_functionalising, exported.graph.nodes)):
        return exported
    lines = {
        node.name: node.meta
        for module in exported.graph_module.modules()
        if isinstance(module, fx.GraphModule) and module is not exported.graph_module
        for node in module.graph.nodes
        if isinstance(node.target, OpOverload)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
        try:
            plain: ExportedProgram = exported.run_decompositions({})
        except Exception as error:
            raise not_functional(error) from error
    for node in plain.graph.nodes:
        restore_place(node, lines)
    return plain


def not_functional(error: Exception) -> CaptureError:
    """Return what torch raised as it made a graph functional, with the user's line."""
    reason = next((s for s in str(error).splitlines() if s.strip()), type(error).__name__)
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    return CaptureError(
        f"torch cannot write this model without in-place ops: {reason.strip()}",
        at=[(pick_line([(path, int(n)) for path, n in frames]) or "the model", "where it stops")],
        remedy="write out of place there, or leave dims out of dynamic",
    )


def needs_functionalising(node: fx.Node) -> bool:
    """Say whether `node` is a region, or writes in place."""
    if isinstance(node.target, HigherOrderOperator):
        return True
    flag = HIDDEN_WRITES.get(node.target)
    return is_mutable(node) or (flag is not None and bool(node.args[flag]))


def restore_place(node: fx.Node, metas: dict[str, dict[str, Any]]) -> None:
    """Give a node that came out of a region the line and module of the node it was made from."""
    trace = node.meta.get("stack_trace") or ""
    made_from = re.search(r"<eval_with_key>.*\n\s*(\w+)(?:: [^=]+)? = .*\s*$", trace)
    if made_from and (meta := metas.get(made_from[1])):
        node.meta |= {k: meta[k] for k in ("stack_trace", "nn_module_stack") if k in meta}
