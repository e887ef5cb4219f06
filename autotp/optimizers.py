"""Optimizers that were built before the parameters were distributed: repaired, or refused.

A replaced parameter remembers its successor. Before any optimizer's step a hook puts successors in
place of what they replaced; an optimizer that already holds state for one is refused.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autotp.errors import RuntimeStateError


def note_replacement(old: nn.Parameter, new: nn.Parameter) -> None:
    """Remember that `new` stands in place of `old`, and let go of the old one's memory."""
    _watch_optimizers()
    old._autotp_successor = new  # type: ignore[attr-defined]
    if not old.is_meta:
        old.data = old.data.new_empty(0)


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_repair)


def _repair(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Put successors in place of replaced parameters.

    Raises RuntimeStateError if the optimizer has state for one of them.
    """
    for number, group in enumerate(optimizer.param_groups):
        if not any(hasattr(p, "_autotp_successor") for p in group["params"]):
            continue
        held = [p for p in group["params"] if optimizer.state.get(p)]
        if held:
            raise RuntimeStateError(
                f"{type(optimizer).__name__} has stepped on parameters that were replaced since",
                at=[(f"param_groups[{number}]", f"holds state of {len(held)} whole parameters")],
                remedy="build the optimizer after autotp.parallelize, or before its first step",
            )
        group["params"] = [getattr(p, "_autotp_successor", p) for p in group["params"]]
