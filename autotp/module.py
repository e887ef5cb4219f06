"""The module that runs: the user's own model, in place, with its forward replaced.

`ParallelModule` is mixed into the model's class (as FSDP2 does), so that its names, buffers,
methods and attributes stay. Parameters become DTensors; `forward` hands their local tensors to the
emitted graph of the mode (train or eval; captured separately) and rebuilds the original's outputs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from autotp.axis import Axis
from autotp.dist_axis import dist_axes
from autotp.distribute import distribute, owners_of, whole_parameters
from autotp.errors import RuntimeStateError
from autotp.grid import Coords, Grid
from autotp.layouts import Layout, layout_text, take_shard
from autotp.numerics import run_checked
from autotp.passes.capture.hooks import hook_numbers
from autotp.passes.emit.again import RECALLS
from autotp.passes.program import Program
from autotp.placements import as_dtensor, local_tensor, whole
from autotp.plan import Plan
from autotp.randomness import agreed_step_seed, refuse_unequal_generators
from autotp.ranks import digest, refuse_disagreement, together
from autotp.recall import run_recalled


@dataclass(frozen=True, slots=True)
class Compiled:
    """One mode's program, its plan and the graph of this rank."""

    program: Program
    plan: Plan
    graph_module: fx.GraphModule

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors of a call in the graph's order, if the plan can run them.

        Raises: InputError.
        """
        inputs = self.program.flatten_inputs(args, kwargs)
        self.plan.dynamic.refuse(self.program.sizes_of(inputs))
        return inputs


Mode = tuple[bytes, tuple[int, ...]]
"""One training flag per module, and the hooks of submodules: each combination that is called is
captured by itself."""
COMPARED_CALLS = 3
"""Calls of each mode, its first, whose inputs the ranks compare."""
Method = TypeVar("Method", bound=Callable[..., Any])
Compile = Callable[[nn.Module, Sequence[Any], Mapping[str, Any], bool], Compiled]
"""From a model with whole parameters, inputs and the mode, the program of this rank."""


@dataclass(slots=True)
class State:
    """What a parallel module knows beside the model: where it runs, and its programs by mode.

    modes      programs by mode: the training flags of all modules, whose list `members` is
    layouts    how the parameters rest, tied names included; empty until they are distributed
    owners     the module and the attribute of every parameter and buffer
    compared   how many calls of each mode had their inputs compared between ranks
    """

    grid: Grid
    coords: Coords
    compile: Compile
    outputs: str
    mesh: DeviceMesh
    axes: dict[str, Axis]
    check_numerics: bool = False
    modes: dict[Mode, Compiled] = field(default_factory=dict)
    members: list[nn.Module] = field(default_factory=list)
    owners: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    compared: dict[Mode, int] = field(default_factory=dict)

    @property
    def mode(self) -> Mode:
        """The training flags that the modules have now, and the hooks within the model."""
        flags = bytes([module.training for module in self.members])
        hooks = [n for module in self.members[1:] for n in hook_numbers(module.__dict__)]
        return flags, tuple(hooks)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """Share the ranks and the programs; own what says which modules they read."""
        return replace(
            self,
            modes=dict(self.modes),
            members=copy.deepcopy(self.members, memo),
            owners=copy.deepcopy(self.owners, memo),
            layouts=dict(self.layouts),
            compared=dict(self.compared),
        )


def _eager(*, recursive: bool = True) -> Callable[[Method], Method]:
    """Keep torch.compile out of a method, and of all that it calls if `recursive`."""
    found: Any = torch.compiler.disable(recursive=recursive)  # type: ignore[no-untyped-call]
    return cast(Callable[[Method], Method], found)


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
        state = self._autotp
        if not state.modes:
            raise RuntimeStateError(
                "the model is planned at its first call",
                at=[("the model", "was not called yet, and no example inputs were given")],
                remedy="call it once, or give autotp.parallelize its example_inputs",
            )
        same = [c for c in state.modes.values() if c.plan.train == self.training]
        return state.modes.get(state.mode) or next(iter([*same, *state.modes.values()]))

    @_eager(recursive=False)  # torch.compile begins at the emitted graph
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run this rank's program on the global batch; return what the original would."""
        compiled, arguments = self._begin(args, kwargs)
        if self._autotp.check_numerics:
            values = run_checked(compiled, arguments, self._autotp.grid)
        elif RECALLS in compiled.graph_module.meta:
            values = run_recalled(compiled.graph_module, arguments)
        else:
            values = compiled.graph_module(*arguments)
        return self._end(compiled, arguments, values)

    @_eager()
    def _begin(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Compiled, list[Tensor]]:
        """Return the program of the mode and the arguments of its graph for one call."""
        state = self._autotp
        compiled = state.modes.get(mode := state.mode)
        if compiled is None or _was_unfrozen(state, compiled):
            compiled = compile_mode(self, args, kwargs)
            mode = state.mode
        program = compiled.program
        inputs = _flat_inputs(state, compiled, mode, args, kwargs)
        rng = compiled.graph_module.meta["rng"]
        if rng is not None and rng.exact:
            refuse_unequal_generators(state.axes.values(), {"cpu", state.mesh.device_type})
        elif rng is not None:
            rng.step_seed = agreed_step_seed(state.axes.values())
        return compiled, [*_arguments(state, program, inputs)]

    @_eager()
    def _end(
        self, compiled: Compiled, arguments: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Any:
        """Store the new values of buffers, and rebuild the original's outputs."""
        state = self._autotp
        outputs = _write_buffers(state, compiled.program, values)
        if state.outputs == "sharded":
            outputs = _as_dtensors(state, compiled, arguments, outputs)
        return compiled.program.unflatten_outputs(outputs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the original model's state dict (whole tensors), or this module's own."""
        state = self._autotp
        if assign and state.layouts:
            raise RuntimeStateError(
                "load_state_dict(assign=True) would replace distributed parameters",
                at=[("assign", f"True, and {len(state.layouts)} parameters are DTensors")],
                remedy="load with assign=False",
            )
        own = dict(self.state_dict())
        placed = {name: _place(state, name, v, own.get(name)) for name, v in state_dict.items()}
        return super().load_state_dict(placed, strict=strict, assign=assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert parameters and buffers; a program made for another dtype or device is dropped."""
        before = _kinds(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if _kinds(self) != before:
            self._autotp.modes.clear()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """Copy parameters and buffers; the copy runs the same programs on the same ranks."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        raise RuntimeStateError(
            "a parallel module is bound to its process group and cannot be pickled",
            at=[(type(self).__name__, f"runs on grid {self._autotp.grid}")],
            remedy="save autotp.full_state_dict(model) and model.plan, or copy with copy.deepcopy",
        )


def _place(state: State, name: str, value: Any, own: object) -> Any:
    """Return a whole tensor as the DTensor that the module has in its place."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or value.shape != own.shape:
        return value  # torch's own error names a wrong shape
    layout = state.layouts[name]
    local = take_shard(value.to(own.device), layout, state.grid, state.coords)
    return as_dtensor(local, layout, tuple(own.shape), state.mesh)


def _kinds(model: nn.Module) -> list[tuple[torch.dtype, torch.device]]:
    return [(p.dtype, p.device) for p in model.parameters()]


# One forward -------------------------------------------------------------------------------------


def _was_unfrozen(state: State, compiled: Compiled) -> bool:
    """Say whether a parameter requires a gradient that was not planned; one less is no harm."""
    for fqn, resting in compiled.plan.params.items():
        if not resting.trained:
            module, name = state.owners[fqn]
            if cast(Tensor, module._parameters[name]).requires_grad:
                return True
    return False


def _flat_inputs(
    state: State, compiled: Compiled, mode: Mode, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Return the inputs whole; on the first calls of a mode, those that every rank was given.

    Raises InputError, and RuntimeStateError where the ranks were given different batches.
    """
    if state.grid.world_size == 1 or state.compared.get(mode, 0) == COMPARED_CALLS:
        return [whole(leaf) for leaf in compiled.flatten(args, kwargs)]
    inputs = [whole(x) for x in together(lambda: compiled.flatten(args, kwargs))]
    names = compiled.program.inputs
    digests = {name: digest(x) for name, x in zip(names, inputs, strict=True)}
    remedy = "pass the same global batch on every rank: no DistributedSampler, one seed"
    refuse_disagreement("inputs", digests, remedy)
    state.compared[mode] = state.compared.get(mode, 0) + 1
    return inputs


def _arguments(state: State, program: Program, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the graph's arguments: local parameters, buffers, constants, then inputs."""
    for fqn in program.params.values():
        module, name = state.owners[fqn]
        parameter = module._parameters[name]
        if not isinstance(parameter, DTensor):
            raise _replaced(state, program)
        yield local_tensor(parameter)
    for fqn in program.buffers.values():
        module, name = state.owners[fqn]
        yield cast(Tensor, module._buffers[name])
    yield from program.constants.values()
    yield from inputs


def _replaced(state: State, program: Program) -> RuntimeStateError:
    """Return the error that names every parameter that is no longer the planned DTensor."""
    found = {fqn: state.owners[fqn] for fqn in program.params.values()}
    now = {fqn: module._parameters[name] for fqn, (module, name) in found.items()}
    return RuntimeStateError(
        "distributed parameters were replaced",
        at=[
            (fqn, f"is a {type(p).__name__}, planned a DTensor, {layout_text(state.layouts[fqn])}")
            for fqn, p in now.items()
            if not isinstance(p, DTensor)
        ],
        remedy="change them in place, or through load_state_dict",
    )


def _write_buffers(state: State, program: Program, values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Store the new values of mutated buffers, which follow the user's outputs; return those."""
    count = len(program.outputs)
    for fqn, value in zip(program.mutations.values(), values[count:], strict=True):
        module, name = state.owners[fqn]
        with torch.no_grad():
            cast(Tensor, module._buffers[name]).copy_(value)
    return values[:count]


def _as_dtensors(
    state: State, compiled: Compiled, arguments: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[Tensor]:
    program = compiled.program
    inputs = arguments[len(arguments) - len(program.inputs) :]
    shapes = program.output_shapes(program.sizes_of(inputs))
    return [
        as_dtensor(out, layout, shape, state.mesh) if layout is not None else out
        for out, layout, shape in zip(outputs, compiled.plan.outputs, shapes, strict=False)
    ]


# Making one --------------------------------------------------------------------------------------


def make_parallel(model: nn.Module, state: State) -> ParallelModule:
    """Change the class of `model` to its parallel one, in place."""
    base = type(model)

    @functools.wraps(base.forward)  # trainers read its signature
    def forward(self: ParallelModule, *args: Any, **kwargs: Any) -> Any:
        return ParallelModule.forward(self, *args, **kwargs)

    made = type(f"Parallel{base.__name__}", (ParallelModule, base), {"forward": forward})
    model.__class__ = made
    parallel = cast(ParallelModule, model)
    object.__setattr__(parallel, "_autotp", state)
    return parallel


def compile_mode(model: ParallelModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
    """Capture, plan and emit the current mode; the first time, distribute the parameters."""
    state = model._autotp
    whole_args, whole_kwargs = tree_map(whole, (tuple(args), dict(kwargs)))
    with torch.inference_mode(False), torch.enable_grad():
        with _original_class(model), whole_parameters(model):
            compiled = state.compile(model, whole_args, whole_kwargs, model.training)
        if not state.layouts:
            params, mesh = compiled.plan.params, state.mesh
            state.layouts = distribute(model, params, state.grid, state.coords, mesh)
    assert all(state.layouts[n] == r.layout for n, r in compiled.plan.params.items())
    state.members = list(model.modules())
    state.modes[state.mode] = compiled
    state.owners = owners_of(model)
    return compiled


class _original_class:
    """Give a parallel model its own class and forward back while it is captured."""

    def __init__(self, model: ParallelModule) -> None:
        self.model, self.parallel = model, type(model)

    def __enter__(self) -> None:
        self.model.__class__ = self.parallel.__mro__[2]

    def __exit__(self, *_error: object) -> None:
        self.model.__class__ = self.parallel


def new_state(
    grid: Grid, compile: Compile, outputs: str, mesh: DeviceMesh, check_numerics: bool = False
) -> State:
    """Return the state of a module that has not been captured yet."""
    coords = mesh.get_coordinate()
    assert coords is not None, "a rank outside of its own grid"
    axes = dist_axes(mesh, grid.names)
    return State(grid, tuple(coords), compile, outputs, mesh, axes, check_numerics)
