"""What the schedules of random programs are held to, and which of them were met.

met             the kinds of schedules that a plan has
awaited         simulated ranks that use up what they begin with, and must end what they began
twice           a step after a backward whose gradients were set to zero
bytes_problem   what a rank sent beyond its plan
"""

from contextlib import contextmanager
from unittest import mock

import torch

from autotp.axis import ThreadAxis
from autotp.check import take_step
from autotp.passes.emit.again import runnable
from autotp.plan import WHERE_MADE
from autotp.simulate import _local_gradients

KINDS = (
    "gather in a ring",
    "scatter in a ring",
    "panels",
    "ring by price",
    "gather begins early",
    "activations begin early",
    "gradients begin early",
    "shared call",
    "two levels",
    "shared call of two levels",
    "op again",
    "gather again",
    "ring, something again",
    "early, something again",
    "two levels, something again",
    "ring, something early",
)


def met(plan):
    """Return the kinds of schedules that a plan has."""
    rests = {r.value: r.layout for r in plan.params.values()}
    early = [(b, plan.moves[b.moves[0]].value in rests) for b in plan.buckets if b.begins]
    shared = [b for b in plan.buckets if len(b.moves) > 1]
    rings = [m for m in plan.moves if m.schedule == "ring"]
    found = {
        "gather in a ring": any(m.forward == "all_gather" for m in rings),
        "scatter in a ring": any(m.forward == "reduce_scatter" for m in rings),
        "panels": any(m.schedule == "panels" for m in plan.moves),
        "ring by price": any(m.seconds < m.apart_s for m in rings),
        "gather begins early": any(b.begins != WHERE_MADE for b, _ in early),
        "activations begin early": any(b.begins == WHERE_MADE and not p for b, p in early),
        "gradients begin early": any(b.begins == WHERE_MADE and p for b, p in early),
        "shared call": bool(shared),
        "two levels": bool(plan.levels()),
        "shared call of two levels": any("nodes_of" in b.by + b.back_by for b in shared),
        "op again": any(d.again for d in plan),
        "gather again": any(m.again for m in plan.moves if not m.schedule),
    }
    again = found["op again"] or found["gather again"]
    found["ring, something again"] = bool(rings) and again
    found["early, something again"] = bool(early) and again
    found["two levels, something again"] = found["two levels"] and again
    found["ring, something early"] = bool(rings) and bool(early)
    return [kind for kind in KINDS if found[kind]]


# As real ranks may run ---------------------------------------------------------------------------


@contextmanager
def awaited():
    """Let simulated ranks use up what they begin with; raise where what began does not end."""
    begin, permute = ThreadAxis.begin, ThreadAxis._begin_permute
    flying = []

    def on_its_way(x, made, used_up):
        if used_up:
            x.fill_(torch.nan)
        flight = object()
        flying.append(flight)
        version = x._version

        def finish():
            flying.remove(flight)
            assert x._version == version, "what is being sent was changed"
            return made()

        return finish

    def begins(self, kind, x, by=""):
        return on_its_way(x, begin(self, kind, x, by), kind == "all_reduce")

    def permutes(self, x, send, receive):
        return on_its_way(x, permute(self, x, send, receive), False)

    with (
        mock.patch.object(ThreadAxis, "begin", begins),
        mock.patch.object(ThreadAxis, "_begin_permute", permutes),
    ):
        yield
    assert not flying, f"{len(flying)} moves were begun and never awaited"


def twice(subject, plan):
    """Return a step whose gradients are added to those of a backward before, set to zero."""

    def execute(rank, module, values):
        outputs = runnable(module, subject.network)(*values)
        given = _local_gradients(plan, subject.backward, plan.grid.coords(rank))
        pairs = [
            (o, g)
            for o, g in zip(outputs, given, strict=False)
            if g is not None and isinstance(o, torch.Tensor) and o.requires_grad
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True), retain_graph=True)
        for v in values:
            if v.grad is not None:
                v.grad.zero_()
        return outputs

    return take_step(subject, plan, execute)


def bytes_problem(plan, run):
    """Say where a rank sent more than the plan says; parts without a gradient send nothing back."""
    planned = plan.sent()
    for rank, r in enumerate(run.ranks):
        for key, n in r.sent.items():
            if n > planned.get(key, 0):
                return f"rank {rank} sent {n} by {key}, planned {planned.get(key, 0)}"
    return ""
