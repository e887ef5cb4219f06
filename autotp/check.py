"""Compare the distributed program with the original model, all ranks in this one process.

    prepare   capture the model, and take one step (forward, backward, SGD) of the original
    compare   take the same step on every simulated rank of a plan; hold tensor beside tensor

The original is left as it was, the state of the random generators too. Where dropout is active the
original draws masks that no split program repeats: there the captured graph is compared with the
original under one seed, and the ranks with the captured graph, dropout turned off in both.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autotp.divergence import first_divergence
from autotp.errors import AutotpError, LayoutError
from autotp.grid import Grid
from autotp.layouts import I, Layout, layout_text
from autotp.passes.capture import capture
from autotp.passes.export import training_flag, without_cache
from autotp.passes.factors import Factors, infer_factors
from autotp.passes.network import Network, Op, read_network
from autotp.passes.program import Program
from autotp.passes.rules.sentence import Dim, Signature
from autotp.passes.verify import verify
from autotp.plan import Plan
from autotp.report import FLOOR, Difference, Report, Tolerance
from autotp.simulate import (
    GridRun,
    differences,
    leaves,
    placeholder_values,
    run_backward,
    run_grid,
    sgd_step,
)

aten = torch.ops.aten
LEARNING_RATE = 0.1
SEED = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the whole model gives: user outputs, buffers written, gradients, params."""

    outputs: tuple[Tensor, ...]
    buffers: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    params: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Subject:
    """A captured model with the step that every plan of it must reproduce.

    backward   the gradients that are sent back from the outputs
    captured   how far the captured graph is from the original, where that stands between
    """

    model: str
    program: Program
    network: Network
    factors: Factors
    state: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    reference: Step
    backward: tuple[Tensor | None, ...]
    captured: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()


def prepare(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Subject:
    """Capture `model` in its current mode and take the original's step on a copy of it."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise AutotpError("a check needs weights", remedy="build the model off the meta device")
    devices = sorted({t.device for t in model.parameters() if t.is_cuda}, key=str)
    with torch.random.fork_rng(devices), torch.enable_grad():
        program = capture(model, args, kwargs, train=model.training)
        with warnings.catch_warnings(record=True):
            network = read_network(program)
        state = {**dict(named(model.named_parameters)), **dict(named(model.named_buffers))}
        inputs = tuple(program.flatten_inputs(args, kwargs))
        reference, backward = original_step(model, program, args, kwargs)
        captured: tuple[Difference, ...] = ()
        dropout = active_dropout(program)
        if dropout:
            drawn = captured_step(program, state, inputs, backward)
            captured = tuple(between_steps(reference, drawn))
            turn_off(program)
            reference = captured_step(program, state, inputs, backward)
    notes = [f"{op} without a rule, {n} calls: run whole" for op, n in network.unruled.items()]
    notes += [_dropout_note(dropout)] if dropout else []
    return Subject(
        model=type(model).__name__,
        program=program,
        network=network,
        factors=infer_factors(network, program.inputs),
        state=state,
        inputs=inputs,
        reference=reference,
        backward=backward,
        captured=captured,
        notes=tuple(notes),
    )


def compare(subject: Subject, plan: Plan) -> Report:
    """Take the step of `subject` on every rank of `plan`, and report what differs."""
    problems: list[str] = []
    found: list[Difference] = list(subject.captured)
    with torch.random.fork_rng([]), torch.enable_grad():
        try:
            run = take_step(subject, plan)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}; {_notes(error)}")
        else:
            problems += type_problems(subject, plan, run)
            found += with_floor(between(subject, plan, run))
        report = Report(
            model=subject.model,
            grid=str(plan.grid),
            mode="train" if plan.train else "eval",
            differences=tuple(found),
            tolerance=tolerance(subject.program, subject.network),
            problems=tuple(problems),
            notes=subject.notes,
        )
        return report if report.ok else with_first(report, subject, plan)


def take_step(subject: Subject, plan: Plan, execute: Any = None) -> GridRun:
    """Run forward, backward and one SGD step on every rank."""
    return run_grid(
        subject.program,
        subject.network,
        plan,
        subject.state,
        subject.inputs,
        backward=subject.backward,
        lr=LEARNING_RATE,
        execute=execute,
    )


def with_first(report: Report, subject: Subject, plan: Plan) -> Report:
    """Return `report` with the node at which the difference begins."""
    first = first_divergence(
        subject.program,
        placeholder_values(
            subject.program, _leaf_params(subject.state, subject.program), subject.state,
            leaves(subject.inputs),
        ),
        subject.backward,
        lambda execute: take_step(subject, plan, execute),
        plan.grid,
        report.tolerance.value,
    )  # fmt: skip
    values = {name: getattr(report, name) for name in Report.__dataclass_fields__}
    return Report(**(values | {"first": first}))


def _notes(error: BaseException) -> str:
    return "; ".join(getattr(error, "__notes__", ()))


def type_problems(subject: Subject, plan: Plan, run: GridRun) -> list[str]:
    """Return what the type check says of rank 0's program."""
    try:
        verify(run.ranks[0].module, subject.network, subject.factors, plan.grid)
    except LayoutError as error:
        return [str(error)]
    return []


# The original --------------------------------------------------------------------------------------


def named(members: Callable[..., Iterator[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    """Return copies of a module's parameters or buffers under all their names."""
    return {name: t.detach().clone() for name, t in members(remove_duplicate=False)}


def original_step(
    model: nn.Module, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Step, tuple[Tensor | None, ...]]:
    """Run a copy of the original; return its step and the gradients sent back from its outputs."""
    whole = copy.deepcopy(model)
    whole.zero_grad(set_to_none=True)
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = iter(leaves([leaf for leaf in flat if isinstance(leaf, Tensor)]))
    fresh = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in flat]
    args, kwargs = pytree.tree_unflatten(fresh, spec)
    torch.manual_seed(SEED)
    with training_flag(whole, program.train), without_cache(whole):
        result = whole(*args, **kwargs)
    outputs = [o for o in pytree.tree_leaves(result) if isinstance(o, Tensor)]
    backward = cotangents(outputs)
    run_backward(outputs, backward)
    params = dict(whole.named_parameters())
    inputs = dict(zip(program.inputs, program.flatten_inputs(args, kwargs), strict=True))
    buffers = dict(whole.named_buffers(remove_duplicate=False))
    written = {name: buffers[name] for name in program.mutations.values()}
    return _step(outputs, written, params, inputs), backward


def captured_step(
    program: Program,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    backward: Sequence[Tensor | None],
) -> Step:
    """Run the captured graph, whole, as the original was run."""
    params, own = _leaf_params(state, program), leaves(inputs)
    torch.manual_seed(SEED)
    values = program.graph_module(*placeholder_values(program, params, state, own))
    run_backward(values, backward)
    count = len(program.outputs)
    written = dict(zip(program.mutations.values(), values[count:], strict=True))
    return _step(values[:count], written, params, dict(zip(program.inputs, own, strict=True)))


def _leaf_params(state: Mapping[str, Tensor], program: Program) -> dict[str, Tensor]:
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
    grads = {name: t.grad for name, t in (*params.items(), *inputs.items()) if t.requires_grad}
    sgd_step(list(params.values()), LEARNING_RATE)
    return Step(
        outputs=tuple(o.detach() for o in outputs),
        buffers={name: b.detach().clone() for name, b in buffers.items()},
        gradients=grads,
        params={name: p.detach() for name, p in params.items()},
    )


def cotangents(outputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return what is sent back: one from a scalar loss, else random numbers from every output."""
    carry = [o.requires_grad for o in outputs]
    first = carry.index(True) if True in carry else 0
    if any(carry) and outputs[first].ndim == 0:
        return tuple(torch.ones_like(o) if k == first else None for k, o in enumerate(outputs))
    generator = torch.Generator().manual_seed(SEED)
    return tuple(
        torch.randn(o.shape, generator=generator).to(o.device, o.dtype) if c else None
        for o, c in zip(outputs, carry, strict=True)
    )


# Dropout -------------------------------------------------------------------------------------------

RATES = {aten.dropout.default: 1, aten.scaled_dot_product_attention.default: 4}
"""Ops that drop, and the argument that says how much."""


def rate(node: fx.Node) -> float:
    """Return the share that a node drops; 0 for ops that drop nothing."""
    at = RATES.get(node.target)  # type: ignore[arg-type]
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
        at = RATES[node.target]  # type: ignore[index]
        if at < len(node.args):
            node.update_arg(at, 0.0)
        else:
            node.update_kwarg("dropout_p", 0.0)
    program.graph_module.recompile()


def _dropout_note(nodes: Sequence[fx.Node]) -> str:
    return (
        f"dropout is active at {len(nodes)} sites: the captured graph was compared with the"
        " original under one seed, the ranks with the captured graph, dropout turned off in both"
    )


# Tensor beside tensor ------------------------------------------------------------------------------


def between(subject: Subject, plan: Plan, run: GridRun) -> Iterator[Difference]:
    """Yield the difference of every tensor that a step gives."""
    step, whole = subject.reference, (I,) * len(plan.grid.sizes)
    written = [f"{name}" for name in subject.program.mutations.values()]
    expected = [*step.outputs, *(step.buffers[name] for name in written)]
    for k, value in enumerate(expected):
        kind, name = _output_name(subject, k, written)
        pieces = [r.outputs[k] for r in run.ranks]
        yield difference(kind, name, pieces, plan.outputs[k] or whole, value, plan.grid)
    for name, grad in step.gradients.items():
        layout = plan.params[name].layout if name in plan.params else whole
        pieces = _filled([r.gradients.get(name) for r in run.ranks], grad, layout, plan)
        if pieces:
            value = grad if grad is not None else torch.zeros_like(subject.state[name])
            yield difference("gradient", name, pieces, layout, value, plan.grid)
    for name, resting in plan.params.items():
        pieces = [r.params[name].detach() for r in run.ranks]
        yield difference(
            "parameter", name, pieces, resting.layout, step.params[name], plan.grid
        )


def _output_name(subject: Subject, k: int, written: Sequence[str]) -> tuple[str, str]:
    outputs = subject.reference.outputs
    if k >= len(outputs):
        return "buffer", written[k - len(outputs)]
    loss = outputs[k].ndim == 0 and subject.backward[k] is not None
    return ("loss" if loss else "output"), subject.program.outputs[k]


def _filled(
    pieces: Sequence[Tensor | None], whole: Tensor | None, layout: Layout, plan: Plan
) -> list[Tensor]:
    """Return gradients with zeros for those that are absent; nothing where all are."""
    if whole is None and all(p is None for p in pieces):
        return []
    assert any(p is not None for p in pieces) or whole is not None
    zeros = _zeros_like(pieces, whole, layout, plan)
    return [zeros[k] if p is None else p for k, p in enumerate(pieces)]


def _zeros_like(
    pieces: Sequence[Tensor | None], whole: Tensor | None, layout: Layout, plan: Plan
) -> list[Tensor]:
    from autotp.layouts import local_shape

    like = next(p for p in (*pieces, whole) if p is not None)
    return []


def between_steps(original: Step, other: Step) -> Iterator[Difference]:
    return iter(())


def tolerance(program: Program, network: Network) -> Tolerance:
    raise NotImplementedError


def difference(*a: Any) -> Difference:
    raise NotImplementedError


def with_floor(rows: Iterator[Difference]) -> list[Difference]:
    raise NotImplementedError
