"""Rules of normalisations: the normalised dims are whole, or split by a local program."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from autotp import local_programs, local_statistics
from autotp.passes.rules.table import (
    Call,
    Message,
    Ranks,
    Text,
    letters,
    replace_arg,
    rule,
    wide_bytes,
)

aten = torch.ops.aten


def normalised(call: Call) -> Text:
    """One normalised dim is called d and may be split by the program; several are whole."""
    count = len(call.arg(1))
    names = " ".join(["d"] if count == 1 else [f"[d{k}]" for k in range(count)])
    weights = "".join(f", {names}" for _ in call.operands[1:])
    return f"... {names}{weights} -> ... {names}"


def along(call: Call) -> str:
    """The dim of a softmax is called d."""
    assert call.operands[0] is not None
    names = list(letters(len(call.operands[0].shape)))
    names[call.arg(1)] = "d"
    return f"{' '.join(names)} -> {' '.join(names)}"


def channels(call: Call) -> str:
    """Batch, channels and space may split; what is made beside has channels too, if anything."""
    assert call.operands[0] is not None
    x = " ".join(["n", "c", *(f"x{k}" for k in range(len(call.operands[0].shape) - 2))])
    made = ["c" if r.shape[0] else "[none]" for r in call.results[1:]]
    return f"{', '.join([x, *('c' for _ in call.operands[1:])])} -> {', '.join([x, *made])}"


def batch_statistics(call: Call) -> str:
    """Channels may split; in training the statistics need every other dim whole."""
    text = channels(call)
    return re.sub(r"\b(n|x\d)\b", r"[\1]", text) if call.arg(5) else text


def instance(call: Call) -> str:
    """Batch and channels may split; space not where statistics are taken, nothing where kept."""
    text, kept = channels(call), call.arg(3) is not None
    taken = (r"\b(\w+)\b" if kept else r"\b(x\d)\b") if call.arg(5) else None
    return re.sub(taken, r"[\1]", text) if taken else text


def groups(call: Call) -> Text:
    """Batch and groups may split; the channels of a group and its space are whole."""
    assert call.operands[0] is not None
    many = call.operands[0].shape[1] // call.arg(1)
    c = "(g [k])" if many > 1 else "g"
    space = " ".join(f"[x{k}]" for k in range(len(call.operands[0].shape) - 2))
    channel = "".join(f", {c}" for _ in call.operands[1:])
    return f"n {c} {space}{channel} -> n {c} {space}", {"g": call.arg(1)}


def group_count(whole: Call, local: Call) -> tuple[Any, ...]:
    """Write the number of groups that are here."""
    before, here = whole.operands[0], local.operands[0]
    assert before is not None and here is not None
    return replace_arg(local, 1, whole.arg(1) * here.shape[1] // before.shape[1])


def weight_norm(call: Call) -> str:
    """What stands at one index of a dim is scaled to a given length: the other dims are whole.

    To torch, dim -1 is no dim but all of them: one length for the whole tensor.
    """
    v, g = call.operands[:2]
    assert v is not None and g is not None
    kept = call.arg(2, 0)
    names = ["d" if k == kept else f"[x{k}]" for k in range(len(v.shape))]
    ones = ["d" if k == kept else "1" if n == 1 else f"[x{k}]" for k, n in enumerate(g.shape)]
    return f"{' '.join(names)}, {' '.join(ones)} -> {' '.join(names)}"


def rows_bytes(call: Call) -> int:
    """Return the bytes of one number per normalised row."""
    x = call.operands[0]
    assert x is not None
    dim = call.arg(1) if isinstance(call.arg(1), int) else -1
    return math.prod(x.shape) // x.shape[dim] * wide_bytes(x.dtype)


def layer_norm_traffic(call: Call, _ranks: Ranks) -> list[Message]:
    """Mean and variance forward, two sums at once backward."""
    rows = rows_bytes(call)
    return [Message("d", rows, times=2), Message("d", 2 * rows, backward=True)]


def rms_norm_traffic(call: Call, _ranks: Ranks) -> list[Message]:
    """The mean square forward, one sum backward."""
    rows = rows_bytes(call)
    return [Message("d", rows), Message("d", rows, backward=True)]


def batch_norm_traffic(call: Call, ranks: Ranks) -> list[Message]:
    """Mean and variance forward, two sums at once backward, over all axes but the channels'."""
    x = call.operands[0]
    assert x is not None
    size = x.shape[1] * wide_bytes(x.dtype)
    over = [factor for factor in ranks if factor != "c"]
    forward = [Message(factor, size, times=2) for factor in over]
    return [*forward, *(Message(factor, 2 * size, backward=True) for factor in over)]


def softmax_traffic(call: Call, _ranks: Ranks) -> list[Message]:
    """The maximum and the sum forward, one sum backward."""
    rows = rows_bytes(call)
    return [Message("d", rows, times=2), Message("d", rows, backward=True)]


LAYER_NORM: dict[str, Any] = {
    "split": {"d": "S"},
    "program": local_programs.layer_norm,
    "traffic": layer_norm_traffic,
}
BATCH_NORM: dict[str, Any] = {
    "split": dict.fromkeys(("n", "x0", "x1", "x2"), "I"),
    "blocks": ("n", "x0", "x1", "x2"),
    "traffic": batch_norm_traffic,
    "saves": (0,),
}
RMS_NORM: dict[str, Any] = {
    "split": {"d": "S"},
    "program": local_programs.rms_norm,
    "traffic": rms_norm_traffic,
}
SOFTMAX: dict[str, Any] = {"split": {"d": "S"}, "traffic": softmax_traffic, "saves": (-1,)}

rule(
    aten._native_batch_norm_legit.no_stats,
    channels,
    program=local_statistics.batch_norm_untracked,
    **BATCH_NORM,
)
rule(
    aten._native_batch_norm_legit_functional.default,
    channels,
    program=local_statistics.batch_norm,
    **BATCH_NORM,
)
rule(aten._native_batch_norm_legit_no_training.default, channels, saves=(0,))
rule(aten._weight_norm.default, weight_norm)
rule(aten.batch_norm.default, batch_statistics, saves=(0,))
rule(aten.group_norm.default, groups, localize=group_count, saves=(0,))
rule(aten.instance_norm.default, instance, saves=(0,))
rule(aten.layer_norm.default, normalised, saves=(0,), **LAYER_NORM)
rule(aten.log_softmax.int, along, program=local_programs.log_softmax, **SOFTMAX)
rule(aten.rms_norm.default, normalised, saves=(0,), **RMS_NORM)
rule(aten.softmax.int, along, program=local_programs.softmax, **SOFTMAX)
