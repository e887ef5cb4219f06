"""Rules of losses: rows add up; a split vocabulary is summed inside a local program."""

from __future__ import annotations

import torch

from autotp import local_programs
from autotp.passes.rules.table import Call, Message, Ranks, rule, wide_bytes

aten = torch.ops.aten

NONE, MEAN = 0, 1


def cross_entropy(call: Call) -> str:
    """Rows t and classes v; of images and soft targets every dim is whole."""
    logits, target = call.operands[0], call.operands[1]
    assert logits is not None and target is not None
    if len(logits.shape) != 2 or len(target.shape) != 1:
        x, y = (
            " ".join(f"[{c}{k}]" for k in range(len(t.shape)))
            for c, t in (("x", logits), ("y", target))
        )
        out = " ".join(f"[z{k}]" for k in range(len(call.results[0].shape)))
        return f"{x}, {y}, [c] -> {out}"
    return "t v, t, v -> " + ("" if call.results[0].shape == () else "t")


def cross_entropy_traffic(call: Call, _ranks: Ranks) -> list[Message]:
    """Over v the rows' maxima, then all their sums at once; over t the divisor of a mean."""
    logits = call.operands[0]
    assert logits is not None
    weighted, smoothed = call.arg(2) is not None, call.arg(5, 0.0) != 0.0
    wide = wide_bytes(logits.dtype)
    rows = logits.shape[0] * wide
    sums = 2 + weighted + 2 * smoothed
    divisor = wide if weighted else torch.int64.itemsize
    mean = [Message("t", divisor)] if call.arg(3, MEAN) == MEAN else []
    return [Message("v", rows), Message("v", sums * rows), *mean]


def difference(call: Call) -> str:
    """A pointwise loss, summed unless its reduction is none; weights broadcast."""
    left = ", ".join("..." for _ in call.operands)
    return f"{left} -> {'...' if reduction(call) == NONE else ''}"


def averaged(call: Call) -> bool:
    """Say whether the reduction of a pointwise loss is the mean."""
    return reduction(call) == MEAN


def chosen(call: Call) -> str:
    """Rows add up; a mean divides by the weights of all rows, so they are whole."""
    scores, target = call.operands[:2]
    assert scores is not None and target is not None
    t = "[t]" if reduction(call) == MEAN else "t"
    t = t if len(scores.shape) > 1 else ""
    rest = " ".join(f"[x{k}]" for k in range(len(scores.shape) - 2))
    out = f"{t} {rest}" if reduction(call) == NONE else ""
    return f"{t} [v] {rest}, {t} {rest}, [v] -> {out}"


def reduction(call: Call) -> int:
    """Return ATen's number for the reduction of a loss."""
    names = [argument.name for argument in call.op._schema.arguments]
    return int(call.arg(names.index("reduction"), MEAN))


rule(aten.binary_cross_entropy.default, difference, average=averaged)
rule(aten.binary_cross_entropy_with_logits.default, difference, average=averaged)
rule(
    aten.cross_entropy_loss.default,
    cross_entropy,
    saves=(0,),
    split={"t": "P", "v": "I"},
    blocks=("t",),
    program=local_programs.cross_entropy,
    traffic=cross_entropy_traffic,
)
rule(aten.huber_loss.default, difference, average=averaged)
rule(aten.kl_div.default, difference, average=averaged)
rule(aten.l1_loss.default, difference, average=averaged)
rule(aten.mse_loss.default, difference, average=averaged)
rule(aten.nll_loss_nd.default, chosen, linear=(0,))
rule(aten.smooth_l1_loss.default, difference, average=averaged)
