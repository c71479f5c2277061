"""Features that stopped firing: a loss that gives them something to do, or a new start.

auxiliary   the `auxiliary_k` dead features with the largest pre-activations rebuild what the others leave; the loss is
            the share of it that they leave. Source: Gao et al. 2024, arXiv 2406.04093.
resample    a dead feature restarts at a position drawn in proportion to its squared error: its decoder row is what was
            missing there, its encoder reads the input there. Source: Bricken et al. 2023, Towards Monosemanticity.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ._features import INITIAL_THRESHOLD

_ENCODER_SHARE = 0.2


def auxiliary_loss(
    pre: Float[Tensor, "batch d_dict"],
    missing: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "d_dict d_out"],
    dead: Bool[Tensor, " d_dict"],
    k: int,
) -> Float[Tensor, ""]:
    """The share of `missing` that the best dead features leave; nothing but them learns from it."""
    missing = missing.detach()
    candidates = pre[:, dead]
    values, index = candidates.topk(min(k, candidates.shape[1]), dim=-1, sorted=False)
    features = torch.zeros_like(candidates).scatter(-1, index, values.relu())
    left = missing - features @ W_dec[dead]
    return left.square().mean() / missing.square().mean().clamp(min=torch.finfo(missing.dtype).tiny)


@torch.no_grad()
def resample(
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    dead: Bool[Tensor, " d_dict"],
    x: Float[Tensor, "batch d_in"],
    missing: Float[Tensor, "batch d_out"],
    generator: torch.Generator,
) -> None:
    """Restart the dead features, in place, and forget the optimizer's moments of them."""
    chances = missing.square().sum(-1).double().cpu()
    if not dead.any() or not chances.sum() > 0:
        return
    index = torch.multinomial(chances, int(dead.sum()), replacement=True, generator=generator).to(x.device)
    alive = weights["W_enc"][:, ~dead]
    size = _ENCODER_SHARE * (alive.norm(dim=0).mean() if alive.shape[1] else 1.0)
    weights["W_dec"][dead] = _unit(missing[index])
    weights["W_enc"][:, dead] = (_unit(x[index]) * size).mT
    weights["b_enc"][dead] = 0
    if "log_threshold" in weights:
        weights["log_threshold"][dead] = torch.tensor(INITIAL_THRESHOLD).log()
    for name, axis in (("W_dec", 0), ("W_enc", 1), ("b_enc", 0), ("log_threshold", 0)):
        for moment in ("exp_avg", "exp_avg_sq"):
            if name in weights and moment in optimizer.state[weights[name]]:
                optimizer.state[weights[name]][moment].movedim(axis, 0)[dead] = 0


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)
