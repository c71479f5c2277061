"""Circuits from rows of nodes and edges that some other method found."""

from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from ..bases._site import Basis
from ._circuit import Circuit
from ._edge_heads import Traced
from ._flow import complete
from ._table import node_table


def from_tables(
    nodes: Collection[dict], edges: Collection[dict], target_value: float, settings: Mapping[str, Any],
    *, basis: Basis | None = None, traced: Traced | None = None,
) -> Circuit:  # fmt: skip
    """A circuit whose relative weights, flow, influence and shares follow from its scores and attributions.

    Args:
        nodes: rows with entries of `NODE_COLUMNS`; what is missing is neutral. Scores are needed of the logits and of
            every node with incoming edges.
        edges: rows with source, target, weight and attribution; those of one pair are added up.
        target_value: what the circuit explains.
        settings: as `trace` writes them.
        basis: where the nodes live, for evaluation and steering.
        traced: the model and prompt, while they live.
    """
    table = node_table(nodes)
    frame = pd.DataFrame(list(edges), columns=["source", "target", "weight", "attribution"])
    frame = frame.groupby(["source", "target"], sort=False, as_index=False)[["weight", "attribution"]].sum()
    settings = {**settings, "target_value": target_value}
    return Circuit(*complete(table, frame, target_value), settings, basis=basis, traced=traced)
