"""Attribution graphs in Neuronpedia's JSON, as circuit-tracer writes them.

A neuron or feature is written as a unit `{layer}_{unit}_{position}`, a dictionary's error as `err_{layer}_{position}`.
Remainders and the linearization error are errors in the row of the embeddings, since they belong to no layer, and
biases are of Neuronpedia's type for them. Frontends hide units and errors whose `influence` (cumulative, small is
important) exceeds `node_threshold`, which is also as far as their slider goes: so influences are those from before
pruning, and the threshold is the largest of them. What the format has no place for (scores, attributions, settings)
stands in `metadata.info`, so our own files come back whole; other programs' graphs become as much of a circuit as they
say.

circuit-tracer names the error of layer l at position p `0_{l}_{p}`, as it does feature l of layer 0 there. Two nodes of
one id are told apart by their types. A link into that id leads to the feature (errors have no inputs). One from it is
the feature's if its target is not above layer l, else what the writer's order leaves: links into one target stand in
the order of the nodes, features before errors. Where both are possible each gets half of the weight, and a warning
counts such links.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
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
from ._flow import Links, complete, normalized
from ._table import (
    EDGE_COLUMNS,
    HEAD_COLUMNS,
    NODE_COLUMNS,
    SCHEMA,
    node_table,
    typed,
)

if TYPE_CHECKING:
    from ._circuit import Circuit

_URL = "https://pypi.org/project/tl-neuron-circuits/"
_OURS = "tl_neuron_circuits"
UNIT, ERROR, BIAS = "cross layer transcoder", "mlp reconstruction error", "bias"
_TYPE_OF_KIND = {"neuron": UNIT, "feature": UNIT, "embedding": "embedding", "logit": "logit", "bias": BIAS}
_KIND_OF_TYPE = {
    "embedding": "embedding", "logit": "logit", BIAS: "bias", ERROR: "error", "lorsa error": "error",
    "unknown": "error",
}  # fmt: skip
INFLUENCE_BEFORE_PRUNING = "influence_before_pruning"
"""In the settings of a pruned circuit: the cumulative influence that each of its nodes had in the whole one."""
_PINNED = "pinned"
"""In the settings of a graph that was read: nodes that stand on its page without being in a group."""
_LOGIT_CLERP = re.compile(r'Output "(.*)" \(p=[0-9.e-]+\)', re.DOTALL)


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
    n_layers = int(settings["n_layers"])
    ids = _ids(nodes, n_layers)
    influence = _influence(nodes, settings)
    graph = {
        "metadata": {
            "slug": slug or _slug(settings["prompt"]), "scan": scan or settings["model"],
            "transcoder_list": _dictionaries(circuit),
            "prompt_tokens": list(settings["tokens"]), "prompt": settings["prompt"],
            "node_threshold": math.ceil(100 * max(influence)) / 100,
            "schema_version": 1,
            "info": {
                "generator": {"name": _OURS, "version": versions()["tl-neuron-circuits"], "url": _URL},
                _OURS: _tables(circuit),
            },
        },
        "qParams": {
            "pinnedIds": [
                ids[node] for node, group in zip(nodes["node"], nodes["group"], strict=True)
                if group or node in settings.get(_PINNED, ())
            ],
            "supernodes": [
                [group, *(ids[node] for node in same["node"])]
                for group, same in nodes[nodes["group"] != ""].groupby("group", sort=False)
            ],
            "linkType": "both", "clickedId": "", "sg_pos": "",
        },
        "nodes": [
            _node(row, ids[row["node"]], cumulative, row["node"] == _first_logit(nodes), n_layers)
            for row, cumulative in zip(nodes.to_dict("records"), influence, strict=True)
        ],
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in circuit.edges[["source", "target", "weight"]].itertuples(index=False)
        ],
    }  # fmt: skip
    plain = json.loads(json.dumps(graph, allow_nan=False))  # as a reader will have it
    plain["metadata"]["info"][_OURS]["sha256"] = _checksum(plain)
    write_text(path, json.dumps(plain, allow_nan=False))


def read(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any], pd.DataFrame | None]:
    """Nodes, edges, settings, and the edges split by head where the file has them.

    Raises:
        FileFormatError: missing, not JSON, not an attribution graph, or changed since this package wrote it.
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
        return (*_read_foreign(form), None) if ours is None else _read_ours(graph, form, ours, path)
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
    influence: Annotated[float, msgspec.Meta(ge=0, le=1.001)] | None = None


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
    pinnedIds: list[str] = []


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
    heads: dict[str, list[str | int | float]] | None = None
    """Edges split by head, where the circuit has them."""
    sha256: str = ""


def _checksum(graph: Mapping[str, Any]) -> str:
    """Of everything that is read back from a file; texts that only a page shows may be edited."""
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
        elif kind == "bias":
            form, place = f"bias_{{}}_{position}", 0
        else:
            form, place = f"err_{{}}_{position}", row["layer"] if kind == "error" and row["layer"] >= 0 else n_layers
        while form.format(place) in taken:
            place += 1
        ids[row["node"]] = form.format(place)
        taken.add(ids[row["node"]])
    return ids


def _node(row: Mapping[Any, Any], node_id: str, influence: float, first: bool, n_layers: int) -> dict[str, Any]:
    start, number, position = node_id.split("_")
    kind, clerp = _TYPE_OF_KIND.get(row["kind"], ERROR), row["label"]
    probability, feature, layer = _number(row["probability"]), int(number), start
    if kind == "logit":
        clerp = f'Output "{row["label"]}" (p={0.0 if probability is None else probability:.3f})'
        start = "L"
    elif kind == UNIT:
        feature = _cantor(int(layer), feature)
    elif kind in (ERROR, BIAS):  # those of no layer stand in the frontends' row of embeddings
        layer = str(row["layer"]) if row["layer"] >= 0 else "E"
        if kind == BIAS or feature >= n_layers:
            feature = -1 - (feature if kind == BIAS else feature - n_layers)  # no vocabulary entry's number
    if row["label"] == row["node"] == node_id:  # a frontend has its own text where there is none
        clerp = ""
    return {
        "node_id": node_id, "layer": layer, "ctx_idx": int(position), "feature": feature, "feature_type": kind,
        "jsNodeId": f"{start}_{number}-{position}", "clerp": clerp, "influence": influence,
        "activation": _number(row["activation"]), "token_prob": probability if kind == "logit" and probability else 0.0,
        "is_target_logit": first,
    }  # fmt: skip


def _cantor(x: int, y: int) -> int:
    """One number for two, as frontends take it apart again."""
    return (x + y) * (x + y + 1) // 2 + y


def with_influence(whole: Circuit, nodes: pd.DataFrame) -> dict[str, Any]:
    """The settings of a circuit pruned to `nodes`: with the influence that these had before its first pruning."""
    before = whole.settings.get(INFLUENCE_BEFORE_PRUNING)
    if before is None and not np.isfinite(whole.nodes["influence"]).all():  # regressions have none
        return dict(whole.settings)
    if before is None:
        before = dict(zip(whole.nodes["node"], cumulative_influence(whole.nodes["influence"]), strict=True))
    kept = {node: before[node] for node in nodes["node"] if node in before}
    return {**whole.settings, INFLUENCE_BEFORE_PRUNING: kept}


def _influence(nodes: pd.DataFrame, settings: Mapping[str, Any]) -> list[float]:
    """Each node's cumulative influence before pruning; remainders that pruning made get the largest."""
    before = settings.get(INFLUENCE_BEFORE_PRUNING)
    if before is None:
        return cumulative_influence(nodes["influence"])
    largest = max(before.values(), default=1.0)
    return [before.get(node, largest) for node in nodes["node"]]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def cumulative_influence(influence: pd.Series) -> list[float]:
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
        "heads": None if circuit.head_parts is None else {c: plain(circuit.head_parts[c]) for c in HEAD_COLUMNS},
    }


def _read_ours(
    graph: Mapping[str, Any], form: _Graph, tables: Any, path: Path
) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any], pd.DataFrame | None]:
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
    _require_finite(edges)
    heads = None if ours.heads is None else typed(pd.DataFrame(ours.heads), HEAD_COLUMNS)
    return nodes, typed(edges, EDGE_COLUMNS), ours.settings, heads


def _read_foreign(graph: _Graph) -> tuple[pd.DataFrame, pd.DataFrame, Mapping[str, Any]]:
    """Nodes, edges and settings of a graph that is not ours.

    Weights are its own, and the influence that is written with its nodes again. Relative weights are over the sum of
    the sizes of all weights into the target, and a logit's score is its probability: other programs give neither shares
    of activations nor scores.

    Raises:
        FileFormatError: ids that are not unique, links to nodes that are not there, or no logit with a probability.
    """
    metadata, groups = graph.metadata, {}
    for name, *members in graph.qParams.supernodes:
        groups |= dict.fromkeys(members, name)
    tokens = metadata.prompt_tokens
    rows = [_foreign_row(node, tokens, groups) for node in graph.nodes]
    edges = pd.DataFrame(
        [(link.source, link.target, link.weight) for link in graph.links], columns=["source", "target", "weight"]
    )
    edges["weight"] = edges["weight"].astype(float)
    _require_finite(edges)
    ids = [row["node"] for row in rows]
    rows, edges = _told_apart(rows, edges)
    nodes = node_table(rows)
    before = {
        row["node"]: min(node.influence, 1.0)
        for row, node in zip(rows, graph.nodes, strict=True) if node.influence is not None
    }  # fmt: skip
    pinned = [
        row["node"] for row, node_id in zip(rows, ids, strict=True)
        if node_id in graph.qParams.pinnedIds and not row["group"] and row["kind"] != "error"
    ]  # fmt: skip
    edges["attribution"] = edges["weight"]
    edges["relative"] = np.sign(edges["weight"]) * normalized(nodes, Links.read(nodes, edges))
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
        **({INFLUENCE_BEFORE_PRUNING: before} if before else {}), **({_PINNED: pinned} if pinned else {}),
    }  # fmt: skip
    return *complete(nodes, edges, target_value), settings


def _require_finite(edges: pd.DataFrame) -> None:
    """Raise unless every weight is a finite number."""
    bad = ~np.isfinite(edges["weight"].to_numpy(dtype=float))
    if bad.any():
        first = edges[bad].iloc[0]
        raise FileFormatError(
            f"expected finite weights; {int(bad.sum())} of {len(edges)} are NaN or infinite, such as that of "
            f"{first['source']} -> {first['target']}. Export the graph again, in float32."
        )


def _told_apart(rows: Sequence[dict[str, Any]], edges: pd.DataFrame) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Nodes of unique names, and links between them: errors that share a feature's id get one of their own.

    Raises:
        FileFormatError: two nodes of one id that are not a feature and an error.
    """
    names = [row["node"] for row in rows]
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    shared = {name: at for name, at in places.items() if len(at) > 1}
    kinds = {name: sorted(rows[place]["kind"] for place in at) for name, at in shared.items()}
    wrong = [name for name in shared if kinds[name] != ["error", "feature"]]
    if wrong:
        raise FileFormatError(
            f"expected unique node ids; {len(wrong)} of {len(places)} stand for several nodes that are not one feature "
            f"and one error, such as {wrong[0]!r}. Export the graph again."
        )
    rows = [dict(row) for row in rows]
    of_kind = {name: {rows[place]["kind"]: place for place in at} for name, at in shared.items()}
    for row in rows:  # in other files of the same program this id may be a feature's
        if row["kind"] == "error" and row["node"] == f"0_{row['layer']}_{row['position']}":
            row["node"] = f"err_{row['layer']}_{row['position']}"
            if row["node"] in places:
                raise FileFormatError(f"expected one node for the error {row['node']!r}; got two. Export it again.")
            row["group"] = ""  # errors are never pinned
    for name in shared:
        if rows[of_kind[name]["error"]]["node"] == name:
            raise FileFormatError(
                f"expected unique node ids; {name!r} is a feature and an error. Export the graph again."
            )
    first = {name: of_kind[name]["feature"] if name in of_kind else at[0] for name, at in places.items()}
    lost = {*edges["source"], *edges["target"]} - first.keys()
    if lost:
        raise FileFormatError(
            f"links lead to nodes that are not there, such as {sorted(lost)[:3]}. Export the graph again."
        )
    receivers = [first[target] for target in edges["target"]]
    candidates = _candidates([places[source] for source in edges["source"]], receivers, rows)
    several = [len(possible) > 1 for possible in candidates]
    if any(several):
        warnings.warn(
            f"{sum(several)} of {len(edges)} links come from an id that a feature and an error share, and nothing in "
            "the file says from which of them: each gets half of the weight.",
            stacklevel=5,
        )
    links = [
        (rows[place]["node"], rows[target]["node"], weight / len(possible))
        for possible, target, weight in zip(candidates, receivers, edges["weight"], strict=True)
        for place in possible
    ]
    edges = pd.DataFrame(links, columns=["source", "target", "weight"])
    return rows, edges.groupby(["source", "target"], sort=False, as_index=False).sum()


def _candidates(
    sources: Sequence[Sequence[int]], receivers: Sequence[int], rows: Sequence[Mapping[str, Any]]
) -> list[list[int]]:
    """For each link the rows that it may come from, by the layers and by the writer's order where the file keeps it."""
    possible: list[list[int]] = []
    for options, receiver in zip(sources, receivers, strict=True):
        too_late = {
            place for place in options if len(options) > 1 and rows[place]["kind"] == "error"
            and rows[receiver]["kind"] == "feature" and rows[receiver]["layer"] <= rows[place]["layer"]
        }  # fmt: skip
        possible.append(sorted(set(options) - too_late))
    n, beyond = len(possible), len(rows)
    joined = [receivers[k] == receivers[k - 1] for k in range(1, n)] + [False]  # links 0 and 1 are joined by joined[0]
    lowest, highest = [-1] * n, [beyond] * n  # the rows that the links before must have reached, and those after leave
    for k in range(1, n):
        if joined[k - 1]:
            lowest[k] = min((place for place in possible[k - 1] if place > lowest[k - 1]), default=beyond)
    for k in range(n - 2, -1, -1):
        if joined[k]:
            highest[k] = max((place for place in possible[k + 1] if place < highest[k + 1]), default=-1)
    in_order = [
        [place for place in options if low < place < high]
        for options, low, high in zip(possible, lowest, highest, strict=True)
    ]
    return in_order if all(in_order) else possible  # another writer's order says nothing


def _foreign_row(node: _Node, tokens: list[str], groups: Mapping[str, str]) -> dict[str, Any]:
    kind = _KIND_OF_TYPE.get(node.feature_type, "feature")
    layer, position = str(node.layer), node.ctx_idx
    parts = node.node_id.split("_")
    activation, output = node.activation, _LOGIT_CLERP.fullmatch(node.clerp or "")
    label = output[1] if kind == "logit" and output is not None else node.clerp
    return {
        "node": node.node_id, "label": label or (node.node_id if kind == "logit" else ""), "kind": kind,
        "layer": int(layer) if layer.isdigit() else -1,
        "unit": int(parts[1]) if kind != "error" and len(parts) == 3 and parts[1].isdigit() else -1,
        "position": position, "token": tokens[position] if 0 <= position < len(tokens) else "",
        "activation": activation, "sign": 0 if not activation else int(np.sign(activation)),
        "score": node.token_prob if kind == "logit" else None,
        "probability": node.token_prob if kind == "logit" else None, "group": groups.get(node.node_id, ""),
    }  # fmt: skip
