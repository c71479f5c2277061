"""The penalty: a path of them, the error on held-out prompts, and which to take.

Penalties are alpha = penalty / (2 n), which means the same for regressions of different n; a share is alpha over the
smallest alpha that leaves no weight. Held-out error is the mean over targets of (y - prediction)^2 on blocks of prompts
that were left out, in units of the target's variance on all blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm.auto import tqdm

from ._observations import Observations, Regression, Site
from ._solver import LassoSolution, solve_group_lasso, solve_lasso
from ._statistics import Standardized, Statistics, standardize

Joint = Literal["joint", "pairs", "adjacent"]


@dataclass(frozen=True)
class Solving:
    """How weights are solved for: all earlier sites jointly, site by site, or the last earlier site alone."""

    joint: Joint
    groups: bool
    floor: float
    tolerance: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """One regression, standardized, with its weights."""

    regression: Regression
    problem: Standardized
    statistics: Statistics
    weights: Float64[Tensor, "source target"]
    r2: Float64[Tensor, " target"]


def smallest_empty(observations: Observations, solving: Solving) -> float:
    """The alpha from which on no regression has a weight."""
    found = 0.0
    for regression, statistics in zip(observations.regressions, observations.total(), strict=True):
        problem = standardize(statistics, solving.floor)
        pull = (problem.cross * regression.allowed.to(problem.cross.device)).abs()
        found = max(found, float(pull.max()) if pull.numel() else 0.0)
    return found


def fit_path(
    observations: Observations,
    alphas: Sequence[float],
    solving: Solving,
    times: Sequence[int] | None = None,
    verbose: bool = False,
    starts: Sequence[Tensor] | None = None,
) -> Iterator[list[Fitted]]:
    """Fits of all regressions, penalty by penalty in the order given, each from the last: give the largest first."""
    totals = observations.total(times)
    problems = [(r, standardize(s, solving.floor), s) for r, s in zip(observations.regressions, totals, strict=True)]
    last: list[Tensor | None] = [None] * len(problems) if starts is None else [*starts]
    for alpha in tqdm(alphas, desc="penalties", disable=not verbose, leave=False):
        fits = []
        for k, (regression, problem, statistics) in enumerate(problems):
            weights, r2 = _weights(observations.sites, regression, problem, alpha, solving, last[k])
            last[k] = weights
            fits.append(Fitted(regression, problem, statistics, weights, r2))
        yield fits


def _weights(
    sites: Sequence[Site],
    regression: Regression,
    problem: Standardized,
    alpha: float,
    solving: Solving,
    start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    device = problem.cross.device
    allowed = regression.allowed.to(device)
    if solving.groups:
        groups = regression.sources.site.to(device)
        found = _grouped(problem, regression, alpha, allowed, groups, solving, start)
        return found.weights, found.r2
    penalty = 2 * problem.n * alpha
    if solving.joint == "joint":
        found = solve_lasso(problem, penalty, allowed=allowed, start=start, tolerance=solving.tolerance)
        return found.weights, found.r2
    weights = torch.zeros_like(problem.cross)
    r2 = torch.full_like(problem.squares, -torch.inf)
    for rows, columns in _pairs(sites, regression, solving.joint):
        rows, columns = rows.to(device), columns.to(device)
        part = _part(problem, rows, columns)
        mask = allowed[rows][:, columns]
        begin = None if start is None else start[rows][:, columns]
        found = solve_lasso(part, penalty, allowed=mask, start=begin, tolerance=solving.tolerance)
        weights[rows[:, None], columns] = found.weights
        r2[columns] = r2[columns].maximum(found.r2)
    return weights, torch.where(torch.isinf(r2), torch.nan, r2)


def _grouped(
    problem: Standardized,
    regression: Regression,
    alpha: float,
    allowed: Tensor,
    groups: Tensor,
    solving: Solving,
    start: Tensor | None,
) -> LassoSolution:
    """Whole blocks from site to site: in or out together."""
    whole = groups.unique(return_inverse=True)[1]
    targets = regression.targets.site.to(groups.device).unique(return_inverse=True)[1]
    penalty = 2 * problem.n * alpha
    return solve_group_lasso(
        problem, penalty, whole, targets, allowed=allowed, start=start, tolerance=solving.tolerance
    )


def _pairs(sites: Sequence[Site], regression: Regression, joint: Joint) -> list[tuple[Tensor, Tensor]]:
    """Columns of source site and target site, for every pair of sites (the nearest earlier stage where adjacent)."""
    stages = [site.stage for site in sites] + [max(site.stage for site in sites) + 1]  # the readout comes last
    found = []
    for target in regression.targets.site.unique().tolist():
        earlier = [s for s in regression.sources.site.unique().tolist() if stages[s] < stages[target]]
        nearest = max((stages[s] for s in earlier), default=0)
        for source in earlier:
            if joint == "pairs" or stages[source] == nearest:
                rows = (regression.sources.site == source).nonzero().flatten()
                found.append((rows, (regression.targets.site == target).nonzero().flatten()))
    return found


def _part(problem: Standardized, rows: Tensor, columns: Tensor) -> Standardized:
    return Standardized(
        problem.n,
        problem.gram[rows[:, None], rows],
        problem.cross[rows[:, None], columns],
        problem.squares[columns],
        problem.scale[rows],
        problem.target_scale[columns],
        problem.constant[rows],
        problem.target_constant[columns],
    )


def held_out_errors(
    observations: Observations, alphas: Sequence[float], solving: Solving, folds: int, verbose: bool = False
) -> Float64[Tensor, "fold penalty"]:
    """Error on every fold's blocks of what was fitted to the others."""
    n_blocks = len(observations.blocks[0])
    scales = [standardize(total, solving.floor).target_scale for total in observations.total()]
    rows = []
    for fold in tqdm(range(folds), desc="folds", disable=not verbose, leave=False):
        held = [int(block % folds == fold) for block in range(n_blocks)]
        fitted = fit_path(observations, alphas, solving, times=[1 - h for h in held])
        test = observations.total(held)
        rows.append([_error(fits, test, scales) for fits in fitted])
    return torch.tensor(rows, dtype=torch.float64)


def _error(fits: Sequence[Fitted], tests: Sequence[Statistics], scales: Sequence[Tensor]) -> float:
    """Mean over the targets of every regression, then over regressions: the readout counts as much as the rest."""
    means = []
    for fit, test, scale in zip(fits, tests, scales, strict=True):
        explicable = fit.regression.allowed.any(0).to(fit.weights.device) & ~fit.problem.target_constant
        if bool(explicable.any()):
            means.append(float((prediction_error(fit, test) / scale.square())[explicable].mean()))
    return sum(means) / len(means)


def prediction_error(fit: Fitted, test: Statistics) -> Float64[Tensor, " target"]:
    """Mean squared error on the observations of `test`, in the targets' own units."""
    scale, target_scale = fit.problem.scale, fit.problem.target_scale
    weights = fit.weights / scale[:, None] * target_scale
    squares = test.target_squares - 2 * (weights * test.target_products).sum(0)
    squares = squares + (weights * (test.products @ weights)).sum(0)
    shift = (test.target_mean - fit.statistics.target_mean) - (test.mean - fit.statistics.mean) @ weights
    return squares / test.n + shift.square()


def one_standard_error(errors: Float64[Tensor, "fold penalty"]) -> int:
    """The first penalty (they fall) whose mean error is within one standard error of the smallest.

    Source: Hastie, Tibshirani, Friedman 2009, 7.10.
    """
    mean = errors.mean(0)
    best = int(mean.argmin())
    spread = float(errors[:, best].std()) / len(errors) ** 0.5 if len(errors) > 1 else 0.0
    return int((mean <= mean[best] + spread).nonzero()[0])
