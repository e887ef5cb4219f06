"""Write docs/MODELS.md: `python -m tests.zoo.table [--only NAME ...] [--jobs N]`.

With --only, the rows of those models are written anew and the others kept.
"""

import argparse
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.zoo.models import MODELS
from tests.zoo.verdict import examine

PAGE = Path(__file__).parents[2] / "docs" / "MODELS.md"
HEAD = """\
# Models

Every model of `tests/zoo`, captured unmodified, checked against the single device: outputs, loss,
every gradient, one optimizer step and the updated buffers, in training and in evaluation, on the
grids (2,2), (1,4), (4,1) and (2,3). Written by `make models`; `make test-all` holds it.

The shares are those of the best training plan on (2,2) where links are nearly free and chips slow:
what the compiler is able to split. "No rule" are ops that run whole, on the path of gradients, as
the table has no rule for them; "whole" are all that run whole and take 1% of the step or more.

| model | verdict | flops split | parameters split | no rule | whole |
|---|---|---|---|---|---|
"""


def rows_of(page=PAGE):
    """Return the rows of the page, by model."""
    lines = page.read_text().splitlines() if page.exists() else []
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| model")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def row_of(name):
    warnings.filterwarnings("ignore")
    return examine(name).row()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    names = options.only or list(MODELS)
    rows = rows_of()
    with ProcessPoolExecutor(options.jobs) as pool:
        for name, row in zip(names, pool.map(row_of, names), strict=True):
            print(row, flush=True)
            rows[name] = row
            PAGE.write_text(HEAD + "".join(f"{rows[name]}\n" for name in MODELS if name in rows))


if __name__ == "__main__":
    main()
