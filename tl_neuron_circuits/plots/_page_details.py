"""What `Circuit.to_html(details=...)` may say about nodes, checked and brought into one form."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .._errors import SettingsError
from ..explain._max_activating_examples import Example

_FORM = (
    '{"description": "...", "direct_logit_effects": [(token, number), ...], '
    '"examples": ["...", {"tokens": [...], "values": [...], "note": "..."}], "any heading": "any text"}'
)


def checked_details(nodes: pd.DataFrame, details: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Details by node: a list of (heading, text), logit effects and examples, as plain JSON.

    Raises:
        SettingsError: a name that neither a node nor a group has, or details of another form.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, given in details.items():
        if not isinstance(given, Mapping):
            raise SettingsError(f"expected details such as {_FORM}; got {type(given).__name__} for {name!r}.")
        form = {
            "texts": [
                (str(key), str(text)) for key, text in given.items() if key not in ("direct_logit_effects", "examples")
            ],
            "direct_logit_effects": [_effect(name, pair) for pair in given.get("direct_logit_effects", ())],
            "examples": [_example(name, example) for example in given.get("examples", ())],
        }
        for node in _named(nodes, name):
            found[node] = form
    return found


def _named(nodes: pd.DataFrame, name: str) -> Sequence[str]:
    """The node, the nodes of a neuron at all positions, those with a label, or a group."""
    for same in (
        nodes["node"] == name,
        nodes["node"].str.rpartition("@")[0] == name,
        nodes["label"] == name,
    ):
        if same.any():
            return list(nodes.loc[same, "node"])
    if (nodes["group"] == name).any():
        return [name]
    near = nodes["node"].head(3).tolist()
    raise SettingsError(f"expected details of nodes of this circuit, such as {near}, or of a group; got {name!r}.")


def _effect(name: str, pair: Any) -> tuple[str, float]:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise SettingsError(
            f"expected direct_logit_effects as pairs of a token and a number; got {pair!r} for {name!r}."
        )
    return str(pair[0]), _finite(name, [pair[1]])[0]


def _example(name: str, example: Any) -> dict[str, Any]:
    if isinstance(example, str):
        return {"tokens": [example], "values": [0.0], "note": ""}
    if isinstance(example, Example):
        example = {"tokens": example.tokens, "values": example.activations}
    if not isinstance(example, Mapping) or not {"tokens", "values"} <= set(example):
        raise SettingsError(f"expected an example as text, or with tokens and values; got {example!r} for {name!r}.")
    tokens, values = [str(token) for token in example["tokens"]], _finite(name, example["values"])
    if len(tokens) != len(values):
        raise SettingsError(
            f"expected a value a token; got {len(tokens)} tokens and {len(values)} values for {name!r}."
        )
    return {"tokens": tokens, "values": values, "note": str(example.get("note", ""))}


def _finite(name: str, values: Iterable[Any]) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise SettingsError(f"expected numbers in the details of {name!r}; got {error}.") from error
    if not np.isfinite(numbers).all():
        raise SettingsError(f"expected finite numbers in the details of {name!r}; got {numbers}.")
    return [float(f"{number:.5g}") for number in numbers]
