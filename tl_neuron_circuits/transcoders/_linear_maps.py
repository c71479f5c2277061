"""The affine and the rank-r maps that rebuild a hook point best, as baselines to a dictionary.

    affine   y = x A + b, least squares
    rank r   the affine map of rank r with the least squared error: A P, P the projection on the r leading principal
             directions of x A (reduced-rank regression; Izenman 1975)

Both are fitted from sums over positions, in float64. Of an SAE, which reads what it writes, affine is the identity and
rank r is the principal components of the output.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import NumericalError

_RIDGE = 1e-9


@dataclass
class Moments:
    """Sums over positions of inputs, outputs and their products, float64."""

    count: int
    x: Float[Tensor, " d_in"]
    y: Float[Tensor, " d_out"]
    xx: Float[Tensor, "d_in d_in"]
    xy: Float[Tensor, "d_in d_out"]

    @classmethod
    def of(cls, x: Float[Tensor, "position d_in"], y: Float[Tensor, "position d_out"]) -> "Moments":
        """The sums of one batch."""
        x, y = x.double(), y.double()
        return cls(len(x), x.sum(0), y.sum(0), x.mT @ x, x.mT @ y)

    def __add__(self, other: "Moments") -> "Moments":
        """Both together."""
        sums = ((getattr(self, name) + getattr(other, name)) for name in ("count", "x", "y", "xx", "xy"))
        return Moments(*sums)

    @property
    def mean(self) -> Float[Tensor, " d_out"]:
        """Mean of the output."""
        return (self.y / self.count).float()


@dataclass(frozen=True, eq=False)
class LinearMap:
    """y = x @ weight + bias."""

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"]

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The map applied, in float32."""
        return x.float() @ self.weight.to(x.device) + self.bias.to(x.device)


def fit_maps(moments: Moments, rank: int) -> Mapping[str, LinearMap]:
    """The best affine map and the best of rank `rank`, by name ("affine", "rank 16").

    Raises:
        NumericalError: there are fewer positions than unknowns of the map.
    """
    n, d_in = moments.count, len(moments.x)
    if n <= d_in:
        raise NumericalError(f"expected more than {d_in} positions to fit an affine map on; got {n}: give more tokens.")
    mean_x, mean_y = moments.x / n, moments.y / n
    xx = moments.xx / n - torch.outer(mean_x, mean_x)
    xy = moments.xy / n - torch.outer(mean_x, mean_y)
    # A trace of ridge: inputs after a norm are linearly dependent (they have no mean).
    ridge = _RIDGE * xx.diagonal().mean() * torch.eye(d_in, dtype=xx.dtype, device=xx.device)
    weight = torch.linalg.solve(xx + ridge, xy)
    leading = torch.linalg.eigh(weight.mT @ xx @ weight).eigenvectors[:, -rank:]
    low = weight @ leading @ leading.mT
    maps = {"affine": weight, f"rank {rank}": low}
    return {name: LinearMap(w.float(), (mean_y - mean_x @ w).float()) for name, w in maps.items()}
