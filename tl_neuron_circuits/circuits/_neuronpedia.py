"""Attribution graphs in Neuronpedia's JSON, as circuit-tracer writes them.

A neuron or feature is written as a unit `{layer}_{unit}_{position}`, a dictionary's error as `err_{layer}_{position}`,
and remainders, biases and the residual as errors of layers that the model does not have. What that format has no place
for (scores, attributions, settings) stands in `metadata.info`, so our own files come back whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._errors import FileFormatError, SettingsError
from .._files import versions
from ..bases._dictionary_basis import Dictionaries
from ..bases._site import Basis
from ._graph_json import read_graph
from ._table import EDGE_COLUMNS, NODE_COLUMNS, typed

if TYPE_CHECKING:
    from ._circuit import Circuit

_URL = "https://pypi.org/project/tl-neuron-circuits/"
_OURS = "tl_neuron_circuits"
UNIT, ERROR = "cross layer transcoder", "mlp reconstruction error"


def write(circuit: Circuit, path: Path, slug: str | None, scan: str | None) -> None:
    """Write the graph.

    Raises:
        SettingsError: supernodes or summed positions, which the format cannot say.
    """
    nodes, settings = circuit.nodes, circuit.settings
    if (nodes["kind"] == "group").any() or settings.get("positions") == "sum" or not settings["tokens"]:
        raise SettingsError(
            "expected a circuit with positions and without supernodes: the format has one unit and one position a "
            "node. Export the circuit before collapse() or sum_positions(); its groups are written as supernodes."
        )
    ids = _ids(nodes, settings["n_layers"])
    graph = {
        "metadata": {
            "slug": slug or _slug(settings["prompt"]), "scan": scan or settings["model"],
            "transcoder_list": _dictionaries(circuit),
            "prompt_tokens": list(settings["tokens"]), "prompt": settings["prompt"], "node_threshold": 0.8,
            "schema_version": 1,
            "info": {
                "generator": {"name": _OURS, "version": versions()["tl-neuron-circuits"], "url": _URL},
                _OURS: _tables(circuit),
            },
        },
        "qParams": {
            "pinnedIds": [ids[node] for node in nodes.loc[nodes["group"] != "", "node"]],
            "supernodes": [
                [group, *(ids[node] for node in same["node"])]
                for group, same in nodes[nodes["group"] != ""].groupby("group", sort=False)
            ],
            "linkType": "both", "clickedId": "", "sg_pos": "",
        },
        "nodes": [
            _node(row, ids[row["node"]], cumulative, row["node"] == _first_logit(nodes))
            for row, cumulative in zip(nodes.to_dict("records"), _cumulative(nodes["influence"]), strict=True)
        ],
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in circuit.edges[["source", "target", "weight"]].itertuples(index=False)
        ],
    }  # fmt: skip
    path.write_text(json.dumps(graph, allow_nan=False), encoding="utf-8")


def read(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any]]:
    """Nodes, edges and settings.

    Raises:
        FileFormatError: missing, not JSON, or not an attribution graph.
    """
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
        ours = graph["metadata"].get("info", {}).get(_OURS)
        return read_graph(graph) if ours is None else _own(graph, ours)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"expected an attribution graph as JSON at {path}; cannot read it ({error}).") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FileFormatError(
            f"expected an attribution graph at {path} (metadata, qParams, nodes, links); it is none, or damaged: "
            f"{error!r}."
        ) from error


def _dictionaries(circuit: Circuit) -> list[str]:
    """Names of the dictionaries whose features are nodes, where they are known."""
    bases = [circuit.basis] if isinstance(circuit.basis, Basis) else list(circuit.basis or ())
    return [one.name for basis in bases if isinstance(basis, Dictionaries) for one in basis.dictionaries]


def _ids(nodes: pd.DataFrame, n_layers: int) -> dict[str, str]:
    """An id of the format for each node, unique."""
    ids: dict[str, str] = {}
    taken: set[str] = set()
    for row in sorted(nodes.to_dict("records"), key=lambda row: row["kind"] != "error"):
        kind, position = row["kind"], max(row["position"], 0)
        if kind in ("neuron", "feature"):
            form, place = f"{row['layer']}_{{}}_{position}", row["unit"]
        elif kind == "embedding":
            form, place = f"E_{{}}_{position}", max(row["unit"], 0)
        elif kind == "logit":
            form, place = f"{n_layers + 1}_{{}}_{position}", max(row["unit"], 0)
        else:
            form, place = f"err_{{}}_{position}", row["layer"] if kind == "error" and row["layer"] >= 0 else n_layers
        while form.format(place) in taken:
            place += 1
        ids[row["node"]] = form.format(place)
        taken.add(ids[row["node"]])
    return ids


def _node(row: Mapping[Any, Any], node_id: str, cumulative: float, first: bool) -> dict[str, Any]:
    layer, unit, _ = node_id.split("_")
    kind = {"neuron": UNIT, "feature": UNIT, "embedding": "embedding", "logit": "logit"}.get(row["kind"], ERROR)
    logit, clerp = kind == "logit", row["label"]
    probability = _number(row["probability"])
    if logit:
        clerp = f'Output "{row["label"]}" (p={0.0 if probability is None else probability:.3f})'
    x, y = (int(layer) if layer.isdigit() else 0), int(unit)
    return {
        "node_id": node_id, "layer": _layer(row, layer), "ctx_idx": max(row["position"], 0),
        "feature": (x + y) * (x + y + 1) // 2 + y if kind == UNIT else y, "feature_type": kind,
        "jsNodeId": f"{layer}_{unit}-0", "clerp": clerp, "influence": cumulative,
        "activation": _number(row["activation"]), "token_prob": probability if logit and probability else 0.0,
        "is_target_logit": first,
    }  # fmt: skip


def _layer(row: Mapping[Any, Any], layer: str) -> str:
    return str(max(row["layer"], 0)) if layer == "err" else layer


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _cumulative(influence: pd.Series) -> list[float]:
    """0 to 1, smaller is more important: the mass of this node and all above it."""
    order = np.argsort(-influence.to_numpy(), kind="stable")
    total = max(float(influence.sum()), np.finfo(float).tiny)
    out = np.empty(len(influence))
    out[order] = np.minimum(np.cumsum(influence.to_numpy()[order]) / total, 1.0)
    return out.tolist()


def _first_logit(nodes: pd.DataFrame) -> str:
    return str(nodes.loc[nodes["kind"] == "logit", "node"].iloc[0])


def _slug(prompt: str) -> str:
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in prompt.lower()).split()
    return "-".join(words)[:60].strip("-") or "circuit"


def _tables(circuit: Circuit) -> dict[str, Any]:
    """What the format has no place for, in the order of its nodes and links."""
    plain = lambda column: [None if value != value else value for value in column.tolist()]  # noqa: E731  nan
    return {
        "settings": dict(circuit.settings),
        "nodes": {name: plain(circuit.nodes[name]) for name in NODE_COLUMNS},
        "edges": {name: plain(circuit.edges[name]) for name in ("relative", "attribution")},
    }


def _own(graph: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any]]:
    nodes = pd.DataFrame({name: pd.Series(ours["nodes"][name], dtype=object) for name in NODE_COLUMNS})
    nodes = typed(nodes, NODE_COLUMNS)
    names = dict(zip((node["node_id"] for node in graph["nodes"]), nodes["node"], strict=True))
    edges = pd.DataFrame(
        {
            "source": [names[link["source"]] for link in graph["links"]],
            "target": [names[link["target"]] for link in graph["links"]],
            "weight": [link["weight"] for link in graph["links"]],
            **{name: ours["edges"][name] for name in ("relative", "attribution")},
        }
    )
    return nodes, typed(edges, EDGE_COLUMNS), ours["settings"]
