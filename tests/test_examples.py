"""Every public name has an example in its docstring, and every example runs, in a folder of its own."""

import doctest
import functools
import importlib
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import tl_neuron_circuits as tnc
from tests.families import MAJOR
from tests.loops import for_each_of
from tests.test_architecture import re_exports, results
from tl_neuron_circuits.propagation import rules

NAME = tnc.__name__
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
LOADERS = ("load_demo_model", "load_demo_dictionaries")  # loaded once for all examples, which leave them as found


def public() -> dict[str, object]:
    """Public functions and classes, and what they return; aliases of types and constants have no docstrings."""
    found: dict[int, tuple[str, object]] = {}
    for module, name in re_exports():
        value = getattr(importlib.import_module(module), name)
        is_code = inspect.isclass(value) or inspect.isroutine(value)
        if is_code and typing.get_origin(value) is None:
            room = "tnc" if module == NAME else module.removeprefix(f"{NAME}.")
            found.setdefault(id(value), (f"{room}.{name}", value))
    documented = {name: getattr(rules, name) for name in ("LnRule", "IdentityRule", "HalfRule", "RuleSet")}
    documented |= {name: getattr(rules, name) for name in ("AttentionRule", "SplitAttentionRule")}
    returned = {f"({kind.__name__})": kind for _, kind in results()}
    return dict(found.values()) | returned | {f"propagation.rules.{name}": value for name, value in documented.items()}


PUBLIC = public()
ENTRY_POINTS = {"cli.main"}  # it exits; tests/test_package.py and tests/test_cli.py call it
NEWER = ("TransformerBridge", 'load_demo_dictionaries("transcoder")')


def by_room() -> dict[str, list[str]]:
    """The names, by the room whose code they are."""
    rooms: dict[str, list[str]] = {}
    for name, value in sorted(PUBLIC.items()):
        rooms.setdefault(getattr(value, "__module__", NAME).split(".")[1], []).append(name)
    return rooms


def docstrings(name: str, value: object) -> Iterator[tuple[str, str]]:
    """The docstring of a public object and those of its own public methods and properties."""
    yield name, inspect.getdoc(value) or ""
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if not key.startswith("_") and (documentation := inspect.getdoc(getattr(value, key))) and member.__doc__:
                yield f"{name}.{key}", documentation


def examples(value: object, name: str = "") -> list[doctest.DocTest]:
    parser = doctest.DocTestParser()
    tests = [parser.get_doctest(text, {}, where, None, 0) for where, text in docstrings(name, value)]
    return [test for test in tests if test.examples]


def has_example(value: object) -> bool:
    return ">>> " in (value.__doc__ or "")


@functools.cache
def cached(name: str) -> typing.Any:
    return functools.cache(getattr(tnc, name))


def test_every_public_name_has_an_example() -> None:
    without = sorted(name for name, value in PUBLIC.items() if not has_example(value) and name not in ENTRY_POINTS)
    assert not without, f"add an `Example:` to the docstrings of {', '.join(without)}"


@for_each_of("name", by_room())
def test_the_examples_of_a_room_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Demo models and dictionaries once loaded are kept, and files go to a folder that is thrown away."""
    for loader in LOADERS:
        monkeypatch.setattr(tnc, loader, cached(loader))
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    report: list[str] = []
    sources = [example.source for test in examples(PUBLIC[name], name) for example in test.examples]
    if MAJOR < 3 and any(newer in source for source in sources for newer in NEWER):
        pytest.skip(f"needs TransformerLens 3 or later: one of {NEWER}")
    for test in examples(PUBLIC[name], name):
        skipped = [example.source for example in test.examples if doctest.SKIP in example.options]
        assert skipped == [], f"{test.name}: an example that does not run"
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_a_wrong_example_and_a_missing_one_are_found() -> None:
    def wrong() -> None:
        """Adds.

        >>> 1 + 1
        3
        """

    (test,) = examples(wrong, "wrong")
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    assert runner.run(test, out=lambda _: None).failed == 1
    assert not has_example(lambda: None)
