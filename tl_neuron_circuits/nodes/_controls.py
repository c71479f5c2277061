"""Controls: what a method that knows nothing, or only activations, would choose.

`Random`: independent N(0, 1). `ActivationDifference`: mean |a_clean - a_baseline|, no gradient; for a vector node, the
norm of its change. Source: METHODS 1.2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..bases._runs import Values
from ..tasks._tokenized import Batch
from ._method import Method, noise
from ._scope import Blocks, Means, Scope


@dataclass(frozen=True)
class ActivationDifference(Method):
    """How much each node changes, whatever that does.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.ActivationDifference().label
        'activation_difference'
    """

    name: ClassVar[str] = "activation_difference"

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """|a - a_baseline| of every node; the norm of a vector node's change."""
        values, baselines = scope.values(scope.first_run(batch)), scope.baseline_parts(batch, means)
        blocks: Blocks = {}
        for site in scope.sites:
            parts, baseline = site.take_apart(values), baselines[site.hook]
            change = parts.nodes if baseline is None else parts.nodes - baseline.nodes
            blocks[site.hook, "node"] = scope.add_up(change.abs().float(), "node")
            for kind, vector in parts.vectors.items():
                change = vector if baseline is None else vector - baseline.vectors[kind]
                blocks[site.hook, kind] = scope.add_up(change.norm(dim=-1).float(), kind)
        return values, blocks


@dataclass(frozen=True)
class Random(ActivationDifference):
    """Noise: what any ranking must beat.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.Random(seed=3).label
        'random(seed=3)'
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def finish(self, sums: Blocks, n_pairs: int) -> Blocks:
        """Independent N(0, 1), the same for every batch size and number of processes."""
        generator = torch.Generator().manual_seed(self.seed)
        return {key: noise(block, generator) for key, block in sums.items()}
