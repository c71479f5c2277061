"""The lasso on a Gram matrix, for all targets at once.

    minimize over b:  ||y - X b||^2 + penalty * ||b||_1

The paper's scaling; scikit-learn's `alpha` is penalty / (2 n). With G = X'X / n and c = X'y / n this is
b'Gb / 2 - c'b + alpha ||b||_1 + y'y / 2n, so nothing here grows with n. Each target works on a few columns: those it
uses and those that violate optimality, added until the duality gap over all columns is below `tolerance` times y'y / n.
On them: coordinate descent with exact steps between (`_coordinate`). Targets are independent; `allowed` says which
columns each may use. The solution of the lasso is unique unless columns are collinear; then the first of them is taken.
Source: Friedman et al. 2010; Tibshirani et al. 2012 (screening); METHODS 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import NumericalError, SettingsError
from ._coordinate import descend
from ._statistics import Standardized

_SPARSER = 8  # a multiplication by single rows costs so many times one of a full product
_CHUNK = 2**25  # numbers in the gradients of a chunk of targets: 256 MB
_GATHERED = 2**20  # numbers in gathered sub-matrices: 8 MB, which caches hold


@dataclass(frozen=True, eq=False, repr=False)
class LassoSolution:
    """Weights for one penalty: `weights[i, j]` is what source i adds to target j, in the problem's units.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> y = 2 * x[:, :1] - x[:, 1:2]
        >>> problem = tnc.lasso.standardize(tnc.lasso.Statistics.of(x, y))
        >>> found = tnc.lasso.solve_lasso(problem, 0.1 * tnc.lasso.largest_penalty(problem))
        >>> found.n_edges, tuple(found.weights.shape)
        (2, (3, 1))
    """

    penalty: float
    weights: Float64[Tensor, "source target"]
    gap: Float64[Tensor, " target"]
    """Duality gap over y'y / 2n: how far the objective may be from its minimum."""
    r2: Float64[Tensor, " target"]
    """Share of the target's variance explained; nan for a constant target."""

    @property
    def n_edges(self) -> int:
        """How many weights are not zero."""
        return int(self.weights.count_nonzero())

    def __repr__(self) -> str:
        sources, targets = self.weights.shape
        return f"LassoSolution(penalty {self.penalty:g}, {sources:,} x {targets:,}, {self.n_edges:,} weights not zero)"


def largest_penalty(problem: Standardized, allowed: Bool[Tensor, "source target"] | None = None) -> float:
    """The penalty from which on every weight is zero.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> y = 2 * x[:, :1] - x[:, 1:2]
        >>> problem = tnc.lasso.standardize(tnc.lasso.Statistics.of(x, y))
        >>> tnc.lasso.solve_lasso(problem, 1.01 * tnc.lasso.largest_penalty(problem)).n_edges
        0
    """
    cross = problem.cross if allowed is None else problem.cross * allowed
    return 2 * problem.n * float(cross.abs().max()) if cross.numel() else 0.0


def solve_lasso(
    problem: Standardized,
    penalty: float,
    *,
    allowed: Bool[Tensor, "source target"] | None = None,
    start: Float64[Tensor, "source target"] | None = None,
    tolerance: float = 1e-8,
    max_rounds: int = 200,
    verbose: bool = False,
) -> LassoSolution:
    """Solve the lasso for every target of `problem`.

    Args:
        problem: from `standardize(Statistics.of(x, y))`.
        penalty: the paper's lambda; above `largest_penalty(problem)` every weight is zero.
        allowed: which sources each target may use; all unless given.
        start: weights to begin with, such as the solution at a larger penalty.
        tolerance: duality gap at which a target is done, in units of its y'y / 2n.
        max_rounds: how often columns may be added.
        verbose: show progress.

    Raises:
        SettingsError: the penalty is not positive.
        NumericalError: a target did not reach `tolerance`.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> y = 2 * x[:, :1] - x[:, 1:2]
        >>> problem = tnc.lasso.standardize(tnc.lasso.Statistics.of(x, y))
        >>> solution = tnc.lasso.solve_lasso(problem, 0.1 * tnc.lasso.largest_penalty(problem))
        >>> (solution.weights != 0).flatten().tolist(), bool(solution.r2 > 0.95)
        ([True, True, False], True)
    """
    alpha = check_penalty(penalty) / (2 * problem.n)
    weights = torch.zeros_like(problem.cross) if start is None else start.clone()
    gap = torch.zeros_like(problem.squares)
    rows = max(64, _CHUNK // max(1, 4 * len(problem.gram)))
    chunks = torch.arange(weights.shape[1], device=weights.device).split(rows)
    for chunk in tqdm(chunks, desc="lasso targets", disable=not verbose, leave=False):
        mask = None if allowed is None else allowed[:, chunk]
        part = _Part(problem.gram, problem.cross[:, chunk], problem.squares[chunk], mask, alpha)
        weights[:, chunk], gap[chunk] = _solve(part, weights[:, chunk], tolerance, max_rounds)
    worst = float(gap.max()) if len(gap) else 0.0
    if worst > tolerance:
        raise NumericalError(
            f"{int((gap > tolerance).sum())} of {len(gap)} targets did not converge: relative duality gap {worst:.1e}, "
            f"expected {tolerance:.1e}. Raise the penalty, max_rounds or tolerance (nearly collinear sources do this)."
        )
    return LassoSolution(penalty, weights, gap, explained(problem, weights))


def lasso_path(
    problem: Standardized,
    penalties: Sequence[float],
    *,
    allowed: Bool[Tensor, "source target"] | None = None,
    tolerance: float = 1e-8,
    max_rounds: int = 200,
    verbose: bool = False,
) -> list[LassoSolution]:
    """Solve for several penalties, the largest first, each starting from the last; results in the order of `penalties`.

    Raises:
        SettingsError: a penalty is not positive.
        NumericalError: a target did not reach `tolerance`.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> y = 2 * x[:, :1] - x[:, 1:2]
        >>> problem = tnc.lasso.standardize(tnc.lasso.Statistics.of(x, y))
        >>> largest = tnc.lasso.largest_penalty(problem)
        >>> [solution.n_edges for solution in tnc.lasso.lasso_path(problem, [0.9 * largest, 0.1 * largest])]
        [1, 2]
    """
    order = sorted(range(len(penalties)), key=lambda k: -penalties[k])
    found: dict[int, LassoSolution] = {}
    start = None
    for k in tqdm(order, desc="penalties", disable=not verbose, leave=False):
        found[k] = solve_lasso(
            problem, penalties[k], allowed=allowed, start=start, tolerance=tolerance, max_rounds=max_rounds
        )
        start = found[k].weights
    return [found[k] for k in range(len(penalties))]


def explained(problem: Standardized, weights: Float64[Tensor, "source target"]) -> Float64[Tensor, " target"]:
    """R2 of these weights on the problem's observations (which need not be those they were fitted to)."""
    rows = max(64, _CHUNK // max(1, len(weights)))
    change = [
        ((_times(problem.gram, some) - 2 * cross) * some).sum(0)
        for some, cross in zip(weights.split(rows, 1), problem.cross.split(rows, 1), strict=True)
    ]
    residual = problem.squares + torch.cat(change)
    return torch.where(problem.target_constant, torch.nan, 1 - residual / problem.squares)


def check_penalty(penalty: float) -> float:
    """The penalty, if it is positive and finite.

    Raises:
        SettingsError: it is not.
    """
    if not 0 < penalty < float("inf"):
        raise SettingsError(f"expected a positive penalty; got {penalty}. Without penalty this is least squares.")
    return penalty


@dataclass(frozen=True)
class _Part:
    """Some targets of a problem."""

    gram: Tensor
    cross: Tensor
    squares: Tensor
    allowed: Tensor | None
    alpha: float

    def gradient(self, weights: Tensor) -> Tensor:
        """X'(y - X b) / n where allowed, else zero."""
        fitted = _times(self.gram, weights)
        gradient = self.cross - fitted
        return gradient if self.allowed is None else gradient * self.allowed

    def gap(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """Duality gap over y'y / 2n; the dual point is the residual, shrunk until feasible."""
        slope = (self.cross * weights).sum(0)
        # b'Gb = b'(c - gradient) because the weights are zero where the gradient was masked
        residual = self.squares - 2 * slope + slope - (weights * gradient).sum(0)
        shrink = (self.alpha / gradient.abs().amax(0).clamp(min=1e-300)).clamp(max=1.0)
        primal = 0.5 * residual + self.alpha * weights.abs().sum(0)
        dual = shrink * (self.squares - slope) - 0.5 * shrink.square() * residual
        return torch.where(self.squares > 0, (primal - dual) / (0.5 * self.squares.clamp(min=1e-300)), 0.0)

    def of(self, columns: Tensor) -> "_Part":
        """These targets alone."""
        mask = None if self.allowed is None else self.allowed[:, columns]
        return _Part(self.gram, self.cross[:, columns], self.squares[columns], mask, self.alpha)


def _solve(part: _Part, start: Tensor, tolerance: float, max_rounds: int) -> tuple[Tensor, Tensor]:
    """Weights and gaps of all targets of `part`."""
    weights = start if part.allowed is None else start * part.allowed
    gaps = part.squares.new_full(part.squares.shape, torch.inf)
    todo = torch.arange(len(gaps), device=gaps.device)
    for _ in range(max_rounds + 1):
        left, now = part.of(todo), weights[:, todo]
        gradient = left.gradient(now)
        gaps[todo] = left.gap(now, gradient)
        open_ = gaps[todo] > tolerance
        if not bool(open_.any()):
            break
        todo, gradient, now, left = todo[open_], gradient[:, open_], now[:, open_], left.of(open_)
        weights[:, todo] = _on_working_sets(left, now, gradient, 0.1 * tolerance)
    return weights, gaps


def _times(gram: Tensor, weights: Tensor) -> Tensor:
    """gram @ weights, by the few rows that each target uses where that is less work."""
    target, source = weights.T.nonzero(as_tuple=True)
    if _SPARSER * len(source) > weights.numel():
        return gram @ weights
    first = torch.searchsorted(target.contiguous(), torch.arange(weights.shape[1], device=gram.device))
    picked = weights.T[target, source]
    return torch.nn.functional.embedding_bag(source, gram, first, mode="sum", per_sample_weights=picked).T


def _on_working_sets(part: _Part, weights: Tensor, gradient: Tensor, tolerance: float) -> Tensor:
    """Solve every target on the columns it uses and its worst violators."""
    working = weights != 0
    violation = torch.where(working, 0.0, gradient.abs() - part.alpha).clamp_(min=0)
    quota = working.sum(0).clamp(min=32)
    worst = violation.topk(min(int(quota.max()), len(violation)), dim=0)
    chosen = (worst.values > 0) & (torch.arange(len(worst.values), device=quota.device)[:, None] < quota)
    working.scatter_(0, worst.indices, working.gather(0, worst.indices) | chosen)
    size = working.sum(0)
    out = weights.clone()
    for targets in _equal_chunks(size):
        width = int(size[targets].max())
        if width == 0:
            continue
        inside = torch.arange(width, device=size.device) < size[targets, None]
        columns = torch.zeros_like(inside, dtype=torch.long)
        columns[inside] = working[:, targets].T.nonzero(as_tuple=True)[1]
        out[:, targets] = _gathered(part, weights, targets, columns, inside, tolerance)
    return out


def _equal_chunks(size: Int[Tensor, " target"]) -> list[Tensor]:
    """Targets by the size of their working sets, in chunks whose gathered matrices fit in memory."""
    order = size.argsort(stable=True)
    chunks, first, sizes = [], 0, size[order].tolist()
    for last, width in enumerate(sizes):
        too_wide = (last - first + 1) * width**2 > _GATHERED or width > 2 * sizes[first] + 32
        if last > first and too_wide:
            chunks.append(order[first:last])
            first = last
    return [*chunks, order[first:]]


def _gathered(
    part: _Part, weights: Tensor, targets: Tensor, columns: Tensor, inside: Tensor, tolerance: float
) -> Tensor:
    """New weights [source, len(targets)] of targets solved on `columns` (rows padded where not `inside`)."""
    both = inside[:, :, None] & inside[:, None, :]
    gram = part.gram[columns[:, :, None], columns[:, None, :]].mul_(both)
    cross = part.cross.T[targets].gather(1, columns) * inside
    start = weights.T[targets].gather(1, columns) * inside
    found = descend(gram, cross, part.squares[targets], part.alpha, start, tolerance)
    fresh = torch.zeros_like(weights[:, targets]).T.contiguous()
    return fresh.scatter_add_(1, columns, found * inside).T
