"""Randomness: masks equal where a tensor is replicated, and what they are where it is split.

Fast: different where split. A module draws one seed per forward; every random site of its graph
derives its own from that seed, from the site's number and from this rank's index on the axes that
split the tensor. Replicas share all three. Nothing else is drawn, so a recomputed forward under
torch.utils.checkpoint, which restores torch's default generator, draws the same seed and masks.

Exact: the single device's. Every rank's default generator moves as the original's does: each site
draws the whole tensor's numbers from it, in the order of the graph (`drawn_call`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp.axis import Axis
from autotp.errors import RuntimeStateError

_MASK_64 = 2**64 - 1
_SEED_BITS = 63
_DEFAULT_GENERATOR = threading.Lock()  # simulated ranks are threads and share torch's generator


@dataclass(slots=True)
class RandomState:
    """What the sites of a graph draw from: the module writes it, they read it.

    step_seed    the seed of the forward that runs
    exact        whether sites draw from torch's default generator
    own          where several ranks share a process, the state of that generator as this rank
                 has left it, by device; each begins at `step_seed`
    """

    step_seed: int = 0
    exact: bool = False
    own: dict[torch.device, Tensor] | None = None

    def mark(self) -> RandomMark:
        """Return where this rank's draws stand."""
        if not self.exact or self.own is not None:
            return RandomMark(self.step_seed, dict(self.own or {}))
        devices = [torch.device(name) for name in ("cpu", "cuda") if _is_used(name)]
        return RandomMark(0, {d: _default_generator(d).get_state() for d in devices})

    @contextmanager
    def at(self, mark: RandomMark) -> Iterator[None]:
        """Draw from `mark` on, and from where draws stand now afterwards."""
        now = self.mark()
        self._go_to(mark)
        try:
            yield
        finally:
            self._go_to(now)

    def _go_to(self, mark: RandomMark) -> None:
        if not self.exact or self.own is not None:
            self.step_seed = mark.step_seed
            self.own = None if self.own is None else dict(mark.states)
        else:
            for device, state in mark.states.items():
                _default_generator(device).set_state(state)


@dataclass(frozen=True, slots=True)
class RandomMark:
    """A place in a rank's draws: the step's seed, and the states of generators by device."""

    step_seed: int
    states: Mapping[torch.device, Tensor]


def _is_used(device_type: str) -> bool:
    started: Any = torch.cuda.is_initialized
    return device_type == "cpu" or (torch.cuda.is_available() and started())


def draw_step_seed() -> int:
    """Draw the seed of one forward from torch's default generator, which torch.manual_seed sets."""
    return int(torch.randint(2**_SEED_BITS - 1, ()).item())


def refuse_unequal_generators(axes: Iterable[Axis], devices: Iterable[str]) -> None:
    """Raise RuntimeStateError unless torch's default generators stand alike on all ranks."""
    states = [_default_generator(torch.device(d)).get_state() for d in sorted(devices)]
    text = hashlib.sha256(b"".join(s.numpy().tobytes() for s in states)).digest()
    mine = torch.tensor(int.from_bytes(text[:7], "big"))
    for axis in axes:
        if axis.size > 1:
            most, least = axis.all_reduce(torch.stack([mine, -mine]), "max").tolist()
            if most != -least:
                raise RuntimeStateError(
                    'rng="exact" needs the same random state on every rank',
                    at=[(f"axis {axis.name}", "torch's default generators differ")],
                    remedy="call torch.manual_seed with one seed on every rank, and draw from the"
                    ' default generator on all ranks or on none; or use rng="fast"',
                )


def agreed_step_seed(axes: Iterable[Axis]) -> int:
    """Draw the seed of one forward and take the first rank's, however the others are seeded."""
    seed = torch.tensor(draw_step_seed())
    for axis in axes:
        if axis.size > 1:
            seed = axis.all_reduce(seed if axis.index == 0 else torch.zeros_like(seed))
    return int(seed.item())


def site_seed(step_seed: int, site: int, coords: Sequence[int]) -> int:
    """Return the seed of one random site on the ranks whose splitting axes stand at `coords`.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"
    (SplitMix64, with the constants of Vigna's reference code), chained over the integers.
    """
    state = step_seed & _MASK_64
    for number in (site, len(coords), *coords):
        state = _mix((state ^ _mix(number + 1)) & _MASK_64)
    return state >> (64 - _SEED_BITS)


def _mix(number: int) -> int:
    z = (number * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


@contextmanager
def default_generator_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's default generator of `device` at `seed`, and put its state back after."""
    generator = _default_generator(device)
    with _DEFAULT_GENERATOR:
        state = generator.get_state()
        try:
            generator.manual_seed(seed)
            yield
        finally:
            generator.set_state(state)


def seeded_call(
    op: Any, *args: Any, rng: RandomState, site: int, split: Sequence[Axis] = (), **kwargs: Any
) -> Any:
    """Run an op that draws from torch's default generator: alike where `split` has one index."""
    seed = site_seed(rng.step_seed, site, [axis.index for axis in split])
    with default_generator_seeded(seed, _device_of(args, kwargs)):
        return op(*args, **kwargs)


def drawn_call(op: Any, *args: Any, rng: RandomState, **kwargs: Any) -> Any:
    """Run an op that draws from torch's default generator, which moves on as it does alone."""
    if rng.own is None:
        return op(*args, **kwargs)
    device = _device_of(args, kwargs)
    generator = _default_generator(device)
    with _DEFAULT_GENERATOR:
        before = generator.get_state()
        try:
            generator.set_state(rng.own.get(device, _state_at(rng.step_seed, device)))
            out = op(*args, **kwargs)
            rng.own[device] = generator.get_state()
        finally:
            generator.set_state(before)
    return out


def _state_at(seed: int, device: torch.device) -> Tensor:
    return torch.Generator(device).manual_seed(seed).get_state()


def _device_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    generator: torch.Generator = module.default_generators[index]
    return generator


# An op of its own, so that torch.compile sees one node and never specialises on the seed.
torch.library.define(
    "autotp::keep_mask",
    "(Tensor like, float p, SymInt step_seed, int site, int[] coords) -> Tensor",
)


@torch.library.impl("autotp::keep_mask", "CompositeExplicitAutograd")
def _keep_mask(like: Tensor, p: float, step_seed: int, site: int, coords: Sequence[int]) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(site_seed(step_seed, site, coords))
    kept = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    return kept.bernoulli_(1.0 - p, generator=generator)


def _keep_mask_shape(
    like: Tensor, p: float, step_seed: int, site: int, coords: Sequence[int]
) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


torch.library.register_fake("autotp::keep_mask", _keep_mask_shape)


def keep_mask(
    like: Tensor, p: float, rng: RandomState, site: int, split: tuple[Axis, ...]
) -> Tensor:
    """Return a bool mask of the shape of `like`, true with probability 1 - p."""
    coords = [axis.index for axis in split]
    out: Tensor = torch.ops.autotp.keep_mask(like.detach(), p, rng.step_seed, site, coords)
    return out
