"""Curves and comparisons made of given numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tl_neuron_circuits.evaluation import Comparison, SparsityCurve
from tl_neuron_circuits.evaluation._comparison import CurveKey


def curve(
    sizes: Sequence[int],
    faithfulness: Sequence[float] | torch.Tensor,
    n_nodes: int = 100,
    n_pairs: int = 4,
    groups: tuple[str, ...] | None = None,
    **settings: Any,
) -> SparsityCurve:
    """Full metric 3 and empty metric 1 for every pair; `faithfulness` by size, or by size and pair."""
    wanted = torch.as_tensor(faithfulness, dtype=torch.float32)
    wanted = wanted if wanted.dim() == 2 else wanted[:, None].expand(-1, n_pairs)
    n_pairs = wanted.shape[1]
    known = {
        "basis": "neurons",
        "method": "relp",
        "ablation": "mean",
        "error_nodes": "rank",
        "model": "made",
        "metric": "m",
    }
    return SparsityCurve(
        tuple(sizes),
        kept=1 + 2 * wanted,
        removed=3 - 2 * wanted,
        full=torch.full((n_pairs,), 3.0),
        empty=torch.ones(n_pairs),
        predicted=2 * wanted.mean(1),
        total=n_nodes,
        settings=known | settings,
        groups=groups,
    )


def comparison(curves: Mapping[tuple[str, str, str], SparsityCurve], bootstrap: int = 200) -> Comparison:
    """Of curves by (task, basis, method)."""
    settings = {"model": "made", "bootstrap": bootstrap, "seed": 0}
    return Comparison({CurveKey(*key): value for key, value in curves.items()}, settings)
