"""Rules of matrix products: multilinear, a contracted factor leaves a partial."""

from __future__ import annotations

import torch

from autotp.passes.rules.table import Call, rule

aten = torch.ops.aten


def addmm(call: Call) -> str:
    """The first operand is added once and broadcasts."""
    return f"+{added(call, 't o')}, t i, i o -> t o"


def addbmm(call: Call) -> str:
    """The first operand is added once and broadcasts; the batch is summed."""
    return f"+{added(call, 's t')}, z s i, z i t -> s t"


def addmv(call: Call) -> str:
    """The first operand is added once and broadcasts."""
    return f"+{added(call, 't')}, t i, i -> t"


def addr(call: Call) -> str:
    """The first operand is added once and broadcasts."""
    return f"+{added(call, 's t')}, s, t -> s t"


def baddbmm(call: Call) -> str:
    """The first operand is added once and broadcasts."""
    return f"+{added(call, 'z s t')}, z s i, z i t -> z s t"


def added(call: Call, result: str) -> str:
    """Return those of the result's dims that the first operand has, aligned at the right."""
    bias = call.operands[0]
    assert bias is not None
    names = result.split()
    return " ".join(names[len(names) - len(bias.shape) :])


def matmul(call: Call) -> str:
    """A vector on either side loses its dim."""
    left, right = (len(t.shape) for t in call.operands if t)
    row, column = ("" if left == 1 else "s"), ("" if right == 1 else "t")
    many = "..." if max(left, right) > 2 else ""
    first, second = many if left > 2 else "", many if right > 2 else ""
    return f"{first} {row} i, {second} i {column} -> {many} {row} {column}"


def einsum(call: Call) -> str:
    """The equation is a sentence already; an implicit result has what stands once, in order."""
    text = str(call.args[0]).replace(" ", "").replace("...", ".")
    once = "".join(c for c in sorted(set(text) - {",", "."}) if text.count(c) == 1)
    spaced = " ".join(text if "->" in text else f"{text}->{'.' * ('.' in text)}{once}")
    return spaced.replace(".", "...").replace("- >", "->").replace(" ,", ",")


rule(aten.addbmm.default, addbmm, linear="each")
rule(aten.addmm.default, addmm, linear="each")
rule(aten.addmv.default, addmv, linear="each")
rule(aten.addr.default, addr, linear="each")
rule(aten.baddbmm.default, baddbmm, linear="each")
rule(aten.bilinear.default, "... i, ... j, o i j, +o -> ... o", linear="each")
rule(aten.bmm.default, "z s i, z i t -> z s t", linear="each")
rule(aten.dot.default, "i, i -> ", linear="each")
rule(aten.einsum.default, einsum, linear="each")
rule(aten.linear.default, "... i, o i, +o -> ... o", linear="each")
rule(aten.matmul.default, matmul, linear="each")
rule(aten.mm.default, "t i, i o -> t o", linear="each")
rule(aten.mv.default, "t i, i -> t", linear="each")
rule(aten.outer.default, "s, t -> s t", linear="each")
