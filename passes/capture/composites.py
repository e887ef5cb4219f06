"""Replace ops that have no rule by what they are made of.

torch computes many ops (movedim, take_along_dim, the cells of recurrent networks, ...) by calling
others: "composite" ops, whose gradient is that of their parts. Those that the table does not name
are traced into their parts, which it may name. One that cannot be traced, or whose parts are not
all plain functions of tensors, stays as it is: it runs whole. An op that reads memory by strides
is written anew as a lookup: what a rank holds may lie in memory otherwise than the whole.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from autotp.errors import CaptureError
from autotp.passes.capture.normalise import STRIDE_READERS
from autotp.passes.rules import find

aten = torch.ops.aten

PLACE = ("stack_trace", "nn_module_stack", "region")


def read_strided(
    x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Tensor:
    """Look up what as_strided reads: the elements of `x` in the order of its memory, by number."""
    flat = x.permute(order_in_memory(x)).reshape(-1)
    return flat[numbers(x, size, stride, storage_offset or 0)]


def write_strided(
    x: Tensor,
    values: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    """Put `values` where as_strided would read them."""
    order = order_in_memory(x)
    back = [order.index(d) for d in range(x.ndim)]
    at = numbers(x, size, stride, storage_offset or 0).reshape(-1)
    there = x.permute(order)
    return there.reshape(-1).index_put([at], values.reshape(-1)).reshape(there.shape).permute(back)


def order_in_memory(x: Tensor) -> list[int]:
    """Return the dims of `x` from the one whose steps are the longest.

    Raises: CaptureError where the memory holds more than `x`.
    """
    order = sorted(range(x.ndim), key=lambda d: (-x.stride()[d], x.shape[d]))
    there = x.permute(order)
    if x.storage_offset() or not there.is_contiguous():
        raise CaptureError(
            "as_strided reads memory beyond the tensor that it is given",
            at=[("as_strided", f"of {list(x.shape)} with strides {list(x.stride())}")],
            remedy="write it with slices, unfold or indices, or call it on x.clone()",
        )
    return order


def numbers(x: Tensor, size: Sequence[int], stride: Sequence[int], first: int) -> Tensor:
    """Return the places in memory that an as_strided of these sizes and strides reads."""
    at = torch.full((), first, dtype=torch.int64, device=x.device)
    for count, step in zip(size, stride, strict=True):
        at = at.unsqueeze(-1) + torch.arange(count, device=x.device) * step
    return at


WRITTEN: dict[Any, Any] = {
    aten.as_strided.default: read_strided,
    aten.as_strided_scatter.default: write_strided,
}
"""Ops that depend on how memory is laid out, which differs between ranks -> the same without."""
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def open_composites(graph: fx.Graph) -> None:
    """Replace the composite ops of `graph` that have no rule, in place."""
    for node in list(graph.nodes):
        if node.target in WRITTEN or (is_composite(node) and find(node.target) is None):
            parts = parts_of(node)
            assert parts or node.target not in WRITTEN, node
            if parts is not None:
                splice(graph, node, parts)


def is_composite(node: fx.Node) -> bool:
    """Say whether `node` is a call that torch computes by other calls."""
    op = node.target
    if not isinstance(op, OpOverload) or op._schema.is_mutable:
        return False
    name: str = op.name()  # type: ignore[no-untyped-call]
    has = torch._C._dispatch_has_kernel_for_dispatch_key(name, COMPOSITE)
    return has or COMPOSITE in op.py_kernels


def parts_of(node: fx.Node) -> fx.Graph | None:
    """Return the call of a node as a graph of its parts, or none if there is none that is plain."""
    op: Any = WRITTEN.get(node.target, node.target)
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    tensors: list[Any] = [node.meta.get("val") for node in nodes]
    if not tensors or not all(is_static(t) for t in tensors):
        return None

    def compute(*given: Tensor) -> Any:
        rest = iter(given)
        filled = [next(rest) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return op(*args, **kwargs)

    try:
        with warnings.catch_warnings(action="ignore"), allowing_constants(tensors[0]):
            graph: fx.Graph = make_fx(dispatch_functionalize(compute))(*tensors).graph
    except CaptureError:
        raise
    except Exception:  # whatever the op asks of real values
        return None
    return graph if all(map(is_plain, graph.nodes)) and any_ruled(graph) else None


@contextlib.contextmanager
def allowing_constants(value: FakeTensor) -> Iterator[None]:
    """Let what is traced beside `value` make small constants of its own."""
    mode = value.fake_mode
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with torch.no_grad():
            yield
    finally:
        mode.allow_non_fake_inputs = before


def is_static(value: Any) -> bool:
    """Say whether a value is a tensor of known shape."""
    return isinstance(value, FakeTensor) and all(isinstance(n, int) for n in value.shape)


def is_plain(node: fx.Node) -> bool:
    """Say whether a part is a function of tensors to tensors."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    values = pytree.tree_leaves(node.meta.get("val"))
    op = node.target
    is_function = op is operator.getitem or (
        isinstance(op, OpOverload) and not op._schema.is_mutable and op not in STRIDE_READERS
    )
    return is_function and bool(values) and all(map(is_static, values))


def any_ruled(graph: fx.Graph) -> bool:
    """Say whether the table names any of the parts."""
    calls = [n.target for n in graph.nodes if n.op == "call_function"]
    return not calls or any(isinstance(op, OpOverload) and find(op) for op in calls)


def splice(graph: fx.Graph, node: fx.Node, parts: fx.Graph) -> None:
    """Put the parts in the place of `node`, with its line and module."""
    made: dict[fx.Node, Any] = {}
    given = iter(n for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, fx.Node))
    results: Any = None
    with graph.inserting_before(node):
        for part in parts.nodes:
            if part.op == "placeholder":
                made[part] = next(given)
            elif part.op == "output":
                results = fx.map_arg(part.args[0], lambda n: made[n])
            else:
                new = made[part] = graph.node_copy(part, lambda n: made[n])
                new.meta = {k: node.meta[k] for k in PLACE if k in node.meta}
                new.meta["val"] = part.meta["val"]
    replace(graph, node, results)


def replace(graph: fx.Graph, node: fx.Node, results: Any) -> None:
    """Let `results` stand for the value of `node`, or for its items."""
    if isinstance(results, Sequence):
        for item in list(node.users):
            number: Any = item.args[1]
            item.replace_all_uses_with(results[number])
            graph.erase_node(item)
    else:
        node.replace_all_uses_with(results)
    graph.erase_node(node)
