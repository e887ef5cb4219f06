"""Check a rule by arithmetic: what it allows must compute what the op computes.

One call of the op becomes a program of one op, whose operands are cut into random pieces as a
strategy says (the terms of a partial are random and sum to the whole). The code generation emits
it, simulated ranks run it forward and backward on the pieces of a random cotangent, and what they
hold is joined and compared with the op on whole operands: values under the result's layout,
gradients under the operand's dual. What draws must make the single device's numbers, which every
rank can draw; the masks that ranks draw apart are checked elsewhere.
"""

from __future__ import annotations

import inspect
import operator
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autotp.axis import Axis, run_ranks
from autotp.errors import RuleError
from autotp.grid import Grid
from autotp.layouts import (
    Layout,
    P,
    layout_text,
)
from autotp.passes.choices import Strategy, Typing, strategies_of
from autotp.passes.emit.codegen import emit
from autotp.passes.factors import Factors, infer_factors
from autotp.passes.network import Network, Op, read_network
from autotp.passes.pieces import (
    Mismatch,
    Pieces,
    dual,
    is_close,
    is_roughly_close,
    mismatches,
    pieces_of,
)
from autotp.passes.program import InputGuards, OutputSpec, Program
from autotp.passes.rules import Rule
from autotp.plan import Decision, Memory, Plan, Resting

LINES = (Grid(("col",), (2,)), Grid(("col",), (3,)))
GRIDS = (Grid(("row", "col"), (2, 2)), Grid(("row", "col"), (2, 3)))
SAMPLES = 4
"""Strategies that are tried on each grid of two axes; all are on grids of one."""
SEED = 7
"""Where the random numbers of an op that draws begin, on whole operands and on every rank."""


@dataclass(frozen=True, slots=True)
class Example:
    """One call as a program, and by value name all that it takes and gives on whole tensors."""

    program: Program
    network: Network
    operands: Mapping[str, Tensor]
    results: Mapping[str, Tensor]
    cotangents: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]

    @property
    def op(self) -> Op:
        """The program's one op."""
        return self.network.ops[0]

    @property
    def is_precise(self) -> bool:
        """Say whether all is computed in float64."""
        dtypes = {t.dtype for t in (*self.operands.values(), *self.results.values())}
        return not dtypes & {torch.float32, torch.float16, torch.bfloat16}


def check_rule(
    op: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    rule: Rule | None = None,
    grids: Sequence[Grid] = (*LINES, *GRIDS),
) -> list[Strategy]:
    """Prove the strategies of `op(*args, **kwargs)` on `grids` and return them.

    `args` hold whole tensors; those that require grad are differentiated. `rule` is tried in place
    of the op's own.

    Raises RuleError, with the strategy and its mismatches, at the first that arithmetic refutes.
    """
    with torch.enable_grad():
        example = example_of(op, args, kwargs or {}, rule)
        proved = []
        for grid in grids:
            for strategy in _strategies(example, grid):
                _prove(example, strategy, grid)
                proved.append(strategy)
    return proved


# The example -------------------------------------------------------------------------------------


def example_of(
    op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], rule: Rule | None = None
) -> Example:
    """Return one call as a program of one op, with what it computes on whole operands."""
    graph = fx.Graph()
    operands: dict[str, Tensor] = {}

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(operands)}")
        node.meta["val"] = operands[node.name] = value.detach().requires_grad_(value.requires_grad)
        return node

    node = graph.call_function(op, *pytree.tree_map(place, (tuple(args), dict(kwargs))))
    results = _run_whole(graph, node, operands)
    graph.output(tuple(n for n in graph.nodes if n.name in results))
    program = _program(graph, operands, results)
    network = _with_rule(read_network(program), rule)
    makes = dict(zip(network.ops[0].results, results.values(), strict=True))
    back = {v: torch.randn_like(r) for v, r in makes.items() if r.requires_grad}
    return Example(
        program=program,
        network=network,
        operands={n: x.detach() for n, x in operands.items()},
        results={v: r.detach() for v, r in makes.items()},
        cotangents=back,
        gradients=_gradients(operands, makes, back),
    )


def _run_whole(graph: fx.Graph, node: fx.Node, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the op on copies of whole operands; return its results by node name."""
    given = {n: x * 1 if x.requires_grad else x.clone() for n, x in operands.items()}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n.name])
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        made = node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(made, Tensor):
        return {node.name: made}
    return {
        graph.call_function(operator.getitem, (node, k)).name: item for k, item in enumerate(made)
    }


def _gradients(
    operands: Mapping[str, Tensor], results: Mapping[str, Tensor], back: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    leaves = {n: x for n, x in operands.items() if x.requires_grad}
    if not back or not leaves:
        return {}
    found = torch.autograd.grad(
        [results[v] for v in back], list(leaves.values()), list(back.values()), allow_unused=True
    )
    return {
        n: torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), found, strict=True)
    }


def _program(
    graph: fx.Graph, operands: Mapping[str, Tensor], results: Mapping[str, Tensor]
) -> Program:
    """Return a program whose operands are parameters, so that they may rest in any layout."""
    carrying = {**operands, **results}
    return Program(
        graph_module=fx.GraphModule(torch.nn.Module(), graph),
        params={n: n for n in operands},
        tied={},
        buffers={},
        constants={},
        inputs=(),
        outputs=tuple(results),
        mutations={},
        input_guards=InputGuards(inspect.Signature(), {}, {}),
        out_spec=OutputSpec(pytree.tree_structure(()), {}),
        requires_grad=frozenset(n for n, t in carrying.items() if t.requires_grad),
        names={n.name: n.name for n in graph.nodes},
        where={},
        train=True,
    )


def _with_rule(network: Network, rule: Rule | None) -> Network:
    if rule is None:
        return network
    (op,) = network.ops
    return replace(network, ops=(replace(op, rule=rule, signature=rule.signature(op.call)),))


# Strategies --------------------------------------------------------------------------------------


def _strategies(example: Example, grid: Grid) -> list[Strategy]:
    """Return all strategies on one axis, some on more, with plain dims and with dims in blocks."""
    values = example.network.values
    op = example.op
    typing = Typing.of([values[v] for v in op.operands], [values[v] for v in op.results])
    plain = infer_factors(example.network)
    found: dict[object, Strategy] = {}
    for factors in (plain, _halved(infer_factors(example.network))):
        for s in strategies_of(op, typing, factors, grid):
            found.setdefault((s.operands, s.results), s)
    strategies = list(found.values())
    if len(grid.sizes) == 1 or len(strategies) <= SAMPLES:
        return strategies
    return random.Random(f"{op.call} {grid}").sample(strategies, SAMPLES)


def _halved(factors: Factors) -> Factors:
    """Make every atom of even size a row of two blocks, as a fused dim further down would."""
    atoms, names = factors.atoms, dict(factors.names)
    for x in sorted({atoms.find(x) for x in factors.of_op.values()}):
        if atoms.sizes[x] % 2 == 0 and x not in atoms.definition:
            half = atoms.new(atoms.sizes[x] // 2)
            atoms.define(x, "row", (half, half))
            names[half] = f"2*{atoms.sizes[half]}"
    return replace(factors, names=names)


# The proof ---------------------------------------------------------------------------------------


def _prove(example: Example, strategy: Strategy, grid: Grid) -> None:
    """Raise RuleError unless all ranks together compute what the whole op computes."""
    op = example.op
    operands = dict(zip(op.operands, strategy.operands, strict=True))
    results = dict(zip(op.results, strategy.results, strict=True))
    try:
        made, grads = _run_ranks(example, strategy, operands, results, grid)
    except Exception as error:
        fact = f"{type(error).__name__}: {error}"
        raise _refuted(op, strategy, grid, [("a rank", fact)]) from error
    problems: list[Mismatch] = []
    close = is_close if example.is_precise else is_roughly_close
    for k, (v, layout) in enumerate(results.items()):
        if P in layout and example.results[v].dtype is torch.bool:
            problems.append((f"result {k}", "a bool is no term of a sum"))
        problems += mismatches(f"result {k}", made[v], example.results[v], layout, grid, close)
    for k, (v, layout) in enumerate(operands.items()):
        if v in example.gradients:
            what, whole = f"gradient of operand {k}", example.gradients[v]
            problems += mismatches(what, grads[v], whole, dual(layout), grid, close)
    if problems:
        raise _refuted(op, strategy, grid, problems)


def _refuted(op: Op, s: Strategy, grid: Grid, problems: Sequence[Mismatch]) -> RuleError:
    choices = "/".join(c.name for c in s.choices)
    left, right = ("; ".join(map(layout_text, side)) for side in (s.operands, s.results))
    return RuleError(
        f"the rule of {op.call.op} is wrong: strategy {choices} on grid {grid}",
        at=[("layouts", f"{left} -> {right}"), *problems],
        remedy="correct the sentence, or its facts",
    )


def _run_ranks(
    example: Example,
    strategy: Strategy,
    operands: Mapping[str, Layout],
    results: Mapping[str, Layout],
    grid: Grid,
) -> tuple[dict[str, Pieces], dict[str, Pieces]]:
    """Return every rank's results, and gradients of the operands, by value name."""
    plan = _plan(example, strategy, operands, grid)
    cut = {n: pieces_of(x, operands[n], grid) for n, x in example.operands.items()}
    back = {v: pieces_of(g, dual(results[v]), grid) for v, g in example.cotangents.items()}

    def step(rank: int, axes: dict[str, Axis]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        coords = grid.coords(rank)
        leaves = {n: p[coords].clone() for n, p in cut.items()}
        for n in example.gradients:
            leaves[n].requires_grad_()
        module = emit(example.program, example.network, plan, coords, axes, "exact")
        if module.meta["rng"] is not None:
            module.meta["rng"].step_seed, module.meta["rng"].own = SEED, {}
        made = dict(zip(example.results, module(*leaves.values()), strict=True))
        if example.gradients:
            torch.autograd.backward([made[v] for v in back], [g[coords] for g in back.values()])
        return made, {n: _gradient(leaves[n]) for n in example.gradients}

    runs = dict(zip(grid.all_coords(), run_ranks(grid, step), strict=True))
    made: dict[str, Pieces] = {v: {c: m[v].detach() for c, (m, _) in runs.items()} for v in results}
    return made, {n: {c: g[n] for c, (_, g) in runs.items()} for n in example.gradients}


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _plan(example: Example, strategy: Strategy, operands: Mapping[str, Layout], grid: Grid) -> Plan:
    """Return a plan of one decision, whose operands rest as it reads them: nothing moves."""
    op = example.op
    decision = Decision(
        name=op.name,
        op=str(op.call.op),
        choices=tuple(c.name for c in strategy.choices),
        split=tuple(c.split for c in strategy.choices),
        operands=strategy.operands,
        results=strategy.results,
        reads=op.operands,
        makes=op.results,
        shapes=tuple(r.shape for r in op.call.results),
        dims=(),
        dtype="",
        seconds=0.0,
        memory_bytes=0,
        axes=grid.names,
    )
    resting = {
        n: Resting(operands[n], tuple(x.shape), str(x.dtype), 0, n in example.gradients)
        for n, x in example.operands.items()
    }
    return Plan(
        grid=grid,
        cluster="",
        train=True,
        model={},
        decisions=(decision,),
        params=resting,
        copies={},
        outputs=strategy.results,
        moves=(),
        internal=(),
        memory=Memory(0, 0, 0, 0),
        step_time_s=0.0,
        lower_bound_s=0.0,
        search_s=0.0,
    )
