"""`SparsityCurve`: faithfulness and completeness of the best nodes, by how many they are.

    faithfulness(C) = (F(C) - F(0)) / (F(M) - F(0))        ideal 1; more than 1 occurs
    completeness(C) = (F(M \\ C) - F(0)) / (F(M) - F(0))    ideal 0

F is the mean metric of the original model with every node outside the set ablated; M is all nodes, and F(M) the model
itself. Nodes of the set stay live. Source: Marks et al. 2025, arXiv 2403.19647; Arora et al. 2026; METHODS 1.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .._files import read_directory, write_directory

SCHEMA = 1
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False, repr=False)
class SparsityCurve:
    """Metrics per prompt for every size, so that bands can be drawn from the same numbers."""

    sizes: tuple[int, ...]
    kept: Float[Tensor, "size pair"]
    """Metric of each prompt with only the best nodes live."""
    removed: Float[Tensor, "size pair"]
    """Metric of each prompt with the best nodes ablated."""
    full: Float[Tensor, " pair"]
    """Metric of each prompt in the original model."""
    empty: Float[Tensor, " pair"]
    """Metric of each prompt with every node ablated."""
    n_nodes: int
    settings: Mapping[str, Any]

    @property
    def metric_full(self) -> float:
        """F(M): the original model's mean metric."""
        return float(self.full.mean())

    @property
    def metric_empty(self) -> float:
        """F(0): the mean metric with every node ablated."""
        return float(self.empty.mean())

    @property
    def faithfulness(self) -> np.ndarray:
        """One number a size."""
        return self._normalised(self.kept)

    @property
    def completeness(self) -> np.ndarray:
        """One number a size."""
        return self._normalised(self.removed)

    def to_dataframe(self) -> pd.DataFrame:
        """Columns size, fraction (of all nodes), faithfulness, completeness."""
        sizes = np.array(self.sizes)
        return pd.DataFrame(
            {
                "size": sizes,
                "fraction": sizes / self.n_nodes,
                "faithfulness": self.faithfulness,
                "completeness": self.completeness,
            }
        )

    @property
    def cpr(self) -> float:
        """Area under faithfulness over MIB's fractions of all nodes, higher is better; MIB ranks by signed score."""
        return float(np.trapezoid(self._at_fractions(), MIB_FRACTIONS))

    @property
    def cmd(self) -> float:
        """Area under |1 - faithfulness| over MIB's fractions, lower is better; MIB ranks by |score|."""
        return float(np.trapezoid(np.abs(1 - self._at_fractions()), MIB_FRACTIONS))

    def save(self, path: str | Path) -> None:
        """Write a directory with `curve.safetensors` and `curve.json`.

        Raises:
            FileFormatError: the path is something else than a directory of ours.
        """
        tensors = {name: getattr(self, name).contiguous() for name in ("kept", "removed", "full", "empty")}
        notes = {"sizes": list(self.sizes), "n_nodes": self.n_nodes, "settings": dict(self.settings)}
        write_directory(path, "curve", SCHEMA, tensors, notes)

    @classmethod
    def load(cls, path: str | Path) -> "SparsityCurve":
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing, truncated, foreign, or of another schema.
        """
        tensors, notes = read_directory(path, "curve", SCHEMA, required=("sizes", "n_nodes", "settings"))
        return cls(sizes=tuple(notes["sizes"]), n_nodes=notes["n_nodes"], settings=notes["settings"], **tensors)

    def plot(self) -> Any:
        """A plotly figure of faithfulness and completeness, side by side."""
        from ..plots import plot_curves

        return plot_curves([self])

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"SparsityCurve({s['basis']} by {s['method']}, {len(self.sizes)} sizes of {self.n_nodes:,} nodes, "
            f"{len(self.full)} pairs, ablation {s['ablation']}, F(full)={self.metric_full:.3f}, "
            f"F(empty)={self.metric_empty:.3f})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>{self.to_dataframe().to_html(index=False, float_format='%.3f')}"

    def _normalised(self, metric: Tensor) -> np.ndarray:
        low = self.empty.double().mean()
        return ((metric.double().mean(1) - low) / (self.full.double().mean() - low)).numpy()

    def _at_fractions(self) -> np.ndarray:
        """Faithfulness at MIB's fractions, linear between measured sizes; none gives 0 and all give 1."""
        x = np.array([0, *self.sizes, self.n_nodes]) / self.n_nodes
        y = np.array([0.0, *self.faithfulness, 1.0])
        return np.interp(MIB_FRACTIONS, x, y)


def stack(rows: list[Tensor]) -> Tensor:
    """One row a size, on the CPU in float32."""
    return torch.stack([row.float().cpu() for row in rows])
