"""From weights between columns to edges between nodes.

    weight(i -> j) = root mean square over the units of j of the standard deviation that i's columns give them,
                     sqrt(mean_u  B[i,u]' Corr[i,i] B[i,u])

in standard deviations of the target: 1 means that i alone moves j as much as j varies. Between two single columns it is
|weight|, and then the edge carries the sign. `norm` is the Frobenius norm of the block, the paper's ranking; it depends
on how collinear the columns of i are, which `weight` does not.

    reach(i -> j) = |weight(i -> j)| * the largest product of |weights| (each at most 1) on a path from j to the readout

An observational edge into a component that nothing later depends on is as real as any other, but no part of what the
model answers: `weight` ranks dependencies, `reach` those that the answer hangs on. It is ours, not the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ._observations import Columns, Site
from ._path import Fitted

_EDGE_COLUMNS = ("source", "target", "weight", "norm", "n_weights")
_READOUT = "logits"


@dataclass(frozen=True, eq=False)
class Nodes:
    """Names of all nodes in order, and the node of every column of one side."""

    names: tuple[str, ...]
    rows: pd.DataFrame


def nodes_of(sites: Sequence[Site], fits: Sequence[Fitted]) -> Nodes:
    """Every node that has a column; the readout is "logits"."""
    sides = [side for fit in fits for side in (fit.regression.sources, fit.regression.targets)]
    found: dict[str, tuple[str, int, int, int, int]] = {}
    for index, unit, position in sorted({key for side in sides for key in _keys(sites, side)}):
        site = sites[index] if index < len(sites) else None
        name = _name(site, unit, position)
        split = site is not None and site.split
        kind, layer, stage = ("logits", -1, 10**6) if site is None else (site.kind, site.layer, site.stage)
        found.setdefault(name, (kind, layer, unit if split else -1, position if split else -1, stage))
    columns = ["node", "kind", "layer", "unit", "position", "stage"]
    rows = pd.DataFrame([(name, *values) for name, values in found.items()], columns=columns)
    return Nodes(tuple(found), rows)


def _name(site: Site | None, unit: int, position: int) -> str:
    if site is None:
        return _READOUT
    return site.node(unit) + (f"@{position}" if position >= 0 and site.split else "")


def _keys(sites: Sequence[Site], side: Columns) -> set[tuple[int, int, int]]:
    """Site, unit and position of every column; unit and position only where they make a node of their own."""
    split = torch.tensor([*(site.split for site in sites), False])[side.site]
    unit = torch.where(split, side.unit, -1)
    position = torch.where(split & (side.slot >= 0), side.slot, -1)
    return set(zip(side.site.tolist(), unit.tolist(), position.tolist(), strict=True))


def column_nodes(sites: Sequence[Site], side: Columns, nodes: Nodes) -> Int[Tensor, " column"]:
    """The node of every column, as an index into `nodes.names`."""
    index = {name: k for k, name in enumerate(nodes.names)}
    found = []
    for site, unit, slot in zip(side.site.tolist(), side.unit.tolist(), side.slot.tolist(), strict=True):
        owner = sites[site] if site < len(sites) else None
        found.append(index[_name(owner, unit, slot)])
    return torch.tensor(found, dtype=torch.long)


def edge_table(sites: Sequence[Site], fits: Sequence[Fitted], nodes: Nodes) -> pd.DataFrame:
    """One row per edge, strongest first: source, target, weight, norm, n_weights (how many are not zero), reach."""
    tables = [_edges_of(sites, fit, nodes) for fit in fits]
    table = pd.concat([t for t in tables if len(t)] or [pd.DataFrame(columns=list(_EDGE_COLUMNS))], ignore_index=True)
    table["reach"] = _reach(table, nodes)
    order = table["weight"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _reach(edges: pd.DataFrame, nodes: Nodes) -> pd.Series:
    """Weight times the best path from the target on to the readout; nan without a readout."""
    if _READOUT not in nodes.names:
        return pd.Series(float("nan"), index=edges.index)
    stage = nodes.rows.set_index("node")["stage"]
    best = {_READOUT: 1.0}
    size = edges["weight"].abs()
    order = stage[edges["source"]].sort_values(ascending=False, kind="stable").index.unique()
    by_source = {name: rows for name, rows in edges.assign(size=size.clip(upper=1.0)).groupby("source")}
    for source in order:  # later stages first: a source's targets are done before it
        rows = by_source[source]
        best[source] = max(w * best.get(t, 0.0) for w, t in zip(rows["size"], rows["target"], strict=True))
    return size * edges["target"].map(best).fillna(0.0)


def edge_keys(sites: Sequence[Site], fits: Sequence[Fitted], nodes: Nodes) -> set[tuple[int, int]]:
    """The edges that are there, as pairs of node indices."""
    found = set()
    for fit in fits:
        source = column_nodes(sites, fit.regression.sources, nodes)
        target = column_nodes(sites, fit.regression.targets, nodes)
        rows, columns = fit.weights.cpu().nonzero(as_tuple=True)
        found |= set(zip(source[rows].tolist(), target[columns].tolist(), strict=True))
    return found


def _edges_of(sites: Sequence[Site], fit: Fitted, nodes: Nodes) -> pd.DataFrame:
    source = column_nodes(sites, fit.regression.sources, nodes)
    target = column_nodes(sites, fit.regression.targets, nodes)
    weights, gram = fit.weights.cpu(), fit.problem.gram.cpu()
    n_sources, n_targets = int(source.max()) + 1, int(target.max()) + 1
    variance = weights.new_zeros(n_sources, n_targets)
    signed = weights.new_zeros(n_sources, n_targets)
    varying = (~fit.problem.target_constant.cpu()).double()
    units = varying.new_zeros(n_targets).index_add_(0, target, varying).clamp(min=1)
    for node, columns in _members(source, weights):
        block = weights[columns]
        moved = (block * (gram[columns[:, None], columns] @ block)).sum(0)
        variance[node].index_add_(0, target, moved)
        signed[node].index_add_(0, target, block.sum(0))
    size = variance.new_zeros(n_sources, len(target)).index_add_(0, source, weights.square())
    norm = torch.zeros_like(variance).index_add_(1, target, size).sqrt()
    count = torch.zeros_like(size).index_add_(0, source, (weights != 0).double())
    count = torch.zeros_like(variance).index_add_(1, target, count)
    single = _single(source, target, fit)
    strength = (variance / units).clamp(min=0).sqrt()
    strength = torch.where(single, signed.sign() * strength, strength)
    rows, columns = (count > 0).nonzero(as_tuple=True)
    return pd.DataFrame(
        {
            "source": [nodes.names[k] for k in rows.tolist()],
            "target": [nodes.names[k] for k in columns.tolist()],
            "weight": strength[rows, columns].numpy(),
            "norm": norm[rows, columns].numpy(),
            "n_weights": count[rows, columns].long().numpy(),
        }
    )


def node_table(sites: Sequence[Site], nodes: Nodes, fits: Sequence[Fitted]) -> pd.DataFrame:
    """One row per node, in order; r2 is the mean over its units that vary, nan for nodes without sources."""
    total, count = (
        torch.zeros(len(nodes.names), dtype=torch.float64),
        torch.zeros(len(nodes.names), dtype=torch.float64),
    )
    for fit in fits:
        target = column_nodes(sites, fit.regression.targets, nodes)
        r2 = torch.where(fit.regression.allowed.any(0), fit.r2.cpu(), torch.nan)
        known = ~r2.isnan()
        total.index_add_(0, target[known], r2[known])
        count.index_add_(0, target[known], torch.ones_like(r2[known]))
    rows = nodes.rows.assign(r2=torch.where(count > 0, total / count.clamp(min=1), torch.nan).numpy())
    return rows.sort_values("stage", kind="stable").drop(columns="stage").reset_index(drop=True)


def _members(source: Tensor, weights: Float64[Tensor, "source target"]) -> list[tuple[int, Tensor]]:
    """Columns of every node that has a weight at all."""
    used = weights.any(1)
    by_node: dict[int, list[int]] = {}
    for column in used.nonzero().flatten().tolist():
        by_node.setdefault(int(source[column]), []).append(column)
    return [(node, torch.tensor(columns)) for node, columns in by_node.items()]


def _single(source: Tensor, target: Tensor, fit: Fitted) -> Tensor:
    """Whether a pair of nodes has one target column, and one unit at the source (its slots may be several)."""
    n_targets, n_sources = int(target.max()) + 1, int(source.max()) + 1
    one_target = torch.bincount(target, minlength=n_targets) == 1
    unit = fit.regression.sources.unit
    low = torch.full((n_sources,), 2**40).scatter_reduce_(0, source, unit, "amin")
    high = torch.full((n_sources,), -1).scatter_reduce_(0, source, unit, "amax")
    return (low == high)[:, None] & one_target[None]
