"""The check finds what is wrong and where it begins, and leaves the original as it was."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autotp
from autotp import collectives, simulate
from autotp.check import compare, prepare
from autotp.cost_model.cluster import bandwidth_bound
from autotp.errors import AutotpError, PlanError
from autotp.passes.capture.model import capture
from autotp.passes.rules import table
from tests.models import bert, gpt2, mlp, nanogpt

CHIPS = bandwidth_bound(1e9, flops_per_s=1e9)
ATEN = torch.ops.aten


def checked(built, grid=(2, 2), **options):
    model, inputs = built
    return autotp.check(model, grid, inputs, cluster=CHIPS, **options)


def test_report_of_a_sound_program():
    report = checked(nanogpt())
    kinds = [d.kind for d in report.differences]
    assert report.ok and report.first is None and report.notes == ()
    assert kinds.count("loss") == 1 and kinds.count("output") == 1
    assert kinds.count("gradient") == kinds.count("parameter") == 24
    lines = str(report).splitlines()
    assert lines[0] == "check  NanoGPT on 2x2, train: ok, 50 tensors equal up to rounding"
    assert lines[-1].startswith("tolerance  9.3e-06 of a tensor's largest value = 8 eps sqrt(n)")


def test_the_original_is_left_as_it_was():
    model, inputs = nanogpt(dropout=0.1)
    model.wte.weight.grad = torch.ones_like(model.wte.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    assert checked((model, inputs)).ok
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert bool((model.wte.weight.grad == 1).all()) and model.training
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["wte.weight"]


@pytest.mark.parametrize(
    "build", (lambda: nanogpt(0.2), lambda: gpt2(dropout=0.1), lambda: bert(dropout=0.1))
)
def test_dropout_is_turned_off_and_said(build):
    model, inputs = build()
    report = checked((model.train(), inputs))
    assert report.ok and "dropout is active" in report.notes[0]
    captured = [d for d in report.differences if d.kind.startswith("captured")]
    assert captured and max(d.error for d in captured) == 0


class Normalised(nn.Module):
    """Writes buffers, and returns a dict with a number, a mask and no loss."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)

    def forward(self, x):
        y = self.norm(self.fc(x))
        return {"y": y, "mask": y > 0, "name": "n", "sum": x.sum()}


def test_buffers_inputs_and_every_output_are_compared():
    x = torch.randn(8, 6, requires_grad=True)
    report = checked((Normalised(), (x,)))
    found = {(d.kind, d.name) for d in report.differences}
    assert report.ok
    assert {("buffer", f"norm.running_{k}") for k in ("mean", "var")} <= found
    assert ("gradient", "x") in found and x.grad is None
    assert sorted(kind for kind, _ in found if kind in ("loss", "output")) == [
        "loss",
        *["output"] * 2,
    ]


def test_a_check_that_proves_little_says_so():
    model, inputs = mlp()
    assert "splits nothing" in autotp.check(model, (2, 2), inputs, cluster="gloo_loopback").notes[0]
    inputs = {name: x.bfloat16() for name, x in inputs.items()}
    assert "bfloat16 is too coarse" in checked((model.bfloat16(), inputs)).notes[0]


class Shifted(nn.Module):
    """Its shift moves every logit alike: a gradient of rounding alone. `faint` has a small one."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 6)
        self.shift, self.faint = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(12))

    def forward(self, x, y):
        h = F.gelu(self.norm(self.up(x)))
        loss = F.cross_entropy(self.down(h) + self.shift, y)
        return loss + (h * self.faint).square().mean() * 1e-7


def shifted(seed):
    torch.manual_seed(seed)
    return Shifted(), dict(x=torch.randn(12, 8), y=torch.randint(6, (12,)))


@pytest.mark.parametrize("grid", ((2, 2), (1, 4), (4, 1)))
@pytest.mark.parametrize("seed", (10, 11))
def test_a_gradient_of_rounding_alone_is_no_difference(seed, grid):
    report = checked(shifted(seed), grid)
    shift = next(d for d in report.differences if (d.kind, d.name) == ("gradient", "shift"))
    assert report.ok and shift.largest < 1e-6


def test_a_rounding_that_moves_nothing_is_not_the_last_word():
    model, inputs = shifted(10)
    subject = prepare(model, (), inputs)
    still = dataclasses.replace(subject, jitter=dict.fromkeys(subject.jitter, 0.0))
    report = compare(still, autotp.plan(model, (1, 4), inputs, cluster=CHIPS))
    unmoved = [dataclasses.replace(d, jitter=0.0) for d in report.differences]
    assert (
        report.largest
        <= report.tolerance.value
        < max(d.relative(report.tolerance) for d in unmoved)
    )


def test_a_small_gradient_that_is_wrong_is_found(monkeypatch):
    def is_place(node):
        return node.target is ATEN.mul.Tensor and 1e-7 in node.args

    plant(monkeypatch, is_place, lambda node: node.update_arg(1, 1.001e-7))
    report = checked(shifted(10))
    wrong = {d.name for d in report.differences if d.relative(report.tolerance) > 1e-4}
    assert not report.ok and wrong == {"faint"}


def test_a_plan_is_checked_and_must_belong_to_the_model():
    model, inputs = mlp()
    plan = autotp.plan(model, (2, 2), inputs, cluster=CHIPS)
    assert checked((model, inputs), plan=plan).ok
    with pytest.raises(PlanError):
        checked((model, inputs), (1, 4), plan=plan)


def test_pins_are_followed():
    pins = {"up.?": {"col": "o"}, "down.?": {"col": "i"}}
    assert checked(mlp(), (1, 4), pins=pins).ok


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model, inputs = mlp()
    with pytest.raises(AutotpError, match="on the meta device"):
        checked((model, inputs))


# Planted faults -----------------------------------------------------------------------------------


def plant(monkeypatch, is_place, change):
    """Change the first emitted node that is the place, on every rank; return its name in a list."""
    emit, names = simulate.emit, []

    def emit_wrong(*args):
        module = emit(*args)
        node = next(n for n in module.graph.nodes if is_place(n))
        change(node)
        module.recompile()
        names.append(node.name)
        return module

    monkeypatch.setattr(simulate, "emit", emit_wrong)
    return names


def moves(function):
    return lambda node: node.target is function and "move" in node.meta


def calls(op):
    return lambda node: node.target is op


def call_instead(function):
    return lambda node: setattr(node, "target", function)


def identity(x, _axis, **_options):
    return x * 1.0


def refuse(*_args, **_options):
    raise ValueError("not today")


def test_a_swapped_collective_is_named(monkeypatch):
    names = plant(monkeypatch, moves(collectives.all_reduce), call_instead(identity))
    report = checked(mlp(), (1, 4), pins={"down.?": {"col": "i"}})
    assert not report.ok and report.first.node == names[0]
    assert (report.first.what, report.first.op) == ("value", "identity")
    assert "is not what identity does" in report.problems[0]  # the type check sees it as well
    assert "FAILED" in str(report) and "<-- differs" in str(report)


def test_a_collective_without_its_backward_is_named(monkeypatch):
    place = moves(collectives.invariant_to_replicate)
    names = plant(monkeypatch, place, call_instead(identity))
    report = checked(mlp(), (1, 4), pins={"up.?": {"col": "o"}, "*.weight": {"col": "S(0)"}})
    assert not report.ok and report.first.what == "gradient"
    assert names[0] in report.first.readers


def test_a_changed_argument_is_named(monkeypatch):
    names = plant(
        monkeypatch,
        calls(ATEN.layer_norm.default),
        lambda node: node.update_arg(4, 0.5),
    )
    report = checked(nanogpt())
    assert not report.ok and report.first.node == names[0]
    assert "layer_norm.default (h.0.ln_2 at models.py:" in str(report.first)


def test_a_damaged_rule_is_named(monkeypatch):
    wrong = dataclasses.replace(table.find(ATEN.mse_loss.default), average=None)
    monkeypatch.setitem(table._TABLE, ATEN.mse_loss.default, wrong)
    report = checked(mlp(), (1, 4), pins={"mse_loss": {"col": ".0"}})
    assert not report.ok and report.problems == ()  # the type check reads the same rule
    assert report.first.op == "mse_loss.default"


def test_a_graph_that_is_not_the_model_is_found(monkeypatch):
    def wrong(*args, **options):
        program = capture(*args, **options)
        node = next(n for n in program.graph.nodes if n.target is ATEN.gelu.default)
        node.target = ATEN.relu.default
        node.kwargs = {}
        program.graph_module.recompile()
        return program

    monkeypatch.setitem(compare.__globals__, "capture", wrong)
    report = checked(mlp())
    assert not report.ok and any(d.kind == "captured loss" for d in report.worst(99))


def test_an_unread_result_does_not_hide_a_fault(monkeypatch):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 12)

        def forward(self, x):
            return F.gelu(self.fc(x).chunk(2, -1)[0]).sum()

    names = plant(monkeypatch, calls(ATEN.gelu.default), call_instead(ATEN.relu.default))
    report = checked((Split(), (torch.randn(4, 6),)))
    assert not report.ok and report.first.node == names[0]


def test_bool_inputs_and_infinite_buffers_are_nudged_in_type():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.register_buffer("mask", torch.full((6,), -torch.inf))

        def forward(self, x, keep):
            return self.fc(x).masked_fill(~keep, 0).softmax(-1).sum() + self.mask.exp().sum()

    assert checked((Masked(), (torch.randn(4, 6), torch.rand(4, 6) > 0.5))).ok


def test_a_rank_that_raises_is_a_finding(monkeypatch):
    names = plant(monkeypatch, calls(ATEN.gelu.default), call_instead(refuse))
    report = checked(nanogpt())
    assert not report.ok and report.problems[0].startswith("ValueError: not today; raised on")
    assert report.first.node == names[0]


def test_a_part_whose_gradient_is_undefined_is_no_fault():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 12)

        def forward(self, x):
            used, cut = self.up(x).unflatten(-1, (6, 2)).unbind(-1)
            with torch.no_grad():
                cut = cut.abs() + 1
            return used.square().mean() + cut.mT.repeat(3, 1).mean()

    report = autotp.check(Parts().double(), (2, 2), (torch.randn(6, 4).double(),))
    assert report.ok, report
