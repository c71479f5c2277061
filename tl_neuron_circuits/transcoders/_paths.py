"""Greedy search for the paths that contribute most to a target.

Every iteration extends each of the best paths by the `num_branches` largest contributions to its last node, and keeps
the `num_branches` best of all extensions. A path counts what it contributes to the target: the last node's one-step
contribution to the next one, times what a unit of that one contributes. With `cap` a node passes on at most all of what
it is read for: a source may contribute more than its reader's activation where others work against it, and setting
it to zero could not take away more than there is. Source: Dunefsky et al. 2024, arXiv 2406.11944; METHODS.md 4.3.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..nodes._scores import label
from ._explained import Explained
from ._one_step import OneStep, Read, feature_read, head_read, one_step, skip_read
from ._residual_run import ResidualRun

Rank = Literal["positive", "absolute"]


@dataclass(frozen=True)
class Node:
    """A node that reads the residual stream itself: a feature, a skip path, or a head from `position` to `to`.

    An embedding is a node that reads nothing.
    """

    kind: Literal["feature", "skip", "head", "embedding"]
    layer: int
    unit: int
    position: int
    to: int = -1

    @property
    def name(self) -> str:
        """Its label in the circuit."""
        if self.kind == "head":
            return head_label(self.layer, self.unit, self.position, self.to)
        if self.kind == "embedding":
            return f"embed@{self.position}"
        return label(self.layer, "F", self.unit, self.position, "node" if self.kind == "feature" else "skip")

    @property
    def depth(self) -> tuple[int, bool]:
        """Sorts nodes from late to early: whatever reads a node stands deeper than it."""
        return self.layer, self.kind != "head"


@dataclass(frozen=True, eq=False)
class Path:
    """From the last node found back to the target; `read` reads the target's part that runs along it."""

    nodes: tuple[Node, ...]
    read: Read
    contribution: float


def greedy_paths(
    run: ResidualRun,
    target: Explained,
    *,
    num_iters: int,
    num_branches: int,
    rank: Rank,
    cap: bool,
    excluded: Collection[int],
) -> list[Path]:
    """The best paths of every iteration, in the order found.

    Args:
        run: the frozen run.
        target: what they lead to.
        num_iters: how many nodes a path may have.
        num_branches: how many paths are kept an iteration.
        rank: by contribution, or by its size.
        cap: let no node pass on more than it is read for.
        excluded: positions whose nodes are never taken.
    """
    live, found = [Path((), target.read, abs(target.value))], []
    for _ in range(num_iters):
        longer = [one for path in live for one in _extensions(run, path, num_branches, rank, cap, excluded)]
        key = (lambda one: -one[2]) if rank == "positive" else (lambda one: -abs(one[2]))
        best = [_extended(run, *one) for one in sorted(longer, key=key)[:num_branches]]
        found += best
        live = [path for path in best if path.nodes[-1].kind != "embedding"]
    return found


def _extensions(
    run: ResidualRun, path: Path, count: int, rank: Rank, cap: bool, excluded: Collection[int]
) -> Iterator[tuple[Path, Node, float, float]]:
    """What may extend a path: the node, its contribution, and which part of it counts."""
    step, whole = one_step(run, path.read), abs(path.contribution)
    for node, contribution in _candidates(step, count, rank, excluded):
        factor = min(1.0, whole / abs(contribution)) if cap else 1.0
        yield path, node, factor * contribution, factor


def _extended(run: ResidualRun, path: Path, node: Node, contribution: float, factor: float) -> Path:
    read = path.read if node.kind == "embedding" else node_read(run, node, path.read).times(factor)
    return Path((*path.nodes, node), read, contribution)


def node_read(run: ResidualRun, node: Node, read: Read) -> Read:
    """How a node is read further down when `read` reads it."""
    if node.kind == "head":
        return head_read(run, node.layer, node.unit, node.position, read.position, read.vector)
    if node.kind == "skip":
        return skip_read(run, node.layer, read.position, read.vector)
    decoder = run.mlps[node.layer].dictionary
    assert decoder is not None
    u = run.write_vector(node.layer, read.position, read.vector)
    weight = float(decoder.W_dec[node.unit].to(u) @ u)
    return feature_read(run, node.layer, node.unit, node.position).times(weight)


def _candidates(step: OneStep, count: int, rank: Rank, excluded: Collection[int]) -> list[tuple[Node, float]]:
    """The largest sources that are no biases and no errors."""
    t = step.read.position
    blocks: list[tuple[Tensor, Sequence]] = []
    if t not in excluded:
        for features in step.features:
            blocks.append((features.contributions, ("feature", features.layer, features.units)))
        for layer, value in step.skips.items():
            blocks.append((torch.tensor([value]), ("skip", layer, None)))
        blocks.append((torch.tensor([step.embedding]), ("embedding", -1, None)))
    for layer, heads in step.heads.items():
        heads = heads.clone()
        heads[:, [position for position in excluded if position < heads.shape[1]]] = 0.0
        heads[:, t + 1 :] = 0.0
        blocks.append((heads.flatten(), ("head", layer, heads.shape[1])))
    sizes = [(values if rank == "positive" else values.abs()).cpu().double() for values, _ in blocks]
    if not sizes:
        return []
    flat = torch.cat(sizes)
    top = flat.topk(min(count, len(flat)))
    starts = torch.tensor([0, *(len(size) for size in sizes)]).cumsum(0)
    found = []
    for size, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if size <= 0:
            break
        block = int(torch.searchsorted(starts, index, right=True)) - 1
        values, (kind, layer, more) = blocks[block]
        place = index - int(starts[block])
        node = Node(kind, layer, -1, t)
        if kind == "feature":
            node = replace(node, unit=int(more[place]))
        elif kind == "head":
            node = replace(node, unit=place // more, position=place % more, to=t)
        found.append((node, float(values[place])))
    return found


def head_label(layer: int, head: int, source: int, position: int) -> str:
    """A head between two positions: it reads at `source` and writes at `position`."""
    return f"L{layer}/H{head}@{source}→{position}"
