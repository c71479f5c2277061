"""Sparsity against fidelity of dictionaries, one panel per layer and one for all; linear maps as lines."""

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .._errors import SettingsError
from ._style import PALETTE, colors, finish, say

if TYPE_CHECKING:
    import pandas as pd

MEASURES = {
    "recovered_zero": "loss recovered (zero ablation is 0, the model 1)",
    "recovered_mean": "loss recovered (mean ablation is 0, the model 1)",
    "divergence": "KL divergence from the model's predictions",
    "fvu": "fraction of variance unexplained",
    "loss": "next-token loss",
}
_SORTS = ("transcoder", "sae")
_LINES = {"affine": "dash", "mean": "dot"}


def plot_pareto(table: "pd.DataFrame", measure: str = "recovered_zero", model: str = "") -> go.Figure:
    """The table of a `ParetoFront` as a figure: points of one sort joined along their front.

    Raises:
        SettingsError: the measure is not one of the table's.
    """
    if measure not in MEASURES:
        raise SettingsError(f"expected measure to be one of {list(MEASURES)}; got {measure!r}.")
    layers = list(dict.fromkeys(table["layer"]))
    titles = ["all layers" if layer == "all" else f"layer {layer}" for layer in layers]
    figure = make_subplots(cols=len(layers), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.02)
    palette = colors(_SORTS)
    for column, layer in enumerate(layers, 1):
        rows = table[table["layer"] == layer]
        for sort in _SORTS:
            points = rows[rows["replacement"] == sort].sort_values("l0")
            front = points[points["on_front"]]
            figure.add_scatter(
                x=front["l0"], y=front[measure], name=_shown(sort), legendgroup=sort, showlegend=column == 1,
                mode="lines+markers", line={"color": palette[sort]}, row=1, col=column,
            )  # fmt: skip
            rest = points[~points["on_front"]]
            figure.add_scatter(
                x=rest["l0"], y=rest[measure], name=_shown(sort), legendgroup=sort, showlegend=False, mode="markers",
                marker={"color": palette[sort], "symbol": "circle-open"}, row=1, col=column,
            )  # fmt: skip
        _lines(figure, column, rows[rows["target"] != "sae"], measure)
    powers = [2**power for power in range(16)]
    figure.update_xaxes(type="log", title="L0 (features that fire)", tickvals=powers)
    if measure == "divergence":  # over orders of magnitude, from ablation to nearly the model
        figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(title=MEASURES[measure], col=1)
    width = table["d_dict"].dropna().unique()
    features = f"{int(width[0]):,} features per dictionary" if len(width) == 1 else ""
    note = say([model, features, "hollow: off the front", "lines: linear maps on the MLP's input"])
    return finish(figure, "Sparsity against fidelity", note)


def _lines(figure: go.Figure, column: int, rows: "pd.DataFrame", measure: str) -> None:
    """What a linear map reaches, over the width of the panel."""
    points = rows[rows["replacement"].isin(_SORTS)]["l0"]
    if points.empty:
        return
    for name in dict.fromkeys(rows["replacement"]):
        value = rows[rows["replacement"] == name][measure]
        if name in (*_SORTS, "zero") or (name == "mean" and measure == "recovered_mean") or value.isna().all():
            continue
        dash = _LINES.get(name, "longdashdot")
        figure.add_scatter(
            x=[points.min(), points.max()], y=[value.iloc[0]] * 2, name=name, legendgroup=name, showlegend=column == 1,
            mode="lines", line={"color": PALETTE[4] if name == "mean" else "#555", "dash": dash, "width": 1},
            row=1, col=column,
        )  # fmt: skip


def _shown(sort: str) -> str:
    return {"transcoder": "transcoder", "sae": "SAE (MLP out)"}[sort]
