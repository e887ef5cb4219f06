"""Run torch.export on an unmodified model and leave the model as it was.

`export` refuses by name what torch.export would drop in silence: the backward of custom autograd
functions (see `functions`), gradient hooks within a forward, and no_grad within autocast. Its
failures are one line with the user's own file and line.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autotp.errors import CaptureError
from autotp.passes.capture.draws import without_seeding
from autotp.passes.capture.functions import captured_functions
from autotp.passes.capture.hooks import without_gradient_hooks
from autotp.passes.capture.normalise import pick_line
from autotp.passes.capture.regions import marked_regions
from autotp.passes.capture.statistics import followed

# ---- before the export


def refuse_shared_memory(model: nn.Module) -> None:
    """Refuse parameters that are one memory but not one object: sharding would untie them.

    Raises: CaptureError.
    """
    members = {id(t): (name, t) for name, t in (*model.named_buffers(), *model.named_parameters())}
    spans = sorted((*span(t), name, t.requires_grad) for name, t in members.values() if t.numel())
    at = [
        (name, f"begins within {earlier}")
        for (_, end, earlier, trained), (start, _, name, too) in itertools.pairwise(spans)
        if 0 < start < end and (trained or too)
    ]
    if at:
        raise CaptureError(
            "parameters share memory with other tensors of the model",
            at=at,
            remedy="tie them by assigning the same nn.Parameter, or clone one",
        )


def span(t: Tensor) -> tuple[int, int]:
    """Return where the memory of a tensor's elements begins and ends; zeros if it has none."""
    memory, first = t.untyped_storage().data_ptr(), int(t.storage_offset())
    last = first + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    size = t.element_size()
    return (memory + first * size, memory + (last + 1) * size) if memory else (0, 0)


def distinct_tensors(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Give each leaf its own tensor: torch.export makes one input of two that are one tensor."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [
        leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    ]
    fresh: tuple[Any, Any] = pytree.tree_unflatten(leaves, spec)
    return fresh


@contextlib.contextmanager
def training_flag(model: nn.Module, train: bool) -> Iterator[None]:
    """Put `model` into the mode `train`; restore every submodule's flag on leaving."""
    flags = [(module, module.training) for module in model.modules()]
    if model.training != train:
        model.train(train)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[bool]:
    """Turn `config.use_cache` off in all modules; yield whether any had it on."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    changed = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in changed:
        config.use_cache = False
    try:
        yield bool(changed)
    finally:
        for config in changed:
            config.use_cache = True


# ---- the export


def export(model: nn.Module, args: Any, kwargs: Any, shapes: Any = None) -> ExportedProgram:
    """Run torch.export under autograd, outside of any autocast of the caller.

    `shapes`, a torch.export.ShapesCollection, says which dims vary.

    Raises: CaptureError.
    """
    try:
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(without_fast_path())
            stack.enter_context(followed())
            stack.enter_context(captured_functions(current_line))
            stack.enter_context(without_gradient_hooks(current_line))
            stack.enter_context(without_seeding(current_line))
            stack.enter_context(watched_regions())
            stack.enter_context(marked_regions(current_line))
            stack.enter_context(kept_attributes(model))
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except CaptureError:
        raise
    except Exception as error:
        raise failure(error) from error


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep nn.TransformerEncoder in plain ops: its fused inference path has no gradient."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Take back the fake tensors that a traced forward has stored in attributes of modules."""
    before = [(path, m, dict(vars(m))) for path, m in model.named_modules()]
    try:
        yield
    finally:
        lost = []
        for path, module, old in before:
            now = vars(module)
            for name in [n for n, value in now.items() if value is not old.get(n)]:
                if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(now[name])):
                    lost.append(f"{path}.{name}".lstrip("."))
                    del now[name]
                    now.update({name: old[name]} if name in old else {})
        if lost:
            warnings.warn(
                f"the forward stores tensors in {', '.join(lost)}: a parallel model does not",
                stacklevel=2,
            )


class GradWatch(TorchFunctionMode):
    """Refuse no_grad within autocast: torch.export loses it there, and gradients go wrong."""

    depth = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, unless it turns gradients off within autocast."""
        off = func is torch._C._set_grad_enabled and not args[0]
        if off and self.depth and torch.is_grad_enabled():
            raise CaptureError(
                "no_grad within an autocast region cannot be captured",
                at=[(current_line(), "torch.no_grad()")],
                remedy="put no_grad around the autocast region, or use detach()",
            )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched_regions() -> Iterator[None]:
    """Count autocast regions, which pass by function modes, for a GradWatch."""
    watch = GradWatch()
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def count_enter(region: torch.autocast) -> Any:
        watch.depth += 1
        return enter(region)  # type: ignore[no-untyped-call]

    def count_exit(region: torch.autocast, *error: Any) -> Any:
        watch.depth -= 1
        return leave(region, *error)

    with (
        mock.patch.object(torch.autocast, "__enter__", count_enter),
        mock.patch.object(torch.autocast, "__exit__", count_exit),
        watch,
    ):
        yield


def current_line() -> str:
    """Return "file.py:line" of the model's code that runs now."""
    own = (os.path.dirname(__file__), contextlib.__file__)
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith(own)]
    return pick_line([(f.filename, f.lineno or 0) for f in frames])


def failure(error: Exception) -> CaptureError:
    """Return what torch.export raised as one line, with the user's line and a remedy."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(f.filename, f.lineno or 0) for f in frames if f.filename != __file__]
    reason = next((s for s in str(error).splitlines() if s.strip()), type(error).__name__).strip()
    code = frames[-1].line
    inside = [f for f in frames if f"{f.filename}:{f.lineno}".endswith(pick_line(lines) or "\0")]
    code = inside[-1].line if inside else code
    place = (pick_line(lines) or "torch.export", code or "")
    if re.search(r"data.?dependent|GuardOn|unbacked", f"{type(error)} {error}", re.IGNORECASE):
        return CaptureError(
            "the model's Python depends on the values of a tensor, and a plan is made before them",
            at=[place, ("torch", reason.partition(" (unhinted")[0])],
            remedy=VALUE_REMEDIES,
        )
    what = f"the model cannot be captured as one graph: {reason}"
    return CaptureError(what, at=[place], remedy=remedy(f"{type(error).__name__} {error}"))


VALUE_REMEDIES = (
    "compute with the values in tensors: torch.where in place of if and of x[mask]",
    "compute the number before the model is called, and pass it: a constant of the plan",
    "put these lines into a torch.library custom op: it runs whole, or as autotp.rule says",
)
"""What to do where Python depends on a tensor's values."""
WRITES = "a custom op that writes to its operands"
REGION = "a control-flow region"


def leftover_remedies(facts: Collection[str]) -> tuple[str, ...]:
    """Say what to do about nodes that a plan cannot hold."""
    out = ["make the op return what it writes: mutates_args=()"] if _said(WRITES, facts) else []
    out += ["write both branches, and torch.where between them"] if _said(REGION, facts) else []
    others = [f for f in facts if not f.endswith((WRITES, REGION))]
    return (*out, *(VALUE_REMEDIES if others else ()))


def _said(what: str, facts: Collection[str]) -> bool:
    return any(f.endswith(what) for f in facts)


def region_text(node: fx.Node) -> str:
    """Say what a call of a higher-order op is that a plan cannot hold."""
    if str(node.target).startswith("auto_functionalized"):
        return f"{node.args[0]}: {WRITES}"
    return f"{node.target}: {REGION}"


def remedy(text: str) -> str:
    """Say what to do about an error of torch.export."""
    if "pytree" in text or "Unsupported output" in text or "output type" in text:
        return "return tensors in tuples, lists or dicts (Hugging Face: use_cache=False)"
    if "no fake impl" in text:
        return "say what shape the op makes: @torch.library.register_fake"
    return "make torch.export.export(model, args, kwargs, strict=False) accept the model"
