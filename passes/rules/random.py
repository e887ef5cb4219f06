"""Rules of ops that draw: masks are equal where replicated, different where split."""

from __future__ import annotations

import torch

from autotp import local_programs
from autotp.passes.rules.table import Call, rule

aten = torch.ops.aten


def draws(call: Call) -> bool:
    """Say whether this dropout drops anything."""
    return bool(call.arg(2)) and call.arg(1) != 0.0


rule(aten.dropout.default, "... -> ...", random=draws, draw=local_programs.dropout, saves=(-1,))
