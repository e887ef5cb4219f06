"""What is damaged is noticed: a sample of the mutants; `python -m tests.mutation` tries all."""

import pytest

from tests.mutation.equivalents import EQUIVALENT
from tests.mutation.mutants import KINDS, mutants, verdict

EVERY = {"rule": 120, "move": 8, "program": 7, "codegen": 2, "routing": 6, "ring": 4, "random": 12}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_mutants_is_noticed(kind):
    chosen = mutants(kind)[:: EVERY.get(kind, 3)]
    assert [m.name for m in chosen if verdict(m) == "SURVIVED"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_mutant_is_noticed(kind):
    assert [m.name for m in mutants(kind) if verdict(m) == "SURVIVED"] == []


@pytest.mark.slow
def test_what_is_equivalent_is_known_by_its_name():
    assert set(EQUIVALENT) <= {(m.kind, m.name) for m in mutants()}
