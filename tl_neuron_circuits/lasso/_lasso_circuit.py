"""What a fit gives: a `Circuit` whose edges are regression weights, with the regularization path.

An edge's `weight` is the regression's; its `attribution`, which ranks and colors edges as in every circuit, is `reach`
with the weight's sign (the weight itself where there is no readout to reach). A node's `score` is the largest product
of weights on a path from it to the readout (without one, its strongest edge). Nothing is conserved along a regression:
`relative`, `flow` and `influence` are nan, no remainder is kept, and the target's value is 1, its own deviation (0
without a readout).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import torch

from .. import _html
from .._errors import SettingsError
from .._files import formed, read_directory, require_shapes, write_directory
from .._typing import checked
from ..circuits import _circuit_file
from ..circuits._circuit import Circuit

SCHEMA = 2
NODE_EXTRA = ("r2",)
EDGE_EXTRA = ("norm", "n_weights", "reach", "stability")


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    circuit: _circuit_file.CircuitNotes
    path: list[str]


class _Settings(msgspec.Struct):
    """What a regression needs of its settings beside those of a circuit."""

    n: int
    penalty: float


@dataclass(frozen=True, eq=False, repr=False)
class LassoCircuit(Circuit):
    """A `Circuit` from sparse regressions, and how it came about.

    `edges` has these columns beside a circuit's: norm, n_weights, reach, and stability (share of bootstrap resamples
    that have the edge; nan without them). Weights are in standard deviations of the target; `reach` is the weight times
    the strongest path from the target on to the readout (ours, not the paper's). `nodes` has r2 (mean over its units;
    nan where nothing comes before). Kinds: "embedding", "component" (a head, an MLP), "neuron", "feature", "logit".
    `path`: one row per penalty: share, n_edges, n_weights, r2, held-out error with its standard error where that chose.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> penalty, nodes = tnc.lasso.Share(0.9), tnc.lasso.Components(attention="layers")
        >>> method = tnc.lasso.CircuitLasso(penalty=penalty, nodes=nodes, regressors="same")
        >>> found = method.fit(model, tnc.tasks.subject_verb_agreement("simple", n=16))
        >>> isinstance(found, tnc.Circuit), "stability" in found.edges
        (True, True)
    """

    path: pd.DataFrame

    def __post_init__(self) -> None:
        """Give every column its type, and keep the regression's own."""
        nodes, edges = self.nodes, self.edges
        super().__post_init__()
        for name, before, extra in (("nodes", nodes, NODE_EXTRA), ("edges", edges, EDGE_EXTRA)):
            own = {column: before[column].to_numpy(dtype=float) for column in extra}
            object.__setattr__(self, name, getattr(self, name).assign(**own))

    @property
    def unexplained(self) -> float:
        """Share of the readout's variance that its regression leaves; nan without a readout."""
        target = self.nodes.loc[self.nodes["kind"] == "logit", "r2"]
        return float(1 - target.iloc[0]) if len(target) else float("nan")

    @property
    def notes(self) -> list[str]:
        """What to know before telling a story: no edge, a readout that none reaches, or that they hardly predict."""
        remedy = "A smaller penalty keeps more edges, such as Share(0.2); prune(edges=40) then keeps the strongest."
        if np.isnan(self.unexplained):
            return [] if len(self.edges) else [f"no edge is left. {remedy}"]
        r2 = 1 - self.unexplained
        readout = set(self.nodes.loc[self.nodes["kind"] == "logit", "node"])
        if not self.edges["target"].isin(readout).any():
            return [f"no edge reaches the readout, so no edge has a reach. {remedy}"]
        return [f"the edges predict {r2:.0%} of the readout's variance. {remedy}"] if r2 < 0.1 else []

    def to_circuit(self) -> Circuit:
        """A plain `Circuit`, without the regression's own columns and path."""
        return Circuit(self.nodes, self.edges, self.settings)

    @checked
    def prune(
        self,
        *,
        share: float | None = None,
        count: int | None = None,
        edges: int | None = None,
        relative: float | None = None,
        node_influence: float | None = None,
        edge_influence: float | None = None,
    ) -> "LassoCircuit":
        """Fewer nodes and edges; then chosen nodes that lead nowhere go, until none is left.

        Weights stay those of the whole regression: to have the others make up for what is cut, fit with a larger
        penalty.

        Args:
            share: keep nodes with a score of at least this.
            count: keep the nodes with the largest score.
            edges: keep the edges with the largest |attribution|.
            relative: not for regressions.
            node_influence: not for regressions.
            edge_influence: not for regressions.

        Raises:
            SettingsError: no criterion, or one that needs conserved flows.
        """
        if not (relative is node_influence is edge_influence is None) or share is count is edges is None:
            raise SettingsError(
                "expected share, count or edges: along a regression nothing is conserved, so there are no relative "
                "weights and no influence to prune by. Or fit with a larger penalty."
            )
        chosen = _chosen(self.nodes)
        score = self.nodes["score"].abs()
        kept = ~chosen | (score >= (share or 0))
        if count is not None:
            best = score[chosen & kept].sort_values(ascending=False, kind="stable").index[:count]
            kept &= ~chosen | self.nodes.index.isin(best)
        names = set(self.nodes.loc[kept, "node"])
        table = self.edges[self.edges["source"].isin(names) & self.edges["target"].isin(names)]
        if edges is not None:
            order = table["attribution"].abs().sort_values(ascending=False, kind="stable").index[:edges]
            table = table.loc[table.index.isin(order)]
        return self._within(names, table)

    def __sub__(self, other: Circuit) -> "LassoCircuit":
        """This circuit without the other's chosen nodes and their edges."""
        names = set(self.nodes["node"]) - set(other.members)
        inside = self.edges["source"].isin(names) & self.edges["target"].isin(names)
        return self._within(names, self.edges[inside])

    def _within(self, names: set[str], edges: pd.DataFrame) -> "LassoCircuit":
        """These nodes and edges, less the chosen nodes that lead nowhere."""
        chosen = set(self.nodes.loc[_chosen(self.nodes), "node"])
        to_somewhere = "logit" in set(self.nodes["kind"])
        while True:
            linked = set(edges["source"]) | (set() if to_somewhere else set(edges["target"]))
            idle = (names & chosen) - linked
            if not idle:
                break
            names = names - idle
            edges = edges[edges["source"].isin(names) & edges["target"].isin(names)]
        nodes = self.nodes[self.nodes["node"].isin(names)].reset_index(drop=True)
        return replace(self, nodes=nodes, edges=edges.reset_index(drop=True))

    def collapse(self) -> Circuit:
        """One supernode per group, as a plain `Circuit`: weights of edges are added up."""
        return self.to_circuit().collapse()

    def sum_positions(self) -> Circuit:
        """Positions added up, as a plain `Circuit`."""
        return self.to_circuit().sum_positions()

    def _require_mergeable(self) -> None:
        raise SettingsError(
            "the mean of two regressions is the regression of neither: join what they were fitted to instead, "
            "lasso.solve(observations + other_observations). Or merge their to_circuit()."
        )

    def save(self, path: str | Path) -> None:
        """Write a directory with `lasso_circuit.safetensors`: the circuit, the regression's columns and the path.

        Raises:
            FileFormatError: something else is at the path.
            SaveError: it could not be written; what was saved there before is as it was.
        """
        tensors, notes = _circuit_file.to_file(self.nodes, self.edges, self.settings)
        tensors |= {f"extra/nodes/{name}": _tensor(self.nodes[name]) for name in NODE_EXTRA}
        tensors |= {f"extra/edges/{name}": _tensor(self.edges[name]) for name in EDGE_EXTRA}
        tensors |= {f"extra/path/{name}": _tensor(self.path[name]) for name in self.path}
        notes = {"circuit": notes, "path": list(self.path.columns)}
        write_directory(path, "lasso_circuit", SCHEMA, tensors, notes)

    @classmethod
    def load(cls, path: str | Path) -> "LassoCircuit":
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing, truncated, foreign, or of another schema.
        """
        tensors, notes = read_directory(path, "lasso_circuit", SCHEMA, _Notes, surrogates=True)
        formed(notes.circuit.settings, _Settings, path)
        plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("extra/")}
        nodes, edges, *_ = _circuit_file.from_file(plain, notes.circuit, path)
        shapes = {f"extra/nodes/{name}": (len(nodes),) for name in NODE_EXTRA}
        shapes |= {f"extra/edges/{name}": (len(edges),) for name in EDGE_EXTRA}
        rows = {tensors[name].numel() for name in tensors if name.startswith("extra/path/")}
        shapes |= {f"extra/path/{name}": (max(rows, default=0),) for name in notes.path}
        require_shapes(path, {name: tensor for name, tensor in tensors.items() if name not in plain}, shapes)
        nodes = nodes.assign(**{name: tensors[f"extra/nodes/{name}"].numpy() for name in NODE_EXTRA})
        edges = edges.assign(**{name: tensors[f"extra/edges/{name}"].numpy() for name in EDGE_EXTRA})
        table = pd.DataFrame({name: tensors[f"extra/path/{name}"].numpy() for name in notes.path})
        whole = {name: "int64" for name in ("n_edges", "n_weights") if name in table}
        return cls(nodes, edges, notes.circuit.settings, table.astype(whole))

    def __repr__(self) -> str:
        s = self.settings
        size = f"{len(self.nodes)} nodes, {len(self.edges):,} edges"
        read = "" if np.isnan(self.unexplained) else f", R2 of the readout {1 - self.unexplained:.2f}"
        return f"LassoCircuit({size}, {s['model']}, {s['n']} prompts, penalty {s['penalty']:.4g}{read})"

    def _repr_html_(self) -> str:
        shown = ["source", "target", "weight", "reach", "n_weights", "stability"]
        notes = [_html.note(note) for note in self.notes]
        return _html.block(repr(self), *notes, _html.table(self.edges[shown], bars=("weight", "reach")))


def lasso_circuit(
    nodes: pd.DataFrame, edges: pd.DataFrame, path: pd.DataFrame, settings: Mapping[str, Any]
) -> LassoCircuit:
    """From the tables of `_edges` (and the edges' stability) to the columns of a circuit."""
    readout = nodes["kind"] == "logits"
    kinds = nodes["kind"].map({"embedding": "embedding", "logits": "logit"}).fillna("component")
    single = np.where(nodes["node"].str.contains("/F"), "feature", "neuron")
    rows = nodes.assign(
        label=nodes["node"].where(nodes["unit"] >= 0, nodes["node"].str.rpartition("/")[2]),
        kind=kinds.where(nodes["unit"] < 0, single),
        layer=nodes["layer"].where(~readout, settings["n_layers"]),
        share=nodes["score"],
        **dict.fromkeys(("token", "group"), ""),
        **dict.fromkeys(("sign", "gate_sign", "up_sign"), 0),
        **dict.fromkeys(("activation", "change", "flow", "influence", "probability"), np.nan),
    )
    size = edges["reach"] if readout.any() else edges["weight"].abs()
    links = edges.assign(relative=np.nan, attribution=size * np.sign(edges["weight"]))
    more = {
        "target": [settings["readout"]], "target_value": float(readout.any()), "n_prompts": settings["n"],
        "positions": "sum", "prompt": f"{settings['n']} prompts", "tokens": [], "token_ids": [], "position": -1,
        "baseline": "mean",
    }  # fmt: skip
    return LassoCircuit(rows, links, {**settings, **more}, path)


def _tensor(column: pd.Series) -> torch.Tensor:
    return torch.from_numpy(column.to_numpy(dtype=float, copy=True))


def _chosen(nodes: pd.DataFrame) -> pd.Series:
    return ~nodes["kind"].isin(("embedding", "logit"))
