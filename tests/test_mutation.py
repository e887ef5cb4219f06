"""What is damaged is noticed: a sample of the mutants; `python -m tests.mutation` tries all."""

import pytest

from tests.mutation import KINDS, SAME, is_killed, mutants, reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_mutants_is_noticed(kind):
    every = {"rule": 80, "move": 8, "program": 5, "codegen": 2}[kind]
    chosen = mutants(kind)[::every]
    assert [m.name for m in chosen if not is_killed(m) and not reason(m)] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_mutant_is_noticed(kind):
    assert [m.name for m in mutants(kind) if not is_killed(m) and not reason(m)] == []


@pytest.mark.slow
def test_what_rightly_passes_is_known_by_its_name():
    assert set(SAME) <= {(m.kind, m.name) for m in mutants()}
