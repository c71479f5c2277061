"""What direct effects become: the rows of a circuit's tables."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..nodes._scores import label
from ._alignment import Places
from ._direct_effects import DirectEffects
from ._slots import Slot
from ._table import KIND_OF_LETTER, unselected_row
from ._targets import goal_positions


def source_rows(effects: DirectEffects, slots: Sequence[Slot], places: Places, *, paired: bool) -> list[dict]:
    """One row of the nodes per column of the edges, in the order of `Columns`."""
    totals, rows = effects.totals, []
    at = [(places.position(place), text if places.how != "sum" else "…") for place, text in enumerate(places.texts)]
    rests = at[: places.n_positions]
    for index, place_of_node, unit in effects.nodes.tolist():
        slot, place, (position, token) = slots[index], (place_of_node, unit), at[place_of_node]
        activation = float(totals.activation[index][place])
        gate, up = (
            0 if values is None else int(torch.sign(values[place])) for values in (totals.gate[index], totals.up[index])
        )
        rows.append(
            {
                "node": label(slot.layer, slot.letter, unit, position, "node"), "kind": KIND_OF_LETTER[slot.letter],
                "layer": slot.layer, "unit": unit, "position": position, "token": token,
                "activation": activation, "change": float(totals.change[index][place]),
                "sign": int(np.sign(activation)), "gate_sign": gate, "up_sign": up,
                "score": float(totals.score[index][place]),
            }
        )  # fmt: skip
    for index, (token, token_id) in enumerate(zip(places.texts, places.token_ids, strict=True)):
        position = places.position(index)
        rows.append(
            {
                "node": f"embed/{token}" if position < 0 else f"embed@{position}", "label": token, "kind": "embedding",
                "unit": token_id, "position": position, "token": token, "score": float(totals.embedding[index]),
            }
        )  # fmt: skip
    rows += [unselected_row(position, token) for position, token in rests]
    for name, text, score in (
        ("positions", "positional embeddings", totals.positional),
        ("bias", "biases", totals.bias),
    ):
        rows.append({"node": name, "label": text, "kind": "bias", "score": 0.0 if paired else score})
    rows.append({"node": "linearization_error", "label": "not linear", "kind": "linearization_error"})
    for index in effects.columns.slots_with_errors:
        layer, scores = slots[index].layer, totals.errors[index]
        assert scores is not None
        rows += [
            {
                "node": label(layer, "F", -1, position, "error"), "label": f"error of layer {layer}", "kind": "error",
                "layer": layer, "position": position, "token": token, "score": float(score),
            }
            for (position, token), score in zip(rests, scores, strict=True)
        ]  # fmt: skip
    return rows


def target_rows(
    effects: DirectEffects, labels: Sequence[str], n_layers: int, places: Places, end: int
) -> list[dict]:  # fmt: skip
    """One row per logit node; a probability where it is a single token. `end` is where the first prompt ends."""
    totals, rows, goals = effects.totals, [], goal_positions(effects.targets, end)
    for index, (target, text) in enumerate(zip(effects.targets, labels, strict=True)):
        value, change = float(totals.target_values[index]), float(totals.target_changes[index])
        at = target.at(end)
        place = places.position(int(places.alignments[0].place[at]))
        probabilities = totals.probabilities[goals.index(at)]
        rows.append(
            {
                "node": target.name, "label": text, "kind": "logit", "layer": n_layers,
                "unit": target.tokens[0] if target.tokens else -1, "position": place, "token": text,
                "activation": value, "change": change, "sign": int(np.sign(value)), "score": change,
                "probability": float(probabilities[target.tokens[0]]) if len(target.tokens) == 1 else None,
            }
        )  # fmt: skip
    return rows


def edge_rows(matrix: Tensor, sources: Sequence[dict], receivers: Sequence[dict]) -> pd.DataFrame:
    (receiver, source), values = matrix.indices().numpy(), matrix.values().numpy()
    live = (values != 0).any(1)
    names = [np.array([row["node"] for row in rows], dtype=object) for rows in (sources, receivers)]
    return pd.DataFrame(
        {
            "source": pd.Series(names[0][source[live]], dtype=object),  # plain strings: looked up by the ten thousands
            "target": pd.Series(names[1][receiver[live]], dtype=object),
            "weight": values[live, 0],
            "attribution": values[live, 1],
        }
    )
