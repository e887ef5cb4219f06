"""autotp.rule: a user's rule is proved when it is registered, or refused with what is wrong."""

import contextlib
import warnings

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.passes.rules.table import forget
from tests.end_to_end.models import CLUSTER
from tests.faults.table import fault


def custom(name, gradient=None):
    """Make a custom op of the shape of its first operand, from a function."""

    def register(function):
        op = torch.library.custom_op(f"faults::{name}", function, mutates_args=())
        op.register_fake(lambda x, *_rest: torch.empty_like(x))
        if gradient:
            keep = lambda ctx, inputs, output: ctx.save_for_backward(*inputs)  # noqa: E731
            op.register_autograd(gradient, setup_context=keep)
        return op

    return register


def centre_back(ctx, g):
    return g - g.mean(-1, keepdim=True)


@custom("centre", centre_back)
def centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def scale_back(ctx, g):
    x, w = ctx.saved_tensors
    return g * w, (g * x).sum((0, 1))


@custom("scale", scale_back)
def scale(x: Tensor, w: Tensor) -> Tensor:
    return x * w


@custom("wrong_gradient", lambda ctx, g: g.cumsum(1))
def wrong_gradient(x: Tensor) -> Tensor:
    return x * 1


@torch.library.custom_op("faults::power", mutates_args=())
def power(x: Tensor, exponent: int) -> Tensor:
    return x**exponent


power.register_fake(lambda x, exponent: torch.empty_like(x))


@contextlib.contextmanager
def only_here(name):
    try:
        yield
    finally:
        forget(getattr(torch.ops.faults, name).default)


@pytest.mark.parametrize(
    ("op", "sentence", "facts"),
    [
        ("faults::centre", "b t [d] -> b t [d]", {}),
        ("faults::centre", "... [d] -> ... [d]", {"linear": "all"}),
        ("faults::scale", "b t d, d -> b t d", {"linear": "each", "saves": (0, 1)}),
        ("faults::power.default", "... -> ...", {"example": ([torch.randn(12, 6), 3], {})}),
    ],
)
def test_a_right_rule_enters_the_table(op, sentence, facts):
    with only_here(op.partition("::")[2].partition(".")[0]):
        assert autotp.rule(op, sentence, **facts).sentence == sentence


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)
        self.w = nn.Parameter(torch.randn(32))

    def forward(self, x):
        return self.fc2(scale(self.fc1(x), self.w)).square().mean()


def test_an_op_with_a_rule_is_split_like_any_other():
    x, pins = torch.randn(4, 6, 8), {"fc1": {"col": "o"}, "scale": {"col": "d"}}
    with only_here("scale"), warnings.catch_warnings(action="error"):
        autotp.rule("faults::scale", "b t d, d -> b t d", linear="each")
        plan = autotp.plan(Model(), (1, 2), (x,), cluster=CLUSTER, pins=pins, strict=True)
        assert plan["scale"].factors == {"col": "d"} and not plan.unruled
        assert autotp.check(Model(), (1, 2), (x,), cluster=CLUSTER, pins=pins).ok


def test_a_rule_may_be_replaced():
    with only_here("centre"):
        autotp.rule("faults::centre", "b t [d] -> b t [d]")
        better = autotp.rule("faults::centre", "... [d] -> ... [d]", replace=True)
        assert better.sentence == "... [d] -> ... [d]"


@fault(
    "A rule that splits what the op needs whole",
    """
    RuleError: the rule of faults.centre.default is wrong: strategy d on grid 2
      at      layouts                 S(2) -> S(2)
      at      result 0                ..., wanted ..., at [0, 0, 0]
      at      gradient of operand 0   ..., wanted ..., at [0, 0, 0]
      remedy  correct the sentence, or its facts
    """,
)
def test_wrong_rule():
    autotp.rule("faults::centre", "b t d -> b t d")


@fault(
    "A rule under which the gradient is wrong",
    """
    RuleError: the rule of faults.wrong_gradient.default is wrong: strategy t on grid 2
      at      layouts                 S(1) -> S(1)
      at      gradient of operand 0   ..., wanted ..., at [0, 3]
      remedy  correct the sentence, or its facts
    """,
)
def test_wrong_gradient():
    autotp.rule("faults::wrong_gradient", "b t -> b t")


@fault(
    "A rule that lets a partial sum through an op that is not linear",
    """
    RuleError: the rule of faults.power.default is wrong: strategy P on grid 2
      at      layouts    P -> P
      at      result 0   ..., wanted ..., at [0, 0]
      remedy  correct the sentence, or its facts
    """,
)
def test_not_linear():
    example = ([torch.randn(12, 6), 2], {})
    autotp.rule("faults::power", "... -> ...", linear="all", example=example)


@fault(
    "A rule for an op that has one",
    """
    RuleError: faults.centre.default has a rule already
      at      its rule   'b t [d] -> b t [d]'
      remedy  replace=True puts this in its place
    """,
)
def test_second_rule():
    with only_here("centre"):
        for _ in range(2):
            autotp.rule("faults::centre", "b t [d] -> b t [d]")


@fault(
    "A rule for an op of torch's own",
    """
    RuleError: aten.linear.default has a rule already
      at      its rule   '... i, o i, +o -> ... o'
      remedy  its rule is part of autotp
    """,
)
def test_built_in():
    autotp.rule("aten::linear", "... i, o i -> ... o", replace=True)


@fault(
    "A rule for an op that is not defined",
    """
    RuleError: a rule is for one op that exists
      at      faults::nothing   is not defined
      remedy  define it first, with torch.library, and name it "namespace::op.overload"
    """,
)
def test_no_op():
    autotp.rule("faults::nothing", "... -> ...")


@fault(
    "A rule that takes more than tensors to prove",
    """
    RuleError: the rule of faults.power.default cannot be proved on tensors alone
      at      exponent   has the type int
      remedy  pass example=(args, kwargs), a call to prove it on
    """,
)
def test_needs_example():
    autotp.rule("faults::power", "... -> ...")


@fault(
    "A sentence that does not fit the op",
    """
    RuleError: faults.scale.default does not run on operands that its rule allows
      at      operands       [12, 6], [24]
      at      RuntimeError   The size of tensor a (6) must match the size of tensor b (24) ...
      remedy  correct the sentence, or pass example=(args, kwargs), a call to prove it on
    """,
)
def test_misfit():
    autotp.rule("faults::scale", "b d, t -> b d")


@fault(
    "A sentence that is none",
    """
    RuleError: 'b t d' has no '->'
      remedy  write "operands -> results"
    """,
)
def test_no_sentence():
    autotp.rule("faults::centre", "b t d")
