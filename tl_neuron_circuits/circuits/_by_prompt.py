"""The table of single prompts: what each adds to the numbers of a circuit of several.

    kind      source      target      weight                                     attribution
    node      a node                  its change                                 its score
    edge      a source    a node      part of the target's change, directly      of the target's score
    token     a token     a node      the same through all paths                 the same through all paths
    target    a node      a logit     the logit's part through all paths         the same

Edges and scores are those of `Circuit.nodes` and `Circuit.edges`: their means over prompts, zero where a prompt has no
row, are those tables. "token" and "target" rows are profiles: what drives a node, and what it drives.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .._errors import SettingsError
from ._direct_effects import DirectEffects
from ._table import CHOSEN, SINGLE, unselected_name

PROMPT_COLUMNS = {
    "prompt": "int64", "kind": "str", "source": "str", "target": "str", "weight": "float64", "attribution": "float64",
}  # fmt: skip
PROMPT_KINDS = ("node", "edge", "token", "target")
_KEYS = ["prompt", "kind", "source", "target"]
_NUMBERS = ["weight", "attribution"]


def prompt_table(effects: DirectEffects, sources: Sequence[str], logits: Sequence[str]) -> pd.DataFrame | None:
    """The table; None where the numbers of prompts were not kept.

    Args:
        effects: with `by_prompt`.
        sources: names of the columns of its edges.
        logits: names of its targets.
    """
    if not effects.by_prompt:
        return None
    columns, n_nodes = effects.columns, len(effects.nodes)
    names, receivers = (np.array(own, dtype=object) for own in (sources, [*sources[:n_nodes], *logits]))
    tokens = names[columns.embedding : columns.unselected]
    nothing = np.full(1, np.nan)
    frames = []
    for part in effects.by_prompt:
        rows: list[Any] = [
            ("node", names[:n_nodes], "", part.change, part.score),
            ("node", receivers[n_nodes:], "", part.target_changes, part.target_changes),
            ("node", tokens, "", nothing.repeat(len(tokens)), part.embedding),
        ]
        for slot in columns.slots_with_errors:
            errors = part.errors[slot]
            rows.append(("node", names[columns.errors(slot)], "", nothing.repeat(columns.n_rests), errors))
        receiver, source = part.indices.numpy()
        rows.append(("edge", names[source], receivers[receiver], *part.values.T))
        if part.by_token is not None and part.by_target is not None:
            to, what = np.indices((len(receivers), len(tokens))).reshape(2, -1)
            rows.append(("token", tokens[what], receivers[to], *part.by_token.reshape(-1, 2).T))
            logit, node = np.indices(tuple(part.by_target.shape)).reshape(2, -1)
            value = part.by_target.flatten()
            rows.append(("target", names[node], receivers[n_nodes + logit], value, value))
        frames += [_frame(part.prompt, *row) for row in rows]
    return pd.concat(frames, ignore_index=True)


def _frame(prompt: int, kind: str, source: Any, target: Any, weight: Any, attribution: Any) -> pd.DataFrame:
    number = lambda values: values.double().numpy() if isinstance(values, Tensor) else values  # noqa: E731
    values = {"weight": number(weight), "attribution": number(attribution)}
    frame = pd.DataFrame(
        {"prompt": prompt, "kind": kind, "source": pd.Series(source, dtype=object), "target": target, **values}
    )
    empty = (frame["weight"].fillna(0.0) == 0) & (frame["attribution"] == 0)
    return frame if kind == "node" else frame[~empty]


def restrict_prompts(
    table: pd.DataFrame | None, before: pd.DataFrame, nodes: pd.DataFrame, edges: pd.DataFrame
) -> pd.DataFrame | None:
    """The table for fewer nodes and edges: in each prompt, an edge that was cut comes from the remainder instead.

    Args:
        table: of the circuit before.
        before: its nodes.
        nodes: those that are left.
        edges: those that are left.
    """
    if table is None:
        return None
    left = set(nodes["node"])
    stays = (table["source"].isin(left) | (table["kind"] == "edge")) & table["target"].isin(left | {""})
    rows: Any = table[stays]
    is_edge = (rows["kind"] == "edge").to_numpy()
    pairs = pd.MultiIndex.from_frame(rows.loc[is_edge, ["source", "target"]])
    lost = ~pairs.isin(pd.MultiIndex.from_frame(edges[["source", "target"]]))
    position = dict(zip(before["node"], before["position"], strict=True))
    source = rows["source"].to_numpy(dtype=object).copy()
    at = np.flatnonzero(is_edge)[lost]
    source[at] = [unselected_name(int(position[name])) for name in source[at]]
    return _added_up(rows.assign(source=source))


def join_prompts(table: pd.DataFrame | None, sends: Mapping[str, str]) -> pd.DataFrame | None:
    """The table on new nodes, to which `sends` sends each of the old; edges inside one are gone, and their parts.

    Profiles of nodes that had edges inside are gone too: a token's part of one member may pass through the other.
    """
    if table is None:
        return None
    new = {"": ""} | dict(sends)
    moved: Any = table.assign(source=table["source"].map(new), target=table["target"].map(new))
    inside = (moved["kind"] == "edge") & (moved["source"] == moved["target"])
    internal = moved[inside].groupby(["prompt", "target"])[_NUMBERS].sum()
    rows: Any = _added_up(moved[~inside])
    joined = set(internal.index.get_level_values("target"))
    profile = rows["kind"].isin(("token", "target"))
    rows = rows[~(profile & (rows["source"].isin(joined) | rows["target"].isin(joined)))].reset_index(drop=True)
    own = (rows["kind"] == "node").to_numpy()
    lost = internal.reindex(pd.MultiIndex.from_frame(rows.loc[own, ["prompt", "source"]])).fillna(0.0)
    rows.loc[own, _NUMBERS] = rows.loc[own, _NUMBERS].to_numpy() - lost.to_numpy()
    return rows


def concatenate_prompts(tables: Sequence[pd.DataFrame | None], counts: Sequence[int]) -> pd.DataFrame | None:
    """The prompts of several circuits after one another; None where one has no table."""
    found = [table for table in tables if table is not None]
    if len(found) < len(tables):
        return None
    starts = np.cumsum([0, *counts[:-1]])
    moved = [table.assign(prompt=table["prompt"] + start) for table, start in zip(found, starts, strict=True)]
    return pd.concat(moved, ignore_index=True)


def _added_up(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby(_KEYS, sort=False, as_index=False)[_NUMBERS].sum(min_count=1)


def to_columns(table: pd.DataFrame, rows: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """The table as numbers for a file, nodes by their rows; -1 for none."""
    for name in ("prompt", *_NUMBERS):
        yield name, np.array(table[name])
    yield "kind", np.array(table["kind"].map(PROMPT_KINDS.index), dtype="int64")
    for end in ("source", "target"):
        yield end, np.array(table[end].map({"": -1, **rows}), dtype="int64")


def fits_nodes(columns: Mapping[str, Tensor], n_nodes: int, n_prompts: int) -> bool:
    """Whether a file's numbers are of prompts, kinds and nodes that are there."""
    ranges = {"prompt": (0, n_prompts), "kind": (0, len(PROMPT_KINDS)), "source": (0, n_nodes), "target": (-1, n_nodes)}
    return all(
        columns[name].dtype == torch.int64 and bool(((columns[name] >= low) & (columns[name] < high)).all())
        for name, (low, high) in ranges.items()
    ) and all(columns[name].dtype == torch.float64 for name in _NUMBERS)


def from_columns(columns: Mapping[str, np.ndarray], names: Sequence[str]) -> pd.DataFrame:
    """The table from what `to_columns` gave."""
    ends = np.array([*names, ""], dtype=object)  # -1 is the last
    texts = {end: ends[columns[end]] for end in ("source", "target")}
    kind = np.array(PROMPT_KINDS, dtype=object)[columns["kind"]]
    numbers = {name: columns[name] for name in ("prompt", *_NUMBERS)}
    return pd.DataFrame({**numbers, **texts, "kind": kind})[list(PROMPT_COLUMNS)]


def span_table(nodes: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """See `Circuit.spans`."""
    rows = []
    for name, (first, last) in (settings.get("spans") or {}).items():
        inside = nodes["position"].between(first, last)
        chosen = nodes[inside & nodes["kind"].isin(CHOSEN)]
        tokens = nodes.loc[inside & (nodes["kind"] == "embedding"), "score"].sum()
        rows.append((name, first, last, len(chosen), float(chosen["score"].sum()), float(tokens)))
    return pd.DataFrame(rows, columns=["span", "first", "last", "chosen", "score", "tokens"])


def nodes_on_prompt(nodes: pd.DataFrame, settings: Mapping[str, Any], prompt: int) -> pd.DataFrame:
    """See `Circuit.on_prompt`."""
    n_prompts, how = int(settings["n_prompts"]), settings.get("positions", "keep")
    places = settings.get("places")
    if not 0 <= prompt < n_prompts or (how != "keep" and not places):
        raise SettingsError(
            f"expected one of the {n_prompts} prompts that were traced together, from 0, where places are known; got "
            f"{prompt} (positions: {how}). Circuits that were summed or merged later have no places."
        )
    chosen = nodes[nodes["kind"].isin(SINGLE)]
    if how == "keep" or places is None:
        return chosen.reset_index(drop=True)
    own = pd.DataFrame({"place": places[prompt], "at": range(len(places[prompt]))})
    placed = chosen.assign(place=chosen["position"].clip(lower=0)).merge(own, on="place")
    placed = placed.assign(position=placed["at"]).drop(columns=["place", "at"])
    placed.attrs = {}  # these are positions
    return placed
