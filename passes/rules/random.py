"""Rules of ops that draw: masks are equal where replicated; where split, see autotp.randomness.

Ops whose number of draws depends on what they read (poisson, gamma, multinomial) have no rule: they
run whole.
"""

from __future__ import annotations

import torch

from autotp import random_programs
from autotp.passes.rules.table import Call, rule

aten = torch.ops.aten


def drops(call: Call) -> bool:
    """Say whether this dropout drops anything."""
    return call.arg(2) is not False and call.arg(1) != 0.0


def always(_call: Call) -> bool:
    """Say that every call draws."""
    return True


def channels(call: Call) -> str:
    """One draw per channel: what lies within one is whole."""
    (result,) = call.results
    inside = " ".join(f"[x{d}]" for d in range(len(result.shape) - 2))
    return f"n c {inside} -> n c {inside}"


rule(aten.alpha_dropout.default, "... -> ...", random=drops)
rule(aten.bernoulli.default, "... -> ...", random=always, saves=())
rule(
    aten.dropout.default,
    "... -> ...",
    random=drops,
    saves=(-1,),
    draw=random_programs.dropout,
    exact=random_programs.exact_dropout,
)
rule(aten.feature_alpha_dropout.default, channels, random=drops)
rule(aten.feature_dropout.default, channels, random=drops)
rule(aten.native_dropout.default, "... -> ..., ...", random=drops, saves=(-1,))
