"""Rules of losses: rows add up; a split vocabulary is summed inside a local program."""

from __future__ import annotations

import torch

from autotp import local_programs
from autotp.passes.rules.table import Call, rule, wide_bytes

aten = torch.ops.aten

MEAN, SUM = 1, 2


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


def cross_entropy_traffic(call: Call, split: frozenset[str]) -> list[tuple[str, int, bool]]:
    """Over v the rows' maxima, then all their sums at once; over t the divisor of a mean."""
    logits = call.operands[0]
    assert logits is not None
    weighted, smoothed = call.arg(2) is not None, call.arg(5, 0.0) != 0.0
    wide = wide_bytes(logits.dtype)
    rows = logits.shape[0] * wide
    sums = 2 + weighted + 2 * smoothed
    divisor = wide if weighted else torch.int64.itemsize
    mean = [("t", divisor, False)] if call.arg(3, MEAN) == MEAN else []
    return [("v", rows, False), ("v", sums * rows, False), *mean]


def difference(call: Call) -> str:
    """A pointwise loss, summed unless its reduction is none."""
    return "..., ... -> " + ("..." if call.arg(2, MEAN) == 0 else "")


def averaged(call: Call) -> bool:
    """Say whether the reduction of a pointwise loss is the mean."""
    return bool(call.arg(2, MEAN) == MEAN)


rule(
    aten.cross_entropy_loss.default,
    cross_entropy,
    saves=(0,),
    split={"t": "P", "v": "I"},
    program=local_programs.cross_entropy,
    traffic=cross_entropy_traffic,
)
rule(aten.l1_loss.default, difference, average=averaged)
rule(aten.mse_loss.default, difference, average=averaged)
