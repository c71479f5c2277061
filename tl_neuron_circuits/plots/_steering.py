"""The figure of a steering sweep."""

from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

if TYPE_CHECKING:
    from ..interventions._steer import SteeringSweep


def plot_sweep(sweep: "SteeringSweep", prompt: int = 0) -> go.Figure:
    """Probability of every top token of one prompt against the multiplier."""
    table = sweep.to_dataframe()
    figure = go.Figure()
    for _, rows in table[table["prompt"] == prompt].groupby("token_id", sort=False):
        rows = rows.sort_values("scale")
        figure.add_scatter(
            x=rows["scale"],
            y=rows["probability"],
            mode="lines+markers",
            name=escape(repr(rows["token"].iloc[0]), quote=False),
        )
    figure.update_layout(
        title=escape(sweep.prompts[prompt], quote=False),
        xaxis_title="multiplier of the neurons",
        yaxis_title="probability of the next token",
    )
    figure.add_vline(x=1, line_dash="dot", annotation_text="unsteered")
    return figure
