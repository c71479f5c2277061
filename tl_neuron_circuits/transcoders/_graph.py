"""From the nodes that paths found to a circuit's rows, with nothing lost: what was left out becomes remainders.

Nodes are taken apart from late to early, each as all its readers together read it. Then edges hold between all nodes
found, whichever path found them, and every node's incoming edges sum to it.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..circuits._table import unselected_row
from ..nodes._scores import label
from ._explained import Explained
from ._one_step import OneStep, Read, feature_read, one_step
from ._paths import Node, node_read
from ._residual_run import ResidualRun

Rows = list[dict[str, Any]]


def graph_rows(run: ResidualRun, target: Explained, nodes: Sequence[Node], texts: Sequence[str]) -> tuple[Rows, Rows]:
    """Rows of nodes and of edges.

    Args:
        run: the frozen run.
        target: what is explained.
        nodes: every feature, head and skip path that takes part, from late to early.
        texts: the prompt's tokens.
    """
    graph = _Graph(run, nodes)
    graph.expand(target.label, target.read, 1.0)
    rows = []
    for node in nodes:
        score, factor, read = graph.take(node)
        rows.append(_row(run, node, score, texts))
        graph.expand(node.name, read, factor)
    rows += _ends(run, graph.edges, texts)
    goal = {
        "node": target.label, "label": target.text or target.label, "kind": "logit", "layer": run.n_layers,
        "unit": target.unit, "position": target.position, "token": target.text or texts[target.position],
        "activation": target.value, "change": target.value, "sign": int(np.sign(target.value)), "score": target.value,
    }  # fmt: skip
    return [*rows, goal], graph.edges


class _Graph:
    """Edges so far, and for every node not yet taken apart what reads it."""

    def __init__(self, run: ResidualRun, nodes: Sequence[Node]) -> None:
        self.edges: Rows = []
        self._run = run
        self._at: dict[int, list[Node]] = defaultdict(list)
        for node in nodes:
            self._at[node.to if node.kind == "head" else node.position].append(node)
        self._reads: dict[Node, Read] = {}
        self._scores: dict[Node, float] = defaultdict(float)
        self._weights: dict[Node, float] = defaultdict(float)

    def take(self, node: Node) -> tuple[float, float, Read]:
        """A node's part of the target, that of one unit of its activation, and what reads it."""
        if node.kind != "feature":
            return self._scores[node], 1.0, self._reads[node]
        return self._scores[node], self._weights[node], feature_read(self._run, node.layer, node.unit, node.position)

    def expand(self, name: str, read: Read, factor: float) -> None:
        """Add the edges into a node whose unit counts `factor` for the target, as `read` reads it for one unit."""
        step, t = one_step(self._run, read), read.position
        left = torch.zeros(len(self._run.tokens), dtype=torch.float64)
        for heads in step.heads.values():
            left += heads.sum(0).cpu().double()
        left[t] += sum(float(f.contributions.sum()) for f in step.features) + sum(step.skips.values())
        for node in self._at[t]:
            found = _contribution(step, node)
            if found is None:
                continue
            value, weight = found
            left[node.position] -= value
            self._edge(node.name, name, value, factor)
            self._scores[node] += factor * value
            if node.kind == "feature":
                self._weights[node] += factor * weight
            else:
                more = node_read(self._run, node, read).times(factor)
                self._reads[node] = self._reads[node].plus(more) if node in self._reads else more
        self._ends(name, step, left, factor)

    def _ends(self, name: str, step: OneStep, left: Tensor, factor: float) -> None:
        t = step.read.position
        self._edge(f"embed@{t}", name, step.embedding, factor)
        if step.positional is not None:
            self._edge("positions", name, step.positional, factor)
        self._edge("bias", name, sum(step.constants.values(), 0.0), factor)
        for layer, value in step.errors.items():
            self._edge(label(layer, "", -1, t, "error"), name, value, factor)
        for position, value in enumerate(left[: t + 1].tolist()):
            self._edge(f"unselected@{position}", name, value, factor)

    def _edge(self, source: str, target: str, weight: float, factor: float) -> None:
        if weight:
            self.edges.append(
                {"source": source, "target": target, "weight": weight, "attribution": factor * weight}
            )  # fmt: skip


def _contribution(step: OneStep, node: Node) -> tuple[float, float] | None:
    """What a node contributes in a step, and its weight; None where it does not stand before what reads."""
    if node.kind == "head":
        heads = step.heads.get(node.layer)
        return None if heads is None else (float(heads[node.unit, node.position]), 1.0)
    if node.kind == "skip":
        return (step.skips[node.layer], 1.0) if node.layer in step.skips else None
    for found in step.features:
        if found.layer == node.layer:
            place = int((found.units == node.unit).nonzero()[0])
            return float(found.contributions[place]), float(found.weights[place])
    return None


def _row(run: ResidualRun, node: Node, score: float, texts: Sequence[str]) -> dict[str, Any]:
    row = {
        "node": node.name, "kind": node.kind, "layer": node.layer, "unit": node.unit, "position": node.position,
        "token": texts[node.position], "score": score, "change": score,
    }  # fmt: skip
    features = run.mlps[node.layer].features
    if node.kind == "feature" and features is not None:
        at = features.units[node.position] == node.unit
        activation = float(features.values[node.position][at][0])
        row |= {"activation": activation, "change": activation, "sign": int(np.sign(activation))}
    return row


def _ends(run: ResidualRun, edges: Rows, texts: Sequence[str]) -> Rows:
    """Rows of what edges come from beside the nodes found; every embedding is there."""
    sums: dict[str, float] = defaultdict(float)
    for edge in edges:
        sums[edge["source"]] += edge["attribution"]
    rows: Rows = [
        {
            "node": f"embed@{p}", "label": text, "kind": "embedding", "unit": int(run.tokens[p]), "position": p,
            "token": text, "score": sums[f"embed@{p}"],
        }
        for p, text in enumerate(texts)
    ]  # fmt: skip
    rows += [unselected_row(p, text) for p, text in enumerate(texts)]
    for name, text in (("positions", "positional embeddings"), ("bias", "biases")):
        if name in sums:
            rows.append({"node": name, "label": text, "kind": "bias", "score": sums[name]})
    for layer in range(run.n_layers):
        for position, text in enumerate(texts):
            name = label(layer, "", -1, position, "error")
            if name in sums:
                place = {"layer": layer, "position": position, "token": text}
                rows.append({"node": name, "kind": "error", "score": sums[name], **place})
    used = set(sums)
    return [row for row in rows if row["kind"] == "embedding" or row["node"] in used]
