"""Matched controls: for every node of a group a random other one of its hook point, position and size of activation.

Random neurons of a layer are mostly near zero, and scaling them shows nothing about those that were chosen for being
strong. So each node is replaced by one of the `POOL` nodes, among those in no group, whose mean |activation| over the
prompts is nearest to its own; no node twice in a draw. The strongest of a layer may have no equal:
`size` = sum |a| of the drawn / sum |a| of the group says how well the draws match.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._errors import SettingsError
from ..models._protocol import TransformerLensModel
from ._find_nodes import reads_of_nodes, values_by_key
from ._steering_prompts import ReadPrompts, run

POOL = 10
Place = tuple[str, int]
"""Key and position of nodes; -1 is every position."""


@dataclass(frozen=True, eq=False)
class Draw:
    """A control group, with its size against the group's."""

    nodes: pd.DataFrame
    size: float


def draw_matched(
    model: TransformerLensModel, prompts: ReadPrompts, groups: Mapping[str, pd.DataFrame], count: int, seed: int,
    batch_size: int,
) -> dict[str, list[Draw]]:  # fmt: skip
    """`count` control groups for every group.

    Raises:
        SettingsError: a hook point has too few nodes outside the groups.
    """
    frame = pd.concat(groups.values())
    sizes = _mean_sizes(model, prompts, frame, batch_size)
    free = _free(frame, sizes)
    generator = torch.Generator().manual_seed(seed)
    return {name: [_draw(group, sizes, free, generator) for _ in range(count)] for name, group in groups.items()}


def _mean_sizes(
    model: TransformerLensModel, prompts: ReadPrompts, frame: pd.DataFrame, batch_size: int
) -> dict[Place, Float[Tensor, " unit"]]:
    """Mean |activation| of every unit where some node is; over prompts, and positions for nodes without one."""
    places = list(dict.fromkeys(zip(frame["key"], frame["position"].astype(int), strict=True)))
    sums: dict[Place, Tensor] = {}
    counts: dict[Place, int] = {}
    for _, tokens in prompts.batches(batch_size):
        values = values_by_key(run(model, tokens, reads_of_nodes(frame))[1], frame)
        for place in places:
            key, position = place
            size = values[key].double().abs().cpu()
            if position >= size.shape[1]:
                raise SettingsError(f"expected positions below {size.shape[1]} at {key}; got {position}.")
            size = size.flatten(0, 1) if position < 0 else size[:, position]
            sums[place] = sums.get(place, 0) + size.sum(0)
            counts[place] = counts.get(place, 0) + len(size)
    return {place: total / counts[place] for place, total in sums.items()}


def _free(frame: pd.DataFrame, sizes: Mapping[Place, Tensor]) -> dict[Place, Bool[Tensor, " unit"]]:
    """Units in no group; a node without a position is taken at every position, and the reverse."""
    free = {place: torch.ones(len(size), dtype=torch.bool) for place, size in sizes.items()}
    for key, position, unit in frame[["key", "position", "unit"]].itertuples(index=False):
        _take(free, (str(key), int(position)), int(unit))
    return free


def _take(free: Mapping[Place, Tensor], place: Place, unit: int) -> None:
    for key, position in free:
        if key == place[0] and (position == place[1] or -1 in (position, place[1])):
            free[key, position][unit] = False


def _draw(
    group: pd.DataFrame, sizes: Mapping[Place, Tensor], free: Mapping[Place, Tensor], generator: torch.Generator
) -> Draw:  # fmt: skip
    units: list[int] = []
    free = {place: mask.clone() for place, mask in free.items()}
    own, drawn = 0.0, 0.0
    for key, position, unit in group[["key", "position", "unit"]].itertuples(index=False):
        place = (str(key), int(position))
        size = sizes[place]
        distance = torch.where(free[place], (size - size[unit]).abs(), torch.inf)
        nearest = distance.topk(min(POOL, len(distance)), largest=False)
        near = nearest.indices[nearest.values < torch.inf]
        if not len(near):
            raise SettingsError(f"expected nodes outside the groups at {key}, for controls; all {len(size)} are taken.")
        chosen = int(near[int(torch.randint(len(near), (1,), generator=generator))])
        _take(free, place, chosen)
        units.append(chosen)
        own, drawn = own + float(size[unit]), drawn + float(size[chosen])
    labels = [f"control of {label}" for label in group["label"]]
    return Draw(group.assign(unit=units, label=labels), drawn / own if own else float("nan"))
