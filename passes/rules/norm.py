"""Rules of normalisations: the normalised dims are whole, or split by a local program."""

from __future__ import annotations

import math
from typing import Any

import torch

from autotp import local_programs
from autotp.passes.rules.table import Call, Message, Ranks, Text, letters, rule, wide_bytes

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


def batch_statistics(call: Call) -> str:
    """Channels may split; in training the statistics need every other dim whole."""
    assert call.operands[0] is not None
    training = call.arg(5)
    rest = [f"x{k}" for k in range(len(call.operands[0].shape) - 2)]
    dims = ["n", "c", *rest]
    x = " ".join(d if d == "c" or not training else f"[{d}]" for d in dims)
    channel = "".join(", c" for _ in call.operands[1:])
    return f"{x}{channel} -> {x}"


def batch_statistics_made(call: Call) -> str:
    """Channels may split; it makes statistics of the batch, if any, and new running ones."""
    assert call.operands[0] is not None
    rest = " ".join(f"[x{k}]" for k in range(len(call.operands[0].shape) - 2))
    x = f"[n] c {rest}"
    channel = ["c" for _ in call.operands[1:]]
    made = ["c" if r.shape[0] else "[none]" for r in call.results[1:]]
    return f"{', '.join([x, *channel])} -> {', '.join([x, *made])}"


def groups(call: Call) -> str:
    """Batch may split; the channels of a group and its space are whole."""
    assert call.operands[0] is not None
    space = " ".join(f"[x{k}]" for k in range(len(call.operands[0].shape) - 2))
    channel = "".join(", [c]" for _ in call.operands[1:])
    return f"n [c] {space}{channel} -> n [c] {space}"


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


def softmax_traffic(call: Call, _ranks: Ranks) -> list[Message]:
    """The maximum and the sum forward, one sum backward."""
    rows = rows_bytes(call)
    return [Message("d", rows, times=2), Message("d", rows, backward=True)]


LAYER_NORM: dict[str, Any] = {
    "split": {"d": "S"},
    "program": local_programs.layer_norm,
    "traffic": layer_norm_traffic,
}
RMS_NORM: dict[str, Any] = {
    "split": {"d": "S"},
    "program": local_programs.rms_norm,
    "traffic": rms_norm_traffic,
}
SOFTMAX: dict[str, Any] = {"split": {"d": "S"}, "traffic": softmax_traffic, "saves": (-1,)}

rule(aten._native_batch_norm_legit_functional.default, batch_statistics_made, saves=(0,))
rule(aten.batch_norm.default, batch_statistics, saves=(0,))
rule(aten.group_norm.default, groups, saves=(0,))
rule(aten.layer_norm.default, normalised, saves=(0,), **LAYER_NORM)
rule(aten.log_softmax.int, along, program=local_programs.log_softmax, **SOFTMAX)
rule(aten.rms_norm.default, normalised, saves=(0,), **RMS_NORM)
rule(aten.softmax.int, along, program=local_programs.softmax, **SOFTMAX)
