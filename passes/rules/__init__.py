"""The table of sharding rules: importing this fills it, one file per family of ops."""

from autotp.passes.rules import (
    attention,
    einsum,
    index,
    loss,
    norm,
    pointwise,
    random,
    reduction,
    view,
)
from autotp.passes.rules.sentence import Signature, parse
from autotp.passes.rules.table import Call, Rule, Tensor, draws, find, rows, rule

__all__ = [
    "Call",
    "Rule",
    "Signature",
    "Tensor",
    "attention",
    "draws",
    "einsum",
    "find",
    "index",
    "loss",
    "norm",
    "parse",
    "pointwise",
    "random",
    "reduction",
    "rows",
    "rule",
    "view",
]
