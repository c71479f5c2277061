"""The README and the documentation agree with each other and with the files they point at."""

import re
from pathlib import Path

import pytest

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


@each_page
def test_python_blocks_are_valid_python(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec")
