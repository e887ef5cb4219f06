"""Rules of lookups: the indexed dim is whole, or split by a local program that masks."""

from __future__ import annotations

import torch

from autotp import local_programs
from autotp.passes.rules.table import Call, letters, rule

aten = torch.ops.aten


def lookup(call: Call) -> str:
    """Indices may split, unless a row's gradient is divided by how often it occurs in all."""
    indices = call.operands[1]
    assert indices is not None
    if not call.arg(3, False):
        return "v d, ... -> ... d"
    dims = " ".join(f"[{n}]" for n in letters(len(indices.shape)))
    return f"v d, {dims} -> {dims} d"


rule(
    aten.embedding.default,
    lookup,
    saves=(1,),
    split={"v": "P"},
    program=local_programs.vocab_embedding,
)
