"""Grow a random program: line by line, each run as it is written, so that shapes are known."""

import random
import re

import torch
from torch import nn
from torch.nn import functional as F

from tests.fuzz.ops import FAMILIES, Skip
from tests.fuzz.program import NAME, Line, Program, parameter

LARGEST = 512
"""Elements of the largest tensor."""
WILDEST = 100.0
"""The largest absolute value, so that rounding stays rounding."""
SIZES = (2, 2, 3, 4, 4, 5, 6, 6, 8)
STARTS = ((4, 6, 8), (2, 4, 12), (6, 8), (4, 6), (2, 4, 6, 4), (8, 12), (4, 4, 6), (2, 6, 6))


LOSS = "v999"


class Growth:
    """What has been written, with the values of all tensors."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.scope = {"torch": torch, "nn": nn, "F": F, "aten": torch.ops.aten}
        self.scope["self"] = nn.Module()
        self.inputs, self.params, self.lines = {}, {}, []
        self.count = {"x": 0, "p": 0, "v": 0}

    # names --------------------------------------------------------------------------------------

    def new(self, kind):
        self.count[kind] += 1
        return f"{kind}{self.count[kind] - 1}"

    def input(self, text):
        name = self.new("x")
        self.inputs[name] = text
        self.scope[name] = eval(text, self.scope)
        return name

    def parameter(self, shape):
        """Return a parameter of this shape: an old one at times, a frozen or a tied one seldom."""
        shape = tuple(shape)
        old = [n for n in self.params if self.shape(n) == shape]
        if old and self.rng.random() < 0.3:
            return self.rng.choice(old)
        name = self.new("p")
        if old and self.rng.random() < 0.2:
            self.params[name] = self.rng.choice(old)
        else:
            self.params[name] = parameter(shape, trained=self.rng.random() > 0.1)
        self.scope[name] = eval(self.params[name], self.scope)
        return name

    # values -------------------------------------------------------------------------------------

    def shape(self, name):
        return tuple(self.scope[name].shape)

    def value(self, *ndims, where=lambda shape: True):
        """Return a float value with one of these numbers of dims, a late one rather than an early.

        Raises Skip when there is none.
        """
        return self.any(
            lambda t: (
                t.is_floating_point() and (not ndims or t.ndim in ndims) and where(tuple(t.shape))
            )
        )

    def any(self, fits):
        """Return a value that fits, late rather than early."""
        found = [n for n in self.values() if fits(self.scope[n])]
        if not found:
            raise Skip
        at = int(len(found) * self.rng.random() ** 0.4)
        return found[min(at, len(found) - 1)]

    def values(self):
        return [n for n in self.scope if n[0] in "xv" and NAME.fullmatch(n)]

    def beside(self, name):
        """Return a value, or a parameter, that broadcasts against this one."""
        shape = self.shape(name)
        fitting = [n for n in self.values() if self.scope[n].is_floating_point()]
        fitting = [n for n in fitting if broadcasts(self.shape(n), shape) and n != name]
        if fitting and self.rng.random() < 0.6:
            return self.rng.choice(fitting)
        return self.parameter(self.narrow(shape))

    def narrow(self, shape):
        """Return a shape that broadcasts to this one."""
        kept = shape[self.rng.choice([0, 0, 0, len(shape) // 2, max(len(shape) - 1, 0)]) :]
        return [1 if self.rng.random() < 0.2 else n for n in kept]

    def mask(self, shape):
        """Return a bool tensor that broadcasts to this shape."""
        old = [n for n in self.values() if self.scope[n].dtype is torch.bool]
        old = [n for n in old if broadcasts(self.shape(n), shape) and len(self.shape(n))]
        if old and self.rng.random() < 0.5:
            return self.rng.choice(old)
        return self.input(f"torch.rand({self.narrow(shape)}) > 0.3")

    def ints(self, high, shape):
        """Return an int tensor of this shape, below `high`."""
        shape = tuple(shape)
        old = [n for n in self.values() if self.scope[n].dtype is torch.long]
        old = [n for n in old if self.shape(n) == shape and self.scope[n].min() >= 0]
        old = [n for n in old if self.scope[n].max() < high]
        if old and self.rng.random() < 0.5:
            return self.below(self.rng.choice(old), high)
        return self.input(f"torch.randint({high}, {list(shape)})")

    def below(self, name, high):
        """Return an int tensor below `high` whatever is drawn when the program is built."""
        drawn = re.match(r"torch\.randint\((\d+),", self.inputs.get(name, ""))
        return name if drawn and int(drawn[1]) <= high else f"({name} % {high})"

    def size(self):
        return self.rng.choice(SIZES)

    def dim(self, name):
        """Return one of a tensor's dims, counted from the front or the back."""
        count = len(self.shape(name))
        if not count:
            raise Skip
        return self.rng.randrange(-count, count)

    # lines --------------------------------------------------------------------------------------

    def line(self, family):
        """Write one line; raise Skip where it does not fit or would be too large or too wild."""
        before = dict(self.scope), dict(self.inputs), dict(self.params), dict(self.count)
        try:
            self.write(family(self))
        except Exception:
            self.scope, self.inputs, self.params, self.count = before
            raise

    def write(self, text):
        out = self.new("v")
        text = text if "{out}" in text else "{out} = " + text
        text = text.replace("{out}", out)
        with torch.no_grad():
            exec(text, self.scope)
        made = self.scope[out]
        makes = (out,)
        if not isinstance(made, torch.Tensor):
            makes = (out, *(self.new("v") for _ in made[1:]))
            self.scope.update(zip(makes, made, strict=True))
            text = text.replace(
                f"{out} = ", ", ".join(makes) + (", = " if len(made) == 1 else " = ")
            )
        if not all(is_tame(self.scope[n]) for n in makes):
            raise Skip
        self.lines.append(Line(makes, text))


def is_tame(t):
    """Say whether a value is small, in elements and in size."""
    if t.numel() > LARGEST or not t.numel():
        return False
    return not t.is_floating_point() or bool((t.abs() < WILDEST).all())


def broadcasts(small, large):
    """Say whether one shape expands to another."""
    tail = large[len(large) - len(small) :] if len(small) <= len(large) else None
    return tail is not None and all(a in (1, b) for a, b in zip(small, tail, strict=True))


def grow(seed, length=12):
    """Return a random program of about `length` lines."""
    g = Growth(seed)
    for _ in range(g.rng.choice((1, 1, 2))):
        asks = ".requires_grad_()" if g.rng.random() < 0.2 else ""
        g.input(f"torch.randn({list(g.rng.choice(STARTS))}).double(){asks}")
    g.line(FIRST)
    wanted = g.rng.randint(2, length)
    families, weights = zip(*FAMILIES.items(), strict=True)
    for _ in range(20 * wanted):
        if len(g.lines) >= wanted:
            break
        try:
            g.line(g.rng.choices(families, weights)[0])
        except Exception:  # what cannot be written here
            continue
    return finish(g)


def FIRST(g):
    """Meet a parameter at once: what no parameter reaches is run whole."""
    a = g.value()
    return f"F.linear({a}, {g.parameter((g.size(), g.shape(a)[-1]))})"


def finish(g):
    """Return a loss of all that nothing reads, or several outputs; others beside them."""
    made = [n for line in g.lines for n in line.makes]
    floats = [n for n in made if g.scope[n].is_floating_point()]
    read = set().union(*(line.reads for line in g.lines))
    unread = [n for n in floats if n not in read] or floats[-1:]
    others = g.rng.sample(made, min(len(made), g.rng.randint(0, 2)))
    if g.rng.random() < 0.7:
        total = " + ".join(f"{n}.square().mean()" for n in unread)
        g.lines.append(Line((LOSS,), f"{LOSS} = {total}"))
        outputs = (LOSS, *others)
    else:
        outputs = (*unread, *others)
    return Program(g.inputs, g.params, tuple(g.lines), tuple(dict.fromkeys(outputs))).live()
