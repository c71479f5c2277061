"""Figures, as plotly objects that are returned and never shown."""

from ._curves import plot_comparison as plot_comparison
from ._curves import plot_curves as plot_curves
from ._curves import plot_trust as plot_trust
from ._pareto import plot_pareto as plot_pareto
from ._steering import plot_sweep as plot_sweep
