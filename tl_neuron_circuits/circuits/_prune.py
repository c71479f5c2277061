"""Pruning: fewer nodes and edges, with nothing lost from the sums. METHODS 1.5 (edges), 4.5 (circuit-tracer)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .._errors import SettingsError
from ._table import CHOSEN, FIXED_SOURCES, LEFT_OUT, logit_weights, normalized, restrict


@dataclass(frozen=True)
class Rule:
    """Criteria of `Circuit.prune`; None is no criterion."""

    share: float | None
    count: int | None
    edges: int | None
    relative: float | None
    node_influence: float | None
    edge_influence: float | None


def prune(
    nodes: pd.DataFrame, edges: pd.DataFrame, target_value: float, rule: Rule
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The nodes and edges that meet every criterion, and lie on some path from an embedding to a logit.

    Raises:
        SettingsError: no criterion, or one out of its range.
    """
    _check(rule)
    kept = _nodes_to_keep(nodes, rule)
    nodes, edges = restrict(nodes, edges, kept, np.ones(len(edges), dtype=bool), target_value)
    kept_edges = _edges_to_keep(nodes, edges, rule)
    alive = _on_a_path(nodes, edges, kept_edges)
    return restrict(nodes, edges, alive, kept_edges, target_value)


def _check(rule: Rule) -> None:
    given = {name: value for name, value in vars(rule).items() if value is not None}
    if not given:
        raise SettingsError("expected a criterion, such as share=0.01, edges=500 or node_influence=0.8; got none.")
    for name in ("node_influence", "edge_influence"):
        if name in given and not 0 < given[name] <= 1:
            raise SettingsError(f"expected {name} above 0 and up to 1; got {given[name]}.")
    for name in set(given) - {"node_influence", "edge_influence"}:
        if given[name] < 0:
            raise SettingsError(f"expected {name} of at least 0; got {given[name]}.")


def _nodes_to_keep(nodes: pd.DataFrame, rule: Rule) -> np.ndarray:
    """Chosen nodes that meet the criteria, and errors that meet those of share and influence."""
    chosen, errors = (nodes["kind"].isin(kinds).to_numpy() for kinds in (CHOSEN, ("error",)))
    kept = chosen | errors
    size = np.where(chosen, nodes["score"].abs().to_numpy(), -np.inf)
    if rule.share is not None:
        kept &= nodes["share"].abs().fillna(0.0).to_numpy() >= rule.share
    if rule.count is not None:
        kept &= errors | _top(size, rule.count)
    if rule.node_influence is not None:
        kept &= cumulative(nodes["influence"].to_numpy(), rule.node_influence)
    return kept


def _edges_to_keep(nodes: pd.DataFrame, edges: pd.DataFrame, rule: Rule) -> np.ndarray:
    kind = nodes.set_index("node")["kind"]
    counted = ~kind[edges["source"]].isin(FIXED_SOURCES).to_numpy()
    kept = np.ones(len(edges), dtype=bool)
    if rule.edges is not None:
        kept &= _top(np.where(counted, edges["attribution"].abs(), -np.inf), rule.edges)
    if rule.relative is not None:
        kept &= edges["relative"].abs().to_numpy() >= rule.relative
    if rule.edge_influence is not None:
        table = nodes.assign(reach=nodes["influence"] + logit_weights(nodes)).set_index("node")
        score = normalized(nodes, edges) * table.loc[edges["target"], "reach"].to_numpy()
        kept &= cumulative(score, rule.edge_influence)
    return kept & counted


def _top(size: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(size), dtype=bool)
    mask[np.argsort(-size, kind="stable")[:count]] = True
    return mask


def cumulative(size: np.ndarray, mass: float) -> np.ndarray:
    """The fewest entries that make up `mass` of the sum."""
    order = np.argsort(-size, kind="stable")
    reached = np.cumsum(size[order]) >= mass * size.sum() * (1 - 1e-12)
    mask = np.zeros(len(size), dtype=bool)
    mask[order[: int(np.argmax(reached)) + 1]] = True
    return mask


def _on_a_path(nodes: pd.DataFrame, edges: pd.DataFrame, kept: np.ndarray) -> np.ndarray:
    """Drop nodes without a kept incoming or outgoing edge, again and again; errors have no incoming ones."""
    index = pd.Series(np.arange(len(nodes)), index=nodes["node"])
    source, target = index[edges["source"]].to_numpy(), index[edges["target"]].to_numpy()
    chosen, errors = (nodes["kind"].isin(kinds).to_numpy() for kinds in (CHOSEN, ("error",)))
    alive = np.ones(len(nodes), dtype=bool)
    while True:
        live = kept & alive[source] & alive[target]
        has_in = np.bincount(target[live], minlength=len(nodes)) > 0
        has_out = np.bincount(source[live], minlength=len(nodes)) > 0
        after = alive & (~chosen | (has_in & has_out)) & (~errors | has_out)
        if (after == alive).all():
            return alive & (chosen | errors)
        alive = after


def graph_replacement(nodes: pd.DataFrame) -> float:
    """I(embeddings) / (I(embeddings) + I(what is left out))."""
    tokens = nodes.loc[nodes["kind"] == "embedding", "influence"].sum()
    errors = nodes.loc[nodes["kind"].isin(LEFT_OUT), "influence"].sum()
    return float(tokens / (tokens + errors)) if tokens + errors else float("nan")


def graph_completeness(nodes: pd.DataFrame, edges: pd.DataFrame) -> float:
    """sum_t (1 - sum over what is left out of N_ts) I'_t / sum_t I'_t with I' = influence + logit weight."""
    table = nodes.assign(reach=nodes["influence"] + logit_weights(nodes)).set_index("node")
    left = table["kind"].isin(LEFT_OUT)[edges["source"]].to_numpy()
    from_errors = pd.Series(np.where(left, normalized(nodes, edges), 0.0)).groupby(edges["target"].to_numpy()).sum()
    reach = table.loc[from_errors.index, "reach"]
    total = float(reach.sum())  # 0 where nothing has an influence, as in a circuit of regressions
    return float(((1 - from_errors) * reach).sum()) / total if total else float("nan")
