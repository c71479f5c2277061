"""Coordinate descent for many small lassos at once, with exact steps on the support between sweeps.

A sweep sets each weight to its minimizer with the others fixed. Sweeps alone crawl where sources are highly correlated,
as activations are; so after a few of them the equations of the support, G_SS b_S = c_S - alpha sign(b_S), are solved
and the weights move towards that solution as far as no sign changes: the objective is quadratic there, so it falls.
Source: Friedman et al. 2010 (sweeps); Lee et al. 2006 (steps on the support).
"""

import torch
from jaxtyping import Float64
from torch import Tensor

_SWEEPS = 2
_STEPS = 2
_RIDGE = 1e-10


def descend(
    gram: Float64[Tensor, "target width width"],
    cross: Float64[Tensor, "target width"],
    squares: Float64[Tensor, " target"],
    alpha: float,
    start: Float64[Tensor, "target width"],
    tolerance: float,
    max_rounds: int = 250,
) -> Float64[Tensor, "target width"]:
    """Minimize b'Gb / 2 - c'b + alpha ||b||_1 for each target until its duality gap over y'y / 2n is `tolerance`.

    Columns with a zero diagonal keep their start. Stops after `max_rounds` whatever the gap: the caller checks it.
    """
    weights = start.clone()
    todo = torch.arange(len(weights), device=weights.device)
    here = (gram, cross, squares, weights)
    for _ in range(max_rounds):
        b = _sweep(*here[:2], alpha, here[3])
        for _ in range(_STEPS):
            b = _on_support(*here[:2], alpha, b)
        weights[todo] = b
        open_ = _gap(*here[:3], alpha, b) > tolerance
        left = int(open_.sum())
        if left == 0:
            break
        if left <= 0.7 * len(b):
            todo = todo[open_]
            here = (here[0][open_], here[1][open_], here[2][open_], b[open_])
        else:
            here = (*here[:3], b)
    return weights


def _sweep(gram: Tensor, cross: Tensor, alpha: float, weights: Tensor) -> Tensor:
    weights = weights.clone()
    gradient = cross - torch.bmm(gram, weights[:, :, None])[:, :, 0]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    safe = diagonal.clamp(min=1e-300)
    for _ in range(_SWEEPS):
        for k in range(weights.shape[1]):
            old = weights[:, k]
            pull = gradient[:, k] + diagonal[:, k] * old
            new = torch.nn.functional.softshrink(pull, alpha) / safe[:, k]
            change = torch.where(diagonal[:, k] > 0, new - old, 0.0)
            gradient.addcmul_(gram[:, k], change[:, None], value=-1)
            weights[:, k] += change
    return weights


def _on_support(gram: Tensor, cross: Tensor, alpha: float, weights: Tensor) -> Tensor:
    """Step to the solution on the support, or as far towards it as no sign changes.

    The ridge stands for exactly collinear columns: along their null space the step is long and ends where the first of
    them is zero, which is where the penalty is least.
    """
    support = weights != 0
    both = support[:, :, None] & support[:, None, :]
    system = torch.where(both, gram, 0.0)
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * diagonal.amax(1, keepdim=True)
    diagonal.add_(torch.where(support, ridge, 1.0))
    gradient = cross - torch.bmm(gram, weights[:, :, None])[:, :, 0]
    right = torch.where(support, gradient - alpha * weights.sign(), 0.0)
    factor, failed = torch.linalg.cholesky_ex(system)
    step = torch.where(support, torch.cholesky_solve(right[:, :, None], factor)[:, :, 0], 0.0)
    crossing = torch.where(step * weights < 0, -weights / step, torch.inf)
    length = crossing.amin(1, keepdim=True).clamp(max=1.0)
    moved = torch.where(crossing <= length, 0.0, weights + length * step)
    good = (failed == 0) & torch.isfinite(moved).all(1)
    good &= _objective(gram, cross, alpha, moved) <= _objective(gram, cross, alpha, weights)
    return torch.where(good[:, None], moved, weights)


def _objective(gram: Tensor, cross: Tensor, alpha: float, weights: Tensor) -> Tensor:
    fitted = torch.bmm(gram, weights[:, :, None])[:, :, 0]
    return ((0.5 * fitted - cross) * weights).sum(1) + alpha * weights.abs().sum(1)


def _gap(gram: Tensor, cross: Tensor, squares: Tensor, alpha: float, weights: Tensor) -> Tensor:
    gradient = cross - torch.bmm(gram, weights[:, :, None])[:, :, 0]
    slope = (cross * weights).sum(1)
    residual = squares - slope - (weights * gradient).sum(1)
    shrink = (alpha / gradient.abs().amax(1).clamp(min=1e-300)).clamp(max=1.0)
    gap = 0.5 * residual + alpha * weights.abs().sum(1) - shrink * (squares - slope) + 0.5 * shrink.square() * residual
    return gap / (0.5 * squares.clamp(min=1e-300))
