"""The README and the documentation agree with each other and with the files they point at."""

import ast
import importlib.util
import pkgutil
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

import tl_neuron_circuits as tnc

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def readme_command(name: str) -> str:
    """The one line of the fenced block that README.md marks with `<!-- command: NAME -->`, as `.ci/run` reads it."""
    found = re.findall(
        rf"<!-- command: {name} -->\n```bash\n(.*)\n```\n", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    assert len(found) == 1, f"README.md marks {len(found)} commands as {name}"
    return found[0]


@pytest.mark.parametrize("name", ["demo", "test"])
def test_getting_started_gives_the_readmes_commands(name: str) -> None:
    lines = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8").splitlines()
    assert readme_command(name) in lines


def test_contributing_sets_up_what_the_readmes_test_command_sets_up() -> None:
    set_up = readme_command("test").rpartition(" && ")[0]
    assert set_up in (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8").splitlines()


def test_ci_runs_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("an sdist has no .ci/run")
    assert "$(readme_command test)" in script.read_text(encoding="utf-8")


@each_page
def test_relative_links_point_at_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@each_page
def test_python_blocks_are_valid_python(page: Path) -> None:
    for block in python_blocks(page):
        compile(block, str(page), "exec")


def missing_names(block: str) -> list[str]:
    """Names `tnc.x` and `tnc.x.y` in a block of Python that the package does not have."""
    missing = []
    for node in ast.walk(ast.parse(block)):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id == "tnc":
            found: object = tnc
            for part in parts:
                if not hasattr(found, part):
                    missing.append(".".join(["tnc", *parts]))
                    break
                found = getattr(found, part)
    return missing


@each_page
def test_python_blocks_use_names_that_exist(page: Path) -> None:
    assert [name for block in python_blocks(page) for name in missing_names(block)] == []


def test_the_check_for_names_can_fail() -> None:
    assert missing_names("tnc.no_such_name(1)") == ["tnc.no_such_name"]
    assert missing_names("tnc.__doc__.no_such_name(1)") == ["tnc.__doc__.no_such_name"]
    assert missing_names("tnc.__doc__") == []


def test_the_readmes_python_runs() -> None:
    (block,) = python_blocks(ROOT / "README.md")
    exec(compile(block, "README.md", "exec"), {})


def public_names() -> set[str]:
    """Every name that the package or one of its rooms re-exports, dotted."""
    packages = [info.name for info in pkgutil.iter_modules(tnc.__path__) if info.ispkg]
    rooms = {f"{tnc.__name__}.{name}" for name in packages if not name.startswith("_")}
    names = set()
    for room in sorted(rooms | {tnc.__name__}):
        source = Path(tnc.__file__).parents[1].joinpath(*room.split("."), "__init__.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                names |= {f"{room}.{alias.asname}" for alias in node.names if alias.asname}
    return names


def test_the_api_reference_has_every_public_name() -> None:
    pytest.importorskip("griffe", reason="the extra docs is not installed")
    specification = importlib.util.spec_from_file_location("_api_pages", ROOT / "docs" / "_api_pages.py")
    assert specification is not None and specification.loader is not None
    hook = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hook)
    entries: set[str] = set()
    for path in (ROOT / "docs" / "api").glob("*.md"):
        page = SimpleNamespace(file=SimpleNamespace(src_uri=f"api/{path.name}"))
        markdown = hook.on_page_markdown(path.read_text(encoding="utf-8"), page=page)
        entries |= set(re.findall(r"^::: (\S+)", markdown, flags=re.MULTILINE))
    # A name that the package takes from a room has its entry there; rooms are entries themselves.
    short = {entry.rpartition(".")[2] for entry in entries}
    assert {name for name in public_names() if name.rpartition(".")[2] not in short} == set()
    in_rooms = {name for name in public_names() if name.count(".") == 2}
    assert len(in_rooms) > 200 and in_rooms - entries == set()


def runnable_blocks(page: Path) -> list[str]:
    """The Python blocks of a page that imports the package, but those after a line `<!-- not run: why -->`."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(<!-- not run: [^\n]*-->\n)?^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [block for mark, block in found if not mark]
    return blocks if any("import tl_neuron_circuits" in block for block in blocks) else []


def slow(page: Path) -> bool:
    return page.name.startswith("case-study-") or page.name in ("circuit-lasso.md", "large-models.md", "transcoders.md")


RUNNABLE = [
    pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.notebooks] if slow(page) else [])
    for page in PAGES
    if page.name != "README.md" and runnable_blocks(page)
]


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version("transformer-lens").startswith("2.") and 'load_demo_dictionaries("transcoder")' in page.read_text(
        "utf-8"
    ):
        pytest.skip("the demo transcoders need TransformerLens 3 or later")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in runnable_blocks(page):
        exec(compile(block, str(page), "exec"), names)
