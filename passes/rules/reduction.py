"""Rules of reductions: a summed factor leaves a partial, an averaged one a scaled partial."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotp.layouts import Shape
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
    at = arguments.index("dim") if "dim" in arguments else None
    listed = None if at is None else call.arg(at, call.op._schema.arguments[at].default_value)
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


def scaled(call: Call) -> str:
    """What stands at one index of a dim is scaled by its norm: the other dims are whole."""
    assert call.operands[0] is not None
    names = list(letters(len(call.operands[0].shape)))
    kept = call.arg(2) % len(names)
    text = " ".join(n if d == kept else f"[{n}]" for d, n in enumerate(names))
    return f"{text} -> {text}"


def compared(call: Call) -> str:
    """Two tensors meet along one whole dim, which the result lacks or keeps as one element."""
    width = max(len(t.shape) for t in call.operands if t)
    names = list(letters(width))
    arguments = [argument.name for argument in call.op._schema.arguments]
    dim = call.arg(arguments.index("dim"), 1) if "dim" in arguments else -1
    left = [f"[{n}]" if d == dim % width else n for d, n in enumerate(names)]
    keep = len(call.results[0].shape) == width
    right = ["1" if d == dim % width else n for d, n in enumerate(names)]
    right = [n for n in right if keep or n != "1"]
    operands = [" ".join(aligned(left, t.shape)) for t in call.operands if t]
    return f"{', '.join(operands)} -> {' '.join(aligned(right, call.results[0].shape))}"


def aligned(names: Sequence[str], shape: Shape) -> list[str]:
    """Name the dims of a tensor that broadcasts: those at the right, 1 where it has one element."""
    kept = names[len(names) - len(shape) :]
    return ["1" if n == 1 else name for name, n in zip(kept, shape, strict=True)]


def always(_call: Call) -> bool:
    """A mean is a mean."""
    return True


rule(aten.all.default, gathered)
rule(aten.all.dim, gathered)
rule(aten.amax.default, gathered)
rule(aten.amin.default, gathered)
rule(aten.aminmax.default, gathered)
rule(aten.any.default, gathered)
rule(aten.any.dim, gathered)
rule(aten.argmax.default, gathered)
rule(aten.argmin.default, gathered)
rule(aten._cdist_forward.default, "... s [d], ... t [d] -> ... s t")
rule(aten._pdist_forward.default, "[n] [d] -> [m]")
rule(aten.cosine_similarity.default, compared)
rule(aten.count_nonzero.default, reduced)
rule(aten.count_nonzero.dim_IntList, reduced)
rule(aten.cummax.default, scan, saves=(-1,))
rule(aten.cummin.default, scan, saves=(-1,))
rule(aten.cumprod.default, scan)
rule(aten.cumsum.default, scan, linear="all", saves=())
rule(aten.kthvalue.default, gathered, saves=(-1,))
rule(aten.linalg_vector_norm.default, gathered)
rule(aten.logcumsumexp.default, scan)
rule(aten.logsumexp.default, gathered)
rule(aten.max.default, gathered)
rule(aten.max.dim, gathered, saves=(-1,))
rule(aten.mean.default, reduced, linear="all", saves=(), average=always)
rule(aten.mean.dim, reduced, linear="all", saves=(), average=always)
rule(aten.median.default, gathered)
rule(aten.median.dim, gathered, saves=(-1,))
rule(aten.min.default, gathered)
rule(aten.min.dim, gathered, saves=(-1,))
rule(aten.mode.default, gathered, saves=(-1,))
rule(aten.nanmedian.default, gathered)
rule(aten.nanmedian.dim, gathered, saves=(-1,))
rule(aten.nansum.default, reduced)
rule(aten.norm.Scalar, gathered)
rule(aten.norm.ScalarOpt_dim, gathered)
rule(aten.prod.default, gathered)
rule(aten.prod.dim_int, gathered)
rule(aten.pairwise_distance.default, compared)
rule(aten.renorm.default, scaled)
rule(aten.std.correction, gathered)
rule(aten.std.default, gathered)
rule(aten.std.dim, gathered)
rule(aten.std_mean.correction, gathered)
rule(aten.sum.default, reduced, linear="all", saves=())
rule(aten.sum.dim_IntList, reduced, linear="all", saves=())
rule(aten.var.correction, gathered)
rule(aten.var.default, gathered)
rule(aten.var.dim, gathered)
rule(aten.var_mean.correction, gathered)
