"""Pruning: fewer nodes and edges, with nothing lost from the sums. METHODS 1.5 (edges), 4.5 (circuit-tracer)."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .._errors import SettingsError
from ._table import (
    CHOSEN,
    FIXED_SOURCES,
    LEFT_OUT,
    influence,
    logit_weights,
    normalized,
    restrict,
    rows_of,
    without_positions,
)


@dataclass(frozen=True)
class Rule:
    """Criteria of `Circuit.prune`; None means no criterion."""

    share: float | None
    count: int | None
    edges: int | None
    relative: float | None
    node_influence: float | None
    edge_influence: float | None
    zero_positions: Collection[int] = ()
    """Where nodes, errors and remainders count as zero when influence is computed."""


def prune(
    nodes: pd.DataFrame, edges: pd.DataFrame, target_value: float, rule: Rule
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The nodes and edges that meet every criterion, and lie on some path from an embedding to a logit.

    Raises:
        SettingsError: no criterion, or one out of its range.
    """
    _check(rule)
    counted = without_positions(nodes, edges, rule.zero_positions)
    whole = nodes.assign(influence=influence(nodes, counted)) if rule.zero_positions else nodes
    kept = _nodes_to_keep(whole, rule)
    live, fixed = _edges_by_influence(whole, edges, kept, rule)
    ids = pd.MultiIndex.from_frame(edges[["source", "target"]])
    nodes, edges = restrict(nodes, edges, kept, np.ones(len(edges), dtype=bool), target_value)
    chosen = ids.get_indexer(pd.MultiIndex.from_frame(edges[["source", "target"]]))  # -1: of a new remainder
    live, fixed = ((chosen >= 0) & mask[chosen] for mask in (live, fixed))
    live &= _edges_to_keep(nodes, edges, rule)
    alive = _on_a_path(nodes, edges, live, fixed)
    return restrict(nodes, edges, alive, live, target_value)


def _check(rule: Rule) -> None:
    given = {name: value for name, value in vars(rule).items() if value is not None and name != "zero_positions"}
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
    return kept & counted


def _edges_by_influence(
    nodes: pd.DataFrame, edges: pd.DataFrame, kept: np.ndarray, rule: Rule
) -> tuple[np.ndarray, np.ndarray]:
    """Edges that meet the criterion of influence, and those of remainders that do: circuit-tracer's edge rule.

    What the nodes' criterion cuts is left out first, remainders of little influence too, and nothing stands in for it:
    edges are normalized, and influence is computed, among what is left. Remainders count as errors do.
    """
    everything = np.ones(len(edges), dtype=bool)
    fixed = nodes["kind"].isin(FIXED_SOURCES).to_numpy()[rows_of(nodes, edges["source"])]
    if rule.edge_influence is None:
        return everything, ~everything
    stays = kept | ~nodes["kind"].isin((*CHOSEN, "error")).to_numpy()
    if rule.node_influence is not None:
        mass = cumulative(nodes["influence"].to_numpy(), rule.node_influence)
        stays &= mass | ~nodes["kind"].isin(FIXED_SOURCES).to_numpy()
    source, target = (rows_of(nodes, edges[end]) for end in ("source", "target"))
    inner = stays[source] & stays[target]
    inner &= edges.index.isin(without_positions(nodes, edges, rule.zero_positions).index)
    left = edges[inner]
    reach = influence(nodes, left) + logit_weights(nodes)
    chosen = ~everything
    chosen[inner] = cumulative(normalized(nodes, left) * reach[target[inner]], rule.edge_influence)
    return chosen, chosen & fixed


def _top(size: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(size), dtype=bool)
    mask[np.argsort(-size, kind="stable")[:count]] = True
    return mask


def cumulative(size: np.ndarray, mass: float) -> np.ndarray:
    """The fewest entries that make up `mass` of the sum."""
    if not len(size):
        return np.zeros(0, dtype=bool)
    order = np.argsort(-size, kind="stable")
    reached = np.cumsum(size[order]) >= mass * size.sum() * (1 - 1e-12)
    mask = np.zeros(len(size), dtype=bool)
    mask[order[: int(np.argmax(reached)) + 1]] = True
    return mask


def _on_a_path(nodes: pd.DataFrame, edges: pd.DataFrame, kept: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Drop nodes without a kept incoming or outgoing edge, again and again; errors have no incoming ones.

    `fixed` are edges of remainders that count as incoming.
    """
    index = pd.Series(np.arange(len(nodes)), index=nodes["node"])
    source, target = index[edges["source"]].to_numpy(), index[edges["target"]].to_numpy()
    chosen, errors = (nodes["kind"].isin(kinds).to_numpy() for kinds in (CHOSEN, ("error",)))
    alive = np.ones(len(nodes), dtype=bool)
    while True:
        live = kept & alive[source] & alive[target]
        has_in = np.bincount(target[live | (fixed & alive[target])], minlength=len(nodes)) > 0
        has_out = np.bincount(source[live], minlength=len(nodes)) > 0
        after = alive & (~chosen | (has_in & has_out)) & (~errors | has_out)
        if (after == alive).all():
            return alive & (chosen | errors)
        alive = after


def graph_scores(nodes: pd.DataFrame, edges: pd.DataFrame, zero_positions: Collection[int] = ()) -> tuple[float, float]:
    """Replacement and completeness, as `Circuit.graph_scores` defines them; nan where nothing has an influence."""
    edges = without_positions(nodes, edges, zero_positions)
    weights, passed = logit_weights(nodes), influence(nodes, edges)
    tokens = passed[(nodes["kind"] == "embedding").to_numpy()].sum()
    left_out = nodes["kind"].isin(LEFT_OUT).to_numpy()
    errors, reach = passed[left_out].sum(), passed + weights
    source, target = (rows_of(nodes, edges[end]) for end in ("source", "target"))
    from_errors = np.bincount(target, normalized(nodes, edges) * left_out[source], len(nodes))
    replacement = tokens / (tokens + errors) if tokens + errors else np.nan
    completeness = ((1 - from_errors) * reach).sum() / reach.sum() if reach.sum() else np.nan
    return float(replacement), float(completeness)
