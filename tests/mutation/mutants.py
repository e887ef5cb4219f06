"""All mutants by kind, and the verdict on one."""

import functools
import warnings

from tests.mutation.equivalents import EQUIVALENT
from tests.mutation.moves import codegen_mutants, move_mutants, subjects
from tests.mutation.programs import DAMAGES, damage_mutants, program_mutants
from tests.mutation.rules import custom_mutants, rule_mutants

KINDS = {
    "rule": rule_mutants,
    "custom": custom_mutants,
    "move": move_mutants,
    "codegen": codegen_mutants,
    "program": program_mutants,
    **{kind: functools.partial(damage_mutants, kind) for kind in DAMAGES},
}


@functools.cache
def mutants(only=""):
    """Return the mutants whose kind and name contain `only`."""
    kinds = [kind for kind in KINDS if only.startswith(kind)] or KINDS
    made = [m for kind in kinds for m in KINDS[kind]()]
    return [m for m in made if only in f"{m.kind} {m.name}"]


def verdict(mutant):
    """Return "killed", "equivalent" or "SURVIVED"."""
    with warnings.catch_warnings(action="ignore"):
        subjects()
        with mutant.plant():
            if mutant.notice():
                return "killed"
    return "equivalent" if (mutant.kind, mutant.name) in EQUIVALENT else "SURVIVED"
