"""The notebooks: what is stored in them, and that each runs from end to end (`pytest -m notebooks`)."""

import os
import re
import resource
from pathlib import Path
from typing import Any

import nbformat
import pytest

from . import notebooks
from .loops import for_each
from .smollm2 import HUB_NAME, environment

NAMES = (
    *("01_quickstart", "02_neurons_vs_saes", "03_two_hop_circuit_and_steering", "04_transcoder_circuits"),
    *("05_circuit_lasso", "06_your_own_model_and_task"),
)
DEMO_FIRST = NAMES[2:5]
"""Open on the demo model: SmolLM2 does not have the step of 03, transcoders (04) take long to train, and patching every
edge (05) takes hours."""
MOST_SECONDS, MOST_BYTES = 45, 1_000_000
MODEL = "TNC_NOTEBOOK_MODEL"  # what the notebooks read; the hub name of tests/smollm2.py runs them on its folder
ROOT = notebooks.ROOT
# An sdist is without the notebooks.
present = pytest.mark.skipif(not notebooks.NOTEBOOKS, reason="there is no folder notebooks/ here")
every_notebook = for_each("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def source(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells)


def repository() -> str:
    """OWNER/NAME of the repository, as mkdocs.yml has it."""
    (address,) = re.findall(
        r"^  repository: https://github\.com/(\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
    )
    return address


@present
def test_the_notebooks_are_there() -> None:
    assert tuple(path.stem for path in notebooks.NOTEBOOKS) == NAMES


@every_notebook
def test_the_first_cell_installs_the_package(path: Path) -> None:
    first, *rest = read(path).cells
    assert first.cell_type == "code" and first.source == "%pip install -q tl_neuron_circuits"
    assert first.metadata.tags == [notebooks.INSTALL] and first.outputs == []
    assert not any("tags" in cell.metadata for cell in rest)


@every_notebook
def test_the_badge_opens_this_notebook_in_colab(path: Path) -> None:
    badge = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    address = f"https://colab.research.google.com/github/{repository()}/blob/main/notebooks/{path.name}"
    assert f"{badge}({address})" in read(path).cells[1].source


def test_the_documentation_links_every_notebook() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    found = re.findall(
        rf"https://colab.research.google.com/github/{repository()}/blob/main/notebooks/(\S+)\.ipynb", page
    )
    assert tuple(found) == NAMES


@every_notebook
def test_one_line_switches_the_model(path: Path) -> None:
    notebook = read(path)
    found = {name: re.findall(rf"^{name} = (.*)$", source(notebook), flags=re.MULTILINE) for name in ("MODEL", "REAL")}
    if path.stem in DEMO_FIRST:
        assert found == {"MODEL": ['os.environ.get("TNC_NOTEBOOK_MODEL", "demo-gelu")'], "REAL": []}
    else:
        assert found == {"MODEL": ['os.environ.get("TNC_NOTEBOOK_MODEL", REAL)'], "REAL": [f'"{HUB_NAME}"']}
    assert "What this does not show" in source(notebook)


@every_notebook
def test_outputs_are_stored_without_complaints_or_paths_of_a_machine(path: Path) -> None:
    notebook = read(path)
    ran = [cell for cell in notebook.cells[1:] if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    assert notebooks.complaints(notebook) == []
    assert sum(bool(cell.outputs) for cell in ran) >= len(ran) / 2
    assert re.findall(r"(?:/home|/root|/work|/tmp)/\S*", path.read_text(encoding="utf-8")) == []
    assert path.stat().st_size < MOST_BYTES


@every_notebook
def test_every_figure_is_also_a_picture(path: Path) -> None:
    data = [output.data for output in notebooks.outputs(read(path)) if notebooks.PLOTLY in output.get("data", {})]
    assert all(figure.get("image/png") for figure in data)


@pytest.mark.notebooks
@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=[path.stem for path in notebooks.NOTEBOOKS])
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    real = os.environ.get(MODEL)
    if real == HUB_NAME:
        request.getfixturevalue("smollm2_folder")  # skips, or fails, without it
        for name in ("HF_HOME", "HF_HUB_CACHE"):
            monkeypatch.setenv(name, environment()[name])
    elif real is None and path.stem != NAMES[0]:
        monkeypatch.setenv(MODEL, "demo-gelu")
    elif real is None:  # as a reader without the hub runs it
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = notebooks.run(path, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert notebooks.complaints(notebook) == []
    offline = "cannot be loaded here" in str([output.get("text") for output in notebooks.outputs(notebook)])
    assert offline == (real is None and path.stem == NAMES[0])
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert real or seconds < MOST_SECONDS
