"""What optimizers do with parameters that were distributed: repaired, and stepped where they lie.

A replaced parameter remembers its successor. Before any optimizer's step a hook puts successors in
place of what they replaced; an optimizer that already holds state for one is refused.

Optimizers that work element by element then step on the local tensors: the numbers are the same,
up to rounding, and torch's dispatch of DTensors, several times the work on a small parameter, is
spared. On a CPU they take torch's fused kernel where the choice was left to torch: one pass over a
large parameter instead of ten. Parameters, gradients and states are DTensors before and after.
Whoever may look in between, a closure or another hook, keeps the step on DTensors, and so does any
optimizer that is not one of ELEMENTWISE. The one module that touches what torch keeps private about
optimizers: their hooks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from autotp.errors import RuntimeStateError
from autotp.placements import as_part_of, local_part, rests_like

ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)
"""The optimizers of torch in which no element of a parameter depends on another."""

SCALARS = frozenset({"eta", "mu", "mu_product", "step"})
"""What they keep once per parameter, and not per element."""


def note_replacement(old: nn.Parameter, new: nn.Parameter) -> None:
    """Remember that `new` stands in place of `old`, and let go of the old one's memory."""
    watch_optimizers()
    old._autotp_successor = new  # type: ignore[attr-defined]
    if not old.is_meta:
        old.data = old.data.new_empty(0)


@functools.cache
def watch_optimizers() -> None:
    """Look at every optimizer's step, once per process."""
    torch_optimizer.register_optimizer_step_pre_hook(_before)
    torch_optimizer.register_optimizer_step_post_hook(_after)


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _after(optimizer, args, kwargs)  # a step that raised has left its parameters aside
    _repair(optimizer)
    is_alone = len(args) == 1 and not any(kwargs.values()) and not torch.compiler.is_compiling()
    if is_alone and type(optimizer) in ELEMENTWISE and _is_unwatched(optimizer):
        _set_aside(optimizer)


def _repair(optimizer: Optimizer) -> None:
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


# The step on local tensors -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Aside:
    """What an optimizer holds between its steps: the parameters of each group, and their states.

    fused   the groups whose kernel was left to torch, and is the fused one within the step
    """

    groups: list[list[Tensor]]
    states: dict[Tensor, dict[str, Any]]
    fused: list[dict[str, Any]]


def _is_unwatched(optimizer: Optimizer) -> bool:
    """Say whether nobody but this module looks at an optimizer within its step."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    hooks = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    return not own and all(len(found) == 1 for found in hooks)


def _set_aside(optimizer: Optimizer) -> None:
    """Put local tensors in place of parameters, gradients and states, if all rest alike."""
    groups = [list(group["params"]) for group in optimizer.param_groups]
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return
    if not all(_rests(p, optimizer.state.get(p)) for params in groups for p in params):
        return
    aside = _Aside(groups, {}, [g for g in optimizer.param_groups if _may_fuse(g, optimizer)])
    for group, params in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [_local(p, optimizer, aside) for p in params]
    for group in aside.fused:
        group["fused"] = True
    optimizer._autotp_aside = aside  # type: ignore[attr-defined]


def _may_fuse(group: dict[str, Any], optimizer: Optimizer) -> bool:
    """Say whether torch may step a group by one kernel: on a CPU, and where nobody chose another.

    By itself torch takes ten ops per parameter there, each over all of its bytes. The kernel goes
    through memory, whatever the strides: all that it touches must be contiguous.
    """
    chosen = [group.get("fused", True), group.get("foreach"), group.get("capturable") or None]
    steps = [optimizer.state[p].get("step") for p in group["params"] if p in optimizer.state]
    return (
        all(choice is None for choice in chosen)
        and all(p.device.type == "cpu" and p.is_floating_point() for p in group["params"])
        and all(isinstance(n, Tensor) and n.dtype is torch.float32 for n in steps)
        and all(
            local_part(t).is_contiguous()
            for p in group["params"]
            for t in _parts(p, optimizer.state.get(p))
        )
    )


def _rests(p: Tensor, state: dict[str, Any] | None) -> bool:
    """Say whether a parameter, its gradient and its state rest alike."""
    return all(rests_like(t, p) for t in _parts(p, state))


def _parts(p: Tensor, state: dict[str, Any] | None) -> list[Tensor]:
    """Return a parameter, its gradient and the states that are DTensors."""
    parts = [p, *([] if p.grad is None else [p.grad])]
    return parts + [v for v in (state or {}).values() if isinstance(v, DTensor)]


def _local(p: Tensor, optimizer: Optimizer, aside: _Aside) -> Tensor:
    local = local_part(p)
    local.grad = None if p.grad is None else local_part(p.grad)
    state = optimizer.state.pop(p, None)
    if state is not None:
        aside.states[p] = state
        optimizer.state[local] = {
            k: local_part(v) if isinstance(v, DTensor) else v for k, v in state.items()
        }
    return local


def _after(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Put parameters and states, as DTensors, back where local tensors stood in for them."""
    aside: _Aside | None = optimizer.__dict__.pop("_autotp_aside", None)
    if aside is None:
        return
    for group, params in zip(optimizer.param_groups, aside.groups, strict=True):
        for p, local in zip(params, group["params"], strict=True):
            local.grad = None
            state = optimizer.state.pop(local, None)
            if state is not None:
                before = aside.states.get(p, {})
                optimizer.state[p] = {k: _whole(k, v, before, p) for k, v in state.items()}
        group["params"] = params
    for group in aside.fused:
        group["fused"] = None


def _whole(key: str, value: Any, before: dict[str, Any], p: Tensor) -> Any:
    """Return a state as it rests between steps: the DTensor that it was, or a new one."""
    was = before.get(key)
    if isinstance(was, DTensor) and local_part(was) is value:
        return was
    is_part = (
        isinstance(value, Tensor) and key not in SCALARS and value.shape == local_part(p).shape
    )
    return as_part_of(value, p) if is_part else value
