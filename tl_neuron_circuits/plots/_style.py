"""One look for every figure: a color-blind safe palette, dashes by method, a subtitle that says what was measured."""

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito's palette, which readers with color blindness can tell apart; black is left for text.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = {
    "relp": "solid",
    "gradient": "8px,4px",
    "integrated_gradients": "2px,2px",
    "integrated_gradients_inputs": "14px,4px",
    "patching": "14px,4px,2px,4px",
    "learned_mask": "10px,2px,2px,2px",
    "mask_gradient": "4px,2px",
    "activation_difference": "6px,3px,1px,3px",
    "random": "2px,5px",
}
CONTROLS = ("activation_difference", "random")
"""Methods that others should beat."""

NAMES = {
    "relp": "RelP",
    "gradient": "gradient (AtP)",
    "integrated_gradients": "integrated gradients",
    "integrated_gradients_inputs": "IG over inputs",
    "patching": "exact patching",
    "learned_mask": "learned mask",
    "mask_gradient": "mask gradient",
    "activation_difference": "activation difference",
}


def shown(basis: str, method: str) -> str:
    """A curve's name in a legend."""
    return f"{basis.replace('_', ' ')}, {NAMES.get(method, method)}"


def colors(names: Iterable[str]) -> dict[str, str]:
    """A color for each name, in order."""
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(dict.fromkeys(names))}


def dash(method: str) -> str:
    """The line style of a method; unknown ones are solid."""
    return DASHES.get(method, "solid")


def translucent(color: str, alpha: float = 0.15) -> str:
    """The color of a band."""
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def finish(figure: go.Figure, title: str, subtitle: str, *, height: int = 480) -> go.Figure:
    """Title, subtitle, white background; the global plotly template is not touched."""
    figure.update_layout(
        title={"text": f"{title}<br><sub>{subtitle}</sub>", "x": 0.01, "xanchor": "left"},
        template="plotly_white",
        height=height,
        margin={"t": 120, "l": 60, "r": 20, "b": 60},
        legend={"tracegroupgap": 6},
        font={"size": 13},
    )
    return figure


def say(parts: Sequence[Any]) -> str:
    """A subtitle from its parts."""
    return " · ".join(str(part) for part in parts if part)
