"""`Descriptions`: a table with one row per node and sign, examples, logit effects; to files of labels and from them.

Files of labels are CSV or JSON with layer, unit and sign, or Neuronpedia's explanations (a JSON list, or JSON lines,
also gzipped: modelId, layer such as "6" or "20-gemmascope-mlp-16k", index, description). Those have no signs: they are
of positive activations, and what we write of negative ones begins with "negative activation: ".
"""

import gzip
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from .. import _html
from .._errors import FileFormatError, SettingsError
from .._files import parse_json, parse_json_lines, read_text, short, write_text
from ._highlight import highlight
from ._max_activating_examples import Example

QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99}
SIGN_TEXT = {1: "+", -1: "-", 0: ""}
_FORMAT = "tl-neuron-circuits descriptions"
_NEGATIVE = "negative activation: "
_SIGN_OF = {"+": 1, "1": 1, "+1": 1, "1.0": 1, "-": -1, "-1": -1, "-1.0": -1, "": 0, "0": 0}
_NUMBERS = ("precision", "recall", "base_rate", "threshold", "active", "min", *QUANTILES, "max", "simulation")
_TEXTS = ("label", "kind", "description")


@dataclass(frozen=True, eq=False, repr=False)
class Descriptions:
    """What nodes are active on.

    `table` has one row per node and sign: node, layer, unit, sign (1 or -1; 0 in files that do not tell); label ("" for
    none) and its kind ("token", "class", "after"); precision, recall and base_rate of the label on held-out texts;
    threshold (of |activation|), active (the share of discovery positions above it); min, q01 to q99 and max of the
    activation on discovery texts; and, where callables gave them, description and simulation (a correlation).
    `examples` are the strongest on discovery texts, by name ("L3/N5+"), and `effects` the direct logit effects of
    neurons, as of `direct_logit_effects(...)`. What was read from a file has as much of this as the file.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, texts = tnc.load_demo_model(), tnc.demo.capitals(n=512).clean
        >>> found = tnc.describe(model, ["L0/N5"], texts)
        >>> found.to_csv("labels.csv")
        >>> read = tnc.explain.Descriptions.from_file("labels.csv")
        >>> read.text("L0/N5+") == found.text("L0/N5+")
        True
    """

    table: pd.DataFrame
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    effects: pd.DataFrame | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def __len__(self) -> int:
        """How many nodes."""
        return int(self.table["node"].nunique())

    def text(self, name: str) -> str:
        """What is known of "L3/N5+", in words: the description, else the label; "" for none.

        A label that fails on other texts (precision no higher than the base rate) is left out; `label_line` tells it.
        Without a sign, both signs' texts; where a file does not tell signs, its text serves for both.
        """
        node, sign = (name[:-1], {"+": 1, "-": -1}[name[-1]]) if name[-1:] in ("+", "-") else (name, 0)
        rows = self.table[self.table["node"] == node]
        rows = rows if sign == 0 else rows[rows["sign"].isin([sign, 0])]
        found = [(int(row["sign"]), _said(row)) for row in rows.to_dict("records")]
        if len(found) < 2:
            return found[0][1] if found else ""
        return "; ".join(f"{SIGN_TEXT[own]} {text}" for own, text in found if text)

    def label_line(self, name: str) -> str:
        """The label of "L3/N5+" with its scores, or that there is none, as one line."""
        rows = self.table[[own == name for own in self._names()]]
        if rows.empty:
            return ""
        row = rows.iloc[0].to_dict()
        if not row["label"]:
            return "no token, class or preceding token tells where it is active"
        if "precision" not in rows:
            return str(row["label"])
        return (
            f"{row['label']} (on other texts: precision {row['precision']:.2f}, recall {row['recall']:.2f}, "
            f"base rate {row['base_rate']:.3f}{'' if _holds(row) else '; it fails there'})"
        )

    def example_table(self, name: str) -> pd.DataFrame:
        """A node's and sign's examples: label, rank, prompt, position, token, activation, text, tokens, activations."""
        rows = [
            (name, rank, e.prompt, e.position, e.tokens[e.position], e.activations[e.position], "".join(e.tokens),
             list(e.tokens), list(e.activations))
            for rank, e in enumerate(self.examples.get(name, ()))
        ]  # fmt: skip
        columns = ["label", "rank", "prompt", "position", "token", "activation", "text", "tokens", "activations"]
        return pd.DataFrame(rows, columns=columns)

    def logit_effects(self, node: str) -> list[tuple[str, float]]:
        """Tokens that a neuron promotes by a positive activation, and those that it suppresses, with effects."""
        if self.effects is None:
            return []
        rows = self.effects[self.effects["label"] == node]
        return list(zip(rows["token"], rows["effect"].astype(float), strict=True))

    def to_csv(self, path: str | Path) -> None:
        """Write the table.

        Raises:
            SaveError: it could not be written; an older file is as it was.
        """
        write_text(path, self.table.to_csv(index=False, lineterminator="\n"))

    def to_json(self, path: str | Path) -> None:
        """Write everything: the table, examples and logit effects.

        Raises:
            SaveError: it could not be written; an older file is as it was.
        """
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.table.to_dict("records")]
        examples = {
            name: [[e.prompt, list(e.tokens), list(e.activations), e.position] for e in found]
            for name, found in self.examples.items()
        }
        effects = [] if self.effects is None else self.effects.to_dict("records")
        content = {"format": _FORMAT, "settings": dict(self.settings), "rows": rows, "examples": examples}
        write_text(path, json.dumps(content | {"effects": effects}, allow_nan=False))

    def to_neuronpedia(self, path: str | Path, *, scan: str | None = None, source: str | None = None) -> None:
        """Write Neuronpedia's list of explanations, one per node and sign that has a text.

        Args:
            path: of the JSON file.
            scan: the model's name there; the model's own unless given.
            source: the rest of a layer's name there, such as "gemmascope-mlp-16k" for "20-gemmascope-mlp-16k".

        Raises:
            SaveError: it could not be written; an older file is as it was.
        """
        rows = [
            {
                "modelId": scan or str(self.settings.get("model", "unknown")),
                "layer": str(row["layer"]) if source is None else f"{row['layer']}-{source}",
                "index": str(row["unit"]),
                "description": (_NEGATIVE if row["sign"] == -1 else "") + _said(row),
                "explanationModelName": "tl-neuron-circuits",
                "typeName": "description" if row.get("description") else "token-label",
            }
            for row in self.table.to_dict("records")
            if _said(row)
        ]
        write_text(path, json.dumps(rows))

    @classmethod
    def from_file(cls, path: str | Path) -> "Descriptions":
        """Read labels: a CSV or JSON (layer, unit, sign; label or description), or Neuronpedia's.

        Of several explanations of one unit the first is taken.

        Raises:
            FileFormatError: missing, or of another form.
        """
        path = Path(path)
        try:
            if path.exists() and not path.is_file():
                raise OSError("not a regular file")  # a pipe would never end
            text = gzip.decompress(path.read_bytes()).decode("utf-8-sig") if path.suffix == ".gz" else read_text(path)
            if text.lstrip()[:1] not in ("[", "{"):
                return cls(_table(pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False).to_dict("records")))
            try:
                content = parse_json(text, surrogates=True)
            except ValueError:
                content = [value for _, value in parse_json_lines(text)]
            if isinstance(content, dict) and content.get("format") == _FORMAT:
                return _from_ours(content)
            rows = content.get("explanations", [content]) if isinstance(content, dict) else content
            return cls(_table(rows))
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise FileFormatError(
                f"expected labels at {path}: CSV or JSON with layer, unit and label (and sign), or Neuronpedia's "
                f"explanations with layer, index and description; {short(error)}."
            ) from error

    def html(self, name: str) -> str:
        """The examples of "L3/N5+", tokens colored by activation and escaped.

        Raises:
            SettingsError: no such name.
        """
        if name not in self.examples:
            raise SettingsError(f"expected one of {list(self.examples)[:8]}; got {name!r}.")
        found = self.examples[name]
        largest = max((abs(value) for example in found for value in example.activations), default=0.0)
        lines = [f"<li>{highlight(e.tokens, e.activations, largest)}</li>" for e in found]
        return f"<div><b>{escape(name)}</b> {escape(self.text(name))}<ol>{''.join(lines)}</ol></div>"

    def __repr__(self) -> str:
        said = int(sum(bool(_said(row)) for row in self.table.to_dict("records")))
        texts = f", {self.settings['texts']:,} texts" if "texts" in self.settings else ""
        return f"Descriptions({len(self)} nodes, {said} of {len(self.table)} signs with a label{texts})"

    def _repr_html_(self) -> str:
        columns = ("node", "sign", "label", "description", "precision", "recall", "base_rate")
        shown = [column for column in columns if column in self.table]
        bars = ["precision"] if "precision" in shown else []
        examples = [self.html(name) for name in self._names()[:10] if self.examples.get(name)]
        return _html.block(repr(self), _html.table(self.table[shown], bars=bars), *examples)

    def _names(self) -> list[str]:
        return [f"{node}{SIGN_TEXT[sign]}" for node, sign in zip(self.table["node"], self.table["sign"], strict=True)]


def _said(row: Mapping[Any, Any]) -> str:
    return str(row.get("description") or (row.get("label") if _holds(row) else "") or "")


def _holds(row: Mapping[Any, Any]) -> bool:
    """Whether a label was not shown to fail: on other texts it occurs, and tells more than the base rate."""
    base_rate = row.get("base_rate", float("nan"))  # nan where nothing was measured
    return bool(np.isnan(base_rate) or row.get("precision", float("nan")) > base_rate)


def _plain(value: Any) -> Any:
    return None if value != value else value.item() if hasattr(value, "item") else value


class _Effect(msgspec.Struct):
    label: str
    direction: str
    rank: int
    token: str
    token_id: int
    effect: float


class _Ours(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    examples: dict[str, list[tuple[int, list[str], list[float], int]]]
    effects: list[_Effect]


def _from_ours(content: Mapping[str, Any]) -> Descriptions:
    ours = msgspec.convert(content, _Ours)
    examples = {}
    for name, found in ours.examples.items():
        if any(len(tokens) != len(values) or not 0 <= at < len(tokens) for _, tokens, values, at in found):
            raise ValueError(f"the examples of {name} have other numbers of tokens and activations")
        examples[name] = tuple(Example(n, tuple(tokens), tuple(values), at) for n, tokens, values, at in found)
    effects = pd.DataFrame([msgspec.to_builtins(effect) for effect in ours.effects]) if ours.effects else None
    return Descriptions(_table(ours.rows), examples, effects, ours.settings)


def _table(rows: Sequence[Mapping[Any, Any]]) -> pd.DataFrame:
    """A table from rows of a file, ours, Neuronpedia's or a user's.

    Raises:
        ValueError: a row without layer and unit, or with values of other kinds.
    """
    made = []
    for row in rows:
        layer, unit = str(row["layer"]), str(row["unit"] if "unit" in row else row["index"])
        number = re.match(r"-?\d+", layer)
        if number is None or re.fullmatch(r"\d+", unit) is None:
            raise ValueError(f"a row has layer {layer!r} and unit {unit!r}")
        one: dict[str, Any] = {key: str(row[key] or "") for key in _TEXTS if key in row}
        sign = str(row.get("sign", "") if row.get("sign") is not None else "").strip()
        if sign not in _SIGN_OF:
            raise ValueError(f"a row has sign {sign!r}; expected 1, -1, + or -")
        if "index" in row and "unit" not in row:
            negative = one.get("description", "").startswith(_NEGATIVE)
            one["description"] = one.get("description", "").removeprefix(_NEGATIVE).strip()
            sign = "-1" if negative else "1"
        if not {"label", "description"} & one.keys():
            raise ValueError("a row has neither a label nor a description")
        letter = "F" if "-" in layer.lstrip("-") else "N"  # a dictionary's name follows the layer
        node = str(row.get("node") or f"L{number[0]}/{letter}{unit}")
        numbers = {key: _number(row[key]) for key in _NUMBERS if key in row}
        place = {"node": node, "layer": int(number[0]), "unit": int(unit), "sign": _SIGN_OF[sign], "label": ""}
        made.append(place | one | numbers)
    if not made:
        raise ValueError("there are no rows")
    frame = pd.DataFrame(made)
    for name in (c for c in _TEXTS if c in frame):
        frame[name] = frame[name].fillna("").astype(object)
    return frame.drop_duplicates(["node", "sign"]).reset_index(drop=True)


def _number(value: Any) -> float:
    return float("nan") if value is None or value == "" else float(value)
