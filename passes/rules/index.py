"""Rules of lookups: the indexed dim is whole, or split by a local program that masks."""

from __future__ import annotations

import torch

from autotp import local_programs
from autotp.passes.rules.table import rule

aten = torch.ops.aten

rule(
    aten.embedding.default,
    "v d, ... -> ... d",
    saves=(1,),
    split={"v": "P"},
    program=local_programs.vocab_embedding,
)
