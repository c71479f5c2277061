"""The biases of a model: their share of the relevance is what embeddings and neurons do not account for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..models._protocol import TransformerLensModel


def bias_parameters(model: TransformerLensModel) -> dict[str, Tensor]:
    """Every bias once, by name, those that are buffers too.

    `TransformerBridge.named_parameters` leaves out what its adapter does not map.
    """
    module: Any = model
    biases = {name: p for name, p in torch.nn.Module.named_parameters(module) if _is_bias(name)}
    # Compatibility mode on TransformerLens 4.3 keeps the unembedding's folded bias as a buffer.
    buffers = {name: b for name, b in torch.nn.Module.named_buffers(module) if _is_bias(name) and b.is_floating_point()}
    # ... and on 3.9 computes with copies of the MLP's that are plain attributes.
    copies = {
        f"{path}.{name}": value
        for path, part in torch.nn.Module.named_modules(module)
        for name, value in vars(part).items()
        if name.startswith("_processed_b") and isinstance(value, Tensor)
    }
    return biases | buffers | copies


@contextmanager
def biases_in_graph(model: TransformerLensModel) -> Iterator[dict[str, Tensor]]:
    """Inside `relp`, which froze the parameters: let biases alone take part in the graph of a forward pass."""
    biases = bias_parameters(model)
    frozen = [p for p in biases.values() if not p.requires_grad]
    try:
        for bias in frozen:
            bias.requires_grad_(True)
        yield biases
    finally:
        for bias in frozen:
            bias.requires_grad_(False)


def _is_bias(name: str) -> bool:
    """`bias` in Hugging Face's modules, `b`, `b_in`, `_b_K`, ... in HookedTransformer's."""
    last = name.rsplit(".", 1)[-1].lstrip("_")
    return last in ("b", "bias") or last.startswith("b_")
