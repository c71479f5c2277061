"""Figures, as plotly objects that are returned and never shown; and the page of a circuit, one HTML file.

Results draw themselves: `Circuit.plot` and `to_html`, `Comparison.plot` and `plot_trust`, `SteeringSweep.plot`,
`ParetoFront.plot`. `plot_curves` puts several curves into one figure.
"""

from .._lazy import explain_old_names
from ._curves import plot_curves as plot_curves

explain_old_names(__name__)
