"""What a model may not be: wrapped, sharded, compiled or quantised already, or without values.

`refuse_model` looks at every module, parameter and buffer and raises one error with all it finds.
Wrappers are known by the names of their classes, so that none of them is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from autotp.errors import AutotpError, WrappedModelError


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong at one place."""

    place: str
    fact: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A class whose modules are refused: by its package and name, in any base of a module's."""

    package: str
    name: str
    fact: str
    remedy: str

    def is_kind_of(self, module: nn.Module) -> bool:
        """Say whether `module` is an instance of the wrapper."""
        return any(
            c.__module__.startswith(self.package) and self.name in (c.__name__, "")
            for c in type(module).__mro__
        )


UNWRAP = "pass the model inside: wrapper.module; data parallelism is a choice of the plan"
REPLACE_FSDP = "leave out FSDP: pins=autotp.schemes.fsdp(model, grid, inputs) plans the same"
COMPILE_LATER = "call autotp.parallelize first, then torch.compile what it returns"
QUANTISE_NOT = "load the weights in floating point: float32, bfloat16 or float16"

PLAIN = "pass the Python module"
IN_DDP = "is wrapped in DDP, which would average the gradients again"
IN_DATA_PARALLEL = "is wrapped in DataParallel, which copies the model"
IN_FSDP = "is wrapped in FSDP, which has flattened the parameters"
FULLY_SHARDED = "is sharded by fully_shard, which gathers by itself"
COMPILED = "is compiled by torch.compile, which hides the module"
COMPILED_IN_PLACE = "is compiled by module.compile(), which hides the module"
SCRIPTED = "is a TorchScript module, which cannot be captured"
PACKED = "is quantised: its weights are packed"

WRAPPERS = (
    Wrapper("torch.nn.parallel", "DistributedDataParallel", IN_DDP, UNWRAP),
    Wrapper("torch.nn.parallel", "DataParallel", IN_DATA_PARALLEL, UNWRAP),
    Wrapper("torch.distributed.fsdp", "FullyShardedDataParallel", IN_FSDP, UNWRAP),
    Wrapper("torch.distributed.fsdp", "FSDPModule", FULLY_SHARDED, REPLACE_FSDP),
    Wrapper("torch._dynamo", "OptimizedModule", COMPILED, COMPILE_LATER),
    Wrapper("torch.jit", "ScriptModule", SCRIPTED, PLAIN),
    Wrapper("torch.ao.nn.quantized", "", PACKED, QUANTISE_NOT),
    Wrapper("torch.ao.nn.intrinsic.quantized", "", PACKED, QUANTISE_NOT),
    Wrapper("bitsandbytes.nn", "", PACKED, QUANTISE_NOT),
)
"""What may stand around or within a model, as users know it."""

QUANTISED_DTYPES = {
    torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.qint8, torch.quint8, torch.qint32,
}  # fmt: skip
LISTED = 4
"""Places that an error lists for each kind of fault."""


def refuse_model(model: nn.Module, *, weights: bool) -> None:
    """Raise for a model that is no plain one, or, where `weights` are needed, has none.

    Raises WrappedModelError, and AutotpError for parameters or buffers on the meta device.
    """
    wrapped = [*_wrapped_modules(model)]
    sharded = any(f.fact == FULLY_SHARDED for f in wrapped)
    wrapped += [*_odd_parameters(model, sharded)]
    if wrapped:
        raise WrappedModelError(
            f"autotp takes a plain model, and this {type(model).__name__} is not one",
            at=_listed(wrapped),
            remedy=tuple(dict.fromkeys(f.remedy for f in wrapped)),
        )
    if weights:
        _refuse_meta(model)


def _wrapped_modules(model: nn.Module) -> Iterator[Fault]:
    for path, module in model.named_modules():
        place = path or "the model"
        for wrapper in WRAPPERS:
            if wrapper.is_kind_of(module):
                yield Fault(place, wrapper.fact, wrapper.remedy)
                break
        else:
            if getattr(module, "_compiled_call_impl", None) is not None:
                yield Fault(
                    place, "is compiled by module.compile(), which hides the module", COMPILE_LATER
                )


def _odd_parameters(model: nn.Module, sharded: bool) -> Iterator[Fault]:
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            if not sharded:  # else its module is named already
                fact = f"is a DTensor already: {', '.join(map(str, p.placements))}"
                yield Fault(name, fact, "pass whole parameters: autotp distributes them itself")
        elif is_lazy(p):
            yield Fault(name, "is not initialised yet", "call the model once, to give it shapes")
        elif p.dtype in QUANTISED_DTYPES:
            dtype = str(p.dtype).removeprefix("torch.")
            yield Fault(name, f"is quantised: {dtype}", QUANTISE_NOT)


def _refuse_meta(model: nn.Module) -> None:
    """Raise AutotpError for tensors without values: there is nothing to distribute."""
    tensors: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())
    empty = [Fault(name, "has no values", "") for name, t in tensors if t.is_meta]
    if empty:
        raise AutotpError(
            f"{len(empty)} tensors of {type(model).__name__} are on the meta device",
            at=_listed(empty),
            remedy='model.to_empty(device="cpu") and load weights; autotp.plan needs none',
        )


def _listed(faults: list[Fault]) -> list[tuple[str, str]]:
    """Return the first places of each fact, and how many more there are."""
    by_fact: dict[str, list[str]] = {}
    for f in faults:
        by_fact.setdefault(f.fact, []).append(f.place)
    return [row for fact, places in by_fact.items() for row in _rows(places, fact)]


def _rows(places: list[str], fact: str) -> Iterator[tuple[str, str]]:
    yield from ((place, fact) for place in places[:LISTED])
    if len(places) > LISTED:
        yield "and more", f"{len(places) - LISTED} others: {fact}"
