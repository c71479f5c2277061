"""The rules of the house, read from the source: the order of imports, sizes, docstrings, what is never used."""

import ast
import importlib
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import tl_neuron_circuits

PACKAGE = Path(tl_neuron_circuits.__file__).parent
NAME = tl_neuron_circuits.__name__
ROOMS = (
    *("models", "propagation", "tasks", "bases", "interventions", "nodes", "components", "circuits", "evaluation"),
    *("explain", "transcoders", "lasso", "plots", "demo", "cli"),
)
# Methods of results that may import from rooms to their right, inside the method.
RIGHTWARD_METHODS = {"plot", "plot_trust", "to_html", "to_neuronpedia", "_repr_html_"}
OPTIONAL = ("sae_lens", "sklearn", "IPython", "matplotlib", "nbclient")
SLOW = (
    "transformer_lens",
    "transformers",
    "accelerate",
    "plotly",
)  # seconds, which `--help` and mistakes need not wait
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
GLOBAL_SEEDS = {"torch.manual_seed", "torch.seed", "random.seed", "np.random.seed", "numpy.random.seed"}
VAGUE_NAMES = {"utils.py", "_utils.py", "helpers.py", "_helpers.py", "base.py", "_base.py", "manager.py", "_manager.py"}

FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def dotted(node: ast.AST) -> str:
    """`torch.load` for the expression torch.load; empty for anything that is not a dotted name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    yield from ((dotted(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(node: ast.AST, path: Path, where: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Every module imported below `node`, absolute, with the names of the classes and functions around the import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, where, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = [NAME, *path.relative_to(PACKAGE).parts[:-1]]
            parent = ".".join(above[: len(above) - child.level + 1]) if child.level else ""
            module = ".".join(part for part in (parent, child.module) if part)
            # `from .. import tasks` imports the room `tasks`; `from ..tasks import x` imports from it.
            yield from ((f"{module}.{a.name}" if module == NAME else module, where, child.lineno) for a in child.names)
        elif isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, path, (*where, child.name))
        else:
            yield from imports(child, path, where)


def wrong_way(tree: ast.AST, path: Path) -> list[str]:
    """Imports of `path` that go against the order of the rooms."""
    here = room_of(path)
    problems = []
    for module, where, line in imports(tree, path):
        if module != NAME and not module.startswith(f"{NAME}."):
            continue
        target = module.split(".")[1] if "." in module else ""
        if here == "__init__" or target == here:
            continue
        in_method = len(where) > 1 and where[-1] in RIGHTWARD_METHODS
        if target in ROOMS and here in ROOMS and (ROOMS.index(target) < ROOMS.index(here) or in_method):
            continue
        if target.startswith("_") and (PACKAGE / f"{target}.py").exists():
            continue
        problems.append(f"{path.name}:{line} ({here}) imports {module}")
    return problems


def forbidden(tree: ast.AST, path: Path) -> list[str]:
    """Pickles, the global seed, prints."""
    modules = [(module.split(".")[0], line) for module, _, line in imports(tree, path)]
    problems = [f"{path.name}:{line} imports {module}" for module, line in modules if module in PICKLES]
    banned = {"torch.load", "torch.save", "print"} | GLOBAL_SEEDS
    if (
        path.name == "train_models.py"
    ):  # transformers draws initial weights from the global state, forked and restored there
        banned -= {"torch.manual_seed"}
    for name, call in calls(tree):
        if name in banned or any(keyword.arg == "allow_pickle" for keyword in call.keywords):
            problems.append(f"{path.name}:{call.lineno} calls {name}")
    return problems


@each_file
def test_rooms_import_only_from_rooms_before_them(path: Path) -> None:
    assert wrong_way(parsed(path), path) == []


@each_file
def test_no_pickle_no_print_no_global_seed(path: Path) -> None:
    assert forbidden(parsed(path), path) == []


@each_file
def test_files_are_named_after_what_they_hold(path: Path) -> None:
    assert path.name not in VAGUE_NAMES
    assert ast.get_docstring(parsed(path)), f"{path.name} does not say what it holds"


@each_file
def test_nothing_optional_is_imported_at_module_level(path: Path) -> None:
    at_module_level = {module.split(".")[0] for module, where, _ in imports(parsed(path), path) if not where}
    assert at_module_level.isdisjoint(OPTIONAL)


def test_every_room_is_in_the_order() -> None:
    found = {room_of(path) for path in FILES if not room_of(path).startswith("_")}
    assert found <= set(ROOMS)


def test_importing_the_package_imports_nothing_optional_and_nothing_slow() -> None:
    watched = {*OPTIONAL, *SLOW}
    script = f"import sys, {NAME}.cli\nprint(*sorted({{name.split('.')[0] for name in sys.modules}} & {watched!r}))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def undocumented(owner: str, public: object) -> Iterator[str]:
    """The public object and its public methods and properties, where they have no docstring of their own."""
    doc = getattr(public, "__doc__", None)
    # A dataclass without a docstring gets its signature as one.
    if not doc or (inspect.isclass(public) and doc.startswith(f"{public.__name__}(")):
        yield owner
    # The members of a Protocol are another library's.
    if inspect.isclass(public) and public.__module__.startswith(NAME) and not getattr(public, "_is_protocol", False):
        for name, member in vars(public).items():
            is_ours = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
            if is_ours and not name.startswith("_") and not inspect.getdoc(getattr(public, name)):
                yield f"{owner}.{name}"


def re_exports() -> list[tuple[str, str]]:
    """(module, name) of what each `__init__.py` re-exports from private modules (`from ._x import y as y`)."""
    found = []
    for path in (file for file in FILES if file.name == "__init__.py"):
        module = ".".join([NAME, *path.relative_to(PACKAGE).parts[:-1]])
        froms = [node for node in parsed(path).body if isinstance(node, ast.ImportFrom)]
        found += [(module, alias.asname or alias.name) for node in froms for alias in node.names]
    return [(module, name) for module, name in found if not name.startswith("_")]


def test_every_public_name_is_documented() -> None:
    problems = []
    for module, name in re_exports():
        public = getattr(importlib.import_module(module), name)
        if typing.get_origin(public) is not None:
            continue  # an alias of a type, which Python 3.10 takes for a class
        if inspect.isclass(public) or inspect.isroutine(public) or inspect.ismodule(public):
            problems += undocumented(f"{module}.{name}", public)
    assert sorted(set(problems)) == []


def test_re_exports_are_explicit() -> None:
    for path in (file for file in FILES if file.name == "__init__.py"):
        for node in (node for node in parsed(path).body if isinstance(node, ast.ImportFrom)):
            names = [alias.name for alias in node.names if alias.asname != alias.name]
            assert not names, f"{path}:{node.lineno}: write `from ... import {names[0]} as {names[0]}`"


IN_TASKS = PACKAGE / "tasks" / "_example.py"


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("from ..models import x", True),
        ("from .._errors import x", True),
        ("from ._pairs import x", True),
        ("from ..plots import x", False),
        ("from .. import plots", False),
        ("import tl_neuron_circuits.plots", False),
        ("from tl_neuron_circuits import plots", False),
        ("from .._absent import x", False),
        ("def f():\n    from ..plots import x", False),
        ("def plot():\n    from ..plots import x", False),
        ("class A:\n    def plot(self):\n        from ..plots import x", True),
        ("class A:\n    def other(self):\n        from ..plots import x", False),
        ("if True:\n    from ..plots import x", False),
    ],
)
def test_the_order_check_can_fail(source: str, allowed: bool) -> None:
    assert (wrong_way(ast.parse(source), IN_TASKS) == []) is allowed


@pytest.mark.parametrize(
    "source",
    ["import pickle", "torch.load('x')", "print(1)", "torch.manual_seed(0)", "np.load('x', allow_pickle=True)"],
)
def test_the_check_for_forbidden_calls_can_fail(source: str) -> None:
    assert forbidden(ast.parse(source), IN_TASKS) != []


def test_the_docstring_check_can_fail() -> None:
    class Documented:
        """Has a docstring."""

        def method(self) -> None: ...

    Documented.__module__ = NAME
    assert list(undocumented("Documented", Documented)) == ["Documented.method"]
    assert list(undocumented("f", lambda: None)) == ["f"]
