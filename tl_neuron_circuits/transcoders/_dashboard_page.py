"""The page of a feature: one HTML file without scripts, network or fonts of its own, in light and dark.

The model's texts are escaped wherever they appear, and a content security policy forbids everything but the page's own
style.
"""

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Any

import pandas as pd

from .._files import versions
from ..explain._highlight import highlight
from ._dashboard import Band, FeatureDashboard, Firing, Route

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(dashboard: FeatureDashboard) -> str:
    """The whole file."""
    title = escape(f"{dashboard.feature} of {dashboard.model}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{title}</title></head><body class="page">{body(dashboard)}</body></html>\n'
    )


def body(dashboard: FeatureDashboard) -> str:
    """What a notebook shows, style included."""
    made_with = " · ".join(f"{escape(name)} {escape(version)}" for name, version in versions().items())
    parts = [
        f"<h1>Feature {escape(dashboard.feature)} of {escape(dashboard.model)}</h1>",
        _restricted() if dashboard.firing is None else _facts(dashboard.firing),
        "" if dashboard.firing is None else _examples(dashboard.firing.bands, dashboard.firing.largest),
        *(_route(route) for route in dashboard.routes[:1]),
        _section(
            "Logits", "Tokens whose logits it raises and lowers directly.",
            _columns(_both(dashboard.logits, "token", "raises", "lowers")),
        ),
        _heads(dashboard.heads),
        *(_route(route) for route in dashboard.routes[1:]),
        f"<p>{made_with}</p>",
    ]  # fmt: skip
    style = (files(__name__.rpartition(".")[0]) / "feature_page.css").read_text(encoding="utf-8")
    text = f'<style>{style}</style><div class="feature">{"".join(parts)}</div>'
    return text.encode("utf-8", "replace").decode("utf-8").encode("ascii", "xmlcharrefreplace").decode("ascii")


def _restricted() -> str:
    return (
        '<p class="hidden">Restricted: nothing here comes from the feature’s own activations. Write your guess down '
        "before you look at its examples.</p>"
    )


def _facts(firing: Firing) -> str:
    facts = [
        ("fires on", f"{100 * firing.frequency:.3g}% of {firing.positions:,} positions"),
        ("largest activation", f"{firing.largest:.4g}"),
    ]
    return f'<div class="facts">{"".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts)}</div>'


def _route(route: Route) -> str:
    if route.head is None:
        title, text = "What it reads", "Tokens by their embedding, and earlier features at the same position."
    else:
        title = f"Through head {route.head[1]} of layer {route.head[0]}"
        text = "What excites it from wherever that head attends."
    columns = _both(route.tokens, "token", "tokens that excite", "tokens that inhibit")
    if route.features is not None:
        columns += _both(route.features, "source", "features that excite", "features that inhibit")
        text += " Features count by weight times mean activation; beside them the tokens that excite them by embedding."
    return _section(title, text, _columns(columns))


def _heads(heads: pd.DataFrame) -> str:
    if heads.empty:
        return ""
    top = heads.head(12)
    rows = [(f"L{row.layer}/H{row.head}", float(row.norm), "") for row in top.itertuples()]  # pyright: ignore[reportArgumentType]
    half = -(-len(rows) // 2)
    largest = max(value for _, value, _ in rows)
    table = [_table("", part, largest) for part in (rows[:half], rows[half:]) if part]
    text = "How strongly each head's W_V W_O carries into it: the length of its read vector."
    return _section("Heads", text, _columns(table))


def _both(frame: pd.DataFrame, name: str, top: str, bottom: str) -> list[str]:
    largest = float(frame["value"].abs().max())
    made = []
    for title, direction in ((top, "top"), (bottom, "bottom")):
        rows = frame[frame["direction"] == direction]
        notes = [str(note) for note in rows["reads"]] if "reads" in rows else [""] * len(rows)
        numbers = [float(value) for value in rows["value"]]
        made.append(_table(title, zip(map(str, rows[name]), numbers, notes, strict=True), largest))
    return made


def _table(title: str, rows: Iterable[tuple[str, float, str]], largest: float) -> str:
    lines = []
    for name, value, note in rows:
        width = 100 * abs(value) / largest if largest > 0 else 0.0
        side = "up" if value >= 0 else "down"
        small = f" <small>{escape(note)}</small>" if note else ""
        lines.append(
            f'<tr><td class="name">{_shown(name)}{small}</td><td class="bar">'
            f'<span class="{side}" style="width:{width:.1f}%"></span></td><td class="number">{value:.3g}</td></tr>'
        )
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<div>{heading}<table>{''.join(lines)}</table></div>"


def _examples(bands: tuple[Band, ...], largest: float) -> str:
    if not bands:
        return _section("Examples", "It never fires on these tokens.", "")
    most = max(band.count for band in bands)
    counts: list[Any] = [(f"{band.low:.3g} to {band.high:.3g}", float(band.count), "") for band in bands]
    parts = [_columns([_table("Positions by activation", counts, float(most))])]
    for band in bands:
        lines = "".join(f"<li>{highlight(e.tokens, e.activations, largest)}</li>" for e in band.examples)
        title = f"{band.low:.3g} to {band.high:.3g}: {band.count:,} positions"
        parts.append(f"<h3>{title}</h3>" + (f"<ol>{lines}</ol>" if lines else ""))
    text = (
        "Five bands of equal width up to the largest activation; the uppermost shows its strongest, the others a "
        "random choice."
    )
    return _section("Examples", text, "".join(parts))


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _columns(columns: Iterable[str]) -> str:
    return f'<div class="columns">{"".join(columns)}</div>'


def _shown(token: str) -> str:
    """A token with its leading space and line breaks visible."""
    text = token.replace("\n", "⏎")
    return escape("␣" + text[1:] if text.startswith(" ") else text) or "∅"
