"""A lasso circuit as a `Circuit`: the same tables, graph, saving and export as circuits found by attribution.

An edge's `weight` is the lasso's and its `attribution` is `reach` with the weight's sign; a node's `score` is the
largest product of weights on a path from it to the readout. Nothing is conserved along a regression, so `relative`,
`flow` and `influence` are nan, and pruning by them means nothing: choose another penalty instead.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..circuits import Circuit

_KINDS = {"embedding": "embedding", "logits": "logit"}


def to_circuit(nodes: pd.DataFrame, edges: pd.DataFrame, settings: Mapping[str, Any]) -> Circuit:
    """The tables in a `Circuit`'s columns."""
    score = _scores(nodes, edges)
    rows = pd.DataFrame(
        {
            "node": nodes["node"],
            "label": nodes["node"],
            "kind": [_kind(*row) for row in zip(nodes["kind"], nodes["unit"], nodes["node"], strict=True)],
            "layer": nodes["layer"],
            "unit": nodes["unit"],
            "position": nodes["position"],
            "token": "",
            "sign": 0,
            "gate_sign": 0,
            "up_sign": 0,
            "score": score,
            "share": score,
            "group": "",
            **dict.fromkeys(("activation", "change", "flow", "influence", "probability"), np.nan),
        }
    )
    attribution = edges["reach"] * np.sign(edges["weight"])
    links = edges[["source", "target", "weight"]].assign(relative=np.nan, attribution=attribution)
    notes = {**settings, "target": [settings["readout"]], "target_value": 1.0, "n_prompts": settings["n"]}
    return Circuit(rows, links, notes)


def _kind(kind: str, unit: int, node: str) -> str:
    if unit < 0:
        return _KINDS.get(kind, "component")
    return "feature" if "/F" in node else "neuron"


def _scores(nodes: pd.DataFrame, edges: pd.DataFrame) -> np.ndarray:
    """The strongest path of every node to the readout; an edge's reach over its weight is that of its target."""
    best = dict.fromkeys(nodes["node"], 0.0)
    size = edges["weight"].abs()
    for source, reach, weight in zip(edges["source"], edges["reach"], size, strict=True):
        onward = reach / weight if weight > 0 else 0.0
        best[source] = max(best[source], min(weight, 1.0) * onward)
    if "logits" in best:
        best["logits"] = 1.0
    return nodes["node"].map(best).to_numpy(dtype=float)
