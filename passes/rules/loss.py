"""Rules of losses: rows add up; a split vocabulary is summed inside a local program."""

from __future__ import annotations

import math
from typing import Any

import torch

from autotp import local_losses
from autotp.parts import MEAN, NONE
from autotp.passes.rules.table import Call, Message, Ranks, rule, wide_bytes

aten = torch.ops.aten


def classes(call: Call) -> tuple[str, str, str]:
    """Name scores, targets and class weights: rows t, classes v, space x."""
    scores, target = call.operands[:2]
    assert scores is not None and target is not None
    space = [f"x{k}" for k in range(len(scores.shape) - 2)]
    rows = ["t", *space] if len(scores.shape) > 1 else []
    soft = target.dtype.is_floating_point
    v = "[v]" if soft or not rows else "v"
    left = " ".join([*rows[:1], v, *space])
    return left, left if soft else " ".join(rows), v


def of_classes(call: Call) -> str:
    """Rows and space add up, and so does what a rank has of the classes."""
    scores, target, weight = classes(call)
    names = scores.replace("[v]", "v").split()
    rows = " ".join(n for n in names if n != "v") if reduction(call) == NONE else ""
    return f"{scores}, {target}, {weight} -> {rows}"


def cross_entropy_traffic(call: Call, ranks: Ranks) -> list[Message]:
    """Over v the rows' maxima, then all their sums at once; over the rest the divisor of a mean."""
    logits, target = call.operands[:2]
    assert logits is not None and target is not None
    if target.dtype.is_floating_point:
        return []
    weighted, smoothed = call.arg(2) is not None, call.arg(5, 0.0) != 0.0
    wide = wide_bytes(logits.dtype)
    rows = math.prod(target.shape) * wide
    sums = 2 + weighted + 2 * smoothed
    return [Message("v", rows), Message("v", sums * rows), *divisor(call, ranks, "v")]


def nll_traffic(call: Call, ranks: Ranks) -> list[Message]:
    """The divisor of a mean."""
    return divisor(call, ranks)


def divisor(call: Call, ranks: Ranks, *but: str) -> list[Message]:
    """Return the messages of one number over what splits the rows of a mean."""
    scores = call.operands[0]
    assert scores is not None
    size = torch.int64.itemsize if call.arg(2) is None else wide_bytes(scores.dtype)
    return [Message(f, size) for f in ranks if f not in but and reduction(call) == MEAN]


def difference(call: Call) -> str:
    """A pointwise loss, summed unless its reduction is none; weights broadcast."""
    left = ", ".join("..." for _ in call.operands)
    return f"{left} -> {'...' if reduction(call) == NONE else ''}"


def averaged(call: Call) -> bool:
    """Say whether the reduction of a pointwise loss is the mean."""
    return reduction(call) == MEAN


def of_pairs(call: Call) -> str:
    """A loss of vectors of features, which are whole; rows add up."""
    rows = "..." if reduction(call) == NONE else ""
    return ", ".join("... [d]" for _ in call.operands) + f" -> {rows}"


def cosine_embedding(call: Call) -> str:
    """Two vectors and a sign per row."""
    target = call.operands[2]
    assert target is not None
    n = "n" if target.shape else ""
    return f"{n} [d], {n} [d], {n} -> {n if reduction(call) == NONE else ''}"


def multi_margin(call: Call) -> str:
    """A row of scores against one class, or against classes."""
    scores, target = call.operands[:2]
    assert scores is not None and target is not None
    n = "n" if len(scores.shape) > 1 else ""
    one = n or "[one]" * len(target.shape)
    second = f"{n} [v]" if target.shape == scores.shape else one
    out = ("n" if n else "") if call.results[0].shape else ""
    return f"{n} [v], {second}, [v] -> {out}"


def reduction(call: Call) -> int:
    """Return ATen's number for the reduction of a loss."""
    names = [argument.name for argument in call.op._schema.arguments]
    return int(call.arg(names.index("reduction"), MEAN))


POINTWISE: dict[str, Any] = {"average": averaged}

rule(aten.binary_cross_entropy.default, difference, **POINTWISE)
rule(aten.binary_cross_entropy_with_logits.default, difference, **POINTWISE)
rule(aten.cosine_embedding_loss.default, cosine_embedding, **POINTWISE)
rule(
    aten.cross_entropy_loss.default,
    of_classes,
    saves=(0,),
    split={"t": "P", "v": "I", "x0": "P", "x1": "P", "x2": "P"},
    blocks=("t", "x0", "x1", "x2"),
    program=local_losses.cross_entropy,
    traffic=cross_entropy_traffic,
)
rule(aten.hinge_embedding_loss.default, difference, **POINTWISE)
rule(aten.huber_loss.default, difference, **POINTWISE)
rule(aten.kl_div.default, difference, **POINTWISE)
rule(aten.l1_loss.default, difference, **POINTWISE)
rule(aten.margin_ranking_loss.default, difference, **POINTWISE)
rule(aten.mse_loss.default, difference, **POINTWISE)
rule(aten.multi_margin_loss.default, multi_margin, **POINTWISE)
rule(aten.multilabel_margin_loss.default, multi_margin, **POINTWISE)
rule(
    aten.nll_loss_nd.default,
    of_classes,
    linear=(0,),
    saves=(1,),
    split=dict.fromkeys(("t", "v", "x0", "x1", "x2"), "P"),
    blocks=("t", "x0", "x1", "x2"),
    program=local_losses.nll_loss,
    traffic=nll_traffic,
)
rule(aten.poisson_nll_loss.default, difference, **POINTWISE)
rule(aten.smooth_l1_loss.default, difference, **POINTWISE)
rule(aten.soft_margin_loss.default, difference, **POINTWISE)
rule(aten.triplet_margin_loss.default, of_pairs, **POINTWISE)
