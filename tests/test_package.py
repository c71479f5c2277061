"""The package starts at once, its names are imported when they are used, and old names say what they are now."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tl_neuron_circuits as tnc
from tests.loops import for_each
from tests.test_architecture import OPTIONAL, re_exports
from tl_neuron_circuits._lazy import lazy_names
from tl_neuron_circuits._renamed import RENAMED
from tl_neuron_circuits._typing import checked

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("torch", "numpy", "pandas", "jaxtyping", "beartype", "safetensors", "networkx", "plotly"),
    *("transformer_lens", "transformers", "accelerate", "datasets"),
}
# CPU seconds: about three times what they take on an idle machine (.002, .11 and .11), a third of what they once took.
IMPORT_SECONDS, COMMAND_SECONDS = 0.3, 0.5


def python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    script = "import sys, tl_neuron_circuits.cli{}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    at_first, before_a_command = (set(python(script.format(end)).split()) for end in ("", "._app"))
    assert at_first & ({"typer", "rich"} | HEAVY | OPTIONAL) == set()  # Ctrl-C has its answer before any of them
    assert "typer" in before_a_command and before_a_command & (HEAVY | OPTIONAL) == set()


def test_no_room_imports_what_is_optional_or_slow() -> None:
    names = sorted({module for module, _ in re_exports()} - {"tl_neuron_circuits.plots"})  # which is there for plotly
    script = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    imported = set(python(script + "print(*{name.split('.')[0] for name in sys.modules})").split())
    assert imported & {*OPTIONAL, "transformer_lens", "transformers", "accelerate", "plotly"} == set()


def test_importing_the_package_takes_no_time() -> None:
    script = "import time\nstart = time.process_time()\nimport tl_neuron_circuits\nprint(time.process_time() - start)"
    assert float(python(script)) < IMPORT_SECONDS


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_come_at_once(option: str) -> None:
    script = f"""
import contextlib, io, time
from tl_neuron_circuits.cli import main
with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
    main([{option!r}])
assert "neuron" in text.getvalue().lower()
print(time.process_time())
"""
    assert float(python(script)) < COMMAND_SECONDS


def test_every_name_of_the_stub_is_there_and_listed() -> None:
    names = [name for module, name in re_exports() if module == tnc.__name__]
    assert len(names) > 50 and set(names) <= set(dir(tnc)) and "bases" in dir(tnc)
    assert [name for name in names if getattr(tnc, name) is not getattr(tnc, name)] == []
    assert tnc.bases is importlib.import_module("tl_neuron_circuits.bases")
    with pytest.raises(AttributeError, match=r"^module 'tl_neuron_circuits' has no attribute 'no_such_name'$"):
        tnc.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match=r"^module 'tl_neuron_circuits.bases' has no attribute 'no_such_name'$"):
        tnc.bases.no_such_name  # noqa: B018
    assert {"attribute", "bases"} < set(dir(tnc)) and "Neurons" in dir(tnc.bases)  # what a notebook completes
    assert not {"lazy_names", "explain_old_names"} & {*dir(tnc), *dir(tnc.bases)}


def test_a_stub_may_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up.pyi").write_text("from ._errors import PairsError as Other\n")
    monkeypatch.setitem(sys.modules, "tl_neuron_circuits.made_up", type(sys)("tl_neuron_circuits.made_up"))
    lookup, listing = lazy_names("tl_neuron_circuits", str(tmp_path / "made_up.py"))
    assert lookup("Other") is tnc.PairsError and "Other" in listing()
    del tnc.Other  # what was looked up is kept in the package


@for_each("old", RENAMED)
def test_an_old_name_says_the_new_one(old: str) -> None:
    room, _, name = old.rpartition(".")
    with pytest.raises(
        AttributeError, match=rf"^tnc\.{re.escape(old)} was renamed to .* see docs/migration\.md$"
    ) as got:
        getattr(importlib.import_module(f"tl_neuron_circuits.{room}".rstrip(".")), name)
    assert RENAMED[old] in str(got.value)


def test_new_names_exist_and_the_migration_page_lists_them_all() -> None:
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    for old, new in RENAMED.items():
        assert f"| `tnc.{old}` | " in page
        for name in re.findall(r"tnc\.[\w.]*\w", new):
            assert f"`{name}`" in page or f"`{name}()`" in page, f"docs/migration.md lacks {name}"
            value: object = tnc
            for part in name.split(".")[1:]:
                value = getattr(value, part)


def test_a_checked_function_builds_its_type_checker_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxtyping

    built: list[str] = []
    real = jaxtyping.jaxtyped

    def jaxtyped(*context: str, **options: Any) -> Any:
        return real(*context) if context else lambda f: (built.append(f.__name__), real(**options)(f))[1]

    monkeypatch.setattr(jaxtyping, "jaxtyped", jaxtyped)

    @checked
    def double(number: int) -> int:
        return 2 * number

    assert "double" not in built and double(2) == double(number=2) == 4 and built.count("double") == 1
    with pytest.raises(TypeError, match="double: expected number to be int; got .2., a str.$") as error:
        double("2")
    assert "----------------------" not in str(error.value)
