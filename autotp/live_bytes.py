"""The bytes of tensors that live at once: what a step takes on a device that keeps no record.

`LiveBytes` watches every operator, of backward too, and counts the storages that operators made and
that somebody still holds. What was there before counts nothing, nor what an operator holds only
while it runs. Built on torch's dispatch modes, whose module is private.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count bytes within a `with` block: those that live now, and the most that did at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator; what it reads was there before, what it returns beside that is new."""
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            self._note(leaf, made=False)
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            self._note(leaf, made=True)
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, leaf: object, *, made: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            return
        storage = leaf.untyped_storage()
        if id(storage) in self._known:
            return
        size_bytes = storage.nbytes() if made else 0
        self._known.add(id(storage))
        self.now += size_bytes
        weakref.finalize(storage, self._forget, id(storage), size_bytes)

    def _forget(self, key: int, size_bytes: int) -> None:
        self._known.discard(key)
        self.now -= size_bytes
