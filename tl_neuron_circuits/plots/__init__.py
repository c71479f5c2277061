"""Figures, as plotly objects that are returned and never shown; and the page of a circuit, one HTML file."""

from ._circuit import plot_circuit as plot_circuit
from ._curves import plot_comparison as plot_comparison
from ._curves import plot_curves as plot_curves
from ._curves import plot_trust as plot_trust
from ._page import write_page as write_page
from ._pareto import plot_pareto as plot_pareto
from ._steering import plot_sweep as plot_sweep
