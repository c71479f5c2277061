"""What a user's `pip install` gets: the wheel's and the sdist's file lists, sizes and metadata."""

import ast
import json
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tl_neuron_circuits
from tl_neuron_circuits.demo._dictionaries import DEMO_DICTIONARIES
from tl_neuron_circuits.demo._models import DEMO_MODELS
from tl_neuron_circuits.plots._page import _SCRIPTS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tl_neuron_circuits"
DATA = {".safetensors", ".json", ".jsonl", ".md", ".html", ".js", ".css", ".typed", ".txt"}
MAX_BYTES = 16 * 2**20

NO_HATCHLING = find_spec("hatchling") is None
pytestmark = pytest.mark.skipif(NO_HATCHLING, reason="hatchling is not installed; the extra dev has it")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_the_wheel_holds_every_module_and_every_data_file(wheel_names: set[str]) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and (path.suffix in DATA | {".py", ".pyi"}) and "__pycache__" not in path.parts
    }
    assert {"tl_neuron_circuits/py.typed", "tl_neuron_circuits/__init__.pyi"} <= expected
    assert expected - wheel_names == set()


def test_the_wheel_holds_demo_weights_with_their_cards_the_page_and_the_license(wheel_names: set[str]) -> None:
    inside = {name.removeprefix("tl_neuron_circuits/") for name in wheel_names}
    models = {f"demo/models/{name}/{file}" for name in DEMO_MODELS for file in ("model.safetensors", "README.md")}
    layers = {
        f"demo/dictionaries/{kind}/layer-0{n}/sae_weights.safetensors" for kind in DEMO_DICTIONARIES for n in range(4)
    }
    cards = {f"demo/dictionaries/{kind}/README.md" for kind in DEMO_DICTIONARIES}
    page = {f"plots/page/{name}" for name in ("page.html", "page.css", *_SCRIPTS)}
    assert models | layers | cards | page | {"py.typed"} <= inside
    for card in (name for name in models | cards if name.endswith("README.md")):
        assert "license: mit" in (PACKAGE / card).read_text(encoding="utf-8"), card


def test_the_wheel_holds_nothing_else_but_its_metadata_and_license(wheel_names: set[str]) -> None:
    others = {name for name in wheel_names if not name.startswith("tl_neuron_circuits/")}
    assert all(".dist-info/" in name for name in others), others
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in others)
    assert not any("__pycache__" in name or "test" in Path(name).parts for name in wheel_names)


def test_wheel_and_sdist_are_small(built: Path) -> None:
    for path in built.iterdir():
        assert path.stat().st_size < MAX_BYTES, f"{path.name}: {path.stat().st_size / 2**20:.1f} MB"


def test_the_sdist_can_be_built_from(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= names
    assert any(name.startswith("tests/") for name in names) and "tl_neuron_circuits/_version.py" in names
    assert not [name for name in names if name.endswith((".pyc", ".ipynb", ".png")) or name.startswith((".ci", "site"))]


def test_installing_the_wheel_moves_nothing_that_is_there(wheel: Path) -> None:
    if find_spec("pip") is None:
        pytest.skip("pip is not installed in this environment")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--dry-run",
        "--report",
        "-",
        str(wheel),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # without an index pip can only keep what is installed
    moved = {item["metadata"]["name"] for item in json.loads(done.stdout)["install"]}
    assert moved <= {"tl-neuron-circuits"}


def test_every_file_is_python_3_10() -> None:
    for path in PACKAGE.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))


def test_dependencies_are_floors_only(metadata: Message) -> None:
    # A ceiling or a pin would move a user's torch or numpy.
    requirements = [line.partition(";")[0].strip() for line in metadata.get_all("Requires-Dist", [])]
    assert any(line.startswith("transformer-lens>=") for line in requirements)
    assert [line for line in requirements if any(sign in line for sign in ("<", "==", "~=", "!=", "@"))] == []


def test_the_core_dependencies_keep_what_is_installed(metadata: Message) -> None:
    # pip upgrades a dependency only when the installed version does not satisfy the requirement.
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    core = [requirement for requirement in requirements if requirement.marker is None]
    assert {"torch", "numpy", "transformer-lens"} <= {requirement.name for requirement in core}
    assert [str(r) for r in core if not r.specifier.contains(version(r.name), prereleases=True)] == []


def test_the_metadata_names_extras_python_and_the_command(metadata: Message, wheel: Path) -> None:
    assert {"saes", "explain", "docs", "pictures", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    declared = {line.rpartition(" ")[2] for line in metadata.get_all("Classifier", []) if ":: Python :: 3." in line}
    assert declared == {"3.10", "3.11", "3.12", "3.13"}
    assert metadata["Requires-Python"] == ">=3.10"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "tl-neuron-circuits = tl_neuron_circuits.cli:main" in archive.read(name).decode()


def test_every_file_gives_the_same_version(metadata: Message) -> None:
    version_here = metadata["Version"]
    assert version_here == tl_neuron_circuits.__version__
    assert f"\nversion: {version_here}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version_here}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
