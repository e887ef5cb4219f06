"""Lookups in tables whose columns are split, and writes to tables whose rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autotp.parts import Axes, my_range, owned


def embedding_bag(*args: Any, split_d: Axes, size_d: int) -> tuple[Tensor, ...]:
    """Look up bags in some columns of `"v d, k, o -> b d"`.

    Bags, their sizes and their borders do not depend on columns: they are the same on every rank.
    """
    made: tuple[Tensor, ...] = torch.ops.aten.embedding_bag.padding_idx(*args)
    return made


def split_index_put(
    table: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    *,
    split_v: Axes,
    size_v: int,
) -> Tensor:
    """Write `table[..., index] = values`, or add them, with the written dim v split.

    Every rank knows all values, and writes those of its own rows.
    """
    ((dim, index),) = [(d, i) for d, i in enumerate(indices) if i is not None]
    index, mine = torch.where(index < 0, index + size_v, index), my_range(size_v, split_v)
    here = owned(index, mine, size_v).reshape(-1)
    given = values.expand(*table.shape[:dim], *index.shape, *table.shape[dim + 1 :])
    given = given.flatten(dim, dim + index.ndim - 1) if index.ndim else given.unsqueeze(dim)
    at, rows = index.reshape(-1)[here] - mine[0], given.movedim(dim, 0)[here]
    where, rows = [*[None] * dim, at], rows.movedim(0, dim)
    out: Tensor = torch.ops.aten.index_put.default(table, where, rows, accumulate)
    return out
