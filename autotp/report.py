"""A plan as a person reads it: the program with its layouts and prices, and what it all costs.

    plan_text    the whole plan: program, parameters, totals
    explain      one op's choice against its runners-up

Layers that are alike are printed once. Views are left out, an op's operands name what the views
show; so are moves of parameters and inputs that send nothing. Equal plans print equally.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from autotp.errors import PlanError
from autotp.formula import formula_text, layer_formula, repeated_layer, symbol_sizes
from autotp.notation import bytes_text, choice_text, memory_text, seconds_text, type_text
from autotp.plan import Alternative, Plan, Priced
from autotp.program_text import AGAIN, bucket_lines, program_lines
from autotp.repeats import Section, place_moves, sections


def plan_text(plan: Plan) -> str:
    """Return the plan as text: the program, the parameters at rest, the totals of one step."""
    calls = bucket_lines(plan)
    shared = ["", "parameters moved together, one call each", *calls] if calls else []
    body = [*program_lines(plan), *shared, "", *_parameter_lines(plan)]
    parts = [_head(plan), *body, "", *_totals(plan)]
    return "\n".join(line.rstrip() for line in parts)


def _head(plan: Plan) -> str:
    axes = ", ".join(f"{n} {s}" for n, s in zip(plan.grid.names, plan.grid.sizes, strict=True))
    mode = "training step" if plan.train else "forward pass"
    return f"plan of one {mode} on grid {plan.grid} ({axes}) of {plan.cluster}"


# Parameters --------------------------------------------------------------------------------------


def _parameter_lines(plan: Plan) -> list[str]:
    """Return a line per parameter; those of repeated layers, at rest alike, share one."""
    counts: dict[tuple[str, str, str], int] = {}
    layers = [s for s in sections(plan, place_moves(plan)) if s.name]
    for path, r in plan.params.items():
        size = bytes_text(r.local_bytes) + ("" if r.trained else ", frozen")
        row = (f"{_pattern(path, layers)}:", type_text(r.shape, r.layout, r.dtype, plan.grid), size)
        counts[row] = counts.get(row, 0) + 1
    widths = [max((len(row[k]) for row in counts), default=0) for k in range(2)]
    rows = [
        f"  {name:<{widths[0]}}  {type_:<{widths[1]}}  {size}" + (f" x {n}" if n > 1 else "")
        for (name, type_, size), n in counts.items()
    ]
    return ["parameters at rest, bytes per rank", *rows]


def _pattern(path: str, layers: Sequence[Section]) -> str:
    """Return a parameter's name, that of all layers if it is in one that repeats."""
    for section in layers:
        for head in _layer_heads(section.prefix, len(section.layers)):
            if path.startswith(head):
                return f"{section.name}.{path.removeprefix(head)}"
    return path


def _layer_heads(prefix: str, count: int) -> list[str]:
    path, _, first = prefix.removesuffix(".").rpartition(".")
    dot = "." if path else ""
    return [f"{path}{dot}{int(first) + k}." for k in range(count)]


# Totals ------------------------------------------------------------------------------------------


def _totals(plan: Plan) -> list[str]:
    rows = [
        ("time", _time_text(plan)),
        ("sent", _sent_text(plan)),
        ("layer", _layer_text(plan)),
        ("hidden", _hidden_text(plan)),
        ("memory", memory_text(plan.memory)),
        ("split", str(plan.coverage()) if plan.grid.world_size > 1 else ""),
        ("again", _again_text(plan)),
        ("dynamic", plan.dynamic.text()),
        ("unruled", ", ".join(f"{op} x {n}, run whole" for op, n in plan.unruled)),
    ]
    rows += [("note", note) for note in plan.notes]
    return ["one step, per rank", *(f"  {name:<8} {text}" for name, text in rows if text)]


def _time_text(plan: Plan) -> str:
    bound = f"{seconds_text(plan.lower_bound_s)} at least"
    gap = "optimal" if plan.gap <= 0 else f"gap {100 * plan.gap:.2g}%"
    search = f" in {seconds_text(plan.search_s)}" if plan.search_s else ""
    found = f", found by {plan.method}{search}" if plan.method else ""
    return f"{seconds_text(plan.step_time_s)} predicted, {bound} ({gap}){found}"


def _hidden_text(plan: Plan) -> str:
    """Say how much of the collectives' time other ops run beside."""
    hidden = sum(b.hidden_s for b in plan.buckets)
    moving = sum(m.seconds for m in plan.moves)
    if not hidden:
        return ""
    return f"{seconds_text(hidden)} of the moves' {seconds_text(moving)}, beside other ops"


def _sent_text(plan: Plan) -> str:
    parts = [
        f"{kind} {axis} {bytes_text(float(size))}"
        for (kind, axis), size in sorted(plan.sent().items())
    ]
    total = bytes_text(float(plan.comm_bytes))
    between = float(sum(plan.sent_between().values()))
    levels = f"; {bytes_text(between)} of it between nodes, by two levels" if between else ""
    return f"{total}: {', '.join(parts)}{levels}" if parts else "nothing"


def _layer_text(plan: Plan) -> str:
    """Write the formula of what one repeated layer sends, where layers repeat."""
    layer = repeated_layer(plan)
    if layer is None:
        return ""
    formula = layer_formula(plan)
    if not formula.free_symbols:
        return f"{formula} elements sent in each of {layer.name}"
    sizes = symbol_sizes(plan, layer_only=True)
    where = ", ".join(f"{symbol}={n}" for symbol, n in sizes.items())
    return f"{formula_text(formula)} elements sent in each of {layer.name} ({where})"


def _again_text(plan: Plan) -> str:
    """Name the checkpoint regions, which backward computes again, layers that are alike once."""
    layers = [s for s in sections(plan, place_moves(plan)) if s.name]
    names = dict.fromkeys(_pattern(f"{d.region}.", layers)[:-1] for d in plan if d.region)
    regions = f"{', '.join(names)}: computed again in backward (checkpoint)" if names else ""
    return "; ".join(text for text in (regions, _repeated_text(plan)) if text)


def _repeated_text(plan: Plan) -> str:
    """Say how much backward makes again by itself: what is not in a checkpoint region."""
    ops = [d for d in plan if d.again]
    inside = {v for d in plan if d.region for v in d.reads}
    moves = [m for m in plan.moves if m.again and m.value not in inside]
    found = [(len(ops), "op"), (len(moves), "move")]
    counts = " and ".join(f"{n} {word}{'s' * (n > 1)}" for n, word in found if n)
    return f"{counts} made again in backward instead of kept" if counts else ""


# Explanations ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Explanation:
    """The choice of one op, and the best plans in which it chooses otherwise."""

    name: str
    op: str
    where: str
    chosen: Alternative
    runners_up: tuple[Alternative, ...]
    moves: tuple[Priced, ...] = ()

    def __str__(self) -> str:
        rows = [("", "choice", "step", "sent", "memory"), _row("chosen", self.chosen)]
        rows += [_row("runner-up", other, _slower(other, self.chosen)) for other in self.runners_up]
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        lines = [f"{self.name}: {self.op}" + (f"   {self.where}" if self.where else "")]
        for label, choice, *numbers in rows:
            head = f"  {label:<{widths[0]}}  {choice:<{widths[1]}}"
            tail = "  ".join(f"{n:>{w}}" for n, w in zip(numbers, widths[2:], strict=True))
            lines.append(f"{head}  {tail}")
        lines += [_ways_text(p) for p in self.moves]
        lines += [] if self.runners_up else ["  no runner-up: it is pinned, or can do nothing else"]
        return "\n".join(lines)


def _ways_text(p: Priced) -> str:
    """Say what a move takes within the product that may make it, and apart."""
    ways = {"apart" if way == "once" else f"by {way}": s for way, s in p.seconds}
    chosen = "apart" if p.chosen == "once" else f"by {p.chosen}"
    others = [f"{way} {seconds_text(s)}" for way, s in ways.items() if way != chosen]
    start = f"  moves {p.value} over {p.axis} {chosen}, {seconds_text(ways[chosen])}"
    return f"{start}; {', '.join(others)}"


def _row(label: str, a: Alternative, slower: str = "") -> tuple[str, str, str, str, str]:
    sent, held = bytes_text(float(a.comm_bytes)), bytes_text(a.memory_bytes)
    return label, a.choice, slower or seconds_text(a.step_time_s), sent, held


def _slower(a: Alternative, chosen: Alternative) -> str:
    """Write a time as what it is over the chosen one's: whole steps hide small differences."""
    return f"+{seconds_text(max(0.0, a.step_time_s - chosen.step_time_s))}"


def explain(plan: Plan, name: str) -> Explanation:
    """Set the choice of one op against its runners-up.

    Raises PlanError for an op that the plan has not, and for a plan that was loaded.
    """
    decision = plan[name]
    if plan.alternatives is None:
        raise PlanError(
            "a loaded plan cannot explain its choices: it holds no search",
            at=[(name, choice_text(decision, plan.grid))],
            remedy="plan the model again: autotp.plan(model, grid, example_inputs).explain(name)",
        )
    choice = choice_text(decision, plan.grid)
    chosen = Alternative(
        f"{choice}, {AGAIN}" if decision.again else choice,
        plan.step_time_s,
        Fraction(plan.comm_bytes),
        plan.memory_bytes,
    )
    others = tuple(plan.alternatives(name))
    moves = tuple(p for p in plan.priced if p.name == name)
    return Explanation(name, decision.op, decision.where, chosen, others, moves)
