"""Which nodes make the circuit: by number, by their share of the target, or by cumulative mass. METHODS 1.6."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import NumericalError, SettingsError
from .._options import Options, parse_options

_NEAR_ZERO = 1e-6


@dataclass(frozen=True)
class ByShare(Options):
    """Choose every node whose |score| is at least `share` of the target.

    Raises:
        SettingsError: a share that is not positive.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> prompt = "The capital of the state containing Dallas is"
        >>> circuit = tnc.trace(tnc.load_demo_model(), prompt, " Austin", nodes=tnc.ByShare(0.02))
        >>> circuit.settings["nodes"]
        'share(0.02)'
    """

    name: ClassVar[str] = "share"
    share: float = 0.005

    def __post_init__(self) -> None:
        """Check the share."""
        super().__post_init__()
        if not self.share > 0:
            raise SettingsError(f"expected a positive share; got {self.share}.")

    @property
    def label(self) -> str:
        """How settings and the command line write it."""
        return f"share({self.share:g})"


@dataclass(frozen=True)
class ByMass(Options):
    """Choose the fewest nodes that make up `mass` of the sum of all |scores|.

    Raises:
        SettingsError: a mass that is not above 0 and up to 1.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> prompt = "The capital of the state containing Dallas is"
        >>> circuit = tnc.trace(tnc.load_demo_model(), prompt, " Austin", nodes=tnc.ByMass(0.5))
        >>> circuit.settings["nodes"]
        'mass(0.5)'
    """

    name: ClassVar[str] = "mass"
    mass: float = 0.8

    def __post_init__(self) -> None:
        """Check the mass."""
        super().__post_init__()
        if not 0 < self.mass <= 1:
            raise SettingsError(f"expected a mass above 0 and up to 1; got {self.mass}.")

    @property
    def label(self) -> str:
        """How settings and the command line write it."""
        return f"mass({self.mass:g})"


Choice = int | ByShare | ByMass
_KINDS: dict[str, type[ByShare | ByMass]] = {kind.name: kind for kind in (ByShare, ByMass)}


def parse_choice(text: str) -> Choice:
    """The choice that a label or the command line names: "50", "share", "share(0.01)", "mass", "mass(0.9)".

    Raises:
        SettingsError: none of these.
    """
    if re.fullmatch(r"\s*-?\d+\s*", text):
        return int(text)
    return parse_options(text, _KINDS, what="a number of nodes, or a choice")


def choose_nodes(
    scores: Sequence[Float[Tensor, "pos _"]], changes: Sequence[Float[Tensor, "pos _"]], target: float,
    layers: Sequence[int], choice: Choice, *,
    skipped_positions: Collection[int] = (), excluded: Collection[tuple[int, int]] = (),
) -> Int[Tensor, "node 3"]:  # fmt: skip
    """Slot, position and unit of the chosen nodes, in that order.

    Nodes whose score is zero next to the mean are no part of a share or a mass; a number of nodes takes them last, the
    most active first, as circuit-tracer may.

    Args:
        scores: of each slot's nodes.
        changes: of their activations; a node with none is not active.
        target: what the scores are shares of.
        layers: of the slots.
        choice: how many nodes, `ByShare` or `ByMass`.
        skipped_positions: where no node is chosen.
        excluded: (layer, unit) of nodes that are never chosen.

    Raises:
        NumericalError: the target is zero, so nothing has a share of it.
        SettingsError: a number out of its range, or nothing to choose from.
    """
    ranking = rank_nodes(scores, changes, layers, skipped_positions=skipped_positions, excluded=excluded)
    size, available = ranking.size, ranking.available
    if isinstance(choice, int):
        active = available + int((ranking.rest > 0).sum())
        if not 1 <= choice <= active:
            raise SettingsError(f"expected between 1 and {active:,} nodes, as many as are active; got {choice}.")
        count = choice
    elif isinstance(choice, ByMass):
        ordered = size.sort(descending=True).values
        reached = ordered.cumsum(0) >= choice.mass * ordered.sum() * (1 - 1e-12)
        count = min(available, int(reached.int().argmax()) + 1)
    else:
        if target == 0:
            raise NumericalError("the target is exactly zero, so nothing has a share of it. Give a number: nodes=100.")
        count = int((size >= choice.share * abs(target)).sum())
        if count == 0:
            raise SettingsError(
                f"no node has {choice.share:g} of the target ({target:.4g}); the largest has "
                f"{float(size.max()) / abs(target):.2g}. Lower ByShare(...), or give a number: nodes=100."
            )
    return ranking.first(count)


@dataclass(frozen=True)
class Ranking:
    """All nodes that may be chosen, by |score|."""

    size: Float[Tensor, " node"]
    """|score|, zero where a node may not be chosen by it: all slots' nodes, one after the other."""
    available: int
    """How many may."""
    rest: Float[Tensor, " node"]
    """|change| of the active nodes whose score is next to nothing, zero elsewhere."""
    shapes: Sequence[tuple[int, int]]
    """Positions and units of each slot."""

    def first(self, count: int) -> Int[Tensor, "chosen 3"]:
        """Slot, position and unit of the strongest nodes, in that order."""
        index = self.size.topk(min(count, self.available)).indices
        if count > self.available:
            index = torch.cat([index, self.rest.topk(count - self.available).indices])
        index = index.sort().values
        ends = torch.tensor([positions * units for positions, units in self.shapes]).cumsum(0)
        slot = torch.searchsorted(ends, index, right=True)
        inside = index - torch.cat([torch.zeros(1, dtype=torch.long), ends])[slot]
        width = torch.tensor([units for _, units in self.shapes])[slot]
        return torch.stack([slot, inside // width, inside % width], 1)


def rank_nodes(
    scores: Sequence[Float[Tensor, "pos _"]], changes: Sequence[Float[Tensor, "pos _"]], layers: Sequence[int], *,
    skipped_positions: Collection[int] = (), excluded: Collection[tuple[int, int]] = (),
) -> Ranking:  # fmt: skip
    """Rank the nodes that may be chosen; arguments as in `choose_nodes`.

    Raises:
        SettingsError: an excluded unit that is not there.
    """
    scores = [slot.cpu().double() for slot in scores]
    mean = sum(float(score.abs().sum()) for score in scores) / max(1, sum(int((s != 0).sum()) for s in scores))
    allowed = [torch.ones_like(score, dtype=torch.bool) for score in scores]
    for mask in allowed:
        mask[list(skipped_positions)] = False
    for layer, unit in excluded:
        if layer not in layers or not 0 <= unit < scores[layers.index(layer)].shape[1]:
            raise SettingsError(
                f"exclude= names the unit ({layer}, {unit}), which has no nodes here; nodes are in the layers {layers} "
                f"with {[score.shape[1] for score in scores]} units."
            )
        allowed[layers.index(layer)][:, unit] = False
    size, rest = [], []
    for score, change, mask in zip(scores, changes, allowed, strict=True):
        supports = score.abs() > _NEAR_ZERO * mean
        size.append(torch.where(mask & supports, score.abs(), 0.0).flatten())
        rest.append(torch.where(mask & ~supports, change.cpu().double().abs(), 0.0).flatten())
    shapes = [(len(score), score.shape[1]) for score in scores]
    return Ranking(torch.cat(size), sum(int((part > 0).sum()) for part in size), torch.cat(rest), shapes)
