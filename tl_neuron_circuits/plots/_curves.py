"""Sparsity curves: faithfulness and completeness against the number of nodes, and what scores promised beside it.

One color per basis, one dash per method, and a legend for each rather than one entry per curve. The first method is
drawn thickest, controls thinnest.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .._errors import SettingsError
from ._style import CONTROLS, NAMES, colors, dash, finish, say, shown, translucent

if TYPE_CHECKING:
    from ..evaluation._comparison import Comparison
    from ..evaluation._curve import Curve

_MEASURES = ("faithfulness", "completeness")
_GRAY = "#888888"
_RANGE = (-0.3, 1.5)
"""What the panels show; curves that leave it are marked at the edge."""


def plot_curves(curves: "Sequence[Curve]") -> go.Figure:
    """Curves side by side: faithfulness left (1 is ideal), completeness right (0 is ideal).

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import plots
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> curve = tnc.evaluate(model, pairs, tnc.attribute(model, pairs), sizes=[10, 100])
        >>> figure = plots.plot_curves([curve])
        >>> figure.write_html("curve.html")
    """
    figure = _panels()
    pairs = [(str(curve.settings["basis"]), str(curve.settings["method"])) for curve in curves]
    palette = colors(basis for basis, _ in pairs)
    for curve, (basis, method) in zip(curves, pairs, strict=True):
        table = curve.to_dataframe()
        for column, measure in enumerate(_MEASURES, 1):
            _line(figure, column, table, measure, basis, method, palette[basis], _width(method, pairs[0][1]))
    _legend(figure, palette, (method for _, method in pairs))
    return finish(figure, "Sparsity", _subtitle(curves, []))


def plot_comparison(comparison: "Comparison", task: str | None = None) -> go.Figure:
    """One color per basis, one dash per method; one task with bands, or several averaged over a grid of sizes.

    Raises:
        SettingsError: there is no such task.
    """
    tasks = comparison.tasks if task is None else [_known(comparison, task)]
    keys = [key for key in comparison.curves if key.task in tasks]
    palette = colors(key.basis for key in keys)
    figure = _panels()
    table: Any = comparison.to_dataframe()
    for basis, method in dict.fromkeys((key.basis, key.method) for key in keys):
        rows = table[(table["basis"] == basis) & (table["method"] == method) & table["task"].isin(tasks)]
        for column, measure in enumerate(_MEASURES, 1):
            if len(tasks) == 1:
                _band(figure, column, rows, measure, basis, palette[basis])
            drawn = rows if len(tasks) == 1 else _averaged(rows, measure)
            _line(figure, column, drawn, measure, basis, method, palette[basis], _width(method, keys[0].method))
    _legend(figure, palette, (key.method for key in keys))
    notes = ["bands: 95% over words" if len(tasks) == 1 else f"averaged over {len(tasks)} tasks"]
    return finish(figure, "Sparsity of bases", _subtitle([comparison.curves[key] for key in keys], tasks, notes))


def plot_trust(comparison: "Comparison", task: str | None = None) -> go.Figure:
    """Summed scores of the best nodes against the measured drop without them; on the diagonal they can be trusted.

    Scores are against the corrupt prompt; under another ablation the two may differ by a factor (mean ablation goes
    half of the way where pairs come in both directions), and it is the straightness of a curve that tells.

    Raises:
        SettingsError: there is no such task, or only controls were compared.
    """
    task = comparison.tasks[0] if task is None else _known(comparison, task)
    keys = [key for key in comparison.curves if key.task == task and key.method not in CONTROLS]
    if not keys:
        raise SettingsError(
            "expected a method whose scores say how far the metric drops; only controls were compared. "
            "Compare with method 'relp' or 'gradient' too."
        )
    palette = colors(key.basis for key in keys)
    figure = go.Figure()
    limits: list[float] = [0.0]
    for key in keys:
        curve = comparison.curves[key]
        drop = (curve.full.mean() - curve.removed.mean(1)).numpy()
        limits += [float(drop.max()), float(drop.min())]
        figure.add_scatter(
            x=curve.predicted.numpy(), y=drop, name=shown(key.basis, key.method), legendgroup=key.basis,
            mode="lines+markers", marker={"size": 4}, text=[f"{size:,} nodes" for size in curve.sizes],
            line={"color": palette[key.basis], "dash": dash(key.method), "width": _width(key.method, keys[0].method)},
            showlegend=False,
        )  # fmt: skip
    ends = [min(limits), max(limits)]
    _legend(figure, palette, (key.method for key in keys))
    figure.add_scatter(x=ends, y=ends, name="as promised", mode="lines", line={"color": _GRAY, "width": 1})
    first = comparison.curves[keys[0]]
    baseline, ablation = str(first.settings.get("baseline", "corrupt")), str(first.settings["ablation"])
    figure.update_xaxes(title=f"summed scores of the best nodes (against {baseline})")
    figure.update_yaxes(title=f"drop of the metric without them ({ablation})")
    return finish(figure, "Do scores add up?", _subtitle([first], [task]))


def _known(comparison: "Comparison", task: str) -> str:
    if task not in comparison.tasks:
        raise SettingsError(f"expected one of the tasks {comparison.tasks}; got {task!r}.")
    return task


def _panels() -> go.Figure:
    figure = make_subplots(
        cols=2, subplot_titles=("faithfulness (1 is ideal)", "completeness (0 is ideal)"), horizontal_spacing=0.08
    )
    figure.update_annotations(font_size=13)
    # One label a decade; whole numbers with commas rather than a mixture of 1000 and 10k.
    figure.update_xaxes(type="log", title="number of nodes (error nodes counted)", dtick=1, tickformat=",d")
    for column, ideal in ((1, 1.0), (2, 0.0)):
        figure.add_hline(y=ideal, line={"color": _GRAY, "width": 1, "dash": "dot"}, row=1, col=column)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(range=list(_RANGE), ticks="outside", tickcolor="white")
    return figure


def _width(method: str, first: str) -> float:
    return 2.8 if method == first else 1.4 if method in CONTROLS else 1.7


def _line(
    figure: go.Figure, column: int, table: Any, measure: str, basis: str, method: str, color: str, width: float
) -> None:
    table = table[table["size"] > 0]
    figure.add_scatter(
        x=table["size"], y=table[measure], name=shown(basis, method), legendgroup=basis, showlegend=False, mode="lines",
        line={"color": color, "dash": dash(method), "width": width}, row=1, col=column,
        hovertemplate="%{x:,} nodes: %{y:.3f}<extra>" + shown(basis, method) + "</extra>",
    )  # fmt: skip
    _mark_outside(figure, column, table, measure, shown(basis, method), color)


def _mark_outside(figure: go.Figure, column: int, table: Any, measure: str, name: str, color: str) -> None:
    """Triangles at the edge where a curve leaves the panel, and beside the farthest one how far it goes."""
    low, high = _RANGE
    values = table[measure].to_numpy()
    for outside, edge, symbol, farthest in (
        (values > high, high, "triangle-up", np.nanmax), (values < low, low, "triangle-down", np.nanmin)
    ):  # fmt: skip
        if not outside.any():
            continue
        rows, inset = table[outside], 0.03 if edge == low else -0.03
        extreme = farthest(values[outside])
        first = int(np.flatnonzero(rows[measure].to_numpy() == extreme)[0])
        figure.add_scatter(
            x=rows["size"], y=np.full(len(rows), edge + inset), mode="markers+text", showlegend=False,
            marker={"symbol": symbol, "size": 8, "color": color, "line": {"width": 1, "color": "white"}},
            text=[f"{extreme:.3g}" if place == first else "" for place in range(len(rows))],
            textposition="bottom center" if edge == high else "top center", textfont={"size": 11, "color": color},
            customdata=rows[measure], row=1, col=column, cliponaxis=False,
            hovertemplate="%{x:,} nodes: %{customdata:.3f}<extra>" + name + "</extra>",
        )  # fmt: skip


def _legend(figure: go.Figure, palette: dict[str, str], methods: Iterable[str]) -> None:
    """A click on a basis hides its curves; methods are a key to the dashes."""
    for basis, color in palette.items():
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name=basis.replace("_", " "), legendgroup=basis,
            line={"color": color, "width": 4},
        )  # fmt: skip
    for method in dict.fromkeys(methods):
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name=NAMES.get(method, method), legendgroup="methods",
            line={"color": "#444444", "dash": dash(method), "width": 1.7},
        )  # fmt: skip


def _band(figure: go.Figure, column: int, table: Any, measure: str, basis: str, color: str) -> None:
    table = table[table["size"] > 0]
    x = [*table["size"], *table["size"][::-1]]
    y = [*table[f"{measure}_low"], *table[f"{measure}_high"][::-1]]
    figure.add_scatter(
        x=x, y=y, fill="toself", fillcolor=translucent(color), line={"width": 0}, hoverinfo="skip", showlegend=False,
        legendgroup=basis, mode="lines", row=1, col=column,
    )  # fmt: skip


def _averaged(rows: Any, measure: str) -> pd.DataFrame:
    """Mean over tasks, each interpolated linearly over log size onto all sizes that occur.

    Beyond a task's last size, which by default is all nodes, it stays where it is.
    """
    rows = rows[rows["size"] > 0]
    sizes = np.unique(rows["size"])
    each = [np.interp(np.log(sizes), np.log(group["size"]), group[measure]) for _, group in rows.groupby("task")]
    return pd.DataFrame({"size": sizes, measure: np.mean(each, axis=0)})


def _subtitle(curves: "Sequence[Curve]", tasks: Sequence[str], notes: Sequence[str] = ()) -> str:
    first = curves[0].settings
    counts = sorted({len(curve.full) for curve in curves})
    named = ", ".join(task for task in tasks if task != "task")
    pairs = f"{counts[0]} held-out pairs" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} held-out pairs"
    return say([first["model"], named, pairs, f"{first['ablation']} ablation", *notes])
