"""From edges as numbers to the two tables of a circuit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..nodes._scores import label
from ._direct_effects import DirectEffects
from ._slot import Slot
from ._table import KIND_OF_LETTER, complete, edge_table, node_table, rows_of, unselected_row
from ._target import Goal


@dataclass(frozen=True)
class Places:
    """What stands where: texts and numbers of the tokens by position (-1 where prompts differ), and the goals."""

    tokens: Sequence[str]
    token_ids: Sequence[int]
    position: int
    """Where the goals are read."""
    n_layers: int
    slots: Sequence[Slot]
    goal_labels: Sequence[str]
    probabilities: Sequence[float]


def assemble(
    effects: DirectEffects, goals: Sequence[Goal], places: Places, *, paired: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Nodes and edges."""
    totals = effects.totals
    sources = _chosen(effects, places)
    sources += [_embedding(effects, places, p) for p in range(len(places.tokens))]
    sources += [unselected_row(p, token) for p, token in enumerate(places.tokens)]
    for name, text, score in (
        ("positions", "positional embeddings", totals.positional),
        ("bias", "biases", totals.bias),
    ):
        sources.append({"node": name, "label": text, "kind": "bias", "score": 0.0 if paired else score})
    sources.append({"node": "linearization_error", "label": "not linear", "kind": "linearization_error"})
    for slot in effects.columns.slots_with_errors:
        sources += _errors(effects, places, slot)
    outputs = [_output(effects, goal, places, k) for k, goal in enumerate(goals)]
    names = np.array([row["node"] for row in sources], dtype=object)
    targets = np.array([row["node"] for row in [*sources[: len(effects.nodes)], *outputs]], dtype=object)
    edges = _edges(effects.edges, names, targets)
    used = set(edges["source"])
    always = ("neuron", "feature", "embedding")
    nodes = node_table([row for row in sources if row["kind"] in always or row["node"] in used] + outputs)
    edges["relative"] = relative_weights(nodes, edges)
    return complete(nodes, edges, float(totals.goals.sum())), edge_table(edges)


def _output(effects: DirectEffects, goal: Goal, places: Places, k: int) -> dict:
    value, change = float(effects.totals.goal_values[k]), float(effects.totals.goals[k])
    return {
        "node": goal.name, "label": places.goal_labels[k], "kind": "logit", "layer": places.n_layers,
        "unit": goal.token, "position": places.position, "token": places.goal_labels[k], "activation": value,
        "change": change, "sign": int(np.sign(value)), "score": change, "probability": places.probabilities[k],
    }  # fmt: skip


def relative_weights(nodes: pd.DataFrame, edges: pd.DataFrame) -> np.ndarray:
    """Each edge's share of its target's score; on a single prompt that is its share of the activation too."""
    score = nodes["score"].to_numpy()[rows_of(nodes, edges["target"])]
    attribution = edges["attribution"].to_numpy()
    return np.divide(attribution, score, out=np.zeros_like(attribution), where=score != 0)


def _edges(matrix: Tensor, names: np.ndarray, targets: np.ndarray) -> pd.DataFrame:
    (target, source), values = matrix.indices().numpy(), matrix.values().numpy()
    live = (values != 0).any(1)
    return pd.DataFrame(
        {
            "source": pd.Series(names[source[live]], dtype=object),  # plain strings: looked up by the ten thousands
            "target": pd.Series(targets[target[live]], dtype=object),
            "weight": values[live, 0],
            "relative": 0.0,
            "attribution": values[live, 1],
        }
    )


def _chosen(effects: DirectEffects, places: Places) -> list[dict]:
    totals, rows = effects.totals, []
    for index, position, unit in effects.nodes.tolist():
        slot = places.slots[index]
        activation = float(totals.activation[index][position, unit])
        rows.append(
            {
                "node": label(slot.layer, slot.letter, unit, position, "node"), "kind": KIND_OF_LETTER[slot.letter],
                "layer": slot.layer, "unit": unit, "position": position, "token": places.tokens[position],
                "activation": activation, "change": float(totals.change[index][position, unit]),
                "sign": int(np.sign(activation)), "gate_sign": _sign(totals.gate[index], position, unit),
                "up_sign": _sign(totals.up[index], position, unit),
                "score": float(totals.score[index][position, unit]),
            }
        )  # fmt: skip
    return rows


def _errors(effects: DirectEffects, places: Places, index: int) -> list[dict]:
    layer, scores = places.slots[index].layer, effects.totals.errors[index]
    assert scores is not None
    return [
        {
            "node": label(layer, "F", -1, position, "error"), "label": f"error of layer {layer}", "kind": "error",
            "layer": layer, "position": position, "token": token, "score": float(scores[position]),
        }
        for position, token in enumerate(places.tokens)
    ]  # fmt: skip


def _sign(values: Tensor | None, position: int, unit: int) -> int:
    return 0 if values is None else int(torch.sign(values[position, unit]))


def _embedding(effects: DirectEffects, places: Places, position: int) -> dict:
    token = places.tokens[position]
    return {
        "node": f"embed@{position}", "label": token, "kind": "embedding", "unit": places.token_ids[position],
        "position": position, "token": token, "score": float(effects.totals.embedding[position]),
    }  # fmt: skip
