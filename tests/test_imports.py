"""The floors of the house: imports run strictly downwards, without circles, and the program starts without JAX."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import deconstruct

PACKAGE = Path(deconstruct.__file__).parent

# From the ground up. A name is a file or a folder of the package; what stands on one floor does not know each other.
FLOORS = [
    {"types", "duration"},
    {"spelling", "plan", "paths"},
    {"layout", "lock"},
    {"config"},
    {"distributed"},
    {"layers"},
    {"kernels", "data"},
    {"attention"},
    {"model"},
    {"experiment"},
    {"run", "costs"},
    {"train", "evaluate", "interop", "generation", "draw"},
    {"bench", "compile", "compare"},
    {"report"},
    {"notebook"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name):
    """The modules of the package that `name` imports, anywhere in its code; what type checkers alone see counts too."""
    found = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "deconstruct"}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            if base.split(".")[0] == "deconstruct":
                # `from package import x`: x is a module, or a name in the package.
                found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return found


def strings_of_modules(name):
    """Modules that `name` mentions in strings, to import them when they are needed."""
    nodes = ast.walk(ast.parse(MODULES[name].read_text()))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)} & set(INSIDE)


def floor(module):
    return module.split(".")[1]


# The package's own __init__ is the notebook's door, not a floor: it names its modules and imports none.
INSIDE = [name for name in MODULES if name != "deconstruct"]


def test_every_module_has_a_floor():
    assert {floor(name) for name in INSIDE} <= set(FLOOR), "a new file or folder: give it a place in FLOORS"
    assert sum(len(names) for names in FLOORS) == len(FLOOR), "a name has two floors"


@pytest.mark.parametrize("name", INSIDE)
def test_imports_run_downwards(name):
    others = (imported(name) | strings_of_modules(name)) - {"deconstruct"}
    others = {other for other in others if floor(other) != floor(name)}
    up = sorted(other for other in others if FLOOR[floor(other)] >= FLOOR[floor(name)])
    assert not up, f"{name} imports {', '.join(up)}, which stands no lower"


def test_no_circle_between_files():
    graph = {name: imported(name) - {"deconstruct"} for name in INSIDE}
    assert sum(map(len, graph.values())) > len(INSIDE)  # imports were found
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle
    assert set(order) == set(INSIDE)


@pytest.mark.parametrize("module", ["deconstruct", "deconstruct.cli"])
def test_the_door_opens_without_jax(module):
    code = f"import sys, {module}; print([m for m in ('jax', 'flax', 'orbax', 'ml_collections') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert run.stdout.strip() == "[]"


def test_the_names_of_the_notebook():
    for name in deconstruct.__all__:
        assert getattr(deconstruct, name).__module__ == deconstruct._HOMES[name]
    assert dir(deconstruct) == sorted(deconstruct.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fit'; it offers load_config, build_model"):
        deconstruct.fit  # noqa: B018
