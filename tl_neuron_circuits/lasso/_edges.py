"""From weights between columns to nodes and the edges between them.

    weight(i -> j) = root mean square over the units of j of the standard deviation that i's columns give them,
                     sqrt(mean_u  B[i,u]' Corr[i,i] B[i,u])

in standard deviations of the target: 1 means that i alone moves j as much as j varies. Between two single columns it is
|weight|, and then the edge carries the sign. `norm` is the Frobenius norm of the block, the paper's ranking; it depends
on how collinear the columns of i are, which `weight` does not.

    reach(i -> j) = |weight(i -> j)| * the largest product of |weights| (each at most 1) on a path from j to the readout

An edge into a component that nothing later depends on is as real as any other, but is not part of what the model
answers: `weight` ranks dependencies, `reach` those that the answer hangs on. It is ours, not the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ._observations import Columns, Regression, Site
from ._samples import SampledProblem, SampledStatistics
from ._statistics import Standardized, Statistics

_READOUT = "logits"


@dataclass(frozen=True, eq=False)
class Fitted:
    """One regression, standardized, with its weights."""

    regression: Regression
    problem: Standardized | SampledProblem
    statistics: Statistics | SampledStatistics
    weights: Float64[Tensor, "source target"]
    """Sparse where targets are streamed."""
    r2: Float64[Tensor, " target"]


@dataclass(frozen=True, eq=False)
class Nodes:
    """All nodes in order, and which of them every column of every regression belongs to."""

    names: tuple[str, ...]
    rows: pd.DataFrame
    """Columns node, kind, layer, unit, position, stage; the readout is "logits"."""
    columns: tuple[tuple[Int[Tensor, " _"], Int[Tensor, " _"]], ...]
    """By regression: the node of every source, and of every target, as a place in `names`."""


def list_nodes(sites: Sequence[Site], regressions: Sequence[Regression]) -> Nodes:
    """Every node that has a column."""
    split = torch.tensor([*(site.split for site in sites), False])

    known: dict[int, list[tuple[int, int, int]]] = {}  # streamed regressions share their sources

    def keys(side: Columns) -> list[tuple[int, int, int]]:
        """Site, unit and position of every column; unit and position only where they make a node of their own."""
        if id(side) not in known:
            known[id(side)] = find_keys(side)
        return known[id(side)]

    def find_keys(side: Columns) -> list[tuple[int, int, int]]:
        unit = torch.where(split[side.site], side.unit, -1)
        position = torch.where(split[side.site] & (side.slot >= 0), side.slot, -1)
        return list(zip(side.site.tolist(), unit.tolist(), position.tolist(), strict=True))

    sides = [(keys(regression.sources), keys(regression.targets)) for regression in regressions]
    rows: dict[str, tuple[Any, ...]] = {}
    places: dict[tuple[int, int, int], int] = {}
    for key in sorted({key for side in known.values() for key in side}):
        index, unit, position = key
        if index == len(sites):
            name, row = _READOUT, ("logits", -1, -1, -1, 10**6)
        else:
            site = sites[index]
            name = site.node(unit) + (f"@{position}" if position >= 0 else "")
            row = (site.kind, site.layer, unit, position, site.stage)
        places[key] = rows.setdefault(name, (len(rows), name, *row))[0]
    found = {id(side): torch.tensor([places[key] for key in side]) for side in known.values()}
    columns = tuple((found[id(a)], found[id(b)]) for a, b in sides)
    titles = ["node", "kind", "layer", "unit", "position", "stage"]
    return Nodes(tuple(rows), pd.DataFrame([row[1:] for row in rows.values()], columns=titles), columns)


def edge_keys(fits: Sequence[Fitted], nodes: Nodes) -> set[tuple[int, int]]:
    """The edges with a weight, as pairs of places in `nodes.names`."""
    keys = set()
    for fit, (source, target) in zip(fits, nodes.columns, strict=True):
        rows, columns = weight_places(fit.weights.cpu())
        keys |= set(zip(source[rows].tolist(), target[columns].tolist(), strict=True))
    return keys


def weight_places(weights: Float64[Tensor, "source target"]) -> tuple[Int[Tensor, " _"], Int[Tensor, " _"]]:
    """Source and target of every weight that is not zero, of a dense or a sparse matrix."""
    if not weights.is_sparse:
        source, target = weights.nonzero(as_tuple=True)
        return source, target
    source, target = weights.coalesce().indices()
    return source, target


def tables(fits: Sequence[Fitted], nodes: Nodes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per node, in order, and one row per edge, strongest first.

    Nodes: node, kind, layer, unit, position; r2, the mean over units that vary, nan for nodes without sources; score,
    the strongest path to the readout (without one, the strongest edge).
    Edges: source, target, weight, norm, n_weights (how many are not zero), reach (nan without a readout).
    """
    edges = _edges(fits, nodes)
    has_readout = _READOUT in nodes.names
    size = edges["weight"].abs()
    stage = nodes.rows.set_index("node")["stage"]
    best = {_READOUT: 1.0} if has_readout else {}
    by_source = dict(iter(edges.assign(size=size.clip(upper=1.0)).groupby("source")))
    order = stage[edges["source"]].sort_values(ascending=False, kind="stable").index.unique()
    for source in order:  # later stages first: what follows a source's targets is known before it
        onward = by_source[source]["target"].map(best).fillna(0.0) if has_readout else 1.0
        best[source] = float((by_source[source]["size"] * onward).max())
    edges["reach"] = size * edges["target"].map(best).fillna(0.0) if has_readout else float("nan")
    strongest = size.sort_values(ascending=False, kind="stable").index

    total, count = torch.zeros(2, len(nodes.names), dtype=torch.float64)
    for fit, (_, target) in zip(fits, nodes.columns, strict=True):
        r2 = torch.where(fit.regression.allowed.any(0), fit.r2.cpu(), torch.nan)
        known = ~r2.isnan()
        total.index_add_(0, target[known], r2[known])
        count.index_add_(0, target[known], torch.ones_like(r2[known]))
    rows = nodes.rows.assign(
        r2=torch.where(count > 0, total / count.clamp(min=1), torch.nan).numpy(),
        score=nodes.rows["node"].map(best).fillna(0.0),
    )
    rows = rows.sort_values("stage", kind="stable").drop(columns="stage").reset_index(drop=True)
    return rows, edges.loc[strongest].reset_index(drop=True)


def _edges(fits: Sequence[Fitted], nodes: Nodes) -> pd.DataFrame:
    """All regressions' edges; where targets are streamed, those of one node may be in several of them."""
    parts = [_sums(fit, *columns) for fit, columns in zip(fits, nodes.columns, strict=True)]
    found = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    ends = ["source", "target"]
    if found.duplicated(ends).any():
        found = found.groupby(ends, as_index=False).sum()
    n = len(nodes.names)
    varying, width = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    low, high = torch.full((n,), 2**40), torch.full((n,), -1)
    for fit, (source, target) in zip(fits, nodes.columns, strict=True):
        varying.index_add_(0, target, (~fit.problem.target_constant.cpu()).double())
        width.index_add_(0, target, torch.ones_like(target))
        low.scatter_reduce_(0, source, fit.regression.sources.unit, "amin")
        high.scatter_reduce_(0, source, fit.regression.sources.unit, "amax")
    source, target = (torch.tensor(found[end].to_numpy(dtype=int)) for end in ends)
    strength = (torch.tensor(found["moved"].to_numpy()) / varying.clamp(min=1)[target]).clamp(min=0).sqrt()
    # an edge has a sign where it is from one unit (its slots may be several) to one column
    single = (low == high)[source] & (width == 1)[target]
    strength = torch.where(single, torch.tensor(found["total"].to_numpy()).sign() * strength, strength)
    return pd.DataFrame(
        {
            "source": [nodes.names[k] for k in source.tolist()],
            "target": [nodes.names[k] for k in target.tolist()],
            "weight": strength.numpy(),
            "norm": np.sqrt(found["squares"].to_numpy()),
            "n_weights": found["n_weights"].to_numpy(dtype=int),
        }
    )


def _sums(fit: Fitted, source: Tensor, target: Tensor) -> pd.DataFrame:
    """One regression's sums by block of its weights; `source` and `target` are the columns' nodes."""
    weights, gram = fit.weights.to_dense().cpu(), fit.problem.gram
    places, target = target.unique(return_inverse=True)
    n_sources, n_targets = int(source.max()) + 1, len(places)

    def sum_blocks(values: Tensor) -> Tensor:
        rows = values.new_zeros(n_sources, len(target)).index_add_(0, source, values)
        return values.new_zeros(n_sources, n_targets).index_add_(1, target, rows)

    moved = torch.zeros_like(weights)  # b * (G b) within each source node: sums to the variance that it gives
    used = weights.any(1)
    for node in source[used].unique().tolist():
        columns = (used & (source == node)).nonzero().flatten()
        moved[columns] = weights[columns] * (gram[columns[:, None], columns].cpu() @ weights[columns])
    count = sum_blocks((weights != 0).double())
    rows, columns = (count > 0).nonzero(as_tuple=True)
    sums = {"moved": moved, "squares": weights.square(), "total": weights}
    return pd.DataFrame(
        {
            "source": rows.numpy(),
            "target": places[columns].numpy(),
            **{name: sum_blocks(values)[rows, columns].numpy() for name, values in sums.items()},
            "n_weights": count[rows, columns].numpy(),
        }
    )
