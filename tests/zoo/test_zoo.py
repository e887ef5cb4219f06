"""Every model of the zoo: equal to the single device, split as docs/MODELS.md says."""

import pytest

from autotp.check import compare
from autotp.grid import as_grid
from tests.random_plans import random_plan
from tests.zoo.models import MODELS, SAMPLE
from tests.zoo.table import rows_of
from tests.zoo.verdict import GRIDS, SQUARE, examine, subject_of


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_verified(name):
    assert examine(name, grids=(SQUARE,)).status == "verified"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_table_tells_the_truth(name):
    verdict = examine(name)
    assert not verdict.wrong
    assert verdict.row() == rows_of()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_random_plans_compute_what_the_model_computes(name):
    subject = subject_of(name, train=True, double=True)
    for seed, grid in enumerate(GRIDS):
        report = compare(subject, random_plan(subject, as_grid(grid), seed))
        assert report.ok, report


@pytest.mark.slow
def test_the_table_has_every_model():
    assert list(rows_of()) == list(MODELS)
