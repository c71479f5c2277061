"""Node sets for a curve: the k best nodes of a ranking, as masks by block."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._errors import SettingsError
from ..interventions._ablation import Kept
from ..nodes._scores import NodeScores

Ranking = Literal["abs", "signed"]


class Chosen(NamedTuple):
    """One set of a ranking: all nodes ("whole"), the `size` best, or all but these."""

    what: Literal["whole", "best", "but"]
    size: int


class RankedNodes:
    """Every node's rank by score, from which the masks of any size follow at once.

    Nodes whose kind is in `always` (an error that is kept) or `never` (one that is ablated) are not counted or ranked.
    """

    def __init__(
        self, scores: NodeScores, ranking: Ranking, *, always: Sequence[str] = (), never: Sequence[str] = ()
    ) -> None:
        self._shapes = {(hook, kind): block.shape for hook, kind, block in scores.blocks()}
        self._fixed = {key: key[1] in always for key in self._shapes if key[1] in (*always, *never)}
        flat = torch.cat([b.reshape(-1).cpu() for hook, kind, b in scores.blocks() if (hook, kind) not in self._fixed])
        key = flat.abs() if ranking == "abs" else flat
        key = torch.where(key.isnan(), torch.full_like(key, -torch.inf), key)
        order = key.argsort(descending=True, stable=True)
        self.ranks = torch.empty(len(key), dtype=torch.long)
        self.ranks[order] = torch.arange(len(key))
        self._sums = torch.cat(
            [torch.zeros(1, dtype=torch.float32), flat[order].nan_to_num().double().cumsum(0).float()]
        )

    def __len__(self) -> int:
        return len(self.ranks)

    def sum_of_best(self, size: int) -> float:
        """Sum of the `size` best nodes' scores."""
        return float(self._sums[size])

    def best(self, size: int) -> Kept:
        """Masks that keep the `size` best nodes."""
        return self._masks(self.ranks < size)

    def all_but_best(self, size: int) -> Kept:
        """Masks that keep every node but the `size` best."""
        return self._masks(self.ranks >= size)

    def keeping(self, size: int, *, but: bool = False) -> Chosen:
        """The `size` best nodes (or all `but` these), by one name where two are the same set."""
        if but and size in (0, len(self)):
            return self.keeping(len(self) - size)
        if size == len(self) > 0 and all(self._fixed.values()):
            return Chosen("whole", 0)
        return Chosen("but" if but else "best", size)

    def masks(self, chosen: Chosen) -> Kept | None:
        """The masks of this set; None for the whole."""
        if chosen.what == "whole":
            return None
        return self.best(chosen.size) if chosen.what == "best" else self.all_but_best(chosen.size)

    def _masks(self, flat: Tensor) -> Kept:
        masks: dict[tuple[str, str], Tensor] = {}
        start = 0
        for key, shape in self._shapes.items():
            if key in self._fixed:
                masks[key] = torch.full(shape, self._fixed[key])
                continue
            masks[key] = flat[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
        return masks


def chosen_sizes(sizes: Sequence[int] | None, n_nodes: int) -> list[int]:
    """The sizes asked for, or 20 log-spaced ones from 1 to all, ascending and each once.

    Raises:
        SettingsError: a size below 0 or above the number of nodes.
    """
    if sizes is None:
        spaced = torch.logspace(0, torch.log10(torch.tensor(float(n_nodes))), 20).round().long().tolist()
        return sorted({min(size, n_nodes) for size in spaced})
    wrong = [size for size in sizes if not 0 <= size <= n_nodes]
    if wrong or not sizes:
        raise SettingsError(f"expected sizes between 0 and the number of nodes, {n_nodes:,}; got {wrong or 'none'}.")
    return sorted(set(sizes))
