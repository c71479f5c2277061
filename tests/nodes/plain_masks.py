"""Learned masks written out: one prompt at a time, tau by bisection, every gradient autograd's, torch's own Adam."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.nodes.plain import metric_at
from tl_neuron_circuits import LearnedMask
from tl_neuron_circuits.tasks import TokenizedPairs

Values = list[dict[str, Tensor]]


def plain_mask(scores: Tensor, budget: float, temperature: float) -> Tensor:
    """sigmoid((s - tau) / T) that adds up to the budget, differentiable through tau too; float64."""
    scores = scores.double()
    fixed = scores.detach()
    low, high = float(fixed.min()) - 99, float(fixed.max()) + 99
    for _ in range(200):
        tau = (low + high) / 2
        too_many = float(((fixed - tau) / temperature).sigmoid().sum()) > budget
        low, high = (tau, high) if too_many else (low, tau)
    mask = ((fixed - low) / temperature).sigmoid()
    weight = mask * (1 - mask)
    moving = low + (weight * (scores - fixed)).sum() / weight.sum()
    return ((scores - moving) / temperature).sigmoid()


class PlainLearning:
    """Kept positions, corrupt values, the activations at `names`."""

    def __init__(self, model: Any, pairs: TokenizedPairs, names: Sequence[str], method: LearnedMask) -> None:
        self.model, self.pairs, self.names, self.method = model, pairs, names, method
        self.corrupt = [self._values(prompt) for prompt in pairs.corrupt or ()]
        self.shapes = [self.corrupt[0][name].shape for name in names]
        self.n = sum(shape.numel() for shape in self.shapes)

    def _values(self, prompt: Tensor) -> dict[str, Tensor]:
        _, cache = self.model.run_with_cache(prompt[None])
        return {name: cache[name][0].detach() for name in self.names}

    def logits(self, index: int, live: Tensor | float) -> Tensor:
        """Of the clean prompt, `live` of every node being its own and the rest the corrupt prompt's."""
        live = live if isinstance(live, Tensor) else torch.full((self.n,), live)
        pieces = live.split([shape.numel() for shape in self.shapes])

        def hook_of(name: str, piece: Tensor) -> Any:
            other = self.corrupt[index][name]
            share = piece.reshape(other.shape).to(other)
            return name, lambda value, hook: share * value + (1 - share) * other

        hooks = [hook_of(name, piece) for name, piece in zip(self.names, pieces, strict=True)]
        return self.model.run_with_hooks(self.pairs.clean[index][None], fwd_hooks=hooks)

    def loss(self, index: int, mask: Tensor) -> Tensor:
        keep = self.method.direction == "keep"
        logits = self.logits(index, mask if keep else 1 - mask)
        metric = metric_at(logits, self.pairs, index)[0]
        if self.method.loss == "metric":
            return -metric if keep else metric
        with torch.no_grad():
            full, empty = (self.logits(index, live) for live in (1.0, 0.0))
        if self.method.loss == "kl":
            target = (full if keep else empty)[0, -1].float().log_softmax(-1)
            return (target.exp() * (target - logits[0, -1].float().log_softmax(-1))).sum()
        d_full, d_empty = (float(metric_at(found, self.pairs, index)) for found in (full, empty))
        span = max(abs(d_full - d_empty), 0.1 * abs(d_full))
        return abs(metric - (d_full if keep else d_empty)) / span

    def gradient(self, scores: Tensor, chosen: list[int], budget: float, temperature: float) -> Tensor:
        """d mean loss / d scores."""
        scores = scores.clone().requires_grad_(True)
        mask = plain_mask(scores, budget, temperature)
        loss = sum(self.loss(index, mask) for index in chosen) / len(chosen)
        assert isinstance(loss, Tensor)
        (gradient,) = torch.autograd.grad(loss, scores)
        return gradient

    def learn(self) -> Tensor:
        """The scores after all steps."""
        method = self.method
        scores = torch.zeros(self.n, requires_grad=True)
        adam = torch.optim.Adam([scores], lr=method.lr, eps=method.eps)
        for step, (chosen, budget) in enumerate(method._draws(len(self.pairs), self.n)):
            if step == method.steps:
                return scores.detach()
            assert 0 < budget < self.n and math.isfinite(budget)
            scores.grad = self.gradient(scores.detach(), chosen, budget, method.temperature * method.cooling**step)
            adam.step()
        raise AssertionError
