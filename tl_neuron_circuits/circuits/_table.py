"""The two tables of a circuit: their columns, and what follows from them (flow, influence, remainders).

A source's edges say what share of a target's activation comes from it, so a target's relevance can be handed down:

    flow(s) = sum_t relative(s -> t) * flow(t),   flow(logit) = its score

Whatever ends at embeddings, biases, remainders and the linearization error is then the whole of the logits again, after
any pruning: an edge that is cut goes to the remainder at its source's position. What ends at remainders is what the
circuit leaves unexplained.
"""

from collections.abc import Collection

import numpy as np
import pandas as pd

SCHEMA = 3
"""Of these tables in files. 3: one file, with a checksum.
2: kinds `unselected` and `linearization_error`; `nodes` in the settings is a label."""
NODE_COLUMNS = {
    "node": "str", "label": "str", "kind": "str", "layer": "int64", "unit": "int64", "position": "int64",
    "token": "str", "activation": "float64", "change": "float64", "sign": "int64", "gate_sign": "int64",
    "up_sign": "int64", "score": "float64", "share": "float64", "flow": "float64", "influence": "float64",
    "probability": "float64", "group": "str",
}  # fmt: skip
EDGE_COLUMNS = {
    "source": "str",
    "target": "str",
    "weight": "float64",
    "relative": "float64",
    "attribution": "float64",
}
HEAD_COLUMNS = {
    "source": "str",
    "target": "str",
    "kind": "str",
    "layer": "int64",
    "head": "int64",
    "from_position": "int64",
    "part": "float64",
    "attribution": "float64",
    "share": "float64",
}
HEAD_KINDS = ("head", "direct", "rest")
"""What a part is of: a head, the residual stream alone, or parts too small for a row of their own."""
SINGLE = ("neuron", "feature", "component")
"""Kinds of single nodes that were chosen, supernodes aside."""
CHOSEN = (*SINGLE, "head", "skip", "group")
"""Kinds of nodes that pruning may drop; their scores stand beside each other."""
KIND_OF_LETTER = {"N": "neuron", "F": "feature"}
ENDS = ("embedding", "bias", "unselected", "linearization_error", "error")
"""Kinds without incoming edges: where flow ends."""
LEFT_OUT = ("unselected", "linearization_error", "error")
"""Ends that explain nothing: nodes that were not chosen, what the linearization misses, what dictionaries miss."""
FIXED_SOURCES = ("bias", "unselected", "linearization_error")


def node_table(rows: Collection[dict]) -> pd.DataFrame:
    """A table of nodes with every column; missing entries are neutral (-1 for places, 0 for signs, nan for numbers)."""
    neutral = {"str": "", "int64": -1, "float64": np.nan}
    signs = {"sign": 0, "gate_sign": 0, "up_sign": 0}
    frame = pd.DataFrame(list(rows), columns=list(NODE_COLUMNS))
    for column, kind in NODE_COLUMNS.items():
        filled = frame[column].where(frame[column].notna(), signs.get(column, neutral[kind]))
        frame[column] = filled.astype(object if kind == "str" else kind)
    frame["label"] = frame["label"].where(frame["label"] != "", frame["node"])
    return frame


def typed(frame: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """The table with exactly these columns, texts as objects."""
    return frame[list(columns)].astype({c: object if kind == "str" else kind for c, kind in columns.items()})


def edge_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A table of edges, largest |attribution| first."""
    frame = typed(rows, EDGE_COLUMNS)
    return frame.iloc[np.argsort(-frame["attribution"].abs().to_numpy(), kind="stable")].reset_index(drop=True)


def unselected_name(position: int) -> str:
    """The node that stands for whatever was left out at a position."""
    return "unselected" if position < 0 else f"unselected@{position}"


def rows_of(nodes: pd.DataFrame, names: pd.Series) -> np.ndarray:
    """The row of each named node. Plain strings: pandas would convert its own kind at every lookup."""
    rows = pd.Index(nodes["node"], dtype=object).get_indexer(pd.Index(names, dtype=object))
    if (rows < 0).any():
        raise KeyError(sorted(set(names[rows < 0])))
    return rows


def relative_weights(nodes: pd.DataFrame, edges: pd.DataFrame) -> np.ndarray:
    """Each edge's share of its target's score; on a single prompt that is its share of the activation too."""
    score = nodes["score"].to_numpy()[rows_of(nodes, edges["target"])]
    attribution = edges["attribution"].to_numpy()
    return np.divide(attribution, score, out=np.zeros_like(attribution), where=score != 0)


def hand_down(nodes: pd.DataFrame, edges: pd.DataFrame, start: np.ndarray, column: np.ndarray) -> np.ndarray:
    """x = start + sum over out-edges of column * x(target): exact, by as many steps as the graph is deep."""
    source, target = (rows_of(nodes, edges[end]) for end in ("source", "target"))
    x = start.copy()
    for _ in range(2 * int(nodes["layer"].nunique()) + 2):
        before, x = x, start + np.bincount(source, column * x[target], len(nodes))
        if np.array_equal(before, x):
            return x
    matrix = np.eye(len(nodes))  # supernodes over several layers may form cycles
    np.subtract.at(matrix, (source, target), column)
    return np.linalg.solve(matrix, start)


def complete(nodes: pd.DataFrame, edges: pd.DataFrame, target_value: float) -> pd.DataFrame:
    """The nodes with flow, influence, shares and the remainders' scores computed from the edges."""
    nodes = nodes.copy()
    logit = (nodes["kind"] == "logit").to_numpy()
    start = np.where(logit, nodes["score"].fillna(0.0), 0.0)
    nodes["flow"] = hand_down(nodes, edges, start, edges["relative"].to_numpy())
    nodes["influence"] = influence(nodes, edges)
    left = nodes["kind"].isin(["unselected", "linearization_error"])
    nodes.loc[left, "score"] = nodes.loc[left, "flow"]
    nodes["share"] = nodes["score"] / target_value
    return nodes


def logit_weights(nodes: pd.DataFrame) -> np.ndarray:
    """circuit-tracer's weights: the logits' probabilities; their shares of the score where they have none."""
    logit = (nodes["kind"] == "logit").to_numpy()
    probability = nodes["probability"].to_numpy()
    if not np.isfinite(probability[logit]).all():
        size = np.where(logit, nodes["score"].abs().fillna(0.0), 0.0)
        return size / max(size.sum(), np.finfo(float).tiny)
    return np.where(logit, probability, 0.0)


def normalized(nodes: pd.DataFrame, edges: pd.DataFrame) -> np.ndarray:
    """|attribution| over the sum of the target's incoming ones; zero for biases, which circuit-tracer leaves out.

    On a single prompt that is circuit-tracer's |weight| over their sum; with pairs in both directions weights cancel.
    Into a node of score zero all attributions are zero, and weights are not: there they are taken.
    """
    source, target = (rows_of(nodes, edges[end]) for end in ("source", "target"))
    bias = (nodes["kind"] == "bias").to_numpy()[source]
    sizes = (np.where(bias, 0.0, edges[name].abs().to_numpy()) for name in ("attribution", "weight"))
    by_attribution, by_weight = ((size, np.bincount(target, size, len(nodes))[target]) for size in sizes)
    dead = by_attribution[1] == 0
    size, total = (np.where(dead, w, a) for a, w in zip(by_attribution, by_weight, strict=True))
    return size / total.clip(min=np.finfo(float).tiny)


def without_positions(nodes: pd.DataFrame, edges: pd.DataFrame, positions: Collection[int]) -> pd.DataFrame:
    """The edges that do not come from nodes, errors or remainders at these positions: circuit-tracer's zeros at BOS."""
    if not positions:
        return edges
    zeroed = nodes["position"].isin(list(positions)) & ~nodes["kind"].isin(("embedding", "logit", "bias"))
    return edges[~zeroed.to_numpy()[rows_of(nodes, edges["source"])]]


def influence(nodes: pd.DataFrame, edges: pd.DataFrame) -> np.ndarray:
    """w (N + N^2 + ...) with N the normalized edges and w the logits' weights. Source: circuit-tracer; METHODS 4.5."""
    weights = logit_weights(nodes)
    return hand_down(nodes, edges, weights, normalized(nodes, edges)) - weights


def restrict(
    nodes: pd.DataFrame, edges: pd.DataFrame, kept_nodes: np.ndarray, kept_edges: np.ndarray, target_value: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Only the kept nodes and edges; what flowed along the others comes from remainders instead.

    Edges of biases, remainders and the linearization error always stay; so do embeddings and logits as nodes, but not
    errors.
    """
    stays = kept_nodes | ~nodes["kind"].isin((*CHOSEN, "error")).to_numpy()
    source, into = rows_of(nodes, edges["source"]), stays[rows_of(nodes, edges["target"])]
    fixed = nodes["kind"].isin(FIXED_SOURCES).to_numpy()[source]
    along = (kept_edges & stays[source]) | fixed
    place = nodes["position"].astype(object).to_numpy()[source]  # plain integers
    live, lost = edges[into & along], edges[into & ~along]
    lost = lost.assign(source=[unselected_name(position) for position in place[into & ~along]])
    edges = pd.concat([live, lost]).groupby(["source", "target"], sort=False, as_index=False).sum()
    nodes = nodes[stays]
    missing = {name: int(position) for name, position in zip(lost["source"], place[into & ~along], strict=True)}
    new = [unselected_row(position) for name, position in missing.items() if name not in set(nodes["node"])]
    nodes = pd.concat([nodes, node_table(new)], ignore_index=True) if new else nodes.reset_index(drop=True)
    return complete(nodes, edges, target_value), edge_table(edges)


def unselected_row(position: int, token: str = "") -> dict:
    """A remainder, as a row of the nodes."""
    where = "everywhere" if position < 0 else f"at {position}"
    return {
        "node": unselected_name(position), "label": f"left out {where}", "kind": "unselected", "position": position,
        "token": token,
    }  # fmt: skip
