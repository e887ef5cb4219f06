"""Lookups in tables whose columns are split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotp.parts import Axes


def embedding_bag(*args: Any, split_d: Axes, size_d: int) -> tuple[Tensor, ...]:
    """Look up bags in some columns of `"v d, k, o -> b d"`.

    Bags, their sizes and their borders do not depend on columns: they are the same on every rank.
    """
    made: tuple[Tensor, ...] = torch.ops.aten.embedding_bag.padding_idx(*args)
    return made
