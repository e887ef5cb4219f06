"""Rules of convolutions: batch, channels and groups of channels may split, space is whole.

A channel dim is `(g i)`, groups of inputs, and `(g o)`, groups of outputs. The inputs of a group
are summed over; a depthwise convolution has one input per group.
"""

from __future__ import annotations

from typing import Any

import torch

from autotp.passes.rules.table import Call, Text, replace_arg, rule

aten = torch.ops.aten

GROUPS = 6
"""The position of the number of groups among the arguments of every convolution."""


def conv(call: Call) -> Text:
    """The kernel is (outputs, inputs of one group, space)."""
    image, inputs, outputs, space, result = named(call)
    kernel = f"{outputs} {alone(inputs)} {space}"
    return f"{image}, {kernel}, +{outputs} -> {result}", {"g": call.arg(GROUPS, 1)}


def conv_transpose(call: Call) -> Text:
    """The kernel is (inputs, outputs of one group, space)."""
    image, inputs, outputs, space, result = named(call)
    kernel = f"{inputs} {alone(outputs)} {space}"
    return f"{image}, {kernel}, +{outputs} -> {result}", {"g": call.arg(GROUPS, 1)}


def named(call: Call) -> tuple[str, str, str, str, str]:
    """Name the image, its channels and the result's, the kernel's space, and the result."""
    image, kernel = call.operands[:2]
    assert image is not None and kernel is not None
    space = len(kernel.shape) - 2
    batch = "b" if len(image.shape) == len(kernel.shape) else ""
    x, k, y = (" ".join(f"[{letter}{d}]" for d in range(space)) for letter in "xky")
    groups = call.arg(GROUPS, 1)
    inputs, outputs = (
        in_groups(name, groups, t.shape[-space - 1] // groups)
        for name, t in (("i", image), ("o", call.results[0]))
    )
    return f"{batch} {inputs} {x}", inputs, outputs, k, f"{batch} {outputs} {y}"


def in_groups(name: str, groups: int, size: int) -> str:
    """Name a dim of channels: a plain factor, groups of it, or groups of one."""
    return name if groups == 1 else "g" if size == 1 else f"(g {name})"


def alone(channels: str) -> str:
    """Name the channels of one group."""
    return "1" if channels == "g" else channels.removeprefix("(g ").removesuffix(")")


def group_count(_whole: Call, local: Call) -> tuple[Any, ...]:
    """Write the number of groups that are here, by the kernel's channels of one group."""
    return count_groups(local, local.operands[0])


def group_count_transposed(_whole: Call, local: Call) -> tuple[Any, ...]:
    """As that of a convolution, whose kernel has the outputs of one group."""
    return count_groups(local, local.results[0])


def count_groups(local: Call, grouped: Any) -> tuple[Any, ...]:
    """Write how many times the kernel's second dim goes into the channels of `grouped`."""
    kernel = local.operands[1]
    assert kernel is not None
    if local.arg(GROUPS, 1) == 1:
        return local.args
    return replace_arg(local, GROUPS, grouped.shape[1 - len(kernel.shape)] // kernel.shape[1])


def flops(space: int, moved: str) -> str:
    """One product per position of the kernel on the image, channel of each and kernel element."""
    return "b g i o " + " ".join(f"k{d} {moved}{d}" for d in range(space))


def enter(op: Any, space: int) -> None:
    """Enter a convolution."""
    rule(op, conv, linear="each", localize=group_count, flops=flops(space, "y"))


def enter_transposed(op: Any, space: int) -> None:
    """Enter a transposed convolution."""
    localize = group_count_transposed
    rule(op, conv_transpose, linear="each", localize=localize, flops=flops(space, "x"))


enter(aten.conv1d.default, 1)
enter(aten.conv1d.padding, 1)
enter(aten.conv2d.default, 2)
enter(aten.conv2d.padding, 2)
enter(aten.conv3d.default, 3)
enter(aten.conv3d.padding, 3)
enter_transposed(aten.conv_transpose1d.default, 1)
enter_transposed(aten.conv_transpose2d.input, 2)
enter_transposed(aten.conv_transpose3d.input, 3)
