"""The zoo: every family's models by name, each with the inputs of one training step.

A family is a file of this folder with MODELS, as in `tests/models.py`, and SAMPLE: the names of
those that run in every `make test`. SINGLE names those that cannot run in float64 themselves.
"""

import torch

from tests import models as basic
from tests.zoo import (
    by_hand,
    decoders,
    encoders,
    experts,
    generative,
    images,
    seq2seq,
    sequence,
    vision,
)

FAMILIES = (
    basic,
    by_hand,
    decoders,
    encoders,
    seq2seq,
    experts,
    vision,
    images,
    generative,
    sequence,
)

MODELS = {name: build for family in FAMILIES for name, build in family.MODELS.items()}
SAMPLE = tuple(name for family in FAMILIES for name in getattr(family, "SAMPLE", ()))
SINGLE = {name for family in FAMILIES for name in getattr(family, "SINGLE", ())}

assert len(MODELS) == sum(len(family.MODELS) for family in FAMILIES), "two models of one name"


def build(name, *, double=False, seed=0):
    """Return the model called `name`, in float64 if asked and able, with its inputs."""
    torch.manual_seed(seed)
    model, inputs = MODELS[name]()
    if double and name not in SINGLE:
        model = model.double()
        inputs = {k: as_double(v) for k, v in inputs.items()}
    return model, inputs


def as_double(value):
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value
