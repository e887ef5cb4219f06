"""Rules of reductions: a summed factor leaves a partial, an averaged one a scaled partial."""

from __future__ import annotations

import torch

from autotp.passes.rules.table import Call, letters, rule

aten = torch.ops.aten


def reduced(call: Call) -> str:
    """Leave out the reduced dims, or keep them as dims of one element."""
    return _reduce(call, "{}")


def gathered(call: Call) -> str:
    """The reduced dims are whole."""
    return _reduce(call, "[{}]")


def _reduce(call: Call, form: str) -> str:
    assert call.operands[0] is not None
    names = list(letters(len(call.operands[0].shape)))
    arguments = [argument.name for argument in call.op._schema.arguments]
    listed = call.arg(arguments.index("dim")) if "dim" in arguments else None
    listed = [listed] if isinstance(listed, int) else listed
    gone = {d % len(names) for d in listed} if isinstance(listed, list | tuple) and listed else None
    gone = set(range(len(names))) if gone is None else gone
    left = [form.format(n) if d in gone else n for d, n in enumerate(names)]
    keep = len(call.results[0].shape) == len(names)
    right = ["1" if d in gone else n for d, n in enumerate(names) if keep or d not in gone]
    out = " ".join(right)
    return f"{' '.join(left)} -> {', '.join(out for _ in call.results)}"


def scan(call: Call) -> str:
    """The scanned dim is whole."""
    assert call.operands[0] is not None
    names = list(letters(len(call.operands[0].shape)))
    names[call.arg(1)] = "[k]"
    return f"{' '.join(names)} -> {', '.join(' '.join(names) for _ in call.results)}"


def always(_call: Call) -> bool:
    """A mean is a mean."""
    return True


rule(aten.all.default, gathered)
rule(aten.all.dim, gathered)
rule(aten.amax.default, gathered)
rule(aten.amin.default, gathered)
rule(aten.any.default, gathered)
rule(aten.any.dim, gathered)
rule(aten.argmax.default, gathered)
rule(aten.argmin.default, gathered)
rule(aten.cumprod.default, scan)
rule(aten.cumsum.default, scan, linear="all", saves=())
rule(aten.linalg_vector_norm.default, gathered)
rule(aten.logsumexp.default, gathered)
rule(aten.max.default, gathered)
rule(aten.max.dim, gathered, saves=(-1,))
rule(aten.mean.default, reduced, linear="all", saves=(), average=always)
rule(aten.mean.dim, reduced, linear="all", saves=(), average=always)
rule(aten.min.default, gathered)
rule(aten.min.dim, gathered, saves=(-1,))
rule(aten.norm.ScalarOpt_dim, gathered)
rule(aten.prod.default, gathered)
rule(aten.prod.dim_int, gathered)
rule(aten.std.correction, gathered)
rule(aten.std.default, gathered)
rule(aten.std.dim, gathered)
rule(aten.sum.default, reduced, linear="all", saves=())
rule(aten.sum.dim_IntList, reduced, linear="all", saves=())
rule(aten.var.correction, gathered)
rule(aten.var.default, gathered)
rule(aten.var.dim, gathered)
rule(aten.var_mean.correction, gathered)
