"""Pruning: fewer nodes and edges, with nothing lost from the sums. METHODS 1.5 (edges), 4.5 (circuit-tracer)."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .._errors import SettingsError
from ._flow import Links, cut, influence, logit_weights, normalized, of_kinds, to_tables, zeroed_at
from ._table import CHOSEN, FIXED_SOURCES, LEFT_OUT


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
    links = Links.read(nodes, edges)
    counted = ~zeroed_at(nodes, links, rule.zero_positions)
    whole = nodes.assign(influence=influence(nodes, links.only(counted))) if rule.zero_positions else nodes
    kept = _nodes_to_keep(whole, rule)
    live, fixed = _links_by_influence(whole, links, kept, counted, rule)
    nodes, links, origin = cut(nodes, links, kept, np.ones(len(links), dtype=bool))
    live, fixed = ((origin >= 0) & mask[origin] for mask in (live, fixed))
    live &= _links_to_keep(nodes, links, rule)
    alive = _on_a_path(nodes, links, live, fixed)
    nodes, links, _ = cut(nodes, links, alive, live)
    return to_tables(nodes, links, target_value)


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
    chosen, errors = of_kinds(nodes, CHOSEN), of_kinds(nodes, ("error",))
    kept = chosen | errors
    size = np.where(chosen, nodes["score"].abs().to_numpy(), -np.inf)
    if rule.share is not None:
        kept &= nodes["share"].abs().fillna(0.0).to_numpy() >= rule.share
    if rule.count is not None:
        kept &= errors | _top(size, rule.count)
    if rule.node_influence is not None:
        kept &= cumulative(nodes["influence"].to_numpy(), rule.node_influence)
    return kept


def _links_to_keep(nodes: pd.DataFrame, links: Links, rule: Rule) -> np.ndarray:
    counted = ~of_kinds(nodes, FIXED_SOURCES)[links.source]
    kept = np.ones(len(links), dtype=bool)
    if rule.edges is not None:
        kept &= _top(np.where(counted, np.abs(links.attribution), -np.inf), rule.edges)
    if rule.relative is not None:
        kept &= np.abs(links.relative) >= rule.relative
    return kept & counted


def _links_by_influence(
    nodes: pd.DataFrame, links: Links, kept: np.ndarray, counted: np.ndarray, rule: Rule
) -> tuple[np.ndarray, np.ndarray]:
    """Links that meet the criterion of influence, and those of remainders that do: circuit-tracer's edge rule.

    What the nodes' criterion cuts is left out first, remainders of little influence too, and nothing stands in for it:
    links are normalized, and influence is computed, among what is left. Remainders count as errors do.
    """
    everything = np.ones(len(links), dtype=bool)
    if rule.edge_influence is None:
        return everything, ~everything
    remainders = of_kinds(nodes, FIXED_SOURCES)
    stays = kept | ~of_kinds(nodes, (*CHOSEN, "error"))
    if rule.node_influence is not None:
        stays &= cumulative(nodes["influence"].to_numpy(), rule.node_influence) | ~remainders
    inner = np.flatnonzero(counted & stays[links.source] & stays[links.target])
    left = links.only(inner)
    sizes = normalized(nodes, left)
    reach = influence(nodes, left, sizes) + logit_weights(nodes)
    chosen = ~everything
    chosen[inner] = cumulative(sizes * reach[left.target], rule.edge_influence)
    return chosen, chosen & remainders[links.source]


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


def _on_a_path(nodes: pd.DataFrame, links: Links, kept: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Drop nodes without a kept incoming or outgoing link, again and again; errors have no incoming ones.

    `fixed` are links of remainders that count as incoming.
    """
    source, target = links.source, links.target
    chosen, errors = of_kinds(nodes, CHOSEN), of_kinds(nodes, ("error",))
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
    links = Links.read(nodes, edges)
    if zero_positions:
        links = links.only(~zeroed_at(nodes, links, zero_positions))
    sizes, weights = normalized(nodes, links), logit_weights(nodes)
    passed = influence(nodes, links, sizes)
    left_out = of_kinds(nodes, LEFT_OUT)
    tokens, errors, reach = passed[of_kinds(nodes, ("embedding",))].sum(), passed[left_out].sum(), passed + weights
    from_errors = np.bincount(links.target, sizes * left_out[links.source], len(nodes))
    replacement = tokens / (tokens + errors) if tokens + errors else np.nan
    completeness = ((1 - from_errors) * reach).sum() / reach.sum() if reach.sum() else np.nan
    return float(replacement), float(completeness)
