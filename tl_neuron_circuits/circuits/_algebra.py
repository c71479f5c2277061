"""Sets of circuits: unions, intersections, differences. Numbers are means over prompts, zero where a node is absent."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from .._errors import SettingsError
from ..bases._activations import Neurons
from ._by_prompt import concatenate_prompts, restrict_prompts
from ._flow import complete, restrict
from ._groups import common_value
from ._scores import node_sites
from ._table import CHOSEN, node_table

if TYPE_CHECKING:
    from ._circuit import Circuit

_MEANS = ("activation", "change", "score", "probability")


def merge(circuits: Sequence[Circuit], how: Literal["any", "all"]) -> Circuit:
    """Means over the prompts of all circuits; each circuit counts as often as it has prompts.

    Raises:
        SettingsError: no circuits, or circuits that do not fit together.
    """
    _check(circuits)
    counts = np.array([circuit.settings["n_prompts"] for circuit in circuits], dtype=float)
    weights = counts / counts.sum()
    scaled = [
        circuit.nodes.assign(**{column: circuit.nodes[column] * weight for column in _MEANS})
        for circuit, weight in zip(circuits, weights, strict=True)
    ]
    rows = [_one_node(same) for _, same in pd.concat(scaled, ignore_index=True).groupby("node", sort=False)]
    nodes = node_table(rows)
    parts = [
        circuit.edges.assign(weight=circuit.edges["weight"] * weight, attribution=circuit.edges["attribution"] * weight)
        for circuit, weight in zip(circuits, weights, strict=True)
    ]
    edges = pd.concat(parts, ignore_index=True)
    edges = edges.groupby(["source", "target"], sort=False, as_index=False)[["weight", "attribution"]].sum()
    target_value = float(sum(circuit.target_value * weight for circuit, weight in zip(circuits, weights, strict=True)))
    nodes, edges = complete(nodes, edges, target_value)
    by_prompt = concatenate_prompts(
        [circuit.by_prompt for circuit in circuits], [circuit.settings["n_prompts"] for circuit in circuits]
    )
    if how == "all":
        common = frozenset.intersection(*(circuit.members for circuit in circuits))
        kept = (nodes["node"].isin(common) | (nodes["kind"] == "error")).to_numpy()
        before = nodes
        nodes, edges = restrict(nodes, edges, kept, target_value)
        by_prompt = restrict_prompts(by_prompt, before, nodes, edges)
    details = {name: told for circuit in reversed(circuits) for name, told in circuit.details.items()}
    return replace(
        circuits[0], nodes=nodes, edges=edges, settings=_settings(circuits, target_value), head_parts=None, traced=None,
        by_prompt=by_prompt, details=details,
    )  # fmt: skip


def without(circuit: Circuit, other: Circuit) -> Circuit:
    """The circuit without the other's nodes."""
    _check([circuit, other])
    return keep(circuit, circuit.members - other.members)


def keep(circuit: Circuit, members: Collection[str]) -> Circuit:
    """The circuit with these of its chosen nodes alone; errors stay."""
    kept = circuit.nodes["kind"].isin(CHOSEN) & circuit.nodes["node"].isin(list(members))
    kept |= circuit.nodes["kind"] == "error"
    nodes, edges = restrict(circuit.nodes, circuit.edges, kept.to_numpy(), circuit.target_value)
    by_prompt = restrict_prompts(circuit.by_prompt, circuit.nodes, nodes, edges)
    return replace(circuit, nodes=nodes, edges=edges, by_prompt=by_prompt)


def _one_node(same: pd.DataFrame) -> dict:
    row = same.iloc[0].to_dict()
    for column in _MEANS:
        row[column] = same[column].sum(min_count=1)
    for column, otherwise in (("token", "…"), ("gate_sign", 0), ("up_sign", 0)):
        row[column] = common_value(same[column], otherwise)
    row["unit"] = common_value(same["unit"], -1)
    row["group"] = common_value((group for group in same["group"] if group), row["group"])
    row["label"] = common_value(same["label"], "…" if row["kind"] == "embedding" else row["label"])
    row["sign"] = 0 if np.isnan(row["activation"]) else int(np.sign(row["activation"]))
    return row


def _check(circuits: Sequence[Circuit]) -> None:
    if not circuits:
        raise SettingsError("expected at least one circuit; got none.")
    for key in ("model", "basis", "baseline"):
        default = Neurons.title if key == "basis" else None
        found = {str(circuit.settings.get(key, default)) for circuit in circuits}
        if len(found) > 1:
            raise SettingsError(f"expected circuits of one {key}; got {sorted(found)}.")
    if len({str(node_sites(circuit.settings)) for circuit in circuits}) > 1:
        raise SettingsError("expected circuits with nodes at the same hook points; these have others, or other widths.")
    if len({circuit.settings.get("positions", "keep") for circuit in circuits}) > 1:
        raise SettingsError("some of these circuits have positions and some do not: sum_positions() the others too.")
    if len({str(c.settings["tokens"]) for c in circuits if c.settings.get("positions") == "spans"}) > 1:
        raise SettingsError(
            "these circuits have other places: their prompts' spans are aligned in other ways. Trace the prompts in "
            "one call, or sum_positions() each circuit."
        )


def _settings(circuits: Sequence[Circuit], target_value: float) -> dict:
    settings = dict(circuits[0].settings)
    settings.pop("influence_before_pruning", None)  # of one circuit's nodes alone
    tokens = [circuit.settings["tokens"] for circuit in circuits]
    aligned = len({len(one) for one in tokens}) == 1
    hashes = "".join(circuit.settings["pairs_hash"] for circuit in circuits)
    settings |= {
        "n_prompts": int(sum(circuit.settings["n_prompts"] for circuit in circuits)),
        "prompt": " | ".join(dict.fromkeys(circuit.settings["prompt"] for circuit in circuits)),
        "tokens": [common_value(column, "…") for column in zip(*tokens, strict=False)] if aligned else [],
        "token_ids": common_value((str(c.settings["token_ids"]) for c in circuits), None) and settings["token_ids"],
        "target": list(dict.fromkeys(one for circuit in circuits for one in circuit.settings["target"])),
        "target_value": target_value,
        "pairs_hash": hashlib.sha256(hashes.encode()).hexdigest(),
        "position": common_value((circuit.settings["position"] for circuit in circuits), -1),
    }
    for key in ("prompts", "places"):
        lists = [circuit.settings.get(key) for circuit in circuits]
        settings[key] = [one for own in lists for one in own or ()] if all(lists) else None
    if len({str(circuit.settings.get("spans")) for circuit in circuits}) > 1:
        settings["spans"] = {}
    return settings
