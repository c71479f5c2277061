"""From pre-activations to features while training, and what sparsity costs.

    relu       f = relu(pre)                                         cost: mean_b sum_i |f| / sqrt(d_out)
    topk       relu of the k largest of each position                cost: none
    batchtopk  relu of the k * batch largest of the batch            cost: none
    jumprelu   f = pre where pre > threshold                         cost: mean_b sum_i [pre > threshold]

The decoder's rows have norm 1, so |f| is what a feature writes. jumprelu's threshold has a gradient through a kernel of
width `bandwidth` around it (straight-through); the cost reaches the threshold alone. batchtopk is used with a threshold
afterwards: the running mean of the smallest feature that was kept. Source: Bricken et al. 2023; Gao et al. 2024,
arXiv 2406.04093; Rajamanoharan et al. 2024, arXiv 2407.14435; Bussmann et al. 2024, arXiv 2412.06410.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._processes import Processes
from ._config import TrainingConfig

INITIAL_THRESHOLD = 0.5
_THRESHOLD_DECAY = 0.95


def sparse_features(
    pre: Float[Tensor, "batch d_dict"], weights: dict[str, Tensor], config: TrainingConfig
) -> Float[Tensor, "batch d_dict"]:
    """Features of a batch."""
    if config.activation == "relu":
        return pre.relu()
    if config.activation == "jumprelu":
        return _JumpReLU.apply(pre, weights["log_threshold"].exp(), config.bandwidth)  # pyright: ignore[reportReturnType]
    flat = pre if config.activation == "topk" else pre.flatten()
    k = config.k if config.activation == "topk" else min(config.k * len(pre), flat.numel())
    values, index = flat.relu().topk(k, dim=-1, sorted=False)
    return torch.zeros_like(flat).scatter(-1, index, values).view_as(pre)


def sparsity_cost(
    pre: Float[Tensor, "batch d_dict"],
    features: Float[Tensor, "batch d_dict"],
    weights: dict[str, Tensor],
    config: TrainingConfig,
) -> Float[Tensor, ""] | None:
    """What the penalty is multiplied with; None where the number of features is fixed."""
    if config.activation == "relu":
        return features.sum(-1).mean() / weights["W_dec"].shape[1] ** 0.5
    if config.activation == "jumprelu":
        open_ = _Step.apply(pre, weights["log_threshold"].exp(), config.bandwidth)
        return open_.sum(-1).mean()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return None


def running_threshold(
    running: Float[Tensor, ""], features: Float[Tensor, "batch d_dict"], processes: Processes, *, first: bool
) -> Float[Tensor, ""]:
    """The running mean of the smallest feature that fired; of several processes, of the mean of theirs."""
    fired = features.detach()[features > 0]
    seen = torch.stack([fired.min(), fired.new_ones(())]) if len(fired) else running.new_zeros(2)
    smallest, count = processes.total({"smallest": seen})["smallest"]
    if not count:
        return running
    smallest = smallest / count
    return smallest if first else _THRESHOLD_DECAY * running + (1 - _THRESHOLD_DECAY) * smallest


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (pre, threshold) = gradients, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        to_threshold = -(threshold / ctx.bandwidth) * (near * gradient).sum(0)
        return gradient * (pre > threshold), to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (gradient,), (pre, threshold) = gradients, ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -(near * gradient).sum(0) / ctx.bandwidth, None
