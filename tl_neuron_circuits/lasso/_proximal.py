"""FISTA with restart: the solver of the variants that coordinate descent does not cover (groups, labels).

    z = b + momentum;   b = shrink(z - step * gradient(z), step)

Momentum starts anew where it points uphill, target group by target group. Source: Beck & Teboulle 2009; O'Donoghue &
Candes 2015 (restart).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float64, Int
from torch import Tensor

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

    `gradient` is the smooth part's, `shrink(v, step)` the penalty's proximal map, `gap` one number a target group.
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


def largest_eigenvalue(gram: Float64[Tensor, "source source"]) -> float:
    """The Gram's largest eigenvalue, with a grain of safety: 1 / step."""
    return max(float(torch.linalg.eigvalsh(gram)[-1]) * (1 + 1e-9), 1e-300)
