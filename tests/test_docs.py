"""The README and the documentation agree with each other and with the files they point at."""

import ast
import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

import tl_neuron_circuits as tnc
from tests.test_architecture import re_exports

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}


def readme_command(name: str) -> str:
    """The one line of the fenced block that README.md marks with `<!-- command: NAME -->`, as `.ci/run` reads it."""
    found = re.findall(rf"<!-- command: {name} -->\n```bash\n(.*)\n```\n", TEXTS[ROOT / "README.md"])
    assert len(found) == 1, f"README.md marks {len(found)} commands as {name}"
    return found[0]


def test_getting_started_and_contributing_give_the_readmes_commands() -> None:
    assert {readme_command("demo"), readme_command("test")} <= set(TEXTS[ROOT / "docs/getting-started.md"].splitlines())
    assert readme_command("test").rpartition(" && ")[0] in TEXTS[ROOT / "docs/contributing.md"].splitlines()


def test_ci_runs_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("an sdist has no .ci/run")
    assert "$(readme_command test)" in script.read_text(encoding="utf-8")


def broken_links(page: Path) -> list[str]:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", TEXTS[page])
    return [f"{page.name}: {link}" for link in links if not (page.parent / link).exists()]


def test_relative_links_point_at_files() -> None:
    assert [link for page in PAGES for link in broken_links(page)] == []


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXTS[page], flags=re.MULTILINE | re.DOTALL)


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


def test_python_blocks_are_python_and_use_names_that_exist() -> None:
    blocks = [(page, block) for page in PAGES for block in python_blocks(page)]
    for page, block in blocks:
        compile(block, str(page), "exec")
    assert len(blocks) > 20
    assert [f"{page.name}: {name}" for page, block in blocks for name in missing_names(block)] == []


def test_the_checks_of_links_and_names_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXTS, PAGES[0], "[here](no-such-file.md) [there](https://example.org) [up](#up)")
    assert broken_links(PAGES[0]) == ["README.md: no-such-file.md"]
    assert missing_names("tnc.no_such_name(1)") == ["tnc.no_such_name"]
    assert missing_names("tnc.__doc__.no_such_name(1)") == ["tnc.__doc__.no_such_name"]
    assert missing_names("tnc.__doc__") == []


def test_the_readmes_python_runs() -> None:
    (block,) = python_blocks(ROOT / "README.md")
    exec(compile(block, "README.md", "exec"), {})


def test_the_api_reference_has_every_public_name() -> None:
    pytest.importorskip("griffe", reason="the extra docs is not installed")
    specification = importlib.util.spec_from_file_location("_api_pages", ROOT / "docs" / "_api_pages.py")
    assert specification is not None and specification.loader is not None
    hook = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hook)
    entries: set[str] = set()
    for path in (ROOT / "docs" / "api").glob("*.md"):
        page = SimpleNamespace(file=SimpleNamespace(src_uri=f"api/{path.name}"))
        markdown = hook.on_page_markdown(TEXTS[path], page=page)
        entries |= set(re.findall(r"^::: (\S+)", markdown, flags=re.MULTILINE))
    # A name that the package takes from a room has its entry there.
    short = {entry.rpartition(".")[2] for entry in entries}
    in_rooms = {f"{module}.{name}" for module, name in re_exports() if module != tnc.__name__}
    assert {name for _, name in re_exports() if name not in short} == set()
    assert len(in_rooms) > 100 and in_rooms - entries == set()


def runnable_blocks(page: Path) -> list[str]:
    """The Python blocks of a page that imports the package, but those after a line `<!-- not run: why -->`."""
    found = re.findall(
        r"(<!-- not run: [^\n]*-->\n)?^```python\n(.*?)^```", TEXTS[page], flags=re.MULTILINE | re.DOTALL
    )
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
    if version("transformer-lens").startswith("2.") and 'load_demo_dictionaries("transcoder")' in TEXTS[page]:
        pytest.skip("the demo transcoders need TransformerLens 3 or later")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in runnable_blocks(page):
        exec(compile(block, str(page), "exec"), names)


OURS = "https://github.com/tl-neuron-circuits/tl_neuron_circuits/blob/main/"
RAW = "https://raw.githubusercontent.com/tl-neuron-circuits/tl_neuron_circuits/main/"


def test_the_readmes_links_work_on_pypi() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[ROOT / "README.md"])
    assert [link for link in links if not link.startswith("https://")] == []
    ours = [link.removeprefix(OURS).removeprefix(RAW) for link in links if link.startswith((OURS, RAW))]
    missing = [link for link in ours if not (ROOT / link.partition("#")[0]).exists()]
    assert len(ours) > 10 and missing == []
    for page, _, anchor in (link.partition("#") for link in ours if "#" in link):
        headings = re.findall(r"^#+ (.*)", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{page} has no heading #{anchor}"
