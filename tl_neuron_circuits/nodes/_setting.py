"""What every method needs to know, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..bases._site import Parts, Site
from ..models._protocol import TransformerLensModel
from ..tasks._metrics import Metric

MethodName = Literal[
    "relp",
    "gradient",
    "integrated_gradients",
    "integrated_gradients_inputs",
    "patching",
    "activation_difference",
    "random",
]
Baseline = Literal["corrupt", "zero", "mean"]
Direction = Literal["noising", "denoising"]
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """One attribution's settings, checked."""

    model: TransformerLensModel
    sites: tuple[Site, ...]
    metric: Metric
    method: MethodName
    rules: tuple[str, ...]
    stabilizer: float | None
    steps: int
    baseline: Baseline
    direction: Direction
    positions: Literal["keep", "sum"]
    units: Literal["keep", "sum"]


@dataclass(frozen=True)
class Runs:
    """A batch's two runs, taken apart at every site: where gradients are taken, and what it is compared with.

    `base` is None for a site whose baseline is zero.
    """

    clean: Mapping[str, Parts]
    base: Mapping[str, Parts | None]
