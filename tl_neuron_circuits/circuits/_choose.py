"""Which nodes make the circuit: by their share of the target, by count, or by cumulative mass. METHODS 1.6."""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import NumericalError, SettingsError
from ._totals import Totals

Choice = Literal["share", "mass"] | int
_NEAR_ZERO = 1e-6


def choose_nodes(
    totals: Totals, layers: Sequence[int], choice: Choice, *, share: float, mass: float,
    skipped_positions: Collection[int], excluded: Collection[tuple[int, int]],
) -> Int[Tensor, "node 3"]:  # fmt: skip
    """Slot, position and unit of the chosen nodes, in that order; `layers` are the slots' layers.

    Nodes whose score is zero next to the mean are never chosen: shares of zero would say nothing.

    Raises:
        NumericalError: the target is zero, so nothing has a share of it.
        SettingsError: a number out of its range, or nothing to choose from.
    """
    scores = [slot.cpu().double() for slot in totals.score]
    mean = sum(float(score.abs().sum()) for score in scores) / max(1, sum(int((s != 0).sum()) for s in scores))
    allowed = [score.abs() > _NEAR_ZERO * mean for score in scores]
    for mask in allowed:
        mask[list(skipped_positions)] = False
    for layer, unit in excluded:
        if layer not in layers or not 0 <= unit < scores[layers.index(layer)].shape[1]:
            raise SettingsError(
                f"exclude= names the unit ({layer}, {unit}), which has no nodes here; nodes are in the layers {layers} "
                f"with {[score.shape[1] for score in scores]} units."
            )
        allowed[layers.index(layer)][:, unit] = False
    flat = [torch.where(mask, score.abs(), 0.0).flatten() for mask, score in zip(allowed, scores, strict=True)]
    size = torch.cat(flat)
    available = sum(int(mask.sum()) for mask in allowed)
    count = _count(size, choice, share, mass, float(totals.goals.sum()), available)
    if count == 0:
        raise SettingsError(
            f"no node has {share:g} of the target ({float(totals.goals.sum()):.4g}); the largest has "
            f"{float(size.max()) / abs(float(totals.goals.sum())):.2g}. Lower share=, or give a count: nodes=100."
        )
    index = size.topk(count).indices.sort().values
    ends = torch.tensor([len(part) for part in flat]).cumsum(0)
    slot = torch.searchsorted(ends, index, right=True)
    inside = index - torch.cat([torch.zeros(1, dtype=torch.long), ends])[slot]
    width = torch.tensor([score.shape[1] for score in scores])[slot]
    return torch.stack([slot, inside // width, inside % width], 1)


def _count(
    size: Float[Tensor, " node"], choice: Choice, share: float, mass: float, target: float, available: int
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
