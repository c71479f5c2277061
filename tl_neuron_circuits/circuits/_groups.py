"""Names, groups and supernodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._errors import SettingsError
from ..nodes._scores import label as neuron_label
from ._by_prompt import join_prompts
from ._flow import complete
from ._table import CHOSEN, SINGLE, node_table

if TYPE_CHECKING:
    from ._circuit import Circuit


def with_column(nodes: pd.DataFrame, column: str, values: Mapping[str, str]) -> pd.DataFrame:
    """The nodes with some entries of a column replaced.

    Raises:
        SettingsError: a name that no node has.
    """
    nodes = nodes.copy()
    for name, value in values.items():
        nodes.loc[_named(nodes, name), column] = value
    return nodes


def with_groups(nodes: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The nodes with their groups.

    Raises:
        SettingsError: a name that no node has, a node in two groups, a group named like a node, members of other kinds.
    """
    new = pd.Series("", index=nodes.index, dtype=object)
    for group, members in groups.items():
        if not group or (nodes["node"] == group).any():
            raise SettingsError(f"expected a group's name that is neither empty nor a node's; got {group!r}.")
        for member in members:
            rows = _named(nodes, member)
            wrong = set(nodes.loc[rows, "kind"]) - set(CHOSEN)
            if wrong:
                raise SettingsError(f"expected members that were chosen; {member!r} is of kind {sorted(wrong)}.")
            taken = set(new[rows]) - {"", group}
            if taken:
                raise SettingsError(
                    f"the node {member!r} is in the groups {sorted(taken)} and {group!r}; expected one."
                )
            new[rows] = group
    return nodes.assign(group=nodes["group"].where(new == "", new))


def _named(nodes: pd.DataFrame, name: str) -> np.ndarray:
    """Rows of one node, or of one neuron at all positions."""
    rows = (nodes["node"] == name).to_numpy()
    if not rows.any():
        rows = (nodes["node"].str.rpartition("@")[0] == name).to_numpy() & nodes["kind"].isin(CHOSEN).to_numpy()
    if not rows.any():
        near = nodes.loc[nodes["kind"].isin(CHOSEN), "node"].head(5).tolist()
        raise SettingsError(f"expected a node of this circuit, such as {near}; got {name!r}.")
    return rows


def collapse(circuit: Circuit) -> Circuit:
    """Make one supernode of each group.

    Raises:
        SettingsError: no node is in a group.
    """
    grouped = circuit.nodes["group"] != ""
    if not grouped.any():
        raise SettingsError("expected groups to collapse; no node is in one. Call group({...}) first.")
    names = circuit.nodes["group"].where(grouped, circuit.nodes["node"])
    rows = [_supernode(name, rows) for name, rows in circuit.nodes[grouped].groupby("group", sort=False)]
    single = circuit.nodes["kind"].isin(SINGLE) & grouped
    members = {name: rows["node"].tolist() for name, rows in circuit.nodes[grouped].groupby("group", sort=False)}
    nodes = pd.concat([circuit.nodes[~grouped], node_table(rows)], ignore_index=True)
    n_grouped = int(circuit.settings.get("n_grouped", 0)) + int(single.sum())
    settings = {"n_grouped": n_grouped, "groups": dict(circuit.settings.get("groups", {})) | members}
    return join_nodes(circuit, names, nodes, settings)


def _supernode(name: str, rows: pd.DataFrame) -> dict:
    weights = rows["score"].abs().to_numpy()
    layer = float(np.average(rows["layer"], weights=weights)) if weights.sum() else float(rows["layer"].mean())
    return {
        "node": name, "label": name, "kind": "group", "layer": round(layer),
        "position": common_value(rows["position"], -1), "token": common_value(rows["token"], "…"), "group": name,
        **{column: rows[column].sum() for column in ("activation", "change", "score")},
    }  # fmt: skip


def common_value(values: Iterable, otherwise: object) -> object:
    """The value that all share."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else otherwise


def join_nodes(circuit: Circuit, names: pd.Series, nodes: pd.DataFrame, settings: Mapping) -> Circuit:
    """The circuit on `nodes`, to which `names` sends each node of today; edges are added up.

    Edges inside one new node are gone, and so is their part of its change and score.
    """
    sends = dict(zip(circuit.nodes["node"], names, strict=True))
    edges = circuit.edges.assign(source=circuit.edges["source"].map(sends), target=circuit.edges["target"].map(sends))
    inside = edges["source"] == edges["target"]
    internal = edges[inside].groupby("target")[["weight", "attribution"]].sum()
    nodes = nodes.copy()
    for column, part in (("change", "weight"), ("score", "attribution")):
        nodes[column] = nodes[column] - nodes["node"].map(internal[part]).fillna(0.0)
    nodes["sign"] = np.sign(nodes["activation"].fillna(0.0)).astype("int64")
    edges = edges[~inside].groupby(["source", "target"], sort=False, as_index=False)[["weight", "attribution"]].sum()
    nodes, edges = complete(nodes, edges, circuit.target_value)
    by_prompt = join_prompts(circuit.by_prompt, sends)
    settings = {**circuit.settings, **settings}
    return replace(circuit, nodes=nodes, edges=edges, settings=settings, by_prompt=by_prompt)


def sum_positions(circuit: Circuit) -> Circuit:
    """One node per neuron, one embedding per token, one remainder."""
    names = pd.Series([_without_position(row) for row in circuit.nodes.itertuples()], index=circuit.nodes.index)
    rows = []
    for name, same in circuit.nodes.groupby(names, sort=False):
        first = same.iloc[0].to_dict()
        label = common_value(same["label"], name)
        label = name if label == first["node"] or first["kind"] == "unselected" else label
        rows.append(
            first | {
                "node": name, "label": label, "position": -1, "token": common_value(same["token"], "…"),
                **{column: same[column].sum(min_count=1) for column in ("activation", "change", "score")},
                "gate_sign": common_value(same["gate_sign"], 0), "up_sign": common_value(same["up_sign"], 0),
                "unit": common_value(same["unit"], -1), "group": common_value(same["group"], ""),
            }
        )  # fmt: skip
    return join_nodes(circuit, names, node_table(rows), {"positions": "sum", "places": None, "spans": {}})


def _without_position(node: object) -> str:
    kind, name = node.kind, node.node  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "neuron":
        return neuron_label(node.layer, "N", node.unit, -1, "node")  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "embedding":
        return f"embed/{node.token}"  # pyright: ignore[reportAttributeAccessIssue]
    return (
        name.rpartition("@")[0] if kind in ("unselected", "error", "feature", "head", "skip") and "@" in name else name
    )
