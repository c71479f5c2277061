"""TODO: one line."""

from ._steering import plot_sweep as plot_sweep
