"""Run a test's body for several members in one test: models are built once, and a failure names its members."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def for_each(
    name: str | tuple[str, ...],
    members: Iterable[Any],
    ids: Any = str,
    unless: Callable[..., bool] = lambda **arguments: False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call the test once per member, passed as `name`; every member runs, whichever fail. Several names take tuples.

    Each has a `tmp_path` and a `monkeypatch` of its own. `unless` gets `name` and the test's `case`, if it has one.
    """
    names = (name,) if isinstance(name, str) else name
    given = list(members)
    listed = [member.values[0] if isinstance(member, ParameterSet) else member for member in given]
    labels = [ids(member) for member in listed] if callable(ids) else list(ids)
    labels = [str(m.id) if isinstance(m, ParameterSet) else la for m, la in zip(given, labels, strict=True)]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def looped(**arguments: Any) -> None:
            if not listed:
                pytest.skip(f"no {names[0]} on this version of TransformerLens")
            failures, skips = {}, []
            known = {"case": arguments["case"]} if "case" in arguments else {}
            options = [
                (la, {name: m} if isinstance(name, str) else dict(zip(name, m, strict=True)))
                for la, m in zip(labels, listed, strict=True)
            ]
            chosen = [(label, member) for label, member in options if not unless(**known, **member)]
            assert chosen, f"no {name} to test"
            for number, (label, member) in enumerate(chosen):
                own = arguments | member
                if "tmp_path" in own:
                    own["tmp_path"] = arguments["tmp_path"] / f"{names[0]}{number}"
                    own["tmp_path"].mkdir()
                with pytest.MonkeyPatch.context() as patched:
                    if "monkeypatch" in own:
                        own["monkeypatch"] = patched
                    try:
                        test(**own)
                    except pytest.skip.Exception as skip:
                        skips.append(skip)
                    except (Exception, pytest.fail.Exception) as failure:  # noqa: BLE001 (raised below, with its member)
                        failures[label] = failure
            if failures:
                label, first = next(iter(failures.items()))
                raise AssertionError(
                    f"{len(failures)} of {len(chosen)} fail, {name}: {', '.join(failures)}. The first, {label}: {first}"
                ) from first
            if len(skips) == len(chosen):
                raise skips[0]

        kept = [p for p in inspect.signature(test).parameters.values() if p.name not in names]
        looped.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]  # what pytest passes
        return looped

    return decorate


def for_each_of(
    name: str, groups: Mapping[str, Iterable[Any]], ids: Callable[[Any], str] = str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make one test of each group, which calls the test's body once per member, as `for_each` does."""
    given = {group: list(members) for group, members in groups.items()}

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def grouped(group: str, **arguments: Any) -> None:
            for_each(name, given[group], ids)(test)(**arguments)

        own = [p for p in inspect.signature(test).parameters.values() if p.name != name]
        group = inspect.Parameter("group", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        grouped.__signature__ = inspect.Signature([group, *own])  # type: ignore[attr-defined]  # what pytest passes
        return pytest.mark.parametrize("group", given)(grouped)

    return decorate
