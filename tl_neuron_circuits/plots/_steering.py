"""The figure of a steering sweep: the target, and the tokens that move most.

Lines differ by dash and marker as well as by color, so that the figure can be read in gray.
"""

from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from ._style import PALETTE, finish

if TYPE_CHECKING:
    from ..interventions._sweep import SteeringSweep

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
_MOVING = 5


def plot_sweep(sweep: "SteeringSweep", prompt: int = 0) -> go.Figure:
    """Probability of the targets (without any, of the unsteered top token) and of the five others that move most."""
    table = sweep.to_dataframe()
    table = table[table["prompt"] == prompt]
    before = sweep.results[0]
    targets = [token for token in before.settings["targets"] if token in set(table["token_id"])][:_MOVING]
    targets = targets or [int(before.before[prompt].argmax())]
    moved = table.groupby("token_id")["probability"].agg(lambda values: values.max() - values.min())
    moving = [token for token in moved.sort_values(ascending=False).index if token not in targets][:_MOVING]
    figure = go.Figure()
    for place, token in enumerate([*targets, *moving]):
        rows = table[table["token_id"] == token].sort_values("scale")
        name = repr(rows["token"].iloc[0]) + (" (target)" if token in before.settings["targets"] else "")
        figure.add_scatter(
            x=rows["scale"], y=rows["probability"], mode="lines+markers", name=escape(name, quote=False),
            line={
                "color": PALETTE[place % len(PALETTE)], "dash": _DASHES[place % len(_DASHES)],
                "width": 3.5 if token in targets else 1.7,
            },
            marker={"symbol": _SYMBOLS[place % len(_SYMBOLS)], "size": 10 if token in targets else 8},
        )  # fmt: skip
    figure.update_xaxes(title="multiplier of the nodes")
    figure.update_yaxes(title="probability of the next token", range=[-0.03, 1.12])
    figure.add_vline(x=1, line_dash="dot", line_width=1, annotation_text="unsteered")
    others = len(moved) - len(targets) - len(moving)
    subtitle = f"{len(before.nodes):,} nodes" + (f" · {others:,} tokens that move less are left out" if others else "")
    return finish(figure, escape(sweep.prompts[prompt], quote=False), subtitle)
