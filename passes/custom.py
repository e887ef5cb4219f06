"""Rules for ops that this package does not know: `autotp.rule("my::op", "b t [d] -> b t [d]")`.

A rule enters the table only when arithmetic proves it: `check_rule` runs every strategy that its
sentence allows on generated operands (sizes that the ranks divide, and sizes that they do not), or
on the user's own example where the op takes more than tensors.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from autotp.errors import RuleError
from autotp.passes.check_rule import check_rule
from autotp.passes.rules.sentence import ELLIPSIS, Dim, Sentence, parse
from autotp.passes.rules.table import Call, LinearIn, Rule, Text, enter, find, forget

Arguments = tuple[Sequence[Any], Mapping[str, Any]]

DIVIDED = (12, 6, 24, 18)
"""Sizes that 2, 3 and 2x3 ranks divide, handed to the factors in turn."""
UNDIVIDED = (5, 7, 11, 13)
"""Sizes that they do not divide; every rank still gets a part."""
ELLIPSES = (0, 1, 2)
"""Dims that `...` stands for in the generated examples."""


def rule(
    op: str | OpOverload,
    sentence: str | Callable[[Call], Text],
    *,
    linear: LinearIn = None,
    flops: str | None = None,
    saves: tuple[int, ...] | None = None,
    free: bool = False,
    example: Arguments | None = None,
    replace: bool = False,
) -> Rule:
    """Say how an op may be split, prove it by arithmetic, and enter it into the table.

    op        its name, such as "my::op" or "my::op.overload"
    sentence  what may be split, such as "b t [d] -> b t [d]"
    linear    how a partial sum passes: "all" operands together, "each" one alone, or those listed
    flops     products of factors that it computes; `saves`, `free`: see `Rule`
    example   (args, kwargs) to prove it on, where the op takes more than tensors of floats
    replace   put it in place of a rule that was given before

    Raises RuleError, with the strategy and what is wrong, for a rule that arithmetic refutes; for
    an op that does not exist; and for one that has a rule.
    """
    overload = _overload(op) if isinstance(op, str) else op
    _refuse_second(overload, replace)
    new = Rule(overload, sentence, linear=linear, flops=flops, saves=saves, free=free)
    calls = [example] if example else list(_examples(overload, sentence))
    old = forget(overload)  # while the new one is proved: ops are read by what the table says
    try:
        for args, kwargs in calls:
            _prove(new, args, kwargs)
        return enter(new)
    except RuleError:
        if old is not None:
            enter(old)
        raise


def _prove(new: Rule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise RuleError unless every strategy of a call computes what the op computes."""
    with warnings.catch_warnings(action="ignore"):  # that the op has no rule, yet
        check_rule(new.op, _differentiable(new.op, args, kwargs), kwargs, rule=new)


def _overload(name: str) -> OpOverload:
    """Return the op of a name. Raises RuleError where there is none, or several."""
    namespace, colons, rest = name.partition("::")
    short, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), short, None) if colons else None
    known = _overloads(packet) if isinstance(packet, OpOverloadPacket) else []
    wanted = overload or (known[0] if len(known) == 1 else "default")
    if wanted not in known:
        fact = f"has the overloads {', '.join(known)}" if known else "is not defined"
        raise RuleError(
            "a rule is for one op that exists",
            at=[(name, fact)],
            remedy='define it first, with torch.library, and name it "namespace::op.overload"',
        )
    found: OpOverload = getattr(packet, wanted)
    return found


def _overloads(packet: OpOverloadPacket) -> list[str]:
    return [str(name) for name in packet.overloads()]  # type: ignore[no-untyped-call]


def _refuse_second(op: OpOverload, replace: bool) -> None:
    old = find(op)
    built_in = op.namespace in ("aten", "prims")
    if old is None or (replace and not built_in):
        return
    text = repr(old.sentence) if isinstance(old.sentence, str) else "a function of the call"
    raise RuleError(
        f"{op} has a rule already",
        at=[("its rule", text)],
        remedy="its rule is part of autotp" if built_in else "replace=True puts this in its place",
    )


# Examples ----------------------------------------------------------------------------------------


def _examples(op: OpOverload, sentence: str | Callable[[Call], Text]) -> Iterator[Arguments]:
    """Yield arguments of float tensors that fit the sentence. Raises RuleError where none can."""
    tensors = [a for a in op._schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]
    others = [a for a in op._schema.arguments if a not in tensors and not a.has_default_value()]
    if not isinstance(sentence, str) or others:
        why = [(a.name, f"has the type {a.type}") for a in others] or [
            ("sentence", "is a function")
        ]
        raise RuleError(
            f"the rule of {op} cannot be proved on tensors alone",
            at=why,
            remedy="pass example=(args, kwargs), a call to prove it on",
        )
    read = parse(sentence)
    dots = ELLIPSES if any(ELLIPSIS in dims for dims in read.operands) else (0,)
    for sizes, extra in itertools.product((DIVIDED, UNDIVIDED), dots):
        shapes = _shapes(read, sizes, extra)
        given = dict(zip([a.name for a in tensors], shapes, strict=False))
        names = [a.name for a in op._schema.arguments if not a.kwarg_only and a.name in given]
        made = {n: torch.randn(shape, dtype=torch.float64) for n, shape in given.items()}
        yield [made.pop(n) for n in names], made


def _shapes(read: Sentence, sizes: Sequence[int], extra: int) -> list[list[int]]:
    """Return a shape for every operand: a size per factor, in order of appearance."""
    factors = dict.fromkeys(
        f for dims in read.operands for dim in dims for product in dim for f in product
    )
    named = dict(zip([f for f in factors if f != "..."], itertools.cycle(sizes), strict=False))
    lead = [sizes[k % len(sizes)] for k in range(extra)]

    def dims_of(dim: Dim) -> list[int]:
        return lead if dim == ELLIPSIS else [sum(math.prod(named[f] for f in prod) for prod in dim)]

    return [[n for dim in dims for n in dims_of(dim)] for dims in read.operands]


def _differentiable(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return `args` with gradients asked for, if the op has any to give."""
    asking = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]
    with torch.enable_grad():
        made = _run(op, asking, kwargs)
        results = [r for r in (made if isinstance(made, list | tuple) else [made]) if _carries(r)]
        leaves = [a for a in asking if _carries(a)]
        if not results:
            return list(args)
        try:
            torch.autograd.grad([r.sum() for r in results], leaves, allow_unused=True)
        except (RuntimeError, NotImplementedError):  # the op has no formula for its gradient
            return list(args)
    return asking


def _run(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return op(*args, **kwargs)
    except Exception as error:
        taken = ", ".join(str(list(a.shape)) for a in args if isinstance(a, Tensor))
        raise RuleError(
            f"{op} does not run on operands that its rule allows",
            at=[("operands", taken), (type(error).__name__, str(error).strip().splitlines()[0])],
            remedy="correct the sentence, or pass example=(args, kwargs), a call to prove it on",
        ) from error


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
