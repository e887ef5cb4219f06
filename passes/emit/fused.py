"""Products in an emitted program that gather an operand or scatter their result on the way.

gather_matmul(x, weight, col, dim=0, by="ring")      in place of all_gather and the product
matmul_scatter(x, weight, col, dim=0, by="panels")   in place of the product and reduce_scatter
"""

from __future__ import annotations

from typing import Any

from torch import fx

from autotp.grid import Grid
from autotp.layouts import Layout, P, R, Shard, is_even, layout_text, may_change
from autotp.passes.emit.emitter import Emitter, attribute, node_name, note
from autotp.passes.emit.moving import fetch
from autotp.passes.network import Network, Op
from autotp.passes.pricing import RESULT
from autotp.passes.products import Within, moves_within, roles
from autotp.plan import Decision
from autotp.products import SCHEDULES, gather_matmul, matmul_scatter

FUSED = (gather_matmul, matmul_scatter)


def move_within(e: Emitter, op: Op, decision: Decision) -> Within | None:
    """Return the move that a product makes itself, and of which of its operands or its result."""
    values = (*op.operands, op.results[0])
    return moves_within(op, decision, (m for v in values for m in e.moves.get(v, ())))


def emit_product(e: Emitter, node: fx.Node, op: Op, decision: Decision, within: Within) -> None:
    """Emit a product together with one of its moves."""
    move, slot = within
    layouts = [move.before if k == slot else c for k, c in enumerate(decision.operands)]
    operands = [fetch(e, v, c) for v, c in zip(op.operands, layouts, strict=True)]
    found, axis = roles(op), e.grid.axis(move.axis)
    assert found is not None
    shard = (move.after if slot == RESULT else move.before)[axis]
    assert isinstance(shard, Shard)
    kwargs: dict[str, Any] = {"dim": shard.dim, "by": move.schedule}
    if found.bias is not None:
        kwargs["bias"] = operands[found.bias]
    if slot == found.weight:
        kwargs["moved"] = "weight"
    if found.transposed:
        kwargs["transposed"] = True
    args = (operands[found.x], operands[found.weight], attribute(e, move.axis))
    target = matmul_scatter if slot == RESULT else gather_matmul
    made = e.graph.create_node("call_function", target, args, kwargs, name=node_name(decision.name))
    made.meta.update(op=op, decision=decision, operands=tuple(operands))
    note(e, op.name, move.after if slot == RESULT else decision.results[0], made, node)


# Verification ------------------------------------------------------------------------------------


def as_multiplied(
    node: fx.Node, operands: tuple[Layout, ...], results: tuple[Layout, ...], grid: Grid
) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
    """Return the layouts between the exchange and the product of a call that makes both."""
    op: Op = node.meta["op"]
    found = roles(op)
    assert found is not None
    axis = _axis(node, grid)
    if node.target is matmul_scatter:
        return operands, (_changed(results[0], axis, P),)
    slot = found.weight if node.kwargs.get("moved") == "weight" else found.x
    changed = [_changed(c, axis, R) if k == slot else c for k, c in enumerate(operands)]
    return tuple(changed), results


def _axis(node: fx.Node, grid: Grid) -> int:
    attribute: Any = node.args[2]
    return grid.axis(attribute.name)


def _changed(layout: Layout, axis: int, t: Any) -> Layout:
    return (*layout[:axis], t, *layout[axis + 1 :])


def product_problems(node: fx.Node, network: Network, grid: Grid) -> list[tuple[str, str]]:
    """Hold that what a product moves is in even plain chunks of the dim that it names."""
    op: Op = node.meta["op"]
    found = roles(op)
    if found is None:
        return [(node.name, f"{op.call.op} is no product that moves what it reads")]
    axis = _axis(node, grid)
    weight = node.kwargs.get("moved") == "weight"
    value, layout = op.results[0], node.meta["layout"]
    if node.target is gather_matmul:
        slot = found.weight if weight else found.x
        value, layout = op.operands[slot], node.meta["operands"][slot].meta["layout"]
    t, shape = layout[axis], network.values[value].shape
    text = f"{list(shape)} as {layout_text(layout)}"
    if not isinstance(t, Shard) or t.parts or t.dim != node.kwargs["dim"]:
        return [(node.name, f"{text} is no shard of dim {node.kwargs['dim']}")]
    if not may_change(layout, axis, R) or not is_even(shape, layout, grid):
        return [(node.name, f"{text} is not in even chunks of the innermost axis")]
    if node.kwargs["by"] not in SCHEDULES:
        return [(node.name, f"no product is made by {node.kwargs['by']!r}")]
    return []
