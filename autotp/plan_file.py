"""Plans as versioned JSON: what a plan belongs to, and every decision under its module path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from autotp.dynamic import Dynamic, DynamicDim, DynamicSplit
from autotp.errors import GridError, PlanError
from autotp.grid import Grid
from autotp.layouts import layout_text, parse_layout
from autotp.plan import Bucket, Decision, Memory, Plan, PlannedMove, Resting

VERSION = 6


def to_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data. What was measured, such as search time, is left out."""
    return {
        "format": "autotp plan",
        "version": VERSION,
        "grid": dict(zip(plan.grid.names, plan.grid.sizes, strict=True)),
        "cluster": plan.cluster,
        "train": plan.train,
        "model": dict(plan.model),
        "ops": [_decision_data(d) for d in plan.decisions],
        "parameters": {name: _resting_data(r) for name, r in plan.params.items()},
        "copies": {v: layout_text(c) for v, c in plan.copies.items()},
        "outputs": [None if c is None else layout_text(c) for c in plan.outputs],
        "moves": [_move_data(m) for m in plan.moves],
        "buckets": [_bucket_data(b) for b in plan.buckets],
        "internal": [[*row[:3], str(row[3])] for row in plan.internal],
        "memory_bytes": [
            plan.memory.parameters,
            plan.memory.gradients,
            plan.memory.optimizer,
            plan.memory.activations,
            plan.memory.peak,
        ],
        "step_time_s": plan.step_time_s,
        "lower_bound_s": plan.lower_bound_s,
        "method": plan.method,
        "unruled": [list(row) for row in plan.unruled],
        "notes": list(plan.notes),
        "dynamic": {
            "dims": [[d.name, d.least, d.most] for d in plan.dynamic.dims],
            "splits": [[s.size, list(s.ranks), s.even] for s in plan.dynamic.splits],
        },
    }


def _resting_data(r: Resting) -> list[Any]:
    state = [r.dtype, r.local_bytes, r.trained]
    return [layout_text(r.layout), list(r.shape), *state, r.value, list(r.dims)]


def _decision_data(d: Decision) -> dict[str, Any]:
    return {
        "name": d.name,
        "op": d.op,
        "choices": list(d.choices),
        "split": [list(s) for s in d.split],
        "operands": [layout_text(c) for c in d.operands],
        "results": [layout_text(c) for c in d.results],
        "reads": list(d.reads),
        "makes": list(d.makes),
        "shapes": [list(s) for s in d.shapes],
        "dims": [list(s) for s in d.dims],
        "dtype": d.dtype,
        "seconds": d.seconds,
        "memory_bytes": d.memory_bytes,
        "where": d.where,
        "free": d.free,
        "flops": d.flops,
        "region": d.region,
        "again": d.again,
        "backward_s": d.backward_s,
    }


def _move_data(m: PlannedMove) -> list[Any]:
    sent = [[kind, str(size)] for kind, size in m.sent]
    ends = [layout_text(m.before), layout_text(m.after)]
    kinds = [m.forward, m.backward]
    numbers, ways = [m.size_bytes, m.seconds], [m.by, m.back_by, m.schedule, m.apart_s]
    return [m.value, m.of, m.axis, *ends, *kinds, *numbers, sent, m.again, *ways]


def _bucket_data(b: Bucket) -> list[Any]:
    ways = [b.axis, b.forward, b.backward]
    how = [b.begins, b.by, b.back_by, b.hidden_s]
    return [*ways, list(b.moves), b.size_bytes, b.seconds, *how]


def from_json(data: Mapping[str, Any]) -> Plan:
    """Return the plan that `to_json` wrote. Raises PlanError for another format or version."""
    written = (data.get("format"), data.get("version")) if isinstance(data, Mapping) else None
    if written != ("autotp plan", VERSION):
        raise PlanError(
            f"not a plan of version {VERSION}",
            at=[("file", "format {!r}, version {!r}".format(*written) if written else "no plan")],
            remedy="plan again and save",
        )
    try:
        return _read(data)
    except (AttributeError, GridError, KeyError, IndexError, TypeError, ValueError) as error:
        raise PlanError(
            "the plan file is damaged", at=[("file", repr(error))], remedy="plan again and save"
        ) from error


def _read(data: Mapping[str, Any]) -> Plan:
    axes = tuple(data["grid"])
    return Plan(
        grid=Grid(axes, tuple(data["grid"].values())),
        cluster=data["cluster"],
        train=data["train"],
        model=data["model"],
        decisions=tuple(_read_decision(d, axes) for d in data["ops"]),
        params={name: _read_resting(row) for name, row in data["parameters"].items()},
        copies={v: parse_layout(c) for v, c in data["copies"].items()},
        outputs=tuple(None if c is None else parse_layout(c) for c in data["outputs"]),
        moves=tuple(_read_move(row) for row in data["moves"]),
        buckets=tuple(_read_bucket(row) for row in data["buckets"]),
        internal=tuple((n, a, k, Fraction(size)) for n, a, k, size in data["internal"]),
        memory=Memory(*data["memory_bytes"]),
        step_time_s=data["step_time_s"],
        lower_bound_s=data["lower_bound_s"],
        search_s=0.0,
        method=data["method"],
        unruled=tuple((op, n) for op, n in data["unruled"]),
        notes=tuple(data["notes"]),
        dynamic=_read_dynamic(data["dynamic"]),
    )


def _read_dynamic(data: Mapping[str, Any]) -> Dynamic:
    splits = (DynamicSplit(size, tuple(ranks), even) for size, ranks, even in data["splits"])
    return Dynamic(tuple(DynamicDim(*row) for row in data["dims"]), tuple(splits))


def _read_resting(row: list[Any]) -> Resting:
    layout, shape, dtype, local_bytes, trained, value, dims = row
    whole = tuple(shape)
    return Resting(parse_layout(layout), whole, dtype, local_bytes, trained, value, tuple(dims))


def _read_decision(d: Mapping[str, Any], axes: tuple[str, ...]) -> Decision:
    return Decision(
        name=d["name"],
        op=d["op"],
        choices=tuple(d["choices"]),
        split=tuple(tuple(s) for s in d["split"]),
        operands=tuple(parse_layout(c) for c in d["operands"]),
        results=tuple(parse_layout(c) for c in d["results"]),
        reads=tuple(d["reads"]),
        makes=tuple(d["makes"]),
        shapes=tuple(tuple(s) for s in d["shapes"]),
        dims=tuple(tuple(s) for s in d["dims"]),
        dtype=d["dtype"],
        seconds=d["seconds"],
        memory_bytes=d["memory_bytes"],
        axes=axes,
        where=d["where"],
        free=d["free"],
        flops=d["flops"],
        region=d["region"],
        again=d["again"],
        backward_s=d["backward_s"],
    )


def _read_move(row: list[Any]) -> PlannedMove:
    value, of, axis, before, after, forward, backward, size_bytes, seconds, sent, *rest = row
    return PlannedMove(
        value,
        of,
        axis,
        parse_layout(before),
        parse_layout(after),
        forward,
        backward,
        size_bytes,
        seconds,
        tuple((kind, Fraction(size)) for kind, size in sent),
        *rest,
    )


def _read_bucket(row: list[Any]) -> Bucket:
    axis, forward, backward, moves, *rest = row
    return Bucket(axis, forward, backward, tuple(moves), *rest)


def save(plan: Plan, path: str | Path) -> None:
    """Write a plan to a file."""
    Path(path).write_text(json.dumps(to_json(plan), indent=1) + "\n")


def load(path: str | Path) -> Plan:
    """Read a plan from a file. Raises PlanError when it is truncated or of another version."""
    try:
        data = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(
            f"{path} is not a whole plan file", at=[("file", str(error))], remedy="save it again"
        ) from error
    return from_json(data)


def refuse_other(plan: Plan, model: Mapping[str, str], grid: Grid, train: bool) -> None:
    """Raise PlanError, with every difference, if a plan belongs to another model, grid or mode."""
    problems = []
    if plan.grid != grid:
        problems.append(("grid", f"{grid} {grid.names}, planned {plan.grid} {plan.grid.names}"))
    if plan.train != train:
        problems.append(("mode", f"{'train' if train else 'eval'}, planned the other"))
    for name in {**plan.model, **model}:
        here, planned = model.get(name, "absent"), plan.model.get(name, "absent")
        if here != planned:
            problems.append((name, f"{here}, planned {planned}"))
    if problems:
        raise PlanError(
            "the plan belongs to another model, grid or shape",
            at=problems,
            remedy="plan this model on this grid",
        )
