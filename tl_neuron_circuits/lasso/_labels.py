"""Label nodes: which features tell a class, by logistic regression with a lasso penalty.

    minimize over b, intercept:  sum over observations of log(1 + exp(z)) - y z + penalty * ||b||_1, z = X b + intercept

scikit-learn's `LogisticRegression(penalty="l1", C=1 / penalty)`, the intercept free. Several labels are several
independent regressions (one against the rest). A squared-error label is `solve_lasso` with the labels as targets.
Source: METHODS 3.1 (label node).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .._errors import NumericalError, SettingsError
from ._proximal import fista, largest_eigenvalue
from ._solver import check_penalty
from ._statistics import Statistics, standardize


@dataclass(frozen=True, eq=False, repr=False)
class LabelSolution:
    """Weights of standardized features for each label, and the intercepts."""

    penalty: float
    weights: Float64[Tensor, "source label"]
    intercept: Float64[Tensor, " label"]
    gap: Float64[Tensor, " label"]
    """Duality gap over the loss of the intercept alone."""
    mean: Float64[Tensor, " source"]
    scale: Float64[Tensor, " source"]

    def log_odds(self, x: Float[Tensor, "n source"]) -> Float64[Tensor, "n label"]:
        """Log odds of every label on raw features."""
        return (x.double() - self.mean) / self.scale @ self.weights + self.intercept

    def __repr__(self) -> str:
        sources, labels = self.weights.shape
        used = int(self.weights.count_nonzero())
        return f"LabelSolution(penalty {self.penalty:g}, {sources:,} x {labels}, {used} not zero)"


def solve_labels(
    x: Float[Tensor, "n source"],
    y: Float[Tensor, "n label"],
    penalty: float,
    *,
    floor: float = 1e-4,
    tolerance: float = 1e-8,
    max_steps: int = 20_000,
    start: LabelSolution | None = None,
) -> LabelSolution:
    """Fit every label (columns of zeros and ones) on standardized features, from `start` if given (a larger penalty's).

    Raises:
        SettingsError: labels are not zeros and ones, one is the same everywhere, or the penalty is not positive.
        NumericalError: a value is not finite, or `tolerance` was not reached.
    """
    check_penalty(penalty)
    statistics = Statistics.of(x)
    problem = standardize(statistics, floor)
    y = _labels(y.double())
    n = len(y)
    standard = (x.double() - statistics.mean) / problem.scale * ~problem.constant
    alpha = penalty / n
    share = y.mean(0)
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())

    def split(augmented: Tensor) -> tuple[Tensor, Tensor]:
        return augmented[:-1], augmented[-1]

    def gradient(augmented: Tensor) -> Tensor:
        weights, intercept = split(augmented)
        residual = torch.sigmoid(standard @ weights + intercept) - y
        return torch.cat([standard.T @ residual, residual.sum(0, keepdim=True)]) / n

    def shrink(augmented: Tensor, step: float) -> Tensor:
        weights, intercept = split(augmented)
        return torch.cat([torch.nn.functional.softshrink(weights, step * alpha), intercept[None]])

    def gap(augmented: Tensor) -> Tensor:
        weights, intercept = split(augmented)
        z = standard @ weights
        z = z + _best_intercept(z, y, intercept)
        residual = y - torch.sigmoid(z)
        pull = (standard.T @ residual).abs().amax(0) / n
        shrunk = (alpha / pull.clamp(min=1e-300)).clamp(max=1.0)
        primal = (torch.nn.functional.softplus(z) - y * z).mean(0) + alpha * weights.abs().sum(0)
        dual = _entropy(y - shrunk * residual).mean(0)
        return (primal - dual) / entropy

    first = torch.cat([standard.new_zeros(standard.shape[1], y.shape[1]), torch.logit(share)[None]])
    if start is not None:
        first = torch.cat([start.weights, start.intercept[None]])
    step = 4 / max(largest_eigenvalue(problem.gram), 1.0)
    labels = torch.arange(y.shape[1], device=y.device)
    found, gaps = fista(first, step, gradient, shrink, gap, labels, tolerance, max_steps)
    if not float(gaps.max()) <= tolerance:
        raise NumericalError(
            f"the labels' regression did not converge: relative duality gap {float(gaps.max()):.1e}, expected "
            f"{tolerance:.1e}. Raise the penalty, max_steps or tolerance."
        )
    weights, intercept = split(found)
    return LabelSolution(
        penalty, weights, _best_intercept(standard @ weights, y, intercept), gaps, statistics.mean, problem.scale
    )


def _best_intercept(z: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The intercepts at which residuals sum to zero, by Newton's method."""
    intercept = start.clone()
    for _ in range(50):
        p = torch.sigmoid(z + intercept)
        change = (y - p).sum(0) / (p * (1 - p)).sum(0).clamp(min=1e-12)
        intercept = intercept + change.clamp(-1, 1)
        if float(change.abs().max()) < 1e-13:
            break
    return intercept


def _entropy(u: Tensor) -> Tensor:
    return -(torch.xlogy(u, u) + torch.xlogy(1 - u, 1 - u))


def _labels(y: Tensor) -> Tensor:
    if not bool(((y == 0) | (y == 1)).all()):
        raise SettingsError(
            f"expected labels of zeros and ones, one column a label; got {y.unique()[:5].tolist()}. "
            "Give classes as columns: torch.nn.functional.one_hot(classes)."
        )
    same = (y.mean(0) % 1 == 0).nonzero().flatten().tolist()
    if same:
        raise SettingsError(
            f"labels {same} are the same for all {len(y)} observations: nothing to tell apart. Leave them out."
        )
    return y
