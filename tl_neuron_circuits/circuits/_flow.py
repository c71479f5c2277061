"""What follows from a circuit's tables: flow, influence, and what is left when nodes and edges go.

A source's edges say what share of a target's activation comes from it, so a target's relevance can be handed down:

    flow(s) = sum_t relative(s -> t) * flow(t),   flow(logit) = its score

Whatever ends at embeddings, biases, remainders and the linearization error is then the whole of the logits again, after
any pruning: an edge that is cut goes to the remainder at its source's position. What ends at remainders is what the
circuit leaves unexplained.

The tables have names, and a million names take longer to look up than everything that is computed from them. So a call
looks them up once (`Links.read`), works on rows of the nodes, and writes names again at the end (`to_tables`).
"""

from collections.abc import Collection
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from ._table import CHOSEN, EDGE_COLUMNS, FIXED_SOURCES, node_table, typed, unselected_name, unselected_row


@dataclass(frozen=True)
class Links:
    """Edges as arrays: the rows of the nodes that they lead from and to, and their numbers."""

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    relative: np.ndarray
    attribution: np.ndarray

    @classmethod
    def read(cls, nodes: pd.DataFrame, edges: pd.DataFrame) -> "Links":
        """Of a table of edges; relative weights follow from attributions where it has none.

        Into a node of score zero all attributions are zero, so there the edges' shares of its change are taken, which
        on a single prompt is the same number, or of the sum of their sizes where that is zero too.
        """
        source, target = (rows_of(nodes, edges[end]) for end in ("source", "target"))
        weight, attribution = (edges[name].to_numpy(dtype=float) for name in ("weight", "attribution"))
        if "relative" in edges:
            return cls(source, target, weight, edges["relative"].to_numpy(dtype=float), attribution)
        score = nodes["score"].to_numpy()[target]
        relative = np.divide(attribution, score, out=np.zeros_like(attribution), where=score != 0)
        dead = score == 0
        if dead.any():
            size = np.bincount(target[dead], np.abs(weight[dead]), len(nodes))
            change = np.nan_to_num(nodes["change"].to_numpy())
            part = np.where(change[target] != 0, weight, np.abs(weight))
            whole = np.where(change != 0, change, size)[target]
            np.divide(part, whole, out=relative, where=dead & (whole != 0))
        return cls(source, target, weight, relative, attribution)

    def __len__(self) -> int:
        return len(self.source)

    def only(self, which: np.ndarray) -> "Links":
        """Those of a mask, or those at these places."""
        return Links(*(getattr(self, field.name)[which] for field in fields(self)))


def rows_of(nodes: pd.DataFrame, names: pd.Series) -> np.ndarray:
    """The row of each named node. Plain strings: pandas would convert its own kind at every lookup."""
    rows = pd.Index(nodes["node"], dtype=object).get_indexer(pd.Index(names, dtype=object))
    if (rows < 0).any():
        raise KeyError(sorted(set(names[rows < 0])))
    return rows


def of_kinds(nodes: pd.DataFrame, kinds: Collection[str]) -> np.ndarray:
    """Which nodes are of these kinds."""
    return nodes["kind"].isin(list(kinds)).to_numpy()


def hand_down(nodes: pd.DataFrame, links: Links, start: np.ndarray, column: np.ndarray) -> np.ndarray:
    """x = start + sum over out-edges of column * x(target): exact, by as many steps as the graph is deep."""
    x = start.copy()
    for _ in range(2 * int(nodes["layer"].nunique()) + 2):
        before, x = x, start + np.bincount(links.source, column * x[links.target], len(nodes))
        if np.array_equal(before, x):
            return x
    matrix = np.eye(len(nodes))  # supernodes over several layers may form cycles
    np.subtract.at(matrix, (links.source, links.target), column)
    return np.linalg.solve(matrix, start)


def logit_weights(nodes: pd.DataFrame) -> np.ndarray:
    """circuit-tracer's weights: the logits' probabilities; their shares of the score where they have none."""
    logit = (nodes["kind"] == "logit").to_numpy()
    probability = nodes["probability"].to_numpy()
    if not np.isfinite(probability[logit]).all():
        size = np.where(logit, nodes["score"].abs().fillna(0.0), 0.0)
        return size / max(size.sum(), np.finfo(float).tiny)
    return np.where(logit, probability, 0.0)


def normalized(nodes: pd.DataFrame, links: Links) -> np.ndarray:
    """|attribution| over the sum of the target's incoming ones; zero for biases, which circuit-tracer leaves out.

    On a single prompt that is circuit-tracer's |weight| over their sum; with pairs in both directions weights cancel.
    Into a node of score zero all attributions are zero, and weights are not: there they are taken.
    """
    size = np.abs(links.attribution)
    bias = of_kinds(nodes, ("bias",))[links.source]
    size[bias] = 0.0
    total = np.bincount(links.target, size, len(nodes))
    dead = (total == 0)[links.target]
    if dead.any():
        size[dead] = np.where(bias, 0.0, np.abs(links.weight))[dead]
        total = np.where(total == 0, np.bincount(links.target[dead], size[dead], len(nodes)), total)
    return size / total.clip(min=np.finfo(float).tiny)[links.target]


def influence(nodes: pd.DataFrame, links: Links, sizes: np.ndarray | None = None) -> np.ndarray:
    """w (N + N^2 + ...) with N the normalized edges and w the logits' weights. Source: circuit-tracer; METHODS 4.5.

    Args:
        nodes: one row each.
        links: between them.
        sizes: of the links, `normalized(nodes, links)`, where it is known.
    """
    weights = logit_weights(nodes)
    return hand_down(nodes, links, weights, normalized(nodes, links) if sizes is None else sizes) - weights


def zeroed_at(nodes: pd.DataFrame, links: Links, positions: Collection[int]) -> np.ndarray:
    """The links that come from nodes, errors or remainders at these positions: circuit-tracer's zeros at BOS."""
    zeroed = nodes["position"].isin(list(positions)).to_numpy() & ~of_kinds(nodes, ("embedding", "logit", "bias"))
    return zeroed[links.source]


def cut(
    nodes: pd.DataFrame, links: Links, kept_nodes: np.ndarray, kept_links: np.ndarray
) -> tuple[pd.DataFrame, Links, np.ndarray]:
    """Only the kept nodes and links; what flowed along the others comes from remainders instead.

    Links of biases, remainders and the linearization error always stay; so do embeddings and logits as nodes, but not
    errors.

    Returns:
        The nodes, the links between them, and which of the old ones each is: -1 if it comes from a new remainder.
    """
    stays = kept_nodes | ~of_kinds(nodes, (*CHOSEN, "error"))
    fixed = of_kinds(nodes, FIXED_SOURCES)[links.source]
    into, along = stays[links.target], (kept_links & stays[links.source]) | fixed
    live, lost = np.flatnonzero(into & along), np.flatnonzero(into & ~along)
    places = nodes["position"].to_numpy()[links.source[lost]]
    left = nodes[stays]
    wanted = pd.unique(places).tolist()
    there = set(left["node"])
    new = [unselected_row(place) for place in wanted if unselected_name(place) not in there]
    left = pd.concat([left, node_table(new)], ignore_index=True) if new else left.reset_index(drop=True)
    remainders = rows_of(left, pd.Series([unselected_name(place) for place in wanted], dtype=object))
    row = np.cumsum(stays) - 1
    source = np.concatenate([row[links.source[live]], remainders[pd.Index(wanted).get_indexer(pd.Index(places))]])
    target = row[links.target[np.concatenate([live, lost])]]
    frame = pd.DataFrame(vars(links.only(np.concatenate([live, lost]))))
    key = source * len(left) + target
    numbers = frame[["weight", "relative", "attribution"]].groupby(key, sort=False).sum()
    source, target = np.divmod(numbers.index.to_numpy(), len(left))
    origin = np.concatenate([live, np.full(len(lost), -1)])[~pd.Series(key).duplicated().to_numpy()]
    return left, Links(source, target, *(numbers[name].to_numpy() for name in numbers)), origin


def to_tables(nodes: pd.DataFrame, links: Links, target_value: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The nodes with flow, influence, shares and the remainders' scores; the edges, largest |attribution| first."""
    nodes = nodes.copy()
    start = np.where(of_kinds(nodes, ("logit",)), nodes["score"].fillna(0.0), 0.0)
    nodes["flow"] = hand_down(nodes, links, start, links.relative)
    nodes["influence"] = influence(nodes, links)
    left = of_kinds(nodes, ("unselected", "linearization_error"))
    nodes.loc[left, "score"] = nodes.loc[left, "flow"]
    nodes["share"] = nodes["score"] / target_value
    names = nodes["node"].to_numpy(dtype=object)
    ordered = links.only(np.argsort(-np.abs(links.attribution), kind="stable"))
    ends = {end: pd.Series(names[getattr(ordered, end)], dtype=object) for end in ("source", "target")}
    return nodes, typed(pd.DataFrame({**vars(ordered), **ends}), EDGE_COLUMNS)


def complete(nodes: pd.DataFrame, edges: pd.DataFrame, target_value: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables with everything that follows from scores and attributions."""
    return to_tables(nodes, Links.read(nodes, edges), target_value)


def restrict(
    nodes: pd.DataFrame, edges: pd.DataFrame, kept_nodes: np.ndarray, target_value: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Only the kept nodes, and the edges between what is left; see `cut`."""
    links = Links.read(nodes, edges)
    nodes, links, _ = cut(nodes, links, kept_nodes, np.ones(len(links), dtype=bool))
    return to_tables(nodes, links, target_value)
