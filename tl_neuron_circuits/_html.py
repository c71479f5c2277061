"""How results look in a notebook: one line of text, then tables with bars, on light and dark backgrounds.

Every text is escaped. Colors of text and background are the notebook's own; bars have the two colors of the figures,
which stand out on both. Without styles (GitHub strips them) a plain table remains.
Tables are not made by pandas' Styler: `escape="html"` leaves texts inside lists, and the names of columns and index, as
they are (pandas 3.1), and would let a token of a prompt become markup.
"""

from collections.abc import Mapping, Sequence
from html import escape
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd

POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
BAR_WIDTH = 100
"""Pixels of the longest bar."""
LONG = 60
"""Texts of more characters are broken into lines."""

_STYLE = """
.tnc table {border-collapse: collapse; margin: .3em 0 .8em; font-size: 13px}
.tnc th, .tnc td {padding: 2px 8px; border: 0; border-bottom: 1px solid rgba(128,128,128,.3); background: transparent;
 color: inherit; text-align: left !important; white-space: pre; max-width: 40em}
.tnc .n {text-align: right !important; font-variant-numeric: tabular-nums}
.tnc .l {white-space: pre-wrap}
.tnc .b {padding: 2px 4px}
.tnc .b div {height: 10px}
.tnc a {color: inherit; text-decoration: underline dotted}
.tnc small {opacity: .7}
""".strip()

_NEURON_PAGES = {"gpt2": ("gpt2-small", 12, 3072), "gpt2-small": ("gpt2-small", 12, 3072)}
"""Models whose neurons have pages on Neuronpedia: its name there, layers, neurons per layer."""


def neuron_page(model: str, layer: int, unit: int) -> str | None:
    """Neuronpedia's page for a neuron, None where none is known."""
    name, layers, units = _NEURON_PAGES.get(model, ("", 0, 0))
    exists = 0 <= layer < layers and 0 <= unit < units
    return f"https://www.neuronpedia.org/{name}/{layer}/{unit}" if exists else None


def neuron_pages(model: str, frame: pd.DataFrame) -> list[str | None]:
    """Pages by row of a table with layer and unit, and kind or hook where not all rows are neurons."""
    kinds = frame["kind"] if "kind" in frame else ["neuron"] * len(frame)
    hooks = frame["hook"] if "hook" in frame else [".mlp.hook_post"] * len(frame)
    neurons = [k in ("neuron", "node") and str(h).endswith(".mlp.hook_post") for k, h in zip(kinds, hooks, strict=True)]
    places = zip(frame["layer"], frame["unit"], neurons, strict=True)
    return [neuron_page(model, int(layer), int(unit)) if is_neuron else None for layer, unit, is_neuron in places]


def block(text: str, *parts: str) -> str:
    """A result: its line of text, then its tables."""
    return f'<div class="tnc"><style>{_STYLE}</style><p>{escape(text)}</p>{"".join(parts)}</div>'


def note(text: str) -> str:
    """A line between tables."""
    return f"<p>{escape(text)}</p>"


def table(
    frame: pd.DataFrame,
    *,
    bars: Sequence[str] = (),
    rows: int = 20,
    links: Mapping[str, Sequence[str | None]] | None = None,
) -> str:
    """The first `rows` rows as a table.

    Args:
        frame: what to show; its index is left out.
        bars: columns of numbers that get a bar beside them, to a common scale within the column.
        rows: how many to show; the rest are only counted.
        links: by column, one address per row of `frame`.
    """
    shown = frame.head(rows)
    scales = {column: _scale(shown[column]) for column in bars}
    head = "".join(_heading(str(column), frame[column], column in scales) for column in frame.columns)
    body = []
    for place in range(len(shown)):
        cells = []
        for column in shown.columns:
            value = shown[column].iloc[place]
            address = (links or {}).get(str(column), {place: None})[place]
            cells.append(_cell(value, address))
            if column in scales:
                cells.append(f'<td class="b">{_bar(float(value), *scales[column])}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    more = f"<small>{len(shown):,} of {len(frame):,} rows</small>" if len(frame) > len(shown) else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>{more}"


def document(title: str, content: str) -> str:
    """A page of its own around a `block`, for a file."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>:root '
        "{color-scheme: light dark} body {font: 14px/1.4 system-ui, sans-serif; margin: 2em}</style></head>"
        f"<body>{content}</body></html>\n"
    )


def _heading(name: str, column: pd.Series, bar: bool) -> str:
    numeric = ' class="n"' if column.dtype.kind in "iuf" else ""
    return f"<th{numeric}>{escape(name)}</th>" + ("<th></th>" if bar else "")


def _cell(value: Any, address: str | None) -> str:
    plain = _text(value)
    text = escape(plain)
    if address:
        text = f'<a href="{escape(address)}" target="_blank" rel="noopener">{text}</a>'
    if isinstance(value, Real) and not isinstance(value, bool):
        return f'<td class="n">{text}</td>'
    return f'<td class="l">{text}</td>' if len(plain) > LONG else f"<td>{text}</td>"


def _text(value: Any) -> str:
    """Numbers to three digits, lists with spaces in between, nothing for a missing value."""
    if isinstance(value, bool | np.bool_ | Integral):
        return str(value)
    if isinstance(value, Real):
        return "" if np.isnan(float(value)) else f"{float(value):.3g}"
    if isinstance(value, list | tuple):
        return "  ".join(map(_text, value))
    return "" if value is None or value is pd.NA else str(value)


def _scale(column: pd.Series) -> tuple[float, float]:
    """The least and the largest finite number, zero between them."""
    finite = column.astype(float)[np.isfinite(column.astype(float))]
    return min(float(finite.min()), 0.0) if len(finite) else 0.0, max(float(finite.max()), 0.0) if len(finite) else 0.0


def _bar(value: float, low: float, high: float) -> str:
    """From zero to the right for what is positive, to the left for what is negative."""
    if not np.isfinite(value) or high == low:
        return ""
    unit = BAR_WIDTH / (high - low)
    start, width = round((min(value, 0.0) - low) * unit), round(abs(value) * unit)
    color = POSITIVE if value >= 0 else NEGATIVE
    return (
        f'<div style="width: {BAR_WIDTH}px"><div style="margin-left: {start}px; width: {width}px; '
        f'background: {color}"></div></div>'
    )
