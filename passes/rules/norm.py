"""Rules of normalisations: the normalised dims are whole, or split by a local program."""

from __future__ import annotations

import torch

from autotp import local_programs
from autotp.passes.rules.table import Call, Text, letters, rule

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


def groups(call: Call) -> str:
    """Batch may split; the channels of a group and its space are whole."""
    assert call.operands[0] is not None
    space = " ".join(f"[x{k}]" for k in range(len(call.operands[0].shape) - 2))
    channel = "".join(", [c]" for _ in call.operands[1:])
    return f"n [c] {space}{channel} -> n [c] {space}"


SPLIT = {"d": "S"}

rule(aten.batch_norm.default, batch_statistics, saves=(0,))
rule(aten.group_norm.default, groups, saves=(0,))
rule(
    aten.layer_norm.default, normalised, saves=(0,), split=SPLIT, program=local_programs.layer_norm
)
rule(
    aten.log_softmax.int, along, saves=(-1,), split=SPLIT, program=local_programs.log_softmax
)
rule(aten.rms_norm.default, normalised, saves=(0,), split=SPLIT, program=local_programs.rms_norm)
rule(aten.softmax.int, along, saves=(-1,), split=SPLIT, program=local_programs.softmax)
