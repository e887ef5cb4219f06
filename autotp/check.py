"""Compare the distributed program with the original model, all ranks in this one process.

    prepare   capture the model, and take one step (forward, backward, SGD) of the original
    compare   take the same step on every simulated rank of a plan; hold tensor beside tensor

The original is left as it was, and so is the state of torch's random generators.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autotp.comparison import (
    Difference,
    Divergence,
    Report,
    Tolerance,
    distance,
    finite_largest,
)
from autotp.divergence import first_divergence
from autotp.dynamic import DynamicInputs
from autotp.errors import LayoutError
from autotp.grid import Grid, as_grid
from autotp.layouts import I, Layout, layout_text
from autotp.passes.capture.model import capture
from autotp.passes.emit.verify import verify
from autotp.passes.factors import Factors, infer_factors
from autotp.passes.network import Network, Op, read_network
from autotp.passes.program import Program
from autotp.passes.rules.sentence import Dim
from autotp.plan import Plan
from autotp.reference import (
    LEARNING_RATE,
    SEED,
    Cotangents,
    Step,
    active_dropout,
    captured_step,
    leaf_params,
    nudge,
    original_step,
    other_draws,
    turn_off,
)
from autotp.simulate import (
    Execute,
    GridRun,
    differences,
    leaves,
    placeholder_values,
    run_grid,
)

Key = tuple[str, str]
"""Kind and name of a tensor."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A captured model with the step that every plan of it must reproduce.

    backward   the gradients that are sent back from the outputs
    jitter     how far each tensor moves when parameters, inputs and gradients are rounded anew
    captured   how far the captured graph is from the original: where dropout makes it stand
               between, or where it is off
    """

    model: str
    program: Program
    network: Network
    factors: Factors
    state: Mapping[str, Tensor]
    inputs: tuple[Tensor, ...]
    reference: Step
    backward: Cotangents
    tolerance: Tolerance
    jitter: Mapping[Key, float]
    captured: tuple[Difference, ...] = ()
    rng: str = "fast"
    notes: tuple[str, ...] = ()


def prepare(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rng: str = "fast",
    dynamic: DynamicInputs | None = None,
    like: Subject | None = None,
) -> Subject:
    """Capture `model` in its current mode and take the original's step on a copy of it.

    `dynamic` names the dims that vary. A subject of other sizes is `like` the first: one program.
    With rng="exact" dropout stays on: the ranks draw what the original draws.
    """
    members = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    state = {name: t.detach().clone() for name, t in members.items()}
    with torch.random.fork_rng(_devices(state)), torch.enable_grad():
        if like is None:
            program = capture(model, args, kwargs, train=model.training, dynamic=dynamic)
            with warnings.catch_warnings(action="ignore"):
                network = read_network(program)
        else:
            program, network = like.program, like.network
        rounding = tolerance(program, network)
        inputs = tuple(program.flatten_inputs(args, kwargs))
        reference, backward = original_step(model, program, args, kwargs)
        dropout = 0 if rng == "exact" else len(active_dropout(program))
        whole = captured_step(program, state, inputs, backward)
        captured = tuple(between_steps(program, reference, whole))
        if dropout:
            turn_off(program)
            reference = whole = captured_step(program, state, inputs, backward)
        jitter = moved_by_rounding(program, whole, state, inputs, backward, rounding.eps)
        captured = tuple(replace(d, jitter=jitter[d.kind, d.name]) for d in captured)
        if not dropout:  # the ranks stand beside the original themselves
            captured = tuple(d for d in captured if d.relative(rounding) > rounding.value)
    return Subject(
        model=type(model).__name__,
        program=program,
        network=network,
        factors=like.factors if like else infer_factors(network, program.inputs),
        state=state,
        inputs=inputs,
        reference=reference,
        backward=backward,
        tolerance=rounding,
        jitter=jitter,
        captured=tuple(replace(d, kind=f"captured {d.kind}") for d in captured),
        rng=rng,
        notes=tuple(_notes(program, network, dropout, rounding, rng)),
    )


def moved_by_rounding(
    program: Program,
    whole: Step,
    state: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    backward: Cotangents,
    eps: float,
    draw: int = 0,
) -> dict[Key, float]:
    """Return how far each tensor of a step moves where the data is rounded anew at random."""
    moved = captured_step(program, *nudge(state, inputs, eps, draw), backward, eps)
    return {(d.kind, d.name): d.error for d in between_steps(program, whole, moved)}


def _devices(state: Mapping[str, Tensor]) -> list[torch.device]:
    return sorted({t.device for t in state.values() if t.is_cuda}, key=str)


COARSE = 0.05
"""A tolerance above which equality says little."""


def _notes(
    program: Program, network: Network, dropout: int, rounding: Tolerance, rng: str
) -> Iterator[str]:
    if rounding.value > COARSE:
        yield f"{rounding.dtype} is too coarse to prove much: check model.float() or .double()"
    for op, count in network.unruled.items():
        yield f"{op} has no rule: its {count} calls run whole on every rank"
    if dropout:
        yield (
            f"dropout is active at {dropout} sites: the captured graph was compared with the"
            " original under one seed, the ranks with the captured graph, dropout turned off"
        )
    for name in other_draws(program) if rng == "fast" else ():
        yield f"{name} draws random numbers: what depends on it cannot be equal"


def compare(subject: Subject, plan: Plan) -> Report:
    """Take the step of `subject` on every rank of `plan`, and report what differs."""
    problems: list[str] = []
    found = list(subject.captured)
    with torch.random.fork_rng(_devices(subject.state)), torch.enable_grad():
        try:
            run = take_step(subject, plan)
        except Exception as error:  # whatever a rank raises is a finding
            problems.append("; ".join([f"{type(error).__name__}: {error}", *_added(error)]))
        else:
            problems += type_problems(subject, plan, run)
            found += [
                replace(d, jitter=subject.jitter[d.kind, d.name])
                for d in between(subject, plan, run)
            ]
        report = Report(
            model=subject.model,
            grid=str(plan.grid),
            mode="train" if plan.train else "eval",
            differences=tuple(found),
            tolerance=subject.tolerance,
            problems=tuple(problems),
            notes=(*subject.notes, *_plan_notes(plan)),
        )
        if not (report.ok or problems):
            report = _beside_more_rounding(subject, report)
        return report if report.ok else replace(report, first=_first(subject, plan))


MORE_DRAWS = (1, 2)
"""Roundings that are tried before a tensor is said to differ: one alone may move it hardly."""


def _beside_more_rounding(subject: Subject, report: Report) -> Report:
    """Return the report with what the most that any of several roundings moves explains."""
    data = (subject.state, subject.inputs, subject.backward)
    whole = captured_step(subject.program, *data)
    drawn = [
        moved_by_rounding(subject.program, whole, *data, subject.tolerance.eps, draw)
        for draw in MORE_DRAWS
    ]

    def widened(d: Difference) -> Difference:
        key = d.kind.removeprefix("captured "), d.name
        return replace(d, jitter=max(d.jitter, *(jitter[key] for jitter in drawn)))

    return replace(report, differences=tuple(map(widened, report.differences)))


def _plan_notes(plan: Plan) -> Iterator[str]:
    if plan.grid.world_size > 1 and not any(d.factors for d in plan.decisions):
        yield "the plan splits nothing, every rank runs it whole: pins or another cluster split it"


def take_step(subject: Subject, plan: Plan, execute: Execute | None = None) -> GridRun:
    """Run forward, backward and one SGD step on every rank; with `execute`, no SGD step."""
    return run_grid(
        subject.program,
        subject.network,
        plan,
        subject.state,
        subject.inputs,
        backward=subject.backward,
        seed=SEED,
        lr=0.0 if execute else LEARNING_RATE,
        execute=execute,
        rng=subject.rng,
    )


def _first(subject: Subject, plan: Plan) -> Divergence | None:
    program, eps = subject.program, subject.tolerance.eps

    def values(state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        params = leaf_params(program, state)
        return placeholder_values(program, params, state, leaves(inputs))

    return first_divergence(
        program,
        values(subject.state, subject.inputs),
        values(*nudge(subject.state, subject.inputs, eps)),
        subject.backward,
        lambda execute: take_step(subject, plan, execute),
        plan.grid,
        subject.tolerance,
    )


def _added(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def type_problems(subject: Subject, plan: Plan, run: GridRun) -> list[str]:
    """Return what the type check says of rank 0's program."""
    try:
        verify(run.ranks[0].module, subject.network, subject.factors, plan.grid)
    except LayoutError as error:
        return [str(error)]
    return []


# Tensor beside tensor -----------------------------------------------------------------------------


def between(subject: Subject, plan: Plan, run: GridRun) -> Iterator[Difference]:
    """Yield the difference of every tensor that a step gives."""
    step, grid, whole = subject.reference, plan.grid, (I,) * len(plan.grid.sizes)
    for k, (kind, name, value) in enumerate(_returned(subject.program, step)):
        pieces = [rank.outputs[k] for rank in run.ranks]
        yield difference(kind, name, pieces, plan.outputs[k] or whole, value, grid)
    for name, value in step.gradients.items():
        layout = plan.params[name].layout if name in plan.params else whole
        pieces = [_gradient(r.gradients[name], r.params.get(name, value)) for r in run.ranks]
        yield difference("gradient", name, pieces, layout, value, grid)
    for name, value in step.params.items():
        pieces = [rank.params[name] for rank in run.ranks]
        yield difference("parameter", name, pieces, plan.params[name].layout, value, grid)


def between_steps(program: Program, original: Step, other: Step) -> Iterator[Difference]:
    """Yield the difference of every tensor of two steps of the whole model."""
    alone = as_grid((1,))
    pairs = zip(_everything(program, original), _everything(program, other), strict=True)
    for (kind, name, value), (_, _, here) in pairs:
        yield difference(kind, name, [here], (I,), value, alone)


def _everything(program: Program, step: Step) -> Iterator[tuple[str, str, Tensor]]:
    yield from _returned(program, step)
    yield from (("gradient", name, value) for name, value in step.gradients.items())
    yield from (("parameter", name, value) for name, value in step.params.items())


def _returned(program: Program, step: Step) -> Iterator[tuple[str, str, Tensor]]:
    """Yield kind, name and value of what a graph returns, in its order."""
    for node, value in zip(program.outputs, step.outputs, strict=True):
        loss = value.ndim == 0 and node in program.requires_grad
        yield "loss" if loss else "output", program.names[node], value
    for name in program.mutations.values():
        yield "buffer", name, step.buffers[name]


def _gradient(given: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if given is None else given


def difference(
    kind: str, name: str, pieces: Sequence[Tensor], layout: Layout, whole: Tensor, grid: Grid
) -> Difference:
    """Return how far what the ranks hold is from `whole`."""
    pieces = [p.detach() for p in pieces]
    error = max(distance(a, b) for a, b in differences(pieces, layout, whole, grid))
    largest = finite_largest(whole)
    return Difference(kind, name, layout_text(layout), error, largest, largest)


# Tolerance ----------------------------------------------------------------------------------------


def tolerance(program: Program, network: Network) -> Tolerance:
    """Return what rounding may explain in a program."""
    floats = [v for v in network.values.values() if v.dtype.is_floating_point]
    coarse = max(floats, key=lambda v: torch.finfo(v.dtype).eps)
    sums = [(longest_sum(op), op.name) for op in network.ops]
    terms, longest = max(sums, key=lambda item: item[0], default=(1, coarse.name))
    label = program.names.get(coarse.name.partition(".")[0], coarse.name)
    dtype = str(coarse.dtype).removeprefix("torch.")
    eps = torch.finfo(coarse.dtype).eps
    return Tolerance(dtype, eps, label, terms, program.names[longest])


def longest_sum(op: Op) -> int:
    """Return the terms of an op's longest sum: over what a result, or a gradient, lacks.

    Factors that stay whole do not count, nor what a local program sums (a vocabulary looked up).
    """
    signature = op.signature
    read = _factors(dim for dims in signature.operands for dim in dims)
    made = _factors(dim for dims in signature.results for dim in dims)
    summed = read - made - set(op.rule.own)
    lacking = [summed, *(made - _factors(dims) for dims in signature.operands)]
    sizes = [[int(signature.sizes[f]) for f in absent - signature.whole] for absent in lacking]
    return max(map(math.prod, sizes))


def _factors(dims: Any) -> set[str]:
    found: Iterator[Dim] = iter(dims)
    return {f for dim in found for product in dim for f in product}
