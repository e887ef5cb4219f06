"""The table of sharding rules: importing this fills it, one file per family of ops."""

from autotp.passes.rules import (
    attention,
    convolution,
    creation,
    einsum,
    experts,
    index,
    layout,
    loss,
    norm,
    pointwise,
    random,
    recurrent,
    reduction,
    transform,
    view,
    window,
)
from autotp.passes.rules.sentence import Signature, parse
from autotp.passes.rules.table import Call, Rule, Tensor, find, rows, rule

__all__ = [
    "Call",
    "Rule",
    "Signature",
    "Tensor",
    "attention",
    "convolution",
    "creation",
    "einsum",
    "experts",
    "find",
    "index",
    "layout",
    "loss",
    "norm",
    "parse",
    "pointwise",
    "random",
    "recurrent",
    "reduction",
    "rows",
    "rule",
    "transform",
    "view",
    "window",
]
