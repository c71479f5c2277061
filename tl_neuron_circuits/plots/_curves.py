"""Sparsity curves: faithfulness and completeness against the number of nodes, and what scores promised beside it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..evaluation import Comparison, SparsityCurve
from ._style import colours, dash, finish, say, shown, translucent

_MEASURES = ("faithfulness", "completeness")


def plot_curves(curves: Sequence[SparsityCurve]) -> go.Figure:
    """Curves side by side: faithfulness left (1 is ideal), completeness right (0 is ideal)."""
    figure = _panels()
    palette = colours(str(curve.settings["basis"]) for curve in curves)
    for curve in curves:
        basis, method = str(curve.settings["basis"]), str(curve.settings["method"])
        table = curve.to_dataframe()
        for column, measure in enumerate(_MEASURES, 1):
            _line(figure, column, table, measure, shown(basis, method), palette[basis], method)
    return finish(figure, "Sparsity", _subtitle(curves, []))


def plot_comparison(comparison: Comparison, task: str | None = None) -> go.Figure:
    """One colour a basis, one dash a method; one task with bands, or several averaged over a grid of sizes."""
    tasks = comparison.tasks if task is None else [task]
    keys = [key for key in comparison.curves if key.task in tasks]
    palette = colours(key.basis for key in keys)
    figure = _panels()
    table: Any = comparison.to_dataframe()
    for basis, method in dict.fromkeys((key.basis, key.method) for key in keys):
        rows = table[(table["basis"] == basis) & (table["method"] == method) & table["task"].isin(tasks)]
        for column, measure in enumerate(_MEASURES, 1):
            if len(tasks) == 1:
                _band(figure, column, rows, measure, palette[basis])
            drawn = rows if len(tasks) == 1 else _averaged(rows, measure)
            _line(figure, column, drawn, measure, shown(basis, method), palette[basis], method)
    curves = [comparison.curves[key] for key in keys]
    return finish(figure, "Sparsity of bases", _subtitle(curves, tasks))


def plot_trust(comparison: Comparison, task: str | None = None) -> go.Figure:
    """Summed scores of the best nodes against the measured drop without them; on the diagonal they can be trusted."""
    task = task or comparison.tasks[0]
    keys = [
        key for key in comparison.curves if key.task == task and key.method not in ("random", "activation_difference")
    ]
    palette = colours(key.basis for key in keys)
    figure = go.Figure()
    limits: list[float] = [0.0]
    for key in keys:
        curve = comparison.curves[key]
        drop = (curve.full.mean() - curve.removed.mean(1)).numpy()
        limits += [float(drop.max()), float(drop.min())]
        figure.add_scatter(
            x=curve.predicted.numpy(),
            y=drop,
            name=shown(key.basis, key.method),
            mode="lines+markers",
            text=[f"{size:,} nodes" for size in curve.sizes],
            line={"color": palette[key.basis], "dash": dash(key.method)},
        )
    ends = [min(limits), max(limits)]
    figure.add_scatter(x=ends, y=ends, name="as promised", mode="lines", line={"color": "#888", "width": 1})
    figure.update_xaxes(title="summed scores of the best nodes")
    figure.update_yaxes(title="measured drop of the metric without them")
    return finish(figure, "Do scores add up?", _subtitle([comparison.curves[key] for key in keys], [task]))


def _panels() -> go.Figure:
    figure = make_subplots(cols=2, subplot_titles=("faithfulness (1 is ideal)", "completeness (0 is ideal)"))
    figure.update_xaxes(type="log", title="number of nodes (error nodes counted)", dtick=1)
    for column, ideal in ((1, 1.0), (2, 0.0)):
        figure.add_hline(y=ideal, line={"color": "#888", "width": 1, "dash": "dot"}, row=1, col=column)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(range=[-0.3, 1.5])
    return figure


def _line(figure: go.Figure, column: int, table: Any, measure: str, name: str, colour: str, method: str) -> None:
    table = table[table["size"] > 0]
    figure.add_scatter(
        x=table["size"], y=table[measure], name=name, legendgroup=name, showlegend=column == 1, mode="lines+markers",
        line={"color": colour, "dash": dash(method)}, marker={"size": 4}, row=1, col=column,
        hovertemplate="%{x:,} nodes: %{y:.3f}<extra>" + name + "</extra>",
    )  # fmt: skip


def _band(figure: go.Figure, column: int, table: Any, measure: str, colour: str) -> None:
    table = table[table["size"] > 0]
    x = [*table["size"], *table["size"][::-1]]
    y = [*table[f"{measure}_low"], *table[f"{measure}_high"][::-1]]
    figure.add_scatter(
        x=x, y=y, fill="toself", fillcolor=translucent(colour), line={"width": 0}, hoverinfo="skip", showlegend=False,
        mode="lines", row=1, col=column,
    )  # fmt: skip


def _averaged(rows: Any, measure: str) -> pd.DataFrame:
    """Mean over tasks, each interpolated linearly over log size onto all sizes that occur."""
    rows = rows[rows["size"] > 0]
    sizes = np.unique(rows["size"])
    sizes = sizes[sizes <= rows.groupby("task")["size"].max().min()]
    each = [np.interp(np.log(sizes), np.log(group["size"]), group[measure]) for _, group in rows.groupby("task")]
    return pd.DataFrame({"size": sizes, measure: np.mean(each, axis=0)})


def _subtitle(curves: Sequence[SparsityCurve], tasks: Sequence[str]) -> str:
    first = curves[0].settings
    counts = sorted({len(curve.full) for curve in curves})
    named = ", ".join(task for task in tasks if task != "task")
    pairs = f"{counts[0]} held-out pairs" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} held-out pairs"
    return say(
        [
            first["model"],
            named,
            pairs,
            f"{first['ablation']} ablation",
            "bands: 95 % over words" if len(tasks) == 1 else "",
        ]
    )
