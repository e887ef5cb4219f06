"""Emitted programs under the checker of the `spmd_types` package, an oracle that is not ours.

One process stands for rank 0 of a fake process group. Every op runs as the torch function that the
checker knows, every move as the package's own typed collective, and after each the type that the
checker infers must be the layout that the program claims. A shard is V there. What the checker
cannot infer is asserted, and listed here:

  - a product over a split dim is V to the checker, and P by our rule: reinterpreted
  - local programs (a vocab split over ranks, a split norm) have the types that they declare
  - a value without gradient may stand as I or R: the checker knows no such value, so it is
    given the type of what it meets
"""

import contextlib
from dataclasses import replace

import pytest
import spmd_types
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spmd_types import I, P, R, S, SpmdTypeError, V
from spmd_types.checker import no_typecheck, typecheck
from torch import fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from autotp import layouts as ours
from autotp.api import as_grid
from autotp.collectives import all_gather, invariant_to_replicate
from autotp.dist_axis import dist_axes
from autotp.late import late
from autotp.layouts import Shard, kind, local_shape
from autotp.passes.capture.model import capture
from autotp.passes.emit import products
from autotp.passes.emit.codegen import emit
from autotp.passes.emit.together_calls import is_shared, source_of
from autotp.passes.factors import infer_factors
from autotp.passes.network import read_network
from autotp.passes.planning import search_plan
from autotp.ranks import make_mesh
from autotp.together import (
    all_gather_together,
    begin_gather,
    begin_replicate,
    invariant_to_replicate_together,
)
from tests.end_to_end.models import CLUSTER, gpt2, llama, tokens

BESIDE = replace(CLUSTER, overlap=0.5)
"""Where moves begin early."""

TYPES = {"S": V, "R": R, "I": I, "P": P}


@contextlib.contextmanager
def fake_mesh(grid):
    dist.init_process_group("fake", rank=0, world_size=grid.world_size, store=FakeStore())
    try:
        yield make_mesh(grid, "cpu")
    finally:
        dist.destroy_process_group()


def converted(x, group, src, dst):
    return spmd_types.convert(x, group, src=src, dst=dst, expert_mode=True)


MOVES = {
    "all_gather": lambda x, g, dim, to="R", **_: spmd_types.all_gather(
        x, g, src=S(dim), dst=TYPES[to]
    ),
    "all_reduce": lambda x, g, to="R": spmd_types.all_reduce(x, g, src=P, dst=TYPES[to]),
    "all_to_all": lambda x, g, split_dim, concat_dim, **_: spmd_types.all_to_all(
        x, g, src=S(concat_dim), dst=S(split_dim)
    ),
    "invariant_to_replicate": lambda x, g: converted(x, g, I, R),
    "keep_one": lambda x, g, source="I": converted(x, g, TYPES[source], P),
    "pad_to_partial": lambda x, g, dim, **_: converted(x, g, S(dim), P),
    "reduce_scatter": lambda x, g, dim, **_: spmd_types.reduce_scatter(x, g, src=P, dst=S(dim)),
    "replicate_to_invariant": lambda x, g: converted(x, g, R, I),
    "slice_to_shard": lambda x, g, dim, source="I", **_: converted(x, g, TYPES[source], S(dim)),
}
"""The package's typed form of each of our collectives, under the arguments of ours."""


ALIKE = {
    all_gather_together: all_gather,
    begin_gather: None,
    begin_replicate: None,
    invariant_to_replicate_together: invariant_to_replicate,
}
"""What each item of a shared call is moved by."""

LATE = {target: op for op, target in products.LATE.items()}
"""The op that a product with a late weight is."""


def cross_entropy(x, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0):
    name = ("none", "mean", "sum")[reduction]
    return F.cross_entropy(x, target, weight, None, ignore_index, None, name, label_smoothing)


def sliced(x, dim=0, start=0, end=None, step=1):
    start, end, _ = slice(start, end).indices(x.shape[dim])
    return x.narrow(dim, start, end - start)


SPELLED = {
    "cross_entropy_loss": cross_entropy,
    "embedding": lambda weight, indices, *rest: F.embedding(indices, weight),
    "index": lambda x, indices: x[tuple(slice(None) if i is None else i for i in indices)],
    "layer_norm": lambda x, shape, w=None, b=None, eps=1e-5, _=True: F.layer_norm(
        x, shape, w, b, eps
    ),
    "linear": F.linear,
    "slice": sliced,
    "to": lambda x, dtype: x.to(dtype),
}


def torch_function(target):
    name = target._schema.name.split("::")[1]
    homes = [home for home in (torch, F, torch.Tensor) if hasattr(home, name)]
    return SPELLED.get(name) or getattr(homes[0], name)


class Checked(fx.Interpreter):
    """Run an emitted program node by node and hold each result's type against its layout."""

    def __init__(self, module, network, mesh, grid):
        super().__init__(module, garbage_collect_values=False)
        self.network, self.grid = network, grid
        self.groups = {name: mesh.get_group(name) for name in grid.names}
        self.moves = self.inferred = 0

    def differentiable(self, value):
        return value in self.network.values and self.network.values[value].grad

    def types(self, layout):
        named = zip(self.grid.names, layout, strict=True)
        return {self.groups[name]: TYPES[kind(t)] for name, t in named}

    def stamp(self, x, layout, alias=True):
        """Return `x` as a new tensor of the type that `layout` says."""
        with no_typecheck():
            fresh = x.view_as(x) if alias else x
        return spmd_types.assert_type(fresh, self.types(layout))

    def run_node(self, node):
        if node.op == "placeholder":
            return self.stamp(super().run_node(node), node.meta["layout"])
        if node.op != "call_function":
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.target in ALIKE or node.target is late:  # its items move one by one
            return args[0]
        if "move" in node.meta:
            return self.checked(node, self.move(node, self.env[source_of(node)]))
        if not hasattr(LATE.get(node.target, node.target), "_schema"):
            return self.plain(node, args, kwargs)
        return self.checked(node, self.compute(node, args, kwargs))

    def move(self, node, x):
        self.moves += 1
        move = node.meta["move"]
        if not self.network.values[move.value].grad:  # typed by what it met last
            x = self.stamp(x, move.before)
        target, kwargs = node.target, node.kwargs
        if is_shared(node):
            call, number = node.args
            target, kwargs = ALIKE[call.target], {}
            if "dims" in call.kwargs:
                kwargs = {"dim": call.kwargs["dims"][number], "to": call.kwargs["to"]}
        kwargs = {k: v for k, v in kwargs.items() if k not in ("by", "back_by")}
        return MOVES[target.__name__](x, self.groups[move.axis], **kwargs)

    def plain(self, node, args, kwargs):
        """Run what is not an ATen op, a local program or an item: its types are declared."""
        with no_typecheck():
            out = node.target(*args, **kwargs)
        for x, layout in self.declared(node, out):
            self.stamp(x, layout, alias=False)
        return out

    def declared(self, node, out):
        if "layout" in node.meta:
            return [(out, node.meta["layout"])]
        return zip(out, node.meta.get("results", ()), strict=False)

    def compute(self, node, args, kwargs):
        """Run an ATen op as the torch function that the checker knows."""
        met = [n.meta["layout"] for n in node.all_input_nodes if self.has_gradient(n)]

        def typed(n):
            if self.has_gradient(n) or "layout" not in n.meta:
                return self.env[n]
            layout = n.meta["layout"]
            for others in met:
                layout = tuple(
                    t if isinstance(t, Shard) or other is ours.I else ours.R
                    for t, other in zip(layout, others, strict=True)
                )
            return self.stamp(self.env[n].detach(), layout)

        args, kwargs = (fx.node.map_arg(a, typed) for a in (node.args, node.kwargs))
        function = torch_function(LATE.get(node.target, node.target))
        if function not in (torch.addmm, F.linear) or not self.adds_a_term(node):
            return function(*args, **kwargs)
        (bias, *factors) = args if function is torch.addmm else (args[2], *args[:2])
        product = (torch.mm if function is torch.addmm else F.linear)(*factors)
        return torch.add(self.summed(node, product), bias)

    def has_gradient(self, node):
        return "layout" in node.meta and self.differentiable(node.meta["value"])

    def adds_a_term(self, node):
        """Say whether a product is the term of a sum, and so is the bias beside it."""
        operands = [n.meta["layout"] for n in node.all_input_nodes]
        return len(operands) == 3 and any(ours.P in layout for layout in operands)

    def summed(self, node, x):
        """Say that a product over a split dim is a term of a sum."""
        found, layout = spmd_types.get_local_type(x), node.meta["layout"]
        for name, t, split in zip(
            self.grid.names, layout, node.meta["decision"].split, strict=True
        ):
            if t is ours.P and split and type_on(found, self.groups[name]) is V:
                x = spmd_types.reinterpret(x, self.groups[name], src=V, dst=P)
        return x

    def checked(self, node, out):
        for k, (x, layout) in enumerate(self.declared(node, out)):
            value = node.meta.get("value") or f"{node.meta['op'].name}.{k}"
            if not self.differentiable(value):
                self.stamp(x, layout, alias=False) if not spmd_types.has_local_type(x) else None
                continue
            if "op" in node.meta and len(node.meta["decision"].results) == 1:
                x = out = self.summed(node, x)
            self.inferred += 1
            found = spmd_types.get_local_type(x)
            for name, t in zip(self.grid.names, layout, strict=True):
                here = type_on(found, self.groups[name])
                if here is not TYPES[kind(t)]:
                    raise SpmdTypeError(f"{node.name}: {here} on {name}, claimed {t}")
        return out


def type_on(found, group):
    return found[spmd_types.normalize_axis(group)]


def program_of(make, sizes, cluster=CLUSTER):
    torch.manual_seed(0)
    model, inputs, grid = make(), tokens(), as_grid(sizes)
    program = capture(model, (), inputs, train=True)
    network = read_network(program)
    factors = infer_factors(network, program.inputs)
    plan = search_plan(program, network, factors, grid, cluster).plan
    return program, network, plan


def local_arguments(program, plan):
    for node in program.graph.find_nodes(op="placeholder"):
        fqn = program.params.get(node.name)
        if fqn is not None:
            rest = plan.params[fqn]
            shape = local_shape(rest.shape, rest.layout, plan.grid, (0,) * len(plan.grid.sizes))
            yield torch.randn(shape, requires_grad=True)
        elif node.name in program.constants:
            yield program.constants[node.name]
        else:
            value = node.meta["val"]
            yield torch.zeros(value.shape, dtype=value.dtype)


def check(program, network, plan, spoil=None):
    with fake_mesh(plan.grid) as mesh:
        axes = dist_axes(mesh, plan.grid.names)
        module = emit(program, network, plan, (0,) * len(plan.grid.sizes), axes)
        if spoil:
            spoil(module)
        checked = Checked(module, network, mesh, plan.grid)
        arguments = list(local_arguments(program, plan))
        with typecheck(), spmd_types.set_current_mesh(mesh):
            checked.run(*arguments, enable_io_processing=False)
    return checked


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
@pytest.mark.parametrize("cluster", [CLUSTER, BESIDE], ids=["at once", "early"])
def test_the_checker_agrees_with_every_layout(make, sizes, cluster):
    checked = check(*program_of(make, sizes, cluster))
    assert checked.moves > 10 and checked.inferred > 60


def differentiable_moves(module, network):
    moves = [n for n in module.graph.nodes if "move" in n.meta]
    return [n for n in moves if network.values[n.meta["move"].value].grad]


def test_no_move_may_be_left_out():
    program, network, plan = program_of(gpt2, (2,))
    count = sum(network.values[m.value].grad for m in plan.moves)
    for number in range(count):

        def leave_out(module, number=number):
            node = differentiable_moves(module, network)[number]
            node.replace_all_uses_with(source_of(node))
            module.graph.erase_node(node)

        with pytest.raises((SpmdTypeError, RuntimeError)):
            check(program, network, plan, leave_out)


def test_an_all_reduce_may_not_change_its_type():
    program, network, plan = program_of(gpt2, (2,))

    def swap(module):
        moves = differentiable_moves(module, network)
        node = next(n for n in moves if n.target.__name__ == "all_reduce")
        node.update_kwarg("to", "R" if node.kwargs["to"] == "I" else "I")

    with pytest.raises(SpmdTypeError):
        check(program, network, plan, swap)
