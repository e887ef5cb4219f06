"""A program of the fuzzer: straight lines of torch that read as a module a person can paste.

Names say what a tensor is: `x0` an input, `p0` a parameter, `v0` a value that a line makes.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

NAME = re.compile(r"\b[pvx]\d+\b")


@dataclass(frozen=True, slots=True)
class Line:
    """One statement, or a few; `makes` are the names that others may read."""

    makes: tuple[str, ...]
    text: str

    @property
    def reads(self):
        return {n for n in NAME.findall(self.text) if n not in self.makes}


@dataclass(frozen=True, slots=True)
class Program:
    """Inputs and parameters by name with the text that makes them, lines, and what is returned.

    A parameter's text may be the name of another: then the two are tied.
    """

    inputs: dict[str, str]
    params: dict[str, str]
    lines: tuple[Line, ...]
    outputs: tuple[str, ...]

    def __str__(self):
        own = [f"self.{n} = {_of_self(text)}" for n, text in self.params.items()] or ["pass"]
        body = [line for one in self.lines for line in _of_self(one.text).split("\n")]
        returned = _of_self(", ".join(self.outputs))
        return "\n".join(
            [
                "class Model(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for line in own),
                "",
                f"    def forward({', '.join(['self', *self.inputs])}):",
                *(f"        {line}" for line in body),
                f"        return {returned}",
                "",
                "torch.manual_seed(0)",
                "model = Model().train()",
                f"inputs = dict({', '.join(f'{n}={text}' for n, text in self.inputs.items())})",
            ]
        )

    def build(self):
        """Return the module and its inputs, the same whenever it is called."""
        scope = {"torch": torch, "nn": nn, "F": F, "aten": torch.ops.aten}
        with torch.random.fork_rng():
            exec(compile(str(self), "<fuzz>", "exec"), scope)
        return scope["model"], scope["inputs"]

    def live(self):
        """Return the program without what no output needs; one input and one parameter stay."""
        needed, lines = set(self.outputs), []
        for line in reversed(self.lines):
            if needed & set(line.makes):
                lines.append(line)
                needed |= line.reads
        needed |= {n for name in needed for n in NAME.findall(self.params.get(name, ""))}
        return replace(
            self,
            lines=tuple(reversed(lines)),
            inputs=_kept(self.inputs, needed),
            params=_kept(self.params, needed),
        )

    def without(self, line):
        """Yield the program with a line left out: another value, or an input, in its place."""
        values = self._values()
        rest = tuple(other for other in self.lines if other is not line)
        earlier = [n for other in self.lines[: self.lines.index(line)] for n in other.makes]
        for new in [None, *self.inputs, *earlier][:6]:
            renamed, inputs, fits = {}, dict(self.inputs), True
            for k, name in enumerate(line.makes):
                old = values[name]
                if new is None:
                    renamed[name] = f"x{1 + k + max((int(n[1:]) for n in self.inputs), default=0)}"
                    inputs[renamed[name]] = constant(old)
                elif values[new].shape == old.shape and values[new].dtype == old.dtype:
                    renamed[name] = new
                else:
                    fits = False
            if fits:
                yield replace(self, inputs=inputs, lines=rest)._renamed(renamed).live()

    def _values(self):
        """Return what every name holds."""
        model, inputs = self.build()
        scope = {"torch": torch, "nn": nn, "F": F, "aten": torch.ops.aten, "self": model, **inputs}
        scope |= {n: getattr(model, n) for n in self.params}
        for line in self.lines:
            exec(line.text, scope)
        return scope

    def _renamed(self, names):
        def new(text):
            return NAME.sub(lambda m: names.get(m[0], m[0]), text)

        lines = tuple(Line(line.makes, new(line.text)) for line in self.lines)
        return replace(self, lines=lines, outputs=tuple(names.get(o, o) for o in self.outputs))


def _of_self(text):
    return re.sub(r"\b(p\d+)\b", r"self.\1", text)


def _kept(texts, needed):
    return {n: t for n, t in texts.items() if n in needed}


def parameter(shape, trained=True):
    """Return the text of a parameter."""
    frozen = "" if trained else ", requires_grad=False"
    return f"nn.Parameter(torch.randn({list(shape)}).double(){frozen})"


def constant(value):
    """Return the text of an input that is like a tensor."""
    shape = list(value.shape)
    if value.dtype is torch.bool:
        return f"torch.rand({shape}) > 0.3"
    if not value.is_floating_point():
        high = int(value.max()) + 1 if value.numel() else 1
        return f"torch.randint({max(high, 1)}, {shape})"
    return f"torch.randn({shape}).to({value.dtype})"
