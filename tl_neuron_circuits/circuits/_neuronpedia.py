"""Attribution graphs in Neuronpedia's JSON, as circuit-tracer writes them.

A neuron or feature is written as a unit `{layer}_{unit}_{position}`, a dictionary's error as `err_{layer}_{position}`,
and remainders, biases and the linearization error as errors of layers that the model does not have. What that format
has no place for (scores, attributions, settings) stands in `metadata.info`, so our own files come back whole; other
programs' graphs become as much of a circuit as they say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import pandas as pd

from .._errors import FileFormatError, SettingsError
from .._files import formed, parse_json, read_text, short, versions, write_text
from ..bases._dictionary_basis import Dictionaries
from ..bases._site import Basis
from ._circuit_file import CircuitSettings, Count
from ._table import EDGE_COLUMNS, NODE_COLUMNS, SCHEMA, complete, edge_table, node_table, normalized, typed

if TYPE_CHECKING:
    from ._circuit import Circuit

_URL = "https://pypi.org/project/tl-neuron-circuits/"
_OURS = "tl_neuron_circuits"
UNIT, ERROR = "cross layer transcoder", "mlp reconstruction error"
_KIND_OF_TYPE = {"embedding": "embedding", "logit": "logit", ERROR: "error"}


def write(circuit: Circuit, path: Path, slug: str | None, scan: str | None) -> None:
    """Write the graph.

    Raises:
        SettingsError: supernodes or summed positions, which the format cannot say.
    """
    nodes, settings = circuit.nodes, circuit.settings
    if (nodes["kind"] == "group").any() or settings.get("positions") == "sum" or not settings["tokens"]:
        raise SettingsError(
            "expected a circuit with positions and without supernodes: the format has one unit and one position per "
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
    plain = json.loads(json.dumps(graph, allow_nan=False))  # as a reader will have it
    plain["metadata"]["info"][_OURS]["sha256"] = _checksum(plain)
    write_text(path, json.dumps(plain, allow_nan=False))


def read(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any]]:
    """Nodes, edges and settings.

    Raises:
        FileFormatError: missing, not JSON, not an attribution graph, or one of ours that was changed since.
    """
    try:
        graph = parse_json(read_text(path), surrogates=True)
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"expected an attribution graph as JSON at {path}; cannot read it ({short(error)})."
        ) from error
    try:
        form = msgspec.convert(graph, _Graph)
        ours = (form.metadata.info or {}).get(_OURS)
        return _read_foreign(form) if ours is None else _read_ours(graph, form, ours, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise FileFormatError(
            f"expected an attribution graph at {path} (metadata, qParams, nodes, links); it is not one, or damaged: "
            f"{short(error)}."
        ) from error


_Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]


class _Node(msgspec.Struct):
    """What is read of a node; the format has more."""

    node_id: str
    feature_type: str
    layer: str | int
    ctx_idx: Count
    clerp: str | None = None
    activation: _Finite | None = None
    token_prob: _Finite | None = None


class _Link(msgspec.Struct):
    source: str
    target: str
    weight: _Finite


class _Metadata(msgspec.Struct):
    slug: str
    scan: str
    prompt: str
    prompt_tokens: list[str]
    info: dict[str, Any] | None = None


class _Parameters(msgspec.Struct):
    supernodes: list[Annotated[list[str], msgspec.Meta(min_length=1)]] = []


class _Graph(msgspec.Struct):
    metadata: _Metadata
    qParams: _Parameters
    nodes: list[_Node]
    links: list[_Link]


class _Tables(msgspec.Struct, forbid_unknown_fields=True):
    """What the format has no place for; older schemas have no checksum."""

    schema: int
    settings: dict[str, Any]
    nodes: dict[str, list[str | int | float | None]]
    edges: dict[str, list[float | None]]
    sha256: str = ""


def _checksum(graph: Mapping[str, Any]) -> str:
    """Of all that is read of a file of ours; texts that only a page shows may be edited."""
    tables = {name: value for name, value in graph["metadata"]["info"][_OURS].items() if name != "sha256"}
    links = [[link["source"], link["target"], link["weight"]] for link in graph["links"]]
    content = json.dumps([tables, [node["node_id"] for node in graph["nodes"]], links], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


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
        "schema": SCHEMA,
        "settings": dict(circuit.settings),
        "nodes": {name: plain(circuit.nodes[name]) for name in NODE_COLUMNS},
        "edges": {name: plain(circuit.edges[name]) for name in ("relative", "attribution")},
    }


def _read_ours(
    graph: Mapping[str, Any], form: _Graph, tables: Any, path: Path
) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any]]:
    ours = msgspec.convert(tables, _Tables)
    if ours.schema != SCHEMA:
        raise FileFormatError(
            f"expected schema {SCHEMA} of this package's tables in {path}; got {ours.schema}. Export the "
            "circuit again with this version."
        )
    if ours.sha256 != _checksum(graph):
        raise FileFormatError(
            f"{path} was changed or damaged since it was exported. Export the circuit again, or remove "
            f"metadata.info.{_OURS} to read what the graph itself says."
        )
    formed(ours.settings, CircuitSettings, path)
    nodes = pd.DataFrame({name: pd.Series(ours.nodes[name], dtype=object) for name in NODE_COLUMNS})
    nodes = typed(nodes, NODE_COLUMNS)
    names = dict(zip((node.node_id for node in form.nodes), nodes["node"], strict=True))
    edges = pd.DataFrame(
        {
            "source": [names[link.source] for link in form.links],
            "target": [names[link.target] for link in form.links],
            "weight": [link.weight for link in form.links],
            **{name: ours.edges[name] for name in ("relative", "attribution")},
        }
    )
    return nodes, typed(edges, EDGE_COLUMNS), ours.settings


def _read_foreign(graph: _Graph) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any]]:
    """Nodes, edges and settings of a graph that is not ours.

    Weights are its own. Relative weights are weights over the sum of the sizes of all weights into the target, and a
    logit's score is its probability: other programs give neither shares of activations nor scores.

    Raises:
        FileFormatError: ids that are not unique, links to nodes that are not there, or no logit with a probability.
    """
    metadata, groups = graph.metadata, {}
    for name, *members in graph.qParams.supernodes:
        groups |= dict.fromkeys(members, name)
    tokens = metadata.prompt_tokens
    rows = [_foreign_row(node, tokens, groups) for node in graph.nodes]
    names = {row["node"] for row in rows}
    if len(names) < len(rows):
        raise FileFormatError(
            f"expected unique node ids; {len(rows) - len(names)} of {len(rows)} appear twice. Export the graph again."
        )
    edges = pd.DataFrame(
        [(link.source, link.target, link.weight) for link in graph.links], columns=["source", "target", "weight"]
    )
    edges["weight"] = edges["weight"].astype(float)
    lost = set(edges["source"]) | set(edges["target"])
    if lost - names:
        raise FileFormatError(
            f"links lead to nodes that are not there, such as {sorted(lost - names)[:3]}. Export the graph again."
        )
    nodes = node_table(rows)
    edges["attribution"] = edges["weight"]
    edges["relative"] = np.sign(edges["weight"]) * normalized(nodes, edges)
    target_value = float(nodes.loc[nodes["kind"] == "logit", "score"].sum())
    if target_value == 0:
        raise FileFormatError("expected a logit whose token_prob is not 0: it is what the graph explains.")
    layers = [row["layer"] for row in rows if row["kind"] == "feature"]
    settings = {
        "model": metadata.scan, "prompt": metadata.prompt, "tokens": tokens, "token_ids": None, "n_prompts": 1,
        "n_layers": max(layers, default=0) + 1, "baseline": "zero", "pairs_hash": metadata.slug,
        "target": [row["label"] for row in rows if row["kind"] == "logit"], "target_value": target_value,
        "position": len(tokens) - 1, "rules": [], "versions": {},
        "generator": (metadata.info or {}).get("generator"),
    }  # fmt: skip
    return complete(nodes, edges, target_value), edge_table(edges), settings


def _foreign_row(node: _Node, tokens: list[str], groups: Mapping[str, str]) -> dict[str, Any]:
    kind = _KIND_OF_TYPE.get(node.feature_type, "feature")
    layer, position = str(node.layer), node.ctx_idx
    parts = node.node_id.split("_")
    activation = node.activation
    return {
        "node": node.node_id, "label": node.clerp or node.node_id, "kind": kind,
        "layer": int(layer) if layer.isdigit() else -1,
        "unit": int(parts[1]) if kind != "error" and len(parts) == 3 and parts[1].isdigit() else -1,
        "position": position, "token": tokens[position] if 0 <= position < len(tokens) else "",
        "activation": activation, "sign": 0 if not activation else int(np.sign(activation)),
        "score": node.token_prob if kind == "logit" else None,
        "probability": node.token_prob if kind == "logit" else None, "group": groups.get(node.node_id, ""),
    }  # fmt: skip
