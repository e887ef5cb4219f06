"""What a plan belongs to: inputs, parameters and ops; others are refused by their differences."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

from autotp.errors import PlanError
from autotp.passes.network import Network, Op
from autotp.passes.program import Program
from autotp.plan import Plan
from autotp.sizes import shape_of


def fingerprint(program: Program) -> dict[str, str]:
    """Describe what a plan belongs to: inputs and parameters, with shapes, dtypes and freezing."""
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    named = {**{n: f"input {n}" for n in program.inputs}, **program.params}
    frozen = {name for name in program.params if name not in program.requires_grad}
    return {
        name: f"{str(values[node].dtype).removeprefix('torch.')}"
        f"[{', '.join(map(program.spell, shape_of(values[node])))}]" + " frozen" * (node in frozen)
        for node, name in named.items()
    }


LISTED_OPS = 6
"""Ops that an error about another model lists."""


def refuse_other_ops(plan: Plan, program: Program, network: Network) -> None:
    """Raise PlanError if a plan decides other ops than those of a program."""
    mine = {program.names[op.name]: (op_text(op), op.results) for op in network.ops}
    planned = {d.name: (d.op, d.makes) for d in plan.decisions}
    if list(mine.items()) == list(planned.items()):
        return
    differing = [n for n in {**planned, **mine} if mine.get(n) != planned.get(n)]
    at = [
        (name, f"{_op_fact(mine.get(name))}, planned {_op_fact(planned.get(name))}")
        for name in differing[:LISTED_OPS]
    ]
    more = len(differing) - LISTED_OPS
    raise PlanError(
        "the plan decides the ops of another model",
        at=at + [("and more", f"{more} others")] * (more > 0) or [("ops", "in another order")],
        remedy="plan this model on this grid",
    )


def _op_fact(found: tuple[str, tuple[str, ...]] | None) -> str:
    return f"{found[0]} -> {', '.join(found[1])}" if found else "absent"


def op_text(op: Op) -> str:
    """Write the op of a call as plans do."""
    return str(op.call.op).removeprefix("aten.").removesuffix(".default")


def graph_digest(program: Program) -> str:
    """Return a digest of the ops of a program and of their plain arguments, devices left out."""
    text = [
        (str(n.target), [a for a in fx_leaves(n) if isinstance(a, bool | int | float | str)])
        for n in program.graph.nodes
        if n.op == "call_function"
    ]
    return hashlib.sha256(repr(text).encode()).hexdigest()[:16]


def fx_leaves(node: fx.Node) -> list[Any]:
    """Return the arguments of a node without their structure."""
    return tree_leaves((list(node.args), dict(node.kwargs)))
