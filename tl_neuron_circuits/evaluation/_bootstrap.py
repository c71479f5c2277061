"""Bootstrap over lexical items: prompts that share a word are drawn together, and every curve sees the same draws.

Bands are percentiles of ratios of means, each ratio recomputed on the drawn prompts; two bases evaluated on the same
pairs are compared draw by draw.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@runtime_checkable
class Measured(Protocol):
    """What is drawn from: a curve's metric of every pair."""

    @property
    def kept(self) -> Tensor: ...
    @property
    def removed(self) -> Tensor: ...
    @property
    def full(self) -> Tensor: ...
    @property
    def empty(self) -> Tensor: ...


def draw_weights(
    groups: Sequence[str] | None, n_pairs: int, n_draws: int, seed: int, among: Sequence[str] | None = None
) -> np.ndarray:
    """How often each pair is drawn, `[draw, pair]`; pairs of one group come together (without groups: each alone).

    With `among` all of these are drawn from, whether pairs have them or not: the same draws for several sets of pairs.
    """
    names = list(range(n_pairs)) if groups is None else list(groups)
    order = {name: index for index, name in enumerate(dict.fromkeys(names if among is None else among))}
    member = torch.tensor([order[name] for name in names])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(order), (n_draws, len(order)), generator=generator)
    counts = torch.zeros(n_draws, len(order), dtype=torch.float32).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float32)
    )
    return counts[:, member].double().numpy()


def ratios(curve: Measured, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Faithfulness and completeness of every draw, `[draw, size]`; nan where a draw cannot be normalized."""
    total = weights.sum(1, keepdims=True)
    total = np.where(total > 0, total, np.nan)
    mean = lambda values: weights @ values.double().numpy().reshape(-1, weights.shape[1]).T / total  # noqa: E731
    low = mean(curve.empty)
    span = mean(curve.full) - low
    with np.errstate(divide="ignore", invalid="ignore"):
        span = np.where(np.abs(span) > 1e-9, span, np.nan)
        return (mean(curve.kept) - low) / span, (mean(curve.removed) - low) / span


def gap_band(curve: Measured, weights: np.ndarray) -> tuple[float, float]:
    """The middle 95% of F(M) - F(0), which both are divided by, over the draws."""
    gaps = weights @ (curve.full - curve.empty).double().numpy() / weights.sum(1)
    low, high = band(gaps[:, None])
    return float(low[0]), float(high[0])


def band(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper percentile over draws."""
    tail = (1 - level) / 2 * 100
    return np.nanpercentile(values, tail, axis=0), np.nanpercentile(values, 100 - tail, axis=0)
