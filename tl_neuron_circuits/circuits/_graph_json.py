"""Reading attribution graphs that other programs wrote: as much of a circuit as they say."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from .._errors import FileFormatError
from ._table import complete, edge_table, node_table, normalized

_KINDS = {"embedding": "embedding", "logit": "logit", "mlp reconstruction error": "error"}


def read_graph(graph: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any]]:
    """Nodes, edges and settings of a graph that is not ours.

    Weights are its own. Relative weights are weights over the sum of the sizes of all weights into the target, and a
    logit's score is its probability: other programs say neither activations' shares nor scores.

    Raises:
        FileFormatError: ids that are not unique, or links to nodes that are not there.
    """
    metadata, groups = graph["metadata"], {}
    for name, *members in graph["qParams"].get("supernodes", []):
        groups |= dict.fromkeys(members, name)
    tokens = list(metadata["prompt_tokens"])
    rows = [_row(node, tokens, groups) for node in graph["nodes"]]
    names = {row["node"] for row in rows}
    if len(names) < len(rows):
        raise FileFormatError(
            f"expected unique node ids; {len(rows) - len(names)} of {len(rows)} come twice. Export the graph again."
        )
    edges = pd.DataFrame(graph["links"], columns=["source", "target", "weight"])
    lost = set(edges["source"]) | set(edges["target"])
    if lost - names:
        raise FileFormatError(
            f"links lead to nodes that are not there, such as {sorted(lost - names)[:3]}. Export the graph again."
        )
    nodes = node_table(rows)
    edges["attribution"] = edges["weight"]
    edges["relative"] = np.sign(edges["weight"]) * normalized(nodes, edges)
    target_value = float(nodes.loc[nodes["kind"] == "logit", "score"].sum())
    layers = [row["layer"] for row in rows if row["kind"] == "feature"]
    settings = {
        "model": metadata["scan"], "prompt": metadata["prompt"], "tokens": tokens, "token_ids": None, "n_prompts": 1,
        "n_layers": max(layers, default=0) + 1, "d_mlp": None, "baseline": "zero", "pairs_hash": metadata["slug"],
        "target": [row["label"] for row in rows if row["kind"] == "logit"], "target_value": target_value,
        "position": len(tokens) - 1, "rules": [], "versions": {},
        "generator": metadata.get("info", {}).get("generator"),
    }  # fmt: skip
    return complete(nodes, edges, target_value), edge_table(edges), settings


def _row(node: Mapping[str, Any], tokens: list[str], groups: Mapping[str, str]) -> dict[str, Any]:
    kind = _KINDS.get(node["feature_type"], "feature")
    layer, position = str(node["layer"]), int(node["ctx_idx"])
    parts = str(node["node_id"]).split("_")
    activation = node.get("activation")
    return {
        "node": node["node_id"], "label": node.get("clerp") or node["node_id"], "kind": kind,
        "layer": int(layer) if layer.isdigit() else -1,
        "unit": int(parts[1]) if kind != "error" and len(parts) == 3 and parts[1].isdigit() else -1,
        "position": position, "token": tokens[position] if 0 <= position < len(tokens) else "",
        "activation": activation, "sign": 0 if not activation else int(np.sign(activation)),
        "score": node.get("token_prob") if kind == "logit" else None,
        "probability": node.get("token_prob") if kind == "logit" else None, "group": groups.get(node["node_id"], ""),
    }  # fmt: skip
