"""The group lasso on a Gram matrix: whole blocks of weights are in or out together.

    minimize over B:  ||Y - X B||^2 + penalty * sum over blocks of sqrt(size of block) * ||B_block||_F

A block is every weight from one group of sources (the components of one site) to one group of targets. With one column
a group this is the lasso. The factor makes blocks of different sizes equally likely to be chosen by chance.
Source: Yuan & Lin 2006; METHODS 3.3 (edges by block norm).
"""

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from .._errors import NumericalError, SettingsError
from ._proximal import fista, largest_eigenvalue
from ._solver import LassoSolution, check_penalty, explained
from ._statistics import Standardized


def block_norms(
    weights: Float64[Tensor, "source target"], groups: Int[Tensor, " source"], target_groups: Int[Tensor, " target"]
) -> Float64[Tensor, "group target_group"]:
    """Frobenius norm of every block."""
    return _block_sums(weights.square(), groups, target_groups).clamp(min=0).sqrt()


def solve_group_lasso(
    problem: Standardized,
    penalty: float,
    groups: Int[Tensor, " source"],
    target_groups: Int[Tensor, " target"] | None = None,
    *,
    allowed: Bool[Tensor, "source target"] | None = None,
    start: Float64[Tensor, "source target"] | None = None,
    tolerance: float = 1e-8,
    max_steps: int = 20_000,
) -> LassoSolution:
    """Solve the group lasso; `groups[i]` is the group of source i, from 0 without holes.

    Args:
        problem: from `standardize(statistics)`.
        penalty: as in the formula above.
        groups: of the sources.
        target_groups: of the targets; each on its own unless given.
        allowed: which sources each target may use; all unless given.
        start: weights to begin with.
        tolerance: duality gap of a target group at which to stop, in units of its y'y / 2n.
        max_steps: of FISTA.

    Raises:
        SettingsError: the penalty is not positive, or groups have holes.
        NumericalError: `tolerance` was not reached.
    """
    alpha = check_penalty(penalty) / (2 * problem.n)
    n_targets = len(problem.squares)
    if target_groups is None:
        target_groups = torch.arange(n_targets, device=groups.device)
    mask = torch.ones_like(problem.cross) if allowed is None else allowed.double()
    sizes = _block_sums(mask, _whole(groups), _whole(target_groups))
    cost = alpha * sizes.sqrt()
    squares = problem.squares.new_zeros(sizes.shape[1]).index_add_(0, target_groups, problem.squares)

    def gradient(weights: Tensor) -> Tensor:
        return (problem.gram @ weights - problem.cross) * mask

    def shrink(weights: Tensor, step: float) -> Tensor:
        norms = block_norms(weights, groups, target_groups)
        factor = (1 - step * cost / norms.clamp(min=1e-300)).clamp(min=0)
        return weights * factor[groups][:, target_groups]

    def gap(weights: Tensor) -> Tensor:
        slack = -gradient(weights)
        slope = (problem.cross * weights).sum(0)
        residual = problem.squares - slope - (weights * slack).sum(0)
        per_group = [
            v.new_zeros(len(squares)).index_add_(0, target_groups, v) for v in (residual, problem.squares - slope)
        ]
        pull = block_norms(slack, groups, target_groups)
        shrunk = torch.where(pull > 0, cost / pull, torch.inf).amin(0).clamp(max=1.0)
        primal = 0.5 * per_group[0] + (cost * block_norms(weights, groups, target_groups)).sum(0)
        dual = shrunk * per_group[1] - 0.5 * shrunk.square() * per_group[0]
        return torch.where(squares > 0, (primal - dual) / (0.5 * squares.clamp(min=1e-300)), 0.0)

    weights = torch.zeros_like(problem.cross) if start is None else start * mask
    step = 1 / largest_eigenvalue(problem.gram)
    weights, gaps = fista(weights, step, gradient, shrink, gap, target_groups, tolerance, max_steps)
    if float(gaps.max()) > tolerance:
        raise NumericalError(
            f"the group lasso did not converge: relative duality gap {float(gaps.max()):.1e}, expected "
            f"{tolerance:.1e}. Raise the penalty, max_steps or tolerance."
        )
    return LassoSolution(penalty, weights, gaps[target_groups], explained(problem, weights))


def _block_sums(values: Tensor, groups: Tensor, target_groups: Tensor) -> Tensor:
    rows = values.new_zeros(int(groups.max()) + 1, values.shape[1]).index_add_(0, groups, values)
    return values.new_zeros(len(rows), int(target_groups.max()) + 1).index_add_(1, target_groups, rows)


def _whole(groups: Tensor) -> Tensor:
    """The groups, if they are numbered from 0 without holes.

    Raises:
        SettingsError: they are not.
    """
    found = groups.unique()
    if not torch.equal(found, torch.arange(len(found), device=found.device)):
        raise SettingsError(f"expected groups numbered from 0 without holes; got {found[:10].tolist()}.")
    return groups
