"""The figure of a circuit for notebooks: layers against positions, as on the page, with the strongest edges.

One unit of both axes is one node's place. Rows are as high as their fullest cell, and the figure as high, and as wide,
as its rows and columns need, so that nodes do not overlap, however many layers and positions there are.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from ._style import PALETTE, finish, say, translucent

if TYPE_CHECKING:
    from ..circuits._circuit import Circuit

_ENDS = ("bias", "unselected", "linearization_error", "error")
_SYMBOLS = {"logit": "square", "embedding": "square", "group": "hexagon", "head": "diamond"}
_PITCH = 18
"""Pixels of one node's place: the largest node."""
_MARGINS = 180
"""Pixels above and below, or left and right, of the axes."""
_USUAL_WIDTH = 1000
_EMPTY, _GAP = 0.45, 0.5
"""Heights of a row without nodes, and of the space between rows, in places."""
_WIDTHS = (0.5, 1.0, 2.0, 3.5)
"""A Plotly trace has one line width, so edges are drawn in as many traces."""


def plot_circuit(circuit: "Circuit", *, max_edges: int = 200, height: int | None = None) -> go.Figure:
    """Nodes sized by |share| and colored by sign; edges colored by their support for the target.

    Args:
        circuit: any circuit.
        max_edges: how many of the strongest edges are drawn.
        height: of the figure, in pixels; None is as much as its rows need.
    """
    places, columns, rows, (across, down) = _places(circuit)
    figure = go.Figure()
    _draw_edges(figure, circuit, places, max_edges)
    _draw_nodes(figure, circuit, places)
    settings, n_layers = circuit.settings, int(circuit.settings.get("n_layers", 0))
    named = {row: y for row, (y, filled) in rows.items() if filled or row % 5 == 0}
    texts = [{-2: "embeddings", -1: "left out", n_layers: "logits"}.get(row, str(row)) for row in named]
    figure.update_yaxes(
        tickvals=list(named.values()), ticktext=texts, title="layer", zeroline=False, showgrid=False,
        range=[-0.5, down + 0.5],
    )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(columns.values()), ticktext=[_column(circuit, position) for position in columns],
        zeroline=False, showgrid=False, tickangle=0, range=[-0.5, across + 0.5],
    )  # fmt: skip
    drawn = min(max_edges, len(circuit.edges))
    explained = 1 - circuit.unexplained if circuit.target_value else np.nan
    subtitle = say(
        [
            f"“{_short(str(settings.get('prompt', '')), 90)}”", _model(str(settings.get("model", ""))),
            f"{len(circuit):,} nodes",
            f"{drawn:,} of {len(circuit.edges):,} edges",
            f"explained {explained:.0%}" if np.isfinite(explained) else "",
        ]
    )  # fmt: skip
    target = ", ".join(str(one).strip() for one in settings.get("target", []))
    figure = finish(
        figure, f"Circuit for “{escape(target)}” = {circuit.target_value:.3g}", escape(subtitle),
        height=height or max(480, int(np.ceil(_PITCH * (down + 1))) + _MARGINS),
    )  # fmt: skip
    if (width := int(np.ceil(_PITCH * (across + 1))) + _MARGINS) > _USUAL_WIDTH:
        figure.update_layout(width=width)
    figure.update_layout(legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"})
    return figure


def _places(
    circuit: "Circuit",
) -> tuple[dict[str, tuple[float, float]], dict[int, float], dict[int, tuple[float, bool]], tuple[float, float]]:
    """Each node's x and y, each position's x, each row's y and whether it has nodes, and the size of all of it.

    One cell per layer and position, filled line by line by size.
    """
    nodes = circuit.nodes.assign(
        row=[_row(*pair) for pair in zip(circuit.nodes["kind"], circuit.nodes["layer"], strict=True)],
        size=_sizes(circuit),
    )
    nodes = nodes.sort_values("size", ascending=False, kind="stable")
    cells = {key: list(cell["node"]) for key, cell in nodes.groupby(["row", "position"], sort=False)}
    across = {key: int(np.ceil(np.sqrt(len(names) * 1.5))) for key, names in cells.items()}
    columns, x = {}, 0.0
    for position in sorted({int(position) for position in nodes["position"]}):
        label = max(map(len, _column(circuit, position).split("<br>")))
        width = max(3, 1 + label * 8 / _PITCH, *(across[key] + 1 for key in cells if key[1] == position))
        columns[position] = x + width / 2
        x += width
    lines = {key: int(np.ceil(len(names) / across[key])) for key, names in cells.items()}
    rows, y = {}, 0.0
    for row in range(-2, max(int(circuit.settings.get("n_layers", 0)), max(int(key[0]) for key in cells)) + 1):
        filled = [count for key, count in lines.items() if key[0] == row]
        height = max(filled) if filled else _EMPTY
        rows[row] = (y + height / 2, bool(filled))
        y += height + (_GAP if filled else 0)
    found = {}
    for key, names in cells.items():
        for place, name in enumerate(names):
            line, in_line = place // across[key], place % across[key]
            count = min(across[key], len(names) - line * across[key])
            found[name] = (
                columns[int(key[1])] + in_line - (count - 1) / 2, rows[int(key[0])][0] - line + (lines[key] - 1) / 2,
            )  # fmt: skip
    return {name: found[name] for name in circuit.nodes["node"]}, columns, rows, (x, y)


def _row(kind: str, layer: int) -> int:
    if kind in _ENDS and layer < 0:
        return -1
    return -2 if kind == "embedding" else layer


def _sizes(circuit: "Circuit") -> np.ndarray:
    """|share|; influence where there are no scores."""
    share = circuit.nodes["share"].abs()
    return share.where(share.notna(), circuit.nodes["influence"]).fillna(0.0).to_numpy()


def _draw_nodes(figure: go.Figure, circuit: "Circuit", places: dict[str, tuple[float, float]]) -> None:
    nodes = circuit.nodes.assign(size=_sizes(circuit))
    largest = max(float(nodes.loc[~nodes["kind"].isin((*_ENDS, "embedding", "logit")), "size"].max()), 1e-12)
    for name, sign in (("supports the target", 1), ("works against it", -1)):
        rows: list[Any] = [row for row in nodes.itertuples() if (-1 if row.score < 0 else 1) == sign]
        color = PALETTE[0] if sign > 0 else PALETTE[1]
        figure.add_scatter(
            x=[places[row.node][0] for row in rows], y=[places[row.node][1] for row in rows], mode="markers", name=name,
            marker={
                "size": [_diameter(row.kind, row.size / largest) for row in rows],
                "symbol": [_symbol(row.kind) for row in rows], "color": color, "line": {"width": 1, "color": "white"},
            },
            hovertext=[_hover(row) for row in rows], hoverinfo="text",
        )  # fmt: skip
    named = [row for row in nodes.itertuples() if row.kind in ("logit", "group") or row.label != row.node]
    named = [row for row in named if row.kind not in (*_ENDS, "embedding")]
    figure.add_scatter(
        x=[places[row.node][0] for row in named], y=[places[row.node][1] for row in named], mode="text",
        text=["  " + escape(_short(str(row.label), 24)) for row in named], textposition="middle right",
        showlegend=False, hoverinfo="skip",
    )  # fmt: skip


def _diameter(kind: str, size: float) -> float:
    """Area by size; embeddings and what was left out stop at the largest neuron."""
    return 12.0 if kind == "logit" else 6 + 12 * float(np.sqrt(min(size, 1)))


def _symbol(kind: str) -> str:
    return "square-open" if kind in _ENDS else _SYMBOLS.get(kind, "circle")


def _draw_edges(figure: go.Figure, circuit: "Circuit", places: dict[str, tuple[float, float]], most: int) -> None:
    edges = circuit.edges.head(most)
    strongest = max(float(edges["attribution"].abs().max()), 1e-12) if len(edges) else 1.0
    strength = np.sqrt(edges["attribution"].abs().to_numpy() / strongest)
    step = np.minimum((strength * len(_WIDTHS)).astype(int), len(_WIDTHS) - 1)
    for sign, color in ((1, PALETTE[0]), (-1, PALETTE[1])):
        for place, width in enumerate(_WIDTHS):
            rows = edges[(step == place) & (np.where(edges["attribution"] < 0, -1, 1) == sign)]
            ends = list(zip(rows["source"], rows["target"], strict=True))
            figure.add_scatter(
                x=_line([(places[a][0], places[b][0]) for a, b in ends]),
                y=_line([(places[a][1], places[b][1]) for a, b in ends]),
                mode="lines", line={"color": translucent(color, 0.2 + 0.15 * place), "width": width},
                hoverinfo="skip", showlegend=False,
            )  # fmt: skip


def _line(ends: Iterable[tuple[float, float]]) -> Sequence[float | None]:
    return [value for start, end in ends for value in (start, end, None)]


def _hover(row: Any) -> str:
    lines = [f"<b>{escape(_short(str(row.label), 60))}</b> ({row.kind})"]
    if row.label != row.node:
        lines.append(escape(str(row.node)))
    if row.token:
        lines.append(
            f"token “{escape(_short(str(row.token), 40))}”" + (f" at {row.position}" if row.position >= 0 else "")
        )
    for name in ("activation", "score", "share", "influence"):
        value = getattr(row, name)
        if np.isfinite(value):
            lines.append(f"{name} {value:.2%}" if name == "share" else f"{name} {value:.4g}")
    if row.group:
        lines.append(f"group {escape(str(row.group))}")
    return "<br>".join(lines)


def _column(circuit: "Circuit", position: int) -> str:
    if position < 0:
        return "everywhere"
    tokens = circuit.settings.get("tokens") or []
    return f"{escape(_short(str(tokens[position]), 12))}<br>{position}" if position < len(tokens) else str(position)


def _model(name: str) -> str:
    """The name without the folders it was loaded from."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    hub = next((part for part in parts if part.startswith("models--")), None)
    return hub.rpartition("--")[2] if hub is not None else name if len(parts) < 3 else parts[-1]


def _short(text: str, length: int) -> str:
    text = text.replace("\n", "⏎").encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= length else text[: length - 1] + "…"
