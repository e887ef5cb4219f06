"""The module that runs: the user's own model, in place, with its forward replaced.

`ParallelModule` is mixed into the model's class (as FSDP2 does), so that its names, buffers, methods
and attributes stay. Parameters become DTensors; `forward` hands their local tensors to the emitted
graph of the mode (train or eval; captured separately) and rebuilds the original's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autotp.axis import Axis, dist_axes
from autotp.grid import Grid
from autotp.layouts import Layout, take_shard
from autotp.optimizers import note_replacement
from autotp.passes.program import Program
from autotp.placements import as_dtensor, as_parameter
from autotp.plan import Plan
from autotp.randomness import agreed_step_seed


@dataclass(frozen=True, slots=True)
class Compiled:
    """One mode's program, its plan and the graph of this rank."""

    program: Program
    plan: Plan
    graph_module: fx.GraphModule


Compile = Callable[[nn.Module, Sequence[Any], Mapping[str, Any], bool], Compiled]
"""From a model with whole parameters, inputs and the mode, the program of this rank."""


@dataclass(slots=True)
class State:
    """What a parallel module knows beside the model: where it runs, and its programs by mode."""

    grid: Grid
    compile: Compile
    outputs: str
    mesh: DeviceMesh
    axes: dict[str, Axis]
    modes: dict[bool, Compiled] = field(default_factory=dict)
    owners: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)


class ParallelModule(nn.Module):
    """A model whose forward is the distributed program of one rank."""

    _autotp: State

    @property
    def plan(self) -> Plan:
        """The plan of the current mode."""
        return self._compiled().plan

    @property
    def graph_module(self) -> fx.GraphModule:
        """The emitted program of this rank for the current mode."""
        return self._compiled().graph_module

    def _compiled(self) -> Compiled:
        modes = self._autotp.modes
        return modes.get(self.training) or next(iter(modes.values()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run this rank's program on the global batch; return what the original would."""
        state = self._autotp
        compiled = state.modes.get(self.training) or compile_mode(self, args, kwargs)
        program = compiled.program
        inputs = program.flatten_inputs(*_whole_inputs(args, kwargs))
        rng = compiled.graph_module.meta["rng"]
        if rng is not None:
            rng.step_seed = agreed_step_seed(state.axes.values())
        values = compiled.graph_module(*_arguments(state, program, inputs))
        count = len(program.outputs)
        for (_, fqn), value in zip(program.mutations.items(), values[count:], strict=True):
            module, name = state.owners[fqn]
            with torch.no_grad():
                cast(Tensor, module._buffers[name]).copy_(value)
        outputs = values[:count]
        if state.outputs == "sharded":
            outputs = _as_dtensors(state, compiled, outputs)
        return program.unflatten_outputs(outputs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the original model's state dict (whole tensors), or this module's own."""
        own = dict(self.state_dict())
        placed = {
            name: _place(self._autotp, name, value, own.get(name))
            for name, value in state_dict.items()
        }
        return super().load_state_dict(placed, strict=strict, assign=assign)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the original model's state dict, every tensor whole. All ranks must call it."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }


def _place(state: State, name: str, value: Tensor, own: object) -> Tensor:
    """Return a whole tensor as the DTensor that the module has in its place."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or value.shape != own.shape:
        return value  # torch's own error names a wrong shape
    layout = state.layouts[name]
    coords = state.grid.coords(state.mesh.get_rank())
    local = take_shard(value.to(own.device), layout, state.grid, coords)
    return as_dtensor(local, layout, tuple(own.shape), state.mesh)


def _whole_inputs(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    def whole(leaf: Any) -> Any:
        return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf

    out: tuple[Sequence[Any], Mapping[str, Any]]
    out = torch.utils._pytree.tree_map(whole, (tuple(args), dict(kwargs)))
    return out


def _arguments(state: State, program: Program, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the graph's arguments: local parameters, buffers, constants, then inputs."""
    for fqn in program.params.values():
        module, name = state.owners[fqn]
        yield cast(DTensor, module._parameters[name]).to_local()
    for fqn in program.buffers.values():
        module, name = state.owners[fqn]
        yield cast(Tensor, module._buffers[name])
    yield from program.constants.values()
    yield from inputs


def _as_dtensors(state: State, compiled: Compiled, outputs: Sequence[Tensor]) -> list[Tensor]:
    shapes = [_output_shape(compiled.program, name) for name in compiled.program.outputs]
    layouts = compiled.plan.outputs
    return [
        as_dtensor(out, layout, shape, state.mesh) if layout is not None else out
        for out, layout, shape in zip(outputs, layouts, shapes, strict=False)
    ]


def _output_shape(program: Program, name: str) -> tuple[int, ...]:
    (node,) = [n for n in program.graph.nodes if n.name == name]
    return tuple(node.meta["val"].shape)


# Making one -----------------------------------------------------------------------------------------


def make_parallel(model: nn.Module, state: State) -> ParallelModule:
    """Change the class of `model` to its parallel one, in place."""
    base = type(model)
    model.__class__ = type(f"Parallel{base.__name__}", (ParallelModule, base), {})
    parallel = cast(ParallelModule, model)
    object.__setattr__(parallel, "_autotp", state)
    return parallel


def compile_mode(
    model: ParallelModule, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Compiled:
    """Capture, plan and emit the current mode; the first time, distribute the parameters."""
    state = model._autotp
    first = not state.modes
    parallel = type(model)
    with _original_class(model), _whole_parameters(model):
        compiled = state.compile(model, args, kwargs, model.training)
    assert type(model) is parallel
    state.modes[model.training] = compiled
    if first:
        distribute(model, compiled)
    state.owners = owners_of(model)
    return compiled


class _original_class:  # noqa: N801 - a context manager reads as a verb
    """Give a parallel model its own class and forward back while it is captured."""

    def __init__(self, model: ParallelModule) -> None:
        self.model, self.parallel = model, type(model)

    def __enter__(self) -> None:
        self.model.__class__ = self.parallel.__mro__[2]

    def __exit__(self, *_error: object) -> None:
        self.model.__class__ = self.parallel


class _whole_parameters:  # noqa: N801
    """Put parameters of the whole shape in place of sharded ones; capture never reads them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> None:
        whole: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, p in module._parameters.items():
                if isinstance(p, DTensor):
                    self.kept.append((module, name, p))
                    if id(p) not in whole:
                        blank = torch.empty(p.shape, dtype=p.dtype, device=p.device)
                        whole[id(p)] = nn.Parameter(blank, requires_grad=p.requires_grad)
                    module._parameters[name] = whole[id(p)]

    def __exit__(self, *_error: object) -> None:
        for module, name, p in self.kept:
            module._parameters[name] = p


def owners_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the module and the attribute of every parameter and buffer, tied names included."""
    return {
        (f"{path}.{name}" if path else name): (module, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }


def distribute(model: ParallelModule, compiled: Compiled) -> None:
    """Replace every parameter by the DTensor that rests as planned, keeping ties and attributes."""
    state = model._autotp
    coords = state.grid.coords(state.mesh.get_rank())
    made: dict[int, nn.Parameter] = {}
    layouts = {
        id(module._parameters[name]): compiled.plan.params[fqn].layout
        for fqn, (module, name) in owners_of(model).items()
        if fqn in compiled.plan.params
    }
    for fqn, (module, name) in owners_of(model).items():
        old = module._parameters.get(name)
        if old is None:
            continue
        layout = state.layouts[fqn] = layouts[id(old)]
        if id(old) not in made:
            local = take_shard(old.detach(), layout, state.grid, coords).clone()
            new = as_parameter(local, layout, old.shape, state.mesh, old.requires_grad)
            new.__dict__.update(old.__dict__)
            made[id(old)] = new
            note_replacement(old, new)
        module._parameters[name] = made[id(old)]


def new_state(grid: Grid, compile: Compile, outputs: str, mesh: DeviceMesh) -> State:
    """Return the state of a module that has not been captured yet."""
    return State(grid, compile, outputs, mesh, dist_axes(mesh))
