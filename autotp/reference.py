"""One training step of the whole model, which every plan must reproduce.

    original_step   the model itself, on a copy: forward, backward, SGD
    captured_step   the captured graph, run whole
    nudge           the same data rounded anew: how far results move says what rounding may do
    _Rounded        the same for every gradient on its way back

Where dropout is active the original draws masks that no split program repeats: then the captured
graph is held beside the original under one seed, dropout is turned off in the graph (`turn_off`),
and the graph's own step becomes the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autotp.passes.capture.draws import dense_strides, draws
from autotp.passes.capture.export import training_flag, without_cache
from autotp.passes.capture.hooks import without_own_hooks
from autotp.passes.program import Program
from autotp.simulate import leaves, placeholder_values, run_backward, sgd_step

aten = torch.ops.aten
LEARNING_RATE = 0.1
SEED = 0

Cotangents = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step gives: user outputs, buffers written, gradients (zero if absent), params."""

    outputs: tuple[Tensor, ...]
    buffers: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    params: Mapping[str, Tensor]


def original_step(
    model: nn.Module, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Step, Cotangents]:
    """Run a copy of the original; return its step and the gradients sent back from its outputs."""
    whole = copy.deepcopy(model)
    whole.zero_grad(set_to_none=True)
    args, kwargs = fresh_inputs(args, kwargs)
    torch.manual_seed(SEED)
    with training_flag(whole, program.train), without_own_hooks(whole), without_cache(whole):
        result = whole(*args, **kwargs)
    outputs = [o for o in pytree.tree_leaves(result) if isinstance(o, Tensor)]
    backward = cotangents(outputs)
    run_backward(outputs, backward)
    params = dict(whole.named_parameters())
    inputs = dict(zip(program.inputs, program.flatten_inputs(args, kwargs), strict=True))
    buffers = dict(whole.named_buffers(remove_duplicate=False))
    written = {name: buffers[name] for name in program.mutations.values()}
    read = {name: params[name] for name in program.params.values()}
    return _step(outputs, written, read, inputs), backward


def fresh_inputs(args: Any, kwargs: Any) -> Any:
    """Return the arguments of a call with their tensors as leaves of a new graph."""
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = iter(leaves([leaf for leaf in flat if isinstance(leaf, Tensor)]))
    fresh = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in flat]
    return pytree.tree_unflatten(fresh, spec)


def captured_step(
    program: Program,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    backward: Cotangents,
    eps: float = 0.0,
) -> Step:
    """Run the captured graph, whole, as the original was run.

    With `eps` every gradient on its way back is moved by that share of itself, see `_Rounded`.
    """
    params, own = leaf_params(program, state), leaves(inputs)
    torch.manual_seed(SEED)
    graph = _Rounded(program.graph_module, eps) if eps else _InOrder(program.graph_module)
    values = graph.run(*placeholder_values(program, params, state, own))
    run_backward(values, backward)
    count = len(program.outputs)
    written = dict(zip(program.mutations.values(), values[count:], strict=True))
    return _step(values[:count], written, params, dict(zip(program.inputs, own, strict=True)))


class _InOrder(fx.Interpreter):
    """Run a captured graph, each draw on operands that lie in memory as the original's do.

    Capture drops copies, and the order in memory says which random number falls where.
    """

    def run_node(self, n: fx.Node) -> Any:
        if draws(n):
            for operand in n.all_input_nodes:
                self.env[operand] = _in_order(self.env[operand], operand.meta["val"])
        return super().run_node(n)


class _Rounded(_InOrder):
    """Run a captured graph whose gradients all move up by `eps` of their own size.

    A sum of n gradients g then moves by eps (|g_1| + ... + |g_n|), the bound of what adding them up
    may round, also where they cancel: the gradient of a bias that shifts every logit alike is zero
    in exact arithmetic, and data rounded anew may leave its rounding as it was.
    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2.
    """

    def __init__(self, module: fx.GraphModule, eps: float) -> None:
        super().__init__(module)
        self.eps = eps

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            raise_gradient(value, self.eps)
        return value


def raise_gradient(value: Tensor, eps: float) -> None:
    """Let the gradient that comes back to `value`, if any, move up by `eps` of its own size."""

    def raised(grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad + eps * grad.abs()  # one of several may have none

    if eps and value.requires_grad:
        value.register_hook(raised)  # type: ignore[no-untyped-call]


def _in_order(x: Any, like: Any) -> Any:
    if not isinstance(x, Tensor) or dense_strides(x) == dense_strides(like):
        return x
    moved = torch.empty_strided(x.shape, dense_strides(like), dtype=x.dtype, device=x.device)
    return moved.copy_(x)


def leaf_params(program: Program, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole parameters as leaves of a new graph."""
    return {
        fqn: state[fqn].detach().clone().requires_grad_(node in program.requires_grad)
        for node, fqn in program.params.items()
    }


def _step(
    outputs: Sequence[Tensor],
    buffers: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> Step:
    """Take the SGD step and keep what it gives."""
    grads = {
        name: torch.zeros_like(t) if t.grad is None else t.grad.clone()
        for name, t in (*params.items(), *inputs.items())
        if t.requires_grad
    }
    returned = tuple(o.detach().clone() for o in outputs)  # a parameter too is as it was
    sgd_step(list(params.values()), LEARNING_RATE)
    return Step(
        outputs=returned,
        buffers={name: b.detach().clone() for name, b in buffers.items()},
        gradients=grads,
        params={name: p.detach() for name, p in params.items()},
    )


def nudge(
    state: Mapping[str, Tensor], inputs: Sequence[Tensor], eps: float, draw: int = 0
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return parameters, buffers and inputs with every float rounded up or down at random.

    Each `draw` rounds in other directions.
    """
    generator = torch.Generator().manual_seed(SEED + draw)
    moved: dict[int, Tensor] = {}
    for t in (*state.values(), *inputs):
        up = torch.rand(t.shape, generator=generator).to(t.device) < 0.5
        scale = 1 + torch.where(up, eps, -eps).to(t.dtype)
        value = t.detach() * scale if t.is_floating_point() else t.detach().clone()
        moved[id(t)] = value.requires_grad_(t.requires_grad)
    return {name: moved[id(t)] for name, t in state.items()}, [moved[id(t)] for t in inputs]


def cotangents(outputs: Sequence[Tensor]) -> Cotangents:
    """Return what is sent back: one from a scalar loss, else random numbers from every output."""
    carry = [o.requires_grad for o in outputs]
    first = carry.index(True) if any(carry) else 0
    if any(carry) and outputs[first].ndim == 0:
        return tuple(torch.ones_like(o) if k == first else None for k, o in enumerate(outputs))
    generator = torch.Generator().manual_seed(SEED)
    return tuple(
        torch.randn(o.shape, generator=generator).to(o.device, o.dtype) if c else None
        for o, c in zip(outputs, carry, strict=True)
    )


# Dropout ------------------------------------------------------------------------------------------

RATES: dict[Any, int] = {aten.dropout.default: 1, aten.scaled_dot_product_attention.default: 4}
"""Ops that drop, and the argument that says how much."""


def rate(node: fx.Node) -> float:
    """Return the share that a node drops; 0 for ops that drop nothing."""
    at = RATES.get(node.target)
    if at is None or (node.target is aten.dropout.default and not node.args[2]):
        return 0.0
    given: Any = node.args[at] if at < len(node.args) else node.kwargs.get("dropout_p", 0.0)
    return float(given)


def active_dropout(program: Program) -> list[fx.Node]:
    """Return the nodes that drop something."""
    return [node for node in program.graph.nodes if rate(node)]


def turn_off(program: Program) -> None:
    """Set the rate of every dropout of a captured program to zero, in place."""
    for node in active_dropout(program):
        at = RATES[node.target]
        if at < len(node.args):
            node.update_arg(at, 0.0)
        else:
            node.update_kwarg("dropout_p", 0.0)
    program.graph_module.recompile()


def other_draws(program: Program) -> list[str]:
    """Return the ops, other than dropout, that draw random numbers."""
    return sorted(
        {
            str(node.target)
            for node in program.graph.nodes
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            and node.target not in RATES
        }
    )
