"""Run a checkpoint region: backward keeps what enters it, and computes it anew.

Its collectives are called again, on all ranks in one order: nothing of it is left out, as torch
would leave out what follows the last tensor that backward needs, since ranks may differ in that.
Draws are the same again: the seed, or the state of the generators, is that at the region's begin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autotp.randomness import RandomMark, RandomState


def run_region(
    body: Callable[..., Any], rng: RandomState | None, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """Return what `body` makes of `inputs`; `rng` is what it draws from, if it does."""
    if not torch.is_grad_enabled():
        made: tuple[Tensor, ...] = body(*inputs)
        return made
    if torch.compiler.is_compiling():
        made = checkpoint(body, *inputs, use_reentrant=False)
        return made
    run = body if rng is None else _Replay(body, rng)
    made = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, early_stop=False)
    return made


class _Replay:
    """Run a function that draws; each time after the first it draws what it drew then."""

    def __init__(self, body: Callable[..., Any], rng: RandomState) -> None:
        self.body, self.rng = body, rng
        self.start: RandomMark | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.start is None:
            self.start = self.rng.mark()
            return self.body(*inputs)
        with self.rng.at(self.start):
            return self.body(*inputs)
