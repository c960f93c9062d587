"""The rules of docs/architecture.md, checked on the source text: which package may import which, and who may print."""

import ast
from pathlib import Path

from conftest import ROOT
import pytest

import l2ul

# A package imports packages of lower layers, itself, and what SIDEWAYS allows within its layer.
LAYERS = (
    {"common"},
    {"data", "models"},
    {"attack", "importance", "objective"},
    {"unlearn", "methods", "metrics"},
    {"experiments", "training"},
    {"cli", "deletion", "reporting", "sweeps"},
    {"scripts", "__main__"},
)
SIDEWAYS = {
    "unlearn": {"methods", "metrics"},
    "deletion": {"cli"},
    "reporting": {"cli"},
    "sweeps": {"cli", "reporting"},
}
MODULES_BESIDE_PACKAGES = {"__init__", "__main__", "attack", "importance", "objective", "unlearn"}
PARSES = "l2ul/sweeps/worker.py"  # a trial is a command line of main_unlearn.py, which the worker parses and runs
MAY_PRINT = ("main_", "l2ul/__main__.py", "l2ul/cli/", "l2ul/common/progress.py", "benchmarks/")


def sources() -> dict[str, Path]:
    """Return every module of the project by its dotted name."""
    paths = [*(ROOT / "l2ul").rglob("*.py"), *ROOT.glob("main_*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


SOURCES = sources()


def package(module: str) -> str:
    """Return the node of LAYERS that a module belongs to; "" for the package l2ul itself, which imports nothing.

    Its functions of `l2ul.LAZY` are imported at their first use.
    """
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "l2ul" else "scripts"


def imports(module: str) -> set[str]:
    """Return the modules of the project that a module imports anywhere in its source, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= SOURCES.keys() else names | {node.module}  # submodules, or names of the module
    return {name for name in found if name in SOURCES} - {module}


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    own = package(module)
    for other in map(package, imports(module)):
        if other in ("", own):
            continue
        allowed = layer(other) < layer(own) or other in SIDEWAYS.get(own, ())
        assert allowed, f"{module} imports {other}, which is not below {own}"


def test_no_module_imports_itself_through_others():
    edges = {module: imports(module) for module in SOURCES}
    # a package's __init__ runs before each of its modules; it is an edge only where it imports something itself
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == 2:
            return
        assert state.get(module) != 1, "import cycle: " + " → ".join((*path[path.index(module) :], module))
        state[module] = 1
        for other in sorted(edges[module]):
            visit(other, (*path, module))
        state[module] = 2

    for module in SOURCES:
        visit(module, ())


def test_functions_of_the_package_are_named_by_the_module_that_defines_them():
    assert {name: getattr(l2ul, name).__module__ for name in l2ul.LAZY} == l2ul.LAZY
    assert not {name for name in l2ul.LAZY if f"l2ul.{name}" in SOURCES}  # importing it would replace the function


def test_few_modules_lie_beside_the_packages():
    assert {path.stem for path in (ROOT / "l2ul").glob("*.py")} == MODULES_BESIDE_PACKAGES


def test_every_package_says_what_belongs_there():
    for path in (ROOT / "l2ul").rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path
        assert len(docstring) > 40, path


def test_the_method_knows_no_architectures():
    own = {"attack", "importance", "objective", "unlearn", "methods"}
    for module in (name for name in SOURCES if package(name) in own):
        assert "models" not in map(package, imports(module)), module


@pytest.mark.parametrize("module", [name for name in SOURCES if package(name) not in ("scripts", "__main__", "cli")])
def test_library_functions_take_explicit_arguments_and_neither_print_nor_exit(module):
    path = SOURCES[module]
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        place = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.arg):
            assert node.arg not in ("args", "opts") or name == PARSES, f"{place} takes {node.arg}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not name.startswith(MAY_PRINT):
            assert node.func.id not in ("print", "exit", "quit"), f"{place} calls {node.func.id}"
        if isinstance(node, ast.Attribute) and path.name != "options.py":
            assert node.attr not in ("parse_args", "add_argument", "argv"), f"{place} uses {node.attr}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "SystemExit" not in ast.dump(node.exc), f"{place} exits"
