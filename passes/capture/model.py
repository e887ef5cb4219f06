"""Capture a model as one functional graph: torch.export on the unmodified model, then normalise.

    capture(model, args, kwargs, train=...) -> Program

Shapes are static, except for the dims that `dynamic` names. The model is left as it was: training
flags, configuration and gradients. What the graph cannot keep is refused by name; regions under
torch.utils.checkpoint are noted.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.export.graph_signature import OutputSpec as GraphOutput
from torch.utils import _pytree as pytree

from autotp.dynamic import DynamicInputs
from autotp.errors import CaptureError
from autotp.passes.capture.draws import hold_draws, release_draws
from autotp.passes.capture.export import (
    distinct_tensors,
    export,
    leftover_remedies,
    refuse_shared_memory,
    region_text,
    training_flag,
    without_cache,
)
from autotp.passes.capture.hooks import refuse_hooks, without_own_hooks
from autotp.passes.capture.names import op_name, plan_names
from autotp.passes.capture.normalise import (
    carriers,
    functionalise,
    is_mutable,
    like,
    open_regions,
    user_line,
    value_of,
)
from autotp.passes.capture.regions import name_regions, read_regions
from autotp.passes.capture.size_nodes import SizeWriter, is_size, write_sizes
from autotp.passes.capture.spelling import spell
from autotp.passes.capture.varying import export_varying, varying_dims
from autotp.passes.program import InputGuards, OutputSpec, Program, name_leaves, type_of
from autotp.sizes import depends_on_values

aten = torch.ops.aten


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    train: bool,
    dynamic: DynamicInputs | None = None,
) -> Program:
    """Return `model` called with `args` and `kwargs` as a Program.

    `dynamic` names the dims that may vary: `{"input_ids": {0: "batch", 1: "seq"}}`.

    Where the model's training flag is not `train`, `model.train(train)` is called for the capture
    and every flag restored after it, so that modules frozen by hand stay frozen.
    A Hugging Face model's `config.use_cache` is off meanwhile: caches are no plain outputs.

    Raises: CaptureError, with the line of the model that cannot be captured.
    """
    refuse_shared_memory(model)
    refuse_hooks(model)
    args, kwargs = distinct_tensors(tuple(args), dict(kwargs))
    signature, dynamic = inspect.signature(model.forward), dynamic or {}
    leaves = name_leaves(signature, args, kwargs)
    with training_flag(model, train), without_own_hooks(model), without_cache(model) as cache_off:
        exported = export_varying(lambda s: export(model, args, kwargs, s), leaves, dynamic)
    seeds = gradient_seeds(exported, model, args, kwargs)
    hold_draws(exported.graph_module)
    open_regions(exported.graph_module, seeds)
    exported = functionalise(exported)
    defaults = {p.name: p.default for p in signature.parameters.values()}
    defaults |= {"use_cache": False} if cache_off else {}
    call = Call(signature, defaults, args, kwargs, dynamic)
    return assemble(exported, model, call, seeds, train)


# ---- from the exported program to the Program


def gradient_seeds(
    exported: ExportedProgram, model: nn.Module, args: Any, kwargs: Any
) -> frozenset[str]:
    """Return the placeholders that require gradient: parameters, and inputs that ask for it."""
    params = dict(model.named_parameters(remove_duplicate=False))
    owners = exported.graph_signature.inputs_to_parameters
    seeds = {name for name, fqn in owners.items() if params[fqn].requires_grad}
    leaves = call_order(exported, args, kwargs)
    asked = {n for n, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    return frozenset(seeds | asked)


def call_order(exported: ExportedProgram, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return placeholder -> leaf of the call, in the order of the graph's inputs."""
    specs = exported.graph_signature.input_specs
    names = [str(s.arg.name) for s in specs if s.kind is InputKind.USER_INPUT]
    (_, order), given = call_spec(exported), kwargs
    leaves = pytree.tree_leaves((args, {key: given[key] for key in order}))
    return dict(zip(names, leaves, strict=True))


def call_spec(exported: ExportedProgram) -> tuple[Any, dict[str, Any]]:
    """Return the (args, kwargs) of the export with the numbers of its leaves for leaves."""
    spec = exported.call_spec.in_spec
    assert spec is not None
    call: tuple[Any, dict[str, Any]] = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    return call


@dataclass(frozen=True, slots=True)
class Call:
    """The call that is captured: its arguments, what others default to, and what may vary."""

    signature: inspect.Signature
    defaults: Mapping[str, Any]
    args: Any
    kwargs: Any
    dynamic: DynamicInputs


def assemble(
    exported: ExportedProgram, model: nn.Module, call: Call, seeds: frozenset[str], train: bool
) -> Program:
    """Return the Program of a functional `exported`."""
    graph = exported.graph
    refuse_writes(exported)
    inputs = call_order(exported, call.args, call.kwargs)
    constants = constants_of(exported, model)
    params, tied = owned(exported, list(model.named_parameters(remove_duplicate=False)), "params")
    buffers, _ = owned(exported, list(model.named_buffers(remove_duplicate=False)), "buffers")
    release_draws(graph)
    read_regions(graph)
    spell(graph, seeds)
    varying = varying_dims(exported, placeholders_of(exported, call), call.dynamic)
    write_sizes(graph, SizeWriter(graph, varying, nodes_by_name(graph).__getitem__))
    outputs, mutations, out_spec = split_outputs(exported, graph)
    protect_buffers(graph, buffers, mutations, seeds)
    refuse_leftovers(graph)
    order_placeholders(graph, [*params, *buffers], list(constants), list(inputs))
    graph.lint()
    tensors = {n: leaf for n, leaf in inputs.items() if isinstance(leaf, Tensor)}
    constants = {name: v for name, v in constants.items() if name in nodes_by_name(graph)}
    return Program(
        graph_module=fx.GraphModule(nn.Module(), graph),
        params=params,
        tied=tied,
        buffers=buffers,
        constants=constants,
        inputs=tuple(tensors),
        outputs=outputs,
        mutations=mutations,
        input_guards=guards(exported, call),
        out_spec=out_spec,
        requires_grad=frozenset(node.name for node in carriers(graph, seeds)),
        names=plan_names(graph, params | buffers),
        varying=varying,
        where={n.name: at for n in graph.nodes if (at := user_line(n))},
        train=train,
        regions=name_regions(graph, mutations),
    )


def guards(exported: ExportedProgram, call: Call) -> InputGuards:
    """Return the guards of a call, their leaves in the order of the graph's inputs."""
    values = name_leaves(call.signature, call.args, call.kwargs)
    leaves = {
        name: type_of(values[name], call.dynamic.get(name, {}))
        for name in placeholders_of(exported, call)
    }
    return InputGuards(call.signature, leaves, call.defaults)


def placeholders_of(exported: ExportedProgram, call: Call) -> dict[str, str]:
    """Return leaf by name -> placeholder, in the order of the graph's inputs."""
    places = name_leaves(call.signature, *call_spec(exported))
    ordered = sorted(places, key=places.__getitem__)
    return dict(zip(ordered, call_order(exported, call.args, call.kwargs), strict=True))


def nodes_by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return name -> node."""
    return {node.name: node for node in graph.nodes}


def constants_of(exported: ExportedProgram, model: nn.Module) -> dict[str, Tensor]:
    """Return placeholder -> lifted constant.

    Raises: CaptureError for what is no tensor, and for a parameter that is not registered.
    """
    found = {n: exported.constants[t] for n, t in constant_targets(exported).items()}
    hidden = unregistered(model)
    bad = [
        (hidden.get(address(value), name), type(value).__name__)
        for name, value in found.items()
        if not isinstance(value, Tensor) or address(value) in hidden
    ]
    if any(kind == "Generator" for _, kind in bad):
        raise CaptureError(
            "the model draws from a generator of its own",
            at=[("forward", f"reads {name}, a {kind}") for name, kind in bad],
            remedy="draw from torch's default generator, which torch.manual_seed seeds",
        )
    if bad:
        raise CaptureError(
            "the model reads parameters or objects that are not registered",
            at=bad,
            remedy="make them nn.Parameter or buffer attributes, in a ParameterList if many",
        )
    return found


def constant_targets(exported: ExportedProgram) -> dict[str, str]:
    """Return placeholder -> key among the constants of `exported`."""
    kinds = (InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ, InputKind.TOKEN)
    specs = exported.graph_signature.input_specs
    return {str(s.arg.name): s.target or "" for s in specs if s.kind in kinds}


def address(value: object) -> int:
    """Return where the memory of a tensor begins; 0 where there is none."""
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0


def unregistered(model: nn.Module) -> dict[int, str]:
    """Return address -> place of the leaves with gradient that hide in containers of modules."""
    known = {address(p) for p in model.parameters()} | {0}
    return {
        address(leaf): f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, list | tuple | dict) and not name.startswith("_")
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.requires_grad and address(leaf) not in known
    }


def owned(
    exported: ExportedProgram, tensors: list[tuple[str, Tensor]], kind: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Merge the placeholders of tied tensors; return placeholder -> name, and tied -> name."""
    signature = exported.graph_signature
    owners = signature.inputs_to_parameters if kind == "params" else signature.inputs_to_buffers
    holders = {fqn: name for name, fqn in owners.items()}
    nodes = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    first: dict[int, str] = {}
    canonical = {fqn: first.setdefault(id(tensor), fqn) for fqn, tensor in tensors}
    tied = {fqn: name for fqn, name in canonical.items() if fqn != name}
    for fqn, name in tied.items():
        if fqn in holders:
            nodes[holders[fqn]].replace_all_uses_with(nodes[holders[name]])
            exported.graph.erase_node(nodes[holders[fqn]])
    return {holders[fqn]: fqn for fqn in first.values() if fqn in holders}, tied


def refuse_writes(exported: ExportedProgram) -> None:
    """Refuse a forward that changes its inputs or parameters."""
    kinds = (OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION)
    bad = [s for s in exported.graph_signature.output_specs if s.kind in kinds]
    if bad:
        raise CaptureError(
            "the forward writes in place to inputs or parameters",
            at=[(str(s.target), s.kind.name.lower().replace("_", " ")) for s in bad],
            remedy="work on a copy: x = x.clone()",
        )


def split_outputs(
    exported: ExportedProgram, graph: fx.Graph
) -> tuple[tuple[str, ...], dict[str, str], OutputSpec]:
    """Rewrite the graph's output as user tensors, then buffers' new values; say what is which."""
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    pairs = list(zip(exported.graph_signature.output_specs, results, strict=True))
    user = [value for spec, value in pairs if spec.kind is OutputKind.USER_OUTPUT]
    tensors = [value for value in user if isinstance(value, fx.Node)]
    constants = {i: value for i, value in enumerate(user) if not isinstance(value, fx.Node)}
    mutations: dict[str, str] = {}
    written = []
    for spec, value in pairs:
        if spec.kind is OutputKind.BUFFER_MUTATION and not is_unchanged(exported, spec, value):
            value = own_node(graph, output, value, taken=mutations)
            mutations[value.name] = str(spec.target)
            written.append(value)
    output.args = ((*tensors, *written),)
    assert exported.call_spec.out_spec is not None
    out_spec = OutputSpec(exported.call_spec.out_spec, constants)
    return tuple(node.name for node in tensors), mutations, out_spec


def is_unchanged(exported: ExportedProgram, spec: GraphOutput, value: fx.Node) -> bool:
    """Say whether the new value of a buffer is its old one."""
    return bool(exported.graph_signature.inputs_to_buffers.get(value.name) == spec.target)


def own_node(graph: fx.Graph, output: fx.Node, value: fx.Node, taken: Mapping[str, str]) -> fx.Node:
    """Return a node that only one buffer's new value has."""
    if value.name not in taken and value.op != "placeholder":
        return value
    with graph.inserting_before(output):
        return like(graph, aten.clone.default, (value,), value)


def protect_buffers(
    graph: fx.Graph, buffers: dict[str, str], mutations: dict[str, str], seeds: frozenset[str]
) -> None:
    """Let ops with a gradient read a copy of a buffer whose write-back would spoil backward."""
    found = carriers(graph, seeds)
    for node in graph.find_nodes(op="placeholder"):
        if buffers.get(node.name) not in mutations.values() or found.isdisjoint(node.users):
            continue
        first = min(node.users)
        with graph.inserting_before(first):
            copy = like(graph, aten.clone.default, (node,), first)
        copy.meta["val"] = value_of(node)
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)


def refuse_leftovers(graph: fx.Graph) -> None:
    """Refuse what is neither a tensor op nor functional."""
    found = [(user_line(node) or node.name, leftover(node)) for node in graph.nodes]
    problems = list(dict.fromkeys((place, what) for place, what in found if what is not None))
    if problems:
        raise CaptureError(
            "the model computes what a plan cannot hold",
            at=problems,
            remedy=leftover_remedies([what for _, what in problems]),
        )


def leftover(node: fx.Node) -> str | None:
    """Say why a plan cannot hold `node`, if it cannot."""
    if is_size(node):
        return None
    if node.op in ("get_attr", "call_module", "call_method"):
        return f"{node.op} {node.target}"
    if isinstance(node.target, HigherOrderOperator):
        return region_text(node)
    numbers = (torch.SymInt, torch.SymFloat, torch.SymBool)
    if isinstance(value_of(node), numbers) and depends_on_values(value_of(node)):
        return f"{node.target}: a Python number that depends on a tensor's values"
    if any(map(depends_on_values, getattr(value_of(node), "shape", ()))):
        return f"{node.target}: a shape that depends on a tensor's values"
    numeric = isinstance(value_of(node), numbers)
    if not (isinstance(node.target, OpOverload | str) or op_name(node) == "getitem" or numeric):
        return f"{op_name(node)}: what torch.vmap or the like leaves behind"
    assert not is_mutable(node), node
    return None


def order_placeholders(
    graph: fx.Graph, owners: Sequence[str], constants: Sequence[str], inputs: Sequence[str]
) -> None:
    """Put placeholders in the order of a Program; erase unread constants and non-tensor inputs."""
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    unread = [name for name in constants if not nodes[name].users]
    for name in unread + [n for n in inputs if not isinstance(value_of(nodes[n]), Tensor)]:
        graph.erase_node(nodes.pop(name))
    ordered = [nodes[n] for n in (*owners, *constants, *inputs) if n in nodes]
    assert len(ordered) == len(nodes), sorted(set(nodes) - {n.name for n in ordered})
    for node in reversed(ordered):
        next(iter(graph.nodes)).prepend(node)
