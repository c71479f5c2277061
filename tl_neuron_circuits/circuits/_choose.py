"""Which neurons make the circuit: by their share of the target, by count, or by cumulative mass. METHODS 1.6."""

from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import NumericalError, SettingsError
from ..attribution import Totals

Choice = Literal["share", "mass"] | int
_NEAR_ZERO = 1e-6


def choose_neurons(
    totals: Totals, choice: Choice, *, share: float, mass: float, skipped_positions: Collection[int],
    excluded: Collection[tuple[int, int]],
) -> Int[Tensor, "neuron 3"]:  # fmt: skip
    """Layer, position and unit of the chosen neurons, in that order.

    Neurons whose score is zero next to the mean are never chosen: shares of zero would say nothing.

    Raises:
        NumericalError: the target is zero, so nothing has a share of it.
        SettingsError: a number out of its range, or nothing to choose from.
    """
    score = torch.stack([layer.cpu().double() for layer in totals.score])
    allowed = score.abs() > _NEAR_ZERO * score.abs().mean()
    allowed[:, list(skipped_positions)] = False
    for layer, unit in excluded:
        if not (0 <= layer < score.shape[0] and 0 <= unit < score.shape[2]):
            raise SettingsError(
                f"exclude= names the neuron ({layer}, {unit}); this model has layers below {score.shape[0]} and "
                f"units below {score.shape[2]}."
            )
        allowed[layer, :, unit] = False
    size = torch.where(allowed, score.abs(), 0.0).flatten()
    count = _count(size, choice, share, mass, float(totals.goals.sum()), int(allowed.sum()))
    if count == 0:
        raise SettingsError(
            f"no neuron has {share:g} of the target ({float(totals.goals.sum()):.4g}); the largest has "
            f"{float(size.max()) / abs(float(totals.goals.sum())):.2g}. Lower share=, or give a count: nodes=100."
        )
    index = size.topk(count).indices.sort().values
    n_positions, width = score.shape[1:]
    return torch.stack([index // (n_positions * width), index // width % n_positions, index % width], 1)


def _count(
    size: Float[Tensor, " neuron"], choice: Choice, share: float, mass: float, target: float, available: int
) -> int:
    if isinstance(choice, int):
        if not 1 <= choice <= available:
            raise SettingsError(f"expected between 1 and {available:,} nodes, as many as are active; got {choice}.")
        return choice
    if choice == "mass":
        if not 0 < mass <= 1:
            raise SettingsError(f"expected a mass above 0 and up to 1; got {mass}.")
        ordered = size.sort(descending=True).values
        reached = ordered.cumsum(0) >= mass * ordered.sum() * (1 - 1e-12)
        return min(available, int(reached.int().argmax()) + 1)
    if not 0 < share:
        raise SettingsError(f"expected a positive share; got {share}.")
    if target == 0:
        raise NumericalError("the target is exactly zero, so nothing has a share of it. Give a count: nodes=100.")
    return int((size >= share * abs(target)).sum())
