"""The lasso on a Gram matrix, for all targets at once.

    minimize over b:  ||y - X b||^2 + penalty * ||b||_1

The paper's scaling; scikit-learn's `alpha` is penalty / (2 n). With G = X'X / n and c = X'y / n this is
b'Gb / 2 - c'b + alpha ||b||_1 + y'y / 2n, so nothing here grows with n. Each target works on a few columns: those it
uses and those that violate optimality, added until the duality gap over all columns is below `tolerance` times y'y / n.
On them: coordinate descent with exact steps between (`descend`). Targets are independent; `allowed` says which
columns each may use. The solution of the lasso is unique unless columns are collinear; then the first of them is taken.
Source: Friedman et al. 2010; Tibshirani et al. 2012 (screening); METHODS 3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from .._errors import NumericalError, SettingsError
from .._progress import progress
from ._statistics import Products, Standardized

# --- All targets on working sets ---


_SPARSER = 8  # multiplying by gathered rows costs this many times a full product, entry by entry
_CHUNK = 2**25  # numbers in the gradients of a chunk of targets: 256 MB
_GATHERED = 2**20  # numbers in gathered sub-matrices: 8 MB, which caches hold


@dataclass(frozen=True, eq=False, repr=False)
class LassoSolution:
    """Weights for one penalty: `weights[i, j]` is what source i adds to target j, in the problem's units."""

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
    """The penalty from which on every weight is zero."""
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
    verbose: bool | None = False,
) -> LassoSolution:
    """Solve the lasso for every target of `problem`.

    Args:
        problem: from `standardize(Statistics.from_rows(x, y))`.
        penalty: the paper's lambda; above `largest_penalty(problem)` every weight is zero.
        allowed: which sources each target may use; all unless given.
        start: weights to begin with, such as the solution at a larger penalty.
        tolerance: duality gap at which a target is done, in units of its y'y / 2n.
        max_rounds: how often columns may be added.
        verbose: a progress bar; None is by itself, after two seconds.

    Raises:
        SettingsError: the penalty is not positive.
        NumericalError: a target did not reach `tolerance`.
    """
    alpha = check_penalty(penalty) / (2 * problem.n)
    weights = torch.zeros_like(problem.cross) if start is None else start.clone()
    gap = torch.zeros_like(problem.squares)
    rows = max(64, _CHUNK // max(1, 4 * len(problem.gram)))
    chunks = torch.arange(weights.shape[1], device=weights.device).split(rows)
    for chunk in progress(chunks, desc="lasso targets", verbose=verbose):
        mask = None if allowed is None else allowed[:, chunk]
        part = _Part(problem.gram, problem.cross[:, chunk], problem.squares[chunk], mask, alpha)
        weights[:, chunk], gap[chunk] = _solve(part, weights[:, chunk], tolerance, max_rounds)
    worst = float(gap.max()) if len(gap) else 0.0
    if worst > tolerance:
        raise NumericalError(
            f"{int((gap > tolerance).sum())} of {len(gap)} targets did not converge: relative duality gap {worst:.1e}, "
            f"expected {tolerance:.1e}. Raise the penalty, max_rounds or tolerance (nearly collinear sources do this)."
        )
    return LassoSolution(penalty, weights, gap, r_squared(problem, weights))


def r_squared(problem: Standardized, weights: Float64[Tensor, "source target"]) -> Float64[Tensor, " target"]:
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
        raise SettingsError(f"expected a positive penalty; got {penalty}. Without a penalty this is least squares.")
    return penalty


@dataclass(frozen=True)
class _Part:
    """Some targets of a problem."""

    gram: Tensor | Products
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

    def select(self, columns: Tensor) -> "_Part":
        """These targets alone."""
        mask = None if self.allowed is None else self.allowed[:, columns]
        return _Part(self.gram, self.cross[:, columns], self.squares[columns], mask, self.alpha)


def _solve(part: _Part, start: Tensor, tolerance: float, max_rounds: int) -> tuple[Tensor, Tensor]:
    """Weights and gaps of all targets of `part`."""
    weights = start if part.allowed is None else start * part.allowed
    gaps = part.squares.new_full(part.squares.shape, torch.inf)
    todo = torch.arange(len(gaps), device=gaps.device)
    for _ in range(max_rounds + 1):
        rest = part.select(todo)
        gradient = rest.gradient(weights[:, todo])
        gaps[todo] = rest.gap(weights[:, todo], gradient)
        unsolved = gaps[todo] > tolerance
        if not bool(unsolved.any()):
            break
        todo = todo[unsolved]
        weights[:, todo] = _solve_working_sets(
            part.select(todo), weights[:, todo], gradient[:, unsolved], 0.1 * tolerance
        )
    return weights, gaps


def _times(gram: Tensor | Products, weights: Tensor) -> Tensor:
    """gram @ weights, by the few rows that each target uses where that is less work."""
    if not isinstance(gram, Tensor):
        return gram @ weights
    target, source = weights.T.nonzero(as_tuple=True)
    if _SPARSER * len(source) > weights.numel():
        return gram @ weights
    first = torch.searchsorted(target.contiguous(), torch.arange(weights.shape[1], device=gram.device))
    picked = weights.T[target, source]
    return torch.nn.functional.embedding_bag(source, gram, first, mode="sum", per_sample_weights=picked).T


def _solve_working_sets(part: _Part, weights: Tensor, gradient: Tensor, tolerance: float) -> Tensor:
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
        out[:, targets] = _solve_gathered(part, weights, targets, columns, inside, tolerance)
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


def _solve_gathered(
    part: _Part, weights: Tensor, targets: Tensor, columns: Tensor, inside: Tensor, tolerance: float
) -> Tensor:
    """New weights [source, len(targets)] of targets solved on `columns` (rows padded where not `inside`)."""
    both = inside[:, :, None] & inside[:, None, :]
    gram = part.gram[columns[:, :, None], columns[:, None, :]].mul_(both)
    cross = part.cross.T[targets].gather(1, columns) * inside
    start = weights.T[targets].gather(1, columns) * inside
    solved = descend(gram, cross, part.squares[targets], part.alpha, start, tolerance)
    fresh = torch.zeros_like(weights[:, targets]).T.contiguous()
    return fresh.scatter_add_(1, columns, solved * inside).T


# --- Coordinate descent for many small lassos at once, with exact steps on the support between sweeps ---
# A sweep sets each weight to its minimizer with the others fixed. Sweeps alone crawl where sources are highly
# correlated, as activations are; so after a few of them the equations of the support, G_SS b_S = c_S - alpha
# sign(b_S), are solved and the weights move towards that solution as far as no sign changes: the objective is quadratic
# there, so it falls.
# Source: Friedman et al. 2010 (sweeps); Lee et al. 2006 (steps on the support).


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
    b = start
    for _ in range(max_rounds):
        b = _sweep(gram, cross, alpha, b)
        for _ in range(_STEPS):
            b = _step_on_support(gram, cross, alpha, b)
        weights[todo] = b
        unsolved = _gap(gram, cross, squares, alpha, b) > tolerance
        if not bool(unsolved.any()):
            break
        if int(unsolved.sum()) <= 0.7 * len(b):  # copying the rest costs less than solving all again
            todo, b = todo[unsolved], b[unsolved]
            gram, cross, squares = gram[unsolved], cross[unsolved], squares[unsolved]
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


def _step_on_support(gram: Tensor, cross: Tensor, alpha: float, weights: Tensor) -> Tensor:
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


# --- The group lasso on a Gram matrix: whole blocks of weights are in or out together ---
#     minimize over B:  ||Y - X B||^2 + penalty * sum over blocks of sqrt(size of block) * ||B_block||_F
#
# A block is every weight from one group of sources (the components of one site) to one group of targets. With one
# column
# a group this is the lasso. The factor makes blocks of different sizes equally likely to be chosen by chance.
# Source: Yuan & Lin 2006; METHODS 3.3 (edges by block norm).


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
    sizes = _block_sums(mask, _check_groups(groups), _check_groups(target_groups))
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
    assert isinstance(problem.gram, Tensor)  # groups are not streamed
    step = 1 / largest_eigenvalue(problem.gram)
    weights, gaps = fista(weights, step, gradient, shrink, gap, target_groups, tolerance, max_steps)
    if float(gaps.max()) > tolerance:
        raise NumericalError(
            f"the group lasso did not converge: relative duality gap {float(gaps.max()):.1e}, expected "
            f"{tolerance:.1e}. Raise the penalty, max_steps or tolerance."
        )
    return LassoSolution(penalty, weights, gaps[target_groups], r_squared(problem, weights))


def _block_sums(values: Tensor, groups: Tensor, target_groups: Tensor) -> Tensor:
    rows = values.new_zeros(int(groups.max()) + 1, values.shape[1]).index_add_(0, groups, values)
    return values.new_zeros(len(rows), int(target_groups.max()) + 1).index_add_(1, target_groups, rows)


def _check_groups(groups: Tensor) -> Tensor:
    """The groups, if they are numbered from 0 without holes.

    Raises:
        SettingsError: they are not.
    """
    numbers = groups.unique()
    if not torch.equal(numbers, torch.arange(len(numbers), device=numbers.device)):
        raise SettingsError(f"expected groups numbered from 0 without holes; got {numbers[:10].tolist()}.")
    return groups


# --- FISTA with restart: the solver of the variants that coordinate descent does not cover (groups, labels) ---
#     z = b + momentum;   b = shrink(z - step * gradient(z), step)
#
# Momentum starts anew where it points uphill, target group by target group. Source: Beck & Teboulle 2009; O'Donoghue &
# Candes 2015 (restart).


_EVERY = 10


def fista(
    start: Float64[Tensor, "source target"],
    step: float,
    gradient: Callable[[Tensor], Tensor],
    shrink: Callable[[Tensor, float], Tensor],
    gap: Callable[[Tensor], Tensor],
    target_group: Int[Tensor, " target"],
    tolerance: float,
    max_steps: int,
) -> tuple[Float64[Tensor, "source target"], Float64[Tensor, " group"]]:
    """Weights and duality gaps once every gap is below `tolerance`, or after `max_steps`: the caller checks the gaps.

    `gradient` is the smooth part's, `shrink(v, step)` the penalty's proximal map, `gap` one number per target group.
    """
    weights = lookahead = start
    pace = start.new_ones(start.shape[1])
    gaps = gap(start)
    for k in range(1, max_steps + 1):
        if float(gaps.max()) <= tolerance:
            break
        new = shrink(lookahead - step * gradient(lookahead), step)
        uphill = ((lookahead - new) * (new - weights)).sum(0)
        uphill = uphill.new_zeros(len(gaps)).index_add_(0, target_group, uphill)[target_group] > 0
        faster = torch.where(uphill, 1.0, 0.5 * (1 + (1 + 4 * pace.square()).sqrt()))
        momentum = torch.where(uphill, 0.0, (pace - 1) / faster)
        lookahead = new + momentum * (new - weights)
        weights, pace = new, faster
        if k % _EVERY == 0 or k == max_steps:
            gaps = gap(weights)
    return weights, gaps


def largest_eigenvalue(gram: Float64[Tensor, "source source"] | Products) -> float:
    """The largest eigenvalue of a whole Gram, with a grain of safety: 1 / step."""
    assert isinstance(gram, Tensor), "regressions from samples have no groups and no labels"
    return max(float(torch.linalg.eigvalsh(gram)[-1]) * (1 + 1e-9), 1e-300)
