"""From edges as numbers to the two tables of a circuit."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..attribution import DirectEffects, Goal, label
from ._table import complete, edge_table, node_table, remainder_row


def assemble(
    effects: DirectEffects, goals: Sequence[Goal], goal_labels: Sequence[str], probabilities: Sequence[float],
    tokens: Sequence[str], position: int, n_layers: int, *, paired: bool,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Nodes and edges. `tokens` are the texts by position, `position` is where the goals are read."""
    sources = _neurons(effects, tokens)
    sources += [_embedding(effects, p, token) for p, token in enumerate(tokens)]
    sources += [remainder_row(p, token) for p, token in enumerate(tokens)]
    totals = effects.totals
    constant = {"kind": "bias", "score": 0.0 if paired else totals.positional}
    sources += [{"node": "positions", "label": "positional embeddings", **constant}]
    sources += [{"node": "bias", "label": "biases", **constant, "score": 0.0 if paired else totals.bias}]
    sources += [{"node": "residual", "label": "not linear", "kind": "residual"}]
    values = totals.goals.tolist()
    outputs = [
        {
            "node": goal.name, "label": text, "kind": "logit", "layer": n_layers, "unit": goal.token,
            "position": position, "token": text, "activation": value, "sign": int(np.sign(value)), "score": value,
            "probability": probability,
        }
        for goal, text, value, probability in zip(goals, goal_labels, values, probabilities, strict=True)
    ]  # fmt: skip
    n = len(effects.neurons)
    names = np.array([row["node"] for row in sources], dtype=object)
    targets = np.array([row["node"] for row in [*sources[:n], *outputs]], dtype=object)
    edges = _edges(effects.edges, names, targets)
    used = set(edges["source"])
    always = ("neuron", "embedding")
    rows = [row for row in sources if row["kind"] in always or row["node"] in used] + outputs
    nodes = node_table(rows)
    edges["relative"] = relative_weights(nodes, edges)
    return complete(nodes, edges, sum(values)), edge_table(edges)


def relative_weights(nodes: pd.DataFrame, edges: pd.DataFrame) -> np.ndarray:
    """Each edge's share of its target: of its score, which is the share of its activation on a single prompt."""
    score = nodes.set_index("node")["score"][edges["target"]].to_numpy()
    attribution = edges["attribution"].to_numpy()
    return np.divide(attribution, score, out=np.zeros_like(attribution), where=score != 0)


def _edges(matrix: Tensor, names: np.ndarray, targets: np.ndarray) -> pd.DataFrame:
    (target, source), values = matrix.indices().numpy(), matrix.values().numpy()
    live = (values != 0).any(1)
    return pd.DataFrame(
        {
            "source": names[source[live]],
            "target": targets[target[live]],
            "weight": values[live, 0],
            "relative": 0.0,
            "attribution": values[live, 1],
        }
    )


def _neurons(effects: DirectEffects, tokens: Sequence[str]) -> list[dict]:
    totals, rows = effects.totals, []
    for layer, position, unit in effects.neurons.tolist():
        activation = float(totals.activation[layer][position, unit])
        rows.append(
            {
                "node": label(layer, "N", unit, position, "node"), "kind": "neuron", "layer": layer, "unit": unit,
                "position": position, "token": tokens[position], "activation": activation,
                "sign": int(np.sign(activation)), "gate_sign": _sign(totals.gate[layer], position, unit),
                "up_sign": _sign(totals.up[layer], position, unit),
                "score": float(totals.score[layer][position, unit]),
            }
        )  # fmt: skip
    return rows


def _sign(values: Tensor | None, position: int, unit: int) -> int:
    return 0 if values is None else int(torch.sign(values[position, unit]))


def _embedding(effects: DirectEffects, position: int, token: str) -> dict:
    return {
        "node": f"embed@{position}", "label": token, "kind": "embedding", "position": position, "token": token,
        "score": float(effects.totals.embedding[position]),
    }  # fmt: skip
