"""Controls: what a method that knows nothing, or only activations, would choose.

`random`: independent N(0, 1). `activation_difference`: mean |a_clean - a_baseline|, no gradient; for a vector node, the
norm of its change. Source: METHODS 1.2.
"""

import torch
from torch import Tensor

from ..bases._site import Parts


def difference(clean: Parts, base: Parts | None) -> tuple[Tensor, dict[str, Tensor]]:
    """|change| of every node `[batch, pos, unit]`, and the norm of every vector node's change `[batch, pos]`."""
    nodes = clean.nodes if base is None else clean.nodes - base.nodes
    vectors = {k: (v if base is None else v - base.vectors[k]).norm(dim=-1) for k, v in clean.vectors.items()}
    return nodes.abs(), vectors


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) in float32, drawn on the CPU so that every device gets the same."""
    return torch.randn(like.shape, generator=generator)
