"""What backward makes again instead of keeping it: a call, repeated on what it read.

    Recipe         how one call's result is made again, and the result while backward needs it
    recalled       call an op: what it keeps for backward is forgotten where a recipe can make it
    run_recalled   run a program that calls so

A saved tensor that lies in a recipe's result, whole or as a view, is replaced by its place in it.
The first reader in backward runs the call once more, on what it read: kept tensors, parameters, or
results of other recipes; after the last reader the result is let go. Draws, and autocast, are those
of the forward.

The ranks run collectives of recipes in one order: that of autograd, which is the same on all, and
within one call that of `needs`. Whether a saved tensor lies in a result may differ from rank to
rank (a reshape copies or not, by the sizes that a rank holds), and so does not decide: a recipe
that `sends` is run whenever backward comes to a call that needs it.

Without gradient, and under someone else's saved-tensor hooks, such as those of
torch.utils.checkpoint around the model, which then decide what is kept, ops are just called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

from autotp.errors import RuntimeStateError
from autotp.randomness import RandomMark, RandomState

Run = TypeVar("Run", bound=Callable[..., Any])


def _eager(fn: Run) -> Run:
    """Keep torch.compile out of a function."""
    kept: Run = torch.compiler.disable(fn)  # type: ignore[no-untyped-call]
    return kept


Place = tuple[torch.Size, tuple[int, ...], int]
"""Size, strides and offset of a view in a storage."""


def run_recalled(program: Callable[..., Any], arguments: Sequence[Tensor]) -> Any:
    """Run a program that forgets: as it is, also under torch.compile, which would keep all."""
    if torch.compiler.is_compiling():
        _say_eager()
    return _run(program, arguments)


@_eager
def _say_eager() -> None:
    warnings.warn(
        "this plan makes tensors again in backward instead of keeping them: its program runs"
        " in eager, as torch.compile would choose by itself what is kept; to compile, plan with"
        " more memory, or with pins of backward that keep",
        stacklevel=2,
    )


@_eager
def _run(program: Callable[..., Any], arguments: Sequence[Tensor]) -> Any:
    return program(*arguments)


class Recipe:
    """How backward makes the result of one call again.

    reads    the recipes whose results the call reads
    sends    whether it calls collectives, itself or for what it reads
    """

    def __init__(self, reads: Sequence[Recipe], sends: bool) -> None:
        self.reads, self.sends = tuple(reads), sends
        self.storage: StorageWeakRef | None = None
        self.users = self.left = 0
        self.made: Tensor | None = None
        self._call: Callable[[], Any] | None = None
        self._inputs: tuple[Recipe, ...] = ()
        self._like: tuple[Place, torch.dtype, int] | None = None

    def note(
        self,
        op: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Tensor,
        context: _Context,
    ) -> None:
        """Note that `op` made `out`; what it read is held, but for what recipes can make."""
        given = _storages(args, kwargs)
        if _key(out) in given or out.is_conj() or out.is_neg():
            return  # it is what was read: nothing would be saved
        args, kwargs = tree_map(self._remember, (tuple(args), dict(kwargs)))
        self.storage = StorageWeakRef(out.untyped_storage())  # type: ignore[no-untyped-call]
        self._like = _place(out), out.dtype, out.untyped_storage().nbytes()
        there = [r for r in self.reads if r.storage is not None]
        self._inputs = tuple(r for r in there if r.sends or _key(r) in given)

        def call() -> Any:
            given_args, given_kwargs = tree_map(_resolved, (args, kwargs))
            with context.entered():
                return op(*given_args, **given_kwargs)

        self._call = call

    def _remember(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return _Saved(value).forget(self.reads)

    def holds(self, x: Tensor) -> bool:
        """Say whether `x` lies in the memory of the result."""
        return (
            self.storage is not None
            and self._like is not None
            and self.storage.cdata == _key(x)
            and x.dtype == self._like[1]
            and not (x.is_conj() or x.is_neg())
        )

    def use(self) -> None:
        """Note one more who will ask for the result in every backward, and then be `done`."""
        if self.users == 0:
            for recipe in self._inputs:
                recipe.use()
        self.users += 1

    def result(self) -> Tensor:
        """Return the result, made again unless it is still there."""
        if self.made is None:
            assert self._call is not None and self._like is not None
            for recipe in self._inputs:
                recipe.result()
            self.made = self._call()
            self.left = self.users
            for recipe in self._inputs:
                recipe.done()
            like = _place(self.made), self.made.dtype, self.made.untyped_storage().nbytes()
            assert like == self._like, f"made again: {like}, made first: {self._like}"
        return self.made

    def done(self) -> None:
        """Note that one of the users needs the result no more in this backward."""
        self.left -= 1
        if self.left <= 0:
            self.made = None


class _Saved:
    """A tensor for backward: itself, or its place in the result of a recipe."""

    __slots__ = ("place", "recipe", "tensor", "version")

    def __init__(self, x: Tensor) -> None:
        self.tensor: Tensor | None = x.detach()
        self.version, self.place = x._version, _place(x)
        self.recipe: Recipe | None = None

    def forget(self, recipes: Sequence[Recipe]) -> _Saved:
        """Let the tensor go if one of the recipes makes it."""
        assert self.tensor is not None
        self.recipe = next((r for r in recipes if r.holds(self.tensor)), None)
        if self.recipe is not None:
            self.tensor = None
        return self

    def read(self) -> Tensor:
        """Return the tensor."""
        if self.recipe is not None:
            return self.recipe.result().as_strided(*self.place)
        assert self.tensor is not None
        return self.tensor

    def unchanged(self) -> Tensor:
        """Return the tensor. Raises RuntimeStateError if it was changed in the meantime."""
        if self.tensor is not None and self.tensor._version != self.version:
            raise RuntimeStateError(
                "backward makes again what was made of a tensor that has since been changed",
                at=[(f"a tensor of {list(self.tensor.shape)}", "changed in place after forward")],
                remedy="call backward before the optimizer's step, as without autotp",
            )
        return self.read()


def _resolved(value: Any) -> Any:
    return value.unchanged() if isinstance(value, _Saved) else value


class _Visit:
    """One call of an op: what autograd keeps of it, and the recipes that its backward asks.

    saved   the numbers of what was saved, `open` those that a backward has yet to read
    """

    def __init__(self, needs: Sequence[Recipe]) -> None:
        self.needs = needs
        self.packed: list[_Saved] = []
        self.saved = frozenset[int]()
        self.open: set[int] = set()
        self.asked: tuple[Recipe, ...] = ()

    def pack(self, x: Tensor) -> _Saved:
        self.packed.append(_Saved(x))
        return self.packed[-1]

    def forget(self) -> None:
        """Forget what recipes can make: the op has returned, so that their results are known."""
        found = {id(s.forget(self.needs).recipe) for s in self.packed}
        usable = [r for r in self.needs if r.storage is not None and self.packed]
        self.asked = tuple(r for r in usable if r.sends or id(r) in found)
        for recipe in self.asked:
            recipe.use()
        self.saved = frozenset(map(id, self.packed))
        self.packed.clear()  # autograd holds them, and lets them go

    def unpack(self, saved: _Saved) -> Tensor:
        """Return what was saved. The first of a backward asks the recipes, the last is done."""
        if not self.open:
            self.open = set(self.saved)
            for recipe in self.asked:
                recipe.result()
        out = saved.read()
        self.open.discard(id(saved))
        if not self.open:
            for recipe in self.asked:
                recipe.done()
        return out


def recalled(
    op: Any, recipe: Recipe | None, needs: Sequence[Recipe], *args: Any, **kwargs: Any
) -> Any:
    """Return `op(*args, **kwargs)`; forget for backward what recipes can make.

    `recipe` is that of the result, if it has one; `needs` those of what backward of `op` needs.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_hooked():
        return op(*args, **kwargs)
    visit, context = _Visit(needs), None if recipe is None else _Context(args, kwargs)
    with saved_tensors_hooks(visit.pack, visit.unpack):
        out = op(*args, **kwargs)
    if recipe is not None and context is not None:
        recipe.note(op, args, kwargs, out, context)
    visit.forget()
    return out


class _Context:
    """What a call depends on beside its arguments: where draws stand, and autocast."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.rng: RandomState | None = kwargs.get("rng")
        self.mark: RandomMark | None = None if self.rng is None else self.rng.mark()
        x = next((a for a in args if isinstance(a, Tensor)), None)
        self.device = "cpu" if x is None else x.device.type
        self.autocast = torch.is_autocast_enabled(self.device)
        self.dtype = torch.get_autocast_dtype(self.device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run a call as it ran in forward, without gradient."""
        at: AbstractContextManager[None] = nullcontext()
        if self.rng is not None and self.mark is not None:
            at = self.rng.at(self.mark)
        autocast = torch.autocast(self.device, self.dtype, enabled=self.autocast)
        with torch.no_grad(), autocast, at:
            yield


# Memory ------------------------------------------------------------------------------------------


def _place(x: Tensor) -> Place:
    return x.size(), x.stride(), int(x.storage_offset())


def _key(x: Tensor | Recipe) -> int:
    """Return what tells the memory of a tensor, or of a recipe's first result, from all other.

    A recipe's weak reference keeps the number from being given to other memory.
    """
    if isinstance(x, Recipe):
        return -1 if x.storage is None else int(x.storage.cdata)
    return int(x.untyped_storage()._cdata)


def _storages(args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    found: set[int] = set()
    tree_map(lambda v: found.add(_key(v)) if isinstance(v, Tensor) else None, (args, kwargs))
    return found


def _is_hooked() -> bool:
    """Say whether someone else decides what autograd keeps: torch has no public question."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
