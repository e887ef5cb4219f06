"""Who may know whom, and how long a page may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"autotp": "autotp", "passes": "autotp.passes", "cost_model": "autotp.cost_model"}

WORDS = {"dynamic", "errors", "grid", "layouts", "options", "progress", "sizes", "version"}
PLANS = {
    "coverage",
    "formula",
    "grid_table",
    "notation",
    "plan",
    "plan_file",
    "program_text",
    "regions",
    "repeats",
    "report",
}
RUNTIME = {
    "algorithms",
    "axis",
    "collectives",
    "dist_axis",
    "first_order",
    "liveness",
    "local_losses",
    "local_lookups",
    "local_programs",
    "local_statistics",
    "parts",
    "products",
    "random_programs",
    "randomness",
    "ranks",
    "recall",
    "recompute",
    "routing",
    "split_attention",
    "late",
    "together",
}

# Each layer may import itself and those before it.
LAYERS = ("words", "cost_model", "plans", "runtime", "passes", "api")


def module_name(path):
    relative = path.relative_to(ROOT)
    parts = (FOLDERS[relative.parts[0]], *relative.with_suffix("").parts[1:])
    return ".".join(parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))
}


def layer(module):
    top = module.split(".")[1] if "." in module else ""
    if top in ("cost_model", "passes"):
        return top
    named = {"words": WORDS, "plans": PLANS, "runtime": RUNTIME}
    return next((name for name, modules in named.items() if top in modules), "api")


def imports(path):
    """Every module that the file names in an import, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in SOURCES else node.module for name in full)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    allowed = LAYERS[: LAYERS.index(layer(module)) + 1]
    own = [name for name in imports(SOURCES[module]) if name.split(".")[0] == "autotp"]
    assert [name for name in own if layer(name) not in allowed] == []


@pytest.mark.parametrize("module", [m for m in SOURCES if layer(m) == "cost_model"])
def test_cost_model_knows_no_graph_and_no_ranks(module):
    banned = ("torch.fx", "torch.distributed", "torch.export")
    assert [name for name in imports(SOURCES[module]) if name.startswith(banned)] == []


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_are_short(module):
    text = SOURCES[module].read_text()
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    assert len(text.splitlines()) < 400
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_no_file_is_called_utils():
    assert [m for m in SOURCES if m.split(".")[-1] in ("utils", "util", "helpers", "common")] == []
