"""The rules of the house, read from the source: the order of imports, names, docstrings, what is never used.

Every file is parsed once; a test lists what breaks its rule, and a second one shows that the rule can be broken.
"""

import ast
import functools
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import tl_neuron_circuits
from tests.loops import for_each

PACKAGE = Path(tl_neuron_circuits.__file__).parent
NAME = tl_neuron_circuits.__name__
ROOMS = (
    *("models", "propagation", "tasks", "bases", "interventions", "nodes", "components", "circuits", "evaluation"),
    *("explain", "transcoders", "lasso", "plots", "demo", "cli"),
)
# Methods of results that may import from rooms to their right, inside the method.
RIGHTWARD_METHODS = {
    "plot",
    "plot_trust",
    "to_html",
    "to_neuronpedia",
    "_repr_html_",
    "where_model_is_right",
    "describe",
    "at_fdr",
}
OPTIONAL = {"sae_lens", "sklearn", "IPython", "matplotlib", "nbclient"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
GLOBAL_SEEDS = {"torch.manual_seed", "torch.seed", "random.seed", "np.random.seed", "numpy.random.seed"}
VAGUE_NAMES = {"utils", "util", "helpers", "base", "manager", "common", "misc"}
MOST_PUBLIC_NAMES = 125

FILES = {
    path: ast.parse(path.read_text(encoding="utf-8"), filename=str(path)) for path in sorted(PACKAGE.rglob("*.py"))
}


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
    """Pickles, the global seed, prints, hooks that any thread would run."""
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
        if name.endswith("model.hooks") and path.name != "_threads.py":
            problems.append(f"{path.name}:{call.lineno} calls {name}; `hooked` also refuses other threads")
    return problems


def files_imported(tree: ast.AST, path: Path) -> set[Path]:
    """The package's files that `path` needs; not for types alone, nor inside the methods that may import rightwards."""
    found = set()
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and dotted(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.FunctionDef) and child.name in RIGHTWARD_METHODS:
            continue
        if isinstance(child, ast.ImportFrom) and child.level:
            folder = path.parents[child.level - 1].joinpath(*(child.module or "").split("."))
            candidates = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in child.names)]
            found |= {candidate for candidate in candidates if candidate in FILES}
        found |= files_imported(child, path)
    return found


def circle(graph: dict[Path, set[Path]]) -> list[str]:
    """The names of files that import each other in a circle, in order; empty where there is none."""
    done: set[Path] = set()

    def visit(path: Path, above: list[Path]) -> list[Path]:
        if path in above:
            return above[above.index(path) :]
        if path not in done:
            for target in sorted(graph[path]):
                if found := visit(target, [*above, path]):
                    return found
            done.add(path)
        return []

    return next(([path.name for path in found] for start in graph if (found := visit(start, []))), [])


def vague(path: Path) -> bool:
    return path.stem.strip("_") in VAGUE_NAMES


def optional_at_module_level(tree: ast.AST, path: Path) -> list[str]:
    return [module for module, where, _ in imports(tree, path) if not where and module.split(".")[0] in OPTIONAL]


def test_rooms_import_only_from_rooms_before_them() -> None:
    assert [problem for path, tree in FILES.items() for problem in wrong_way(tree, path)] == []


def test_no_pickle_no_print_no_global_seed() -> None:
    assert [problem for path, tree in FILES.items() for problem in forbidden(tree, path)] == []


def test_files_are_named_after_what_they_hold_and_say_it() -> None:
    assert [path for path in FILES if vague(path)] == []
    assert [path for path, tree in FILES.items() if not ast.get_docstring(tree)] == []


def test_nothing_optional_is_imported_at_module_level() -> None:
    assert [module for path, tree in FILES.items() for module in optional_at_module_level(tree, path)] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle({path: files_imported(tree, path) for path, tree in FILES.items()}) == []


def test_every_room_is_in_the_order() -> None:
    found = {room_of(path) for path in FILES if not room_of(path).startswith("_")}
    assert found == set(ROOMS)


def test_the_rest_works_without_the_demo_room(tmp_path: Path) -> None:
    """The room and its two re-exports are deleted in a copy; all other modules import, and the names resolve."""
    copy = tmp_path / NAME
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    stub = copy / "__init__.pyi"
    lines = stub.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("from .demo.", "from . import demo "))]
    assert len(lines) - len(kept) == 3
    stub.write_text("\n".join(kept), encoding="utf-8")
    modules = [
        ".".join([NAME, *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in FILES
        if room_of(path) != "demo" and path.name not in ("__init__.py", "__main__.py")
    ]
    names = [name for module, name in re_exports() if module == NAME and "demo" not in name]
    script = f"import importlib, {NAME} as tnc\nfor name in {modules!r}: importlib.import_module(name)\n"
    script += f"for name in {names!r}: getattr(tnc, name)\nprint(tnc.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0 and done.stdout.strip() == str(copy / "__init__.py"), done.stderr


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


@functools.cache
def re_exports() -> list[tuple[str, str]]:
    """(module, name) of what the package and its rooms re-export (`from ._x import y as y`), but rooms."""
    found = []
    for path, node in tables_of_contents():
        module = ".".join([NAME, *path.relative_to(PACKAGE).parts[:-1]])
        found += [(module, alias.asname or alias.name) for alias in node.names if node.module and node.level == 1]
    return [(module, name) for module, name in found if not name.startswith("_")]


@functools.cache
def results() -> list[tuple[str, type]]:
    """(name of a public function, class of ours that it returns and no room exports)."""
    exported = {name for _, name in re_exports()}
    functions = [(f"{module}.{name}", getattr(importlib.import_module(module), name)) for module, name in re_exports()]
    returned = [
        (name, inspect.signature(value).return_annotation) for name, value in functions if inspect.isroutine(value)
    ]
    ours = [(name, kind) for name, kind in returned if inspect.isclass(kind) and kind.__module__.startswith(NAME)]
    return [(name, kind) for name, kind in ours if kind.__name__ not in exported]


def tables_of_contents() -> Iterator[tuple[Path, ast.ImportFrom]]:
    """The imports of every room's `__init__.py`, and of the package's stub."""
    stub = PACKAGE / "__init__.pyi"
    trees = {stub: ast.parse(stub.read_text(encoding="utf-8"))}
    trees |= {path: tree for path, tree in FILES.items() if path.name == "__init__.py" and path.parent != PACKAGE}
    for path, tree in trees.items():
        yield from ((path, node) for node in tree.body if isinstance(node, ast.ImportFrom))


def test_every_public_name_is_documented() -> None:
    problems = []
    for module, name in re_exports():
        public = getattr(importlib.import_module(module), name)
        if typing.get_origin(public) is not None:
            continue  # an alias of a type, which Python 3.10 takes for a class
        if inspect.isclass(public) or inspect.isroutine(public) or inspect.ismodule(public):
            problems += undocumented(f"{module}.{name}", public)
    for name, kind in results():
        problems += undocumented(f"what {name} returns", kind)
    assert sorted(set(problems)) == []


def test_re_exports_are_explicit() -> None:
    for path, node in tables_of_contents():
        if node.level == 1:
            names = [alias.name for alias in node.names if alias.asname != alias.name]
            assert not names, f"{path}:{node.lineno}: write `from ... import {names[0]} as {names[0]}`"


def test_an_init_only_lists_names() -> None:
    """Its docstring, what it re-exports, and where old names went; nothing is defined there."""
    for path, tree in FILES.items():
        if path.name == "__init__.py" and path.parent != PACKAGE:
            rest = [node for node in tree.body if not isinstance(node, ast.ImportFrom)]
            others = [ast.unparse(node) for node in rest[1:]]
            assert others in ([], ["explain_old_names(__name__)"]), f"{path}: {others}"


def test_there_are_not_too_many_public_names() -> None:
    names = {name for _, name in re_exports()}
    assert 90 < len(names) <= MOST_PUBLIC_NAMES


IN_TASKS = PACKAGE / "tasks" / "_example.py"


@for_each(
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


@for_each(
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


def test_the_other_checks_can_fail() -> None:
    assert vague(Path("_utils.py")) and vague(Path("base.py")) and not vague(Path("_basis.py"))
    assert optional_at_module_level(ast.parse("import sklearn.cluster"), IN_TASKS) == ["sklearn.cluster"]
    assert optional_at_module_level(ast.parse("def f():\n    import sklearn"), IN_TASKS) == []


def test_the_check_for_circles_can_fail() -> None:
    pairs, split = PACKAGE / "tasks" / "_pairs.py", PACKAGE / "tasks" / "_metrics.py"
    for source in ("from ._pairs import x", "def f():\n    from ..tasks._pairs import x", "from . import _pairs"):
        assert files_imported(ast.parse(source), IN_TASKS) == {pairs}
    for method in (
        "if TYPE_CHECKING:\n    from ._pairs import x",
        "class A:\n    def plot(self):\n        from ._pairs import x",
    ):
        assert files_imported(ast.parse(method), IN_TASKS) == set()
    assert circle({pairs: {split}, split: {pairs}}) in (["_pairs.py", "_metrics.py"], ["_metrics.py", "_pairs.py"])
    assert circle({pairs: {split}, split: set()}) == []
