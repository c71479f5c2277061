"""Units: dictionaries are trained on centered inputs and outputs of mean squared norm d, and given back in the model's.

    x_n = (x - mean_in) / scale_in,   y_n = (y - mean_out) / scale_out,   scale^2 = E |x - mean|^2 / d

Folding back keeps decoder rows at unit norm: features are multiplied by scale_out instead.

    W_enc' = W_enc * scale_out / scale_in       b_enc' = scale_out * (b_enc - (mean_in / scale_in) @ W_enc)
    b_dec' = scale_out * b_dec + mean_out - mean_in @ W_skip'.T       W_skip' = W_skip * scale_out / scale_in
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import NumericalError
from .._processes import Processes
from ._sites import TrainingSite

_SAMPLE, _ROWS = 65_536, 4096
"""Positions that means and scales are measured on, at most, and how many at a time in float64."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """Means and scales of one site, float32."""

    mean_in: Float[Tensor, " d_in"]
    mean_out: Float[Tensor, " d_out"]
    scale_in: Float[Tensor, ""]
    scale_out: Float[Tensor, ""]

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "position d_in"],
        y: Float[Tensor, "position d_out"],
        site: TrainingSite,
        processes: Processes | None = None,
    ) -> "Scaling":
        """Measured on a sample, or on those of all processes together.

        Raises:
            NumericalError: the input or the output does not vary: a dead layer.
        """
        moments = [_moments(value, processes or Processes()) for value in (x, y)]
        for name, (_, scale) in zip((site.hook_in, site.hook_out), moments, strict=True):
            if not scale > 0:
                raise NumericalError(
                    f"expected activations that vary at {name}; they are constant over {len(x)} positions, so layer "
                    f"{site.layer} is dead or the tokens are all the same. Leave it out: TrainingConfig(layers=...)."
                )
        (mean_in, scale_in), (mean_out, scale_out) = moments
        return cls(mean_in, mean_out, scale_in, scale_out)

    def apply(self, x: Tensor, y: Tensor) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """Input and output in the units of training, float32."""
        return (x.float() - self.mean_in) / self.scale_in, (y.float() - self.mean_out) / self.scale_out

    def folded(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of training as weights on the model's own activations."""
        ratio = self.scale_out / self.scale_in
        W_enc = weights["W_enc"]
        folded = {
            "W_enc": W_enc * ratio,
            "b_enc": self.scale_out * (weights["b_enc"] - (self.mean_in / self.scale_in) @ W_enc),
            "W_dec": weights["W_dec"].clone(),
            "b_dec": self.scale_out * weights["b_dec"] + self.mean_out,
        }
        if "threshold" in weights:
            folded["threshold"] = weights["threshold"] * self.scale_out
        if "W_skip" in weights:
            folded["W_skip"] = weights["W_skip"] * ratio
            folded["b_dec"] = folded["b_dec"] - folded["W_skip"] @ self.mean_in
        return folded

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        names = ("mean_in", "mean_out", "scale_in", "scale_out")
        return {name: getattr(self, name) for name in names}


def _moments(value: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    parts = value[:_SAMPLE].split(_ROWS)
    count = torch.tensor(float(sum(map(len, parts))), dtype=torch.float64, device=value.device)
    summed = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0)
    total = processes.total({"count": count, "sum": summed})
    mean = total["sum"] / total["count"]
    squares = torch.stack([(part.double() - mean).square().sum() for part in parts]).sum()
    variance = processes.total({"squares": squares})["squares"] / total["count"] / value.shape[1]
    negligible = variance <= 1e-12 * (1e-12 + mean.square().mean())  # rounding of a constant
    return mean.float(), torch.where(negligible, torch.zeros_like(variance), variance.sqrt()).float()
