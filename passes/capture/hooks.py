"""Hooks of modules: forward hooks are captured with the forward; what would be lost is refused.

The hooks of the model itself run around its call, before and after it is parallel: a capture
leaves them out. Those of its submodules are part of what torch.export traces, but for backward
hooks, which it drops; global hooks would run both in the capture and around the parallel model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from autotp.errors import CaptureError

FORWARD = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
GLOBAL = (
    "_global_backward_hooks", "_global_backward_pre_hooks", "_global_forward_hooks",
    "_global_forward_pre_hooks",
)  # fmt: skip


def refuse_hooks(model: nn.Module) -> None:
    """Refuse the backward hooks of submodules, and global hooks.

    Raises: CaptureError, which lists all.
    """
    at = [
        (path, f"{kind.strip('_').removesuffix('s')} {title(hook)}")
        for path, module in model.named_modules()
        for kind in BACKWARD
        if module is not model
        for hook in getattr(module, kind).values()
    ]
    everywhere: Any = torch.nn.modules.module
    at += [
        ("all modules", f"{kind.strip('_').removesuffix('s').replace('_', ' ')} {title(hook)}")
        for kind in GLOBAL
        for hook in getattr(everywhere, kind).values()
    ]
    if at:
        raise CaptureError(
            "module hooks would be lost, or run twice, in a parallel model",
            at=at,
            remedy="register backward hooks on parameters or on the model itself, forward hooks on"
            " modules",
        )


def title(hook: object) -> str:
    """Return the name of a hook."""
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def hook_numbers(hooks: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers that torch gave the hooks of a module whose attributes are `hooks`."""
    for kind in (*FORWARD, *BACKWARD):
        yield from hooks[kind]


@contextmanager
def without_gradient_hooks(line: Callable[[], str]) -> Iterator[None]:
    """Refuse hooks that a forward puts on gradients or on what autograd saves.

    `line` says where the user's code is.
    """

    def refuse(name: str) -> Callable[..., Any]:
        def refusing(*_args: Any) -> Any:
            raise CaptureError(
                "a gradient hook is registered in the forward: it would be lost",
                at=[(line(), name)],
                remedy="register hooks on parameters, outside of the forward",
            )

        return refusing

    graph: Any = torch.autograd.graph
    saving = graph.saved_tensors_hooks
    with (
        mock.patch.object(torch.Tensor, "register_hook", refuse("register_hook")),
        mock.patch.object(graph, "register_multi_grad_hook", refuse("register_multi_grad_hook")),
        mock.patch.object(saving, "__enter__", refuse("saved_tensors_hooks")),
    ):
        yield


@contextmanager
def without_own_hooks(model: nn.Module) -> Iterator[None]:
    """Take the model's own hooks away for a while: they run around the call of it."""
    with ExitStack() as stack:
        for kind in (*FORWARD, *BACKWARD):
            hooks = getattr(model, kind)
            if hooks:
                stack.enter_context(mock.patch.object(model, kind, type(hooks)()))
        yield
