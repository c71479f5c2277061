"""Gradients in mask space: the learned mask (`_learned_mask.py`) without learning.

With all scores zero a mask of budget k is the same t = k / n for all nodes, and the expected negative gradient at the
scores is an integrated gradient over t,

    score(n) = - mean_k t (1 - t) / T * (g_n(t) - mean over nodes of g(t))          g = d loss / d m

Sign: positive supports the answer. Scores are those of a ranking: read them by sign, never by |score|.
Cost: per step a forward and a backward, and one counterfactual run.
Source: Arora et al. 2026, arXiv 2609.25518; METHODS 5.8.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..bases._runs import Values
from ..tasks._tokenized import Batch
from ._masked_runs import (
    NestedMasks,
    draw_budget,
    mask_gradient,
    measure_references,
    node_shapes,
    split_blocks,
)
from ._scope import Blocks, Means, Scope


@dataclass(frozen=True)
class MaskGradient(NestedMasks):
    """Gradients in mask space, averaged over how much of every node is kept: the learned mask without learning.

    Args:
        steps: how many budgets, at the quantiles of `schedule`.
        schedule: as in `LearnedMask`, and so are the others.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.nodes.MaskGradient(steps=5).label
        'mask_gradient(steps=5)'
    """

    name: ClassVar[str] = "mask_gradient"
    steps: int = 10
    schedule: str = "uniform"
    loss: str = "metric"
    direction: str = "keep"
    temperature: float = 0.5

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """The negative gradient at masks that are the same for all nodes, weighted by t (1 - t) / T."""
        values = scope.values(batch)
        shapes = node_shapes(scope, values)
        n = sum(shape.numel() for shape in shapes.values())
        references = measure_references(self, scope, batch, means, shapes)
        total = torch.zeros(n, device=batch.clean.device)
        for step in range(self.steps):
            t = draw_budget((step + 0.5) / self.steps, n, self.schedule) / n
            _, gradient = mask_gradient(self, scope, batch, references, means, torch.full_like(total, t), shapes)
            total -= t * (1 - t) / self.temperature / self.steps * gradient
        blocks = split_blocks(total, shapes)
        return values, {key: block.to(values[key[0]].device) for key, block in blocks.items()}

    def finish(self, sums: Blocks, n_pairs: int) -> Blocks:
        """The mean over pairs, from which the mean over nodes is taken: tau moves with all of them."""
        n = sum(block.numel() for block in sums.values())
        mean = sum(float(block.double().sum()) for block in sums.values()) / n
        return {key: (block - mean) / n_pairs for key, block in sums.items()}
