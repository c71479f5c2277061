"""A linear probe: logistic regression with a small ridge on standardized activations, solved by Newton's method.

    minimize over w, b:  mean of log(1 + exp(z)) - y z  +  ridge / 2 * ||w||^2,   z = standardized(x) w + b

Standardization is of the data it is fitted to and goes into the weights, so that a probe can be applied, and its
gradient taken, on activations themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .._errors import NumericalError, SettingsError
from ._statistics import Statistics, standardize


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """`log_odds(x) = x @ weights + bias` of the label being 1; made by `fit_probe`."""

    weights: Float64[Tensor, " d"]
    bias: float

    def log_odds(self, x: Float[Tensor, "... d"]) -> Float64[Tensor, "..."]:
        """Of activations as they are."""
        return x.double() @ self.weights.to(x.device) + self.bias

    def predictions(self, x: Float[Tensor, "n d"]) -> Tensor:
        """0 or 1."""
        return (self.log_odds(x) > 0).long()

    def __repr__(self) -> str:
        return f"Probe({len(self.weights)} activations)"


def fit_probe(x: Float[Tensor, "n d"], y: Tensor, ridge: float = 1e-2, steps: int = 50) -> Probe:
    """Fit a probe; constant columns get no weight.

    Raises:
        SettingsError: labels are not zeros and ones, or all the same.
        NumericalError: an activation is not finite, or the fit did not converge.
    """
    y = y.double()
    if not bool(((y == 0) | (y == 1)).all()) or len(y.unique()) < 2:
        raise SettingsError("expected labels of both 0 and 1 for a probe, and no others.")
    statistics = Statistics.of(x)
    problem = standardize(statistics)
    keep = (~problem.constant).double() / problem.scale
    standard = torch.cat([(x.double() - statistics.mean) * keep, torch.ones(len(y), 1).double()], 1)
    penalty = torch.full((standard.shape[1],), ridge, dtype=torch.float64)
    penalty[-1] = 1e-9
    weights = torch.zeros_like(penalty)

    def loss(w: Tensor) -> Tensor:
        z = standard @ w
        return (torch.nn.functional.softplus(z) - y * z).mean() + 0.5 * (penalty * w.square()).sum()

    for _ in range(steps):
        p = torch.sigmoid(standard @ weights)
        gradient = standard.T @ (p - y) / len(y) + penalty * weights
        if float(gradient.abs().max()) < 1e-8:
            break
        hessian = (standard.T * (p * (1 - p))) @ standard / len(y) + penalty.diag()
        step = torch.linalg.solve(hessian, gradient)
        length = 1.0
        while length > 1e-6 and loss(weights - length * step) > loss(weights) - 1e-4 * length * (gradient @ step):
            length /= 2
        weights = weights - length * step
    else:
        raise NumericalError("the probe did not converge. Give a larger ridge.")
    scaled = weights[:-1] * keep
    return Probe(scaled, float(weights[-1] - scaled @ statistics.mean))


def eraser(x: Tensor, attribute: Tensor) -> Callable[[Tensor], Tensor]:
    """A projection after which no linear probe tells the attribute on `x` better than its intercept: LEACE's, rank one.

    x - d (v . (x - mean)) / (v . d),   d the difference of class means, v = covariance^-1 d

    Raises:
        SettingsError: the attribute is the same everywhere.

    Source: Belrose et al. 2023, arXiv 2306.03819.
    """
    x = x.double()
    mean = x.mean(0)
    centered = x - mean
    covariance = centered.T @ centered / len(x)
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())
    difference = x[attribute == 1].mean(0) - x[attribute == 0].mean(0)
    if not bool(torch.isfinite(difference).all()):
        raise SettingsError("the concept texts all have one value of the attribute: nothing to contrast.")
    v = torch.linalg.solve(covariance, difference)
    scale = (v @ difference).clamp(min=torch.finfo(torch.float64).tiny)
    return lambda values: values.double() - ((values.double() - mean) @ v / scale)[:, None] * difference
