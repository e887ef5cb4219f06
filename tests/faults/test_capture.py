"""Models that cannot be captured, and ops that nobody has a rule for."""

import pytest
import torch
from torch import Tensor, nn

import autotp
from tests.end_to_end.models import CLUSTER
from tests.faults.table import assert_says, fault

X = torch.randn(4, 8)


def plan(model, **options):
    return autotp.plan(model, (1, 2), (X,), cluster=CLUSTER, **options)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)


class Branch(Linear):
    def forward(self, x):
        if self.fc(x).sum() > 0:
            return self.fc(x)
        return x


@fault(
    "An if that depends on a tensor's values",
    """
    CaptureError: the model's Python depends on the values of a tensor, and a plan is made before them
      at      test_capture.py:...   if self.fc(x).sum() > 0:
      at      torch                 Could not guard on data-dependent expression ...
      remedy  compute with the values in tensors: torch.where in place of if and of x[mask]
      remedy  compute the number before the model is called, and pass it: a constant of the plan
      remedy  put these lines into a torch.library custom op: it runs whole, or as autotp.rule says
    """,
)
def test_branch():
    plan(Branch())


class Loop(Linear):
    def forward(self, x):
        for _ in range(int(x.abs().sum())):
            x = self.fc(x)
        return x


@fault(
    "A loop as long as a tensor says",
    """
    CaptureError: the model's Python depends on the values of a tensor, and a plan is made before them
      at      test_capture.py:...   for _ in range(int(x.abs().sum())):
      at      torch                 Could not guard on data-dependent expression ...
      remedy  compute with the values in tensors: torch.where in place of if and of x[mask]
      remedy  compute the number before the model is called, and pass it: a constant of the plan
      remedy  put these lines into a torch.library custom op: it runs whole, or as autotp.rule says
    """,
)
def test_loop():
    plan(Loop())


class Pieces(Linear):
    def forward(self, x):
        halves = (x.abs().sum().long() % 2 + 1).repeat(2).tolist()
        a, b, _ = x.split([*halves, len(x) - sum(halves)])
        return self.fc(torch.cat([b, a]))


@fault(
    "Pieces as long as a tensor says",
    """
    CaptureError: the model computes what a plan cannot hold
      at      test_capture.py:...   aten.item.default: a Python number that depends on a tensor's values
      at      test_capture.py:...   <built-in function add>: a Python number that depends on a tensor's values
      at      test_capture.py:...   <built-in function sub>: a Python number that depends on a tensor's values
      at      test_capture.py:...   <built-in function getitem>: a shape that depends on a tensor's values
      at      test_capture.py:...   aten.cat.default: a shape that depends on a tensor's values
      at      test_capture.py:...   aten.linear.default: a shape that depends on a tensor's values
      remedy  compute with the values in tensors: torch.where in place of if and of x[mask]
      remedy  compute the number before the model is called, and pass it: a constant of the plan
      remedy  put these lines into a torch.library custom op: it runs whole, or as autotp.rule says
    """,
)
def test_pieces():
    plan(Pieces())


class Item(Linear):
    def forward(self, x):
        return self.fc(x) * x.max().item()


@fault(
    "A number taken from a tensor",
    """
    CaptureError: the model computes what a plan cannot hold
      at      test_capture.py:...   aten.item.default: a Python number that depends on a tensor's values
      remedy  compute with the values in tensors: torch.where in place of if and of x[mask]
      remedy  compute the number before the model is called, and pass it: a constant of the plan
      remedy  put these lines into a torch.library custom op: it runs whole, or as autotp.rule says
    """,
)
def test_item():
    plan(Item())


class Masked(Linear):
    def forward(self, x):
        return self.fc(x)[x > 0]


@fault(
    "A shape that depends on a tensor's values",
    """
    CaptureError: the model computes what a plan cannot hold
      at      test_capture.py:...   aten.index.Tensor: a shape that depends on a tensor's values
      remedy  compute with the values in tensors: torch.where in place of if and of x[mask]
      remedy  compute the number before the model is called, and pass it: a constant of the plan
      remedy  put these lines into a torch.library custom op: it runs whole, or as autotp.rule says
    """,
)
def test_masked():
    plan(Masked())


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Reversed(Linear):
    def forward(self, x):
        return Reverse.apply(self.fc(x))


@fault(
    "A custom autograd function whose backward is not that of its forward",
    """
    CaptureError: Reverse is a custom autograd function: its backward would be lost
      at      test_capture.py:...   tests.faults.test_capture.Reverse
      remedy  write its forward in differentiable ops, or make it a torch.library custom op
    """,
)
def test_function():
    plan(Reversed())


class Caller(Linear):
    def forward(self, x):
        return self.fc(torch.from_numpy(x.detach().numpy()))


@fault(
    "Code that is no tensor program",
    """
    CaptureError: the model cannot be captured as one graph: .numpy() is not supported for tensor subclasses.
      at      test_capture.py:...   return self.fc(torch.from_numpy(x.detach().numpy()))
      remedy  make torch.export.export(model, args, kwargs, strict=False) accept the model
    """,
)
def test_numpy():
    plan(Caller())


# Custom ops --------------------------------------------------------------------------------------


@torch.library.custom_op("faults::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, g: 2 * g)


@torch.library.custom_op("faults::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    return x / 2


halve.register_fake(torch.empty_like)
halve.register_autograd(lambda ctx, g: g / 2)


@torch.library.custom_op("faults::shapeless", mutates_args=())
def shapeless(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("faults::write", mutates_args=("x",))
def write(x: Tensor) -> None:
    x.mul_(2)


class Custom(Linear):
    def forward(self, x):
        return double(halve(double(self.fc(x))))


class Shapeless(Linear):
    def forward(self, x):
        return shapeless(self.fc(x))


class Writes(Linear):
    def forward(self, x):
        y = self.fc(x) * 1
        write(y)
        return y


@fault(
    "strict=True, and a custom op without a rule",
    """
    RuleError: strict=True, and 2 ops have no rule
      at      test_capture.py:...   faults.double.default in double
      at      test_capture.py:...   faults.halve.default in halve
      at      test_capture.py:...   faults.double.default in double_1
      remedy  give a rule, such as autotp.rule("faults::double", "b ... -> b ...")
      remedy  strict=False runs them whole on every rank
    """,
)
def test_strict():
    plan(Custom(), strict=True)


def test_custom_ops_run_whole_with_one_warning_and_are_right():
    with pytest.warns(UserWarning) as warned:
        plan(Custom())
    (one,) = [str(w.message) for w in warned if "rule" in str(w.message)]
    assert_says(
        one,
        "autotp has no rule for faults.double.default (2 calls), faults.halve.default (1 calls):"
        " run whole on every rank; autotp.rule gives it one",
    )
    with pytest.warns(UserWarning, match="no rule"):
        planned = plan(Custom())
    assert planned.unruled == (("faults.double.default", 2), ("faults.halve.default", 1))
    assert autotp.check(Custom(), (1, 2), (X,), cluster=CLUSTER).ok


def test_strict_accepts_what_has_rules():
    assert plan(nn.Sequential(nn.Linear(8, 8), nn.GELU()), strict=True).unruled == ()


@fault(
    "A custom op that does not say what shape it makes",
    """
    CaptureError: the model cannot be captured as one graph: There was no fake impl registered for <CustomOpDef(faults::shapeless)>...
      at      test_capture.py:...   return shapeless(self.fc(x))
      remedy  say what shape the op makes: @torch.library.register_fake
    """,
)
def test_without_fake():
    plan(Shapeless())


@fault(
    "A custom op that writes to its operands",
    """
    CaptureError: the model computes what a plan cannot hold
      at      test_capture.py:...   faults.write.default: a custom op that writes to its operands
      remedy  make the op return what it writes: mutates_args=()
    """,
)
def test_mutating_op():
    plan(Writes())
