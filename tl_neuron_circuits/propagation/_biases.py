"""The biases of a model: their share of the relevance is what embeddings and neurons do not account for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..models._protocol import TransformerLensModel


def bias_parameters(model: TransformerLensModel) -> dict[str, Tensor]:
    """Every bias once, by name; `TransformerBridge.named_parameters` leaves out what its adapter does not map."""
    return {name: p for name, p in torch.nn.Module.named_parameters(model) if _is_bias(name)}  # pyright: ignore[reportArgumentType]


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
