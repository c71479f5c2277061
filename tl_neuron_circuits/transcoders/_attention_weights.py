"""The weights of attention heads, grouped queries and missing biases included, from either model class."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import UnsupportedModelError
from ..models._protocol import TransformerLensModel, submodule
from ._norm_maps import NormMap, norm_map


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """One attention layer, from the residual stream that it reads to the one that it writes.

    Value heads may serve several heads each: head h reads through `W_V[h // (n_heads // n_value_heads)]`.
    """

    W_V: Float[Tensor, "value_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_V: Float[Tensor, "value_head d_head"] | None
    b_O: Float[Tensor, " d_model"] | None
    norm: NormMap
    post: NormMap
    """The norm after attention (Gemma), or none."""

    @property
    def n_heads(self) -> int:
        """How many heads write."""
        return self.W_O.shape[0]

    def read_of(self, v: Float[Tensor, "*batch d_model"]) -> tuple[Tensor, Tensor]:
        """W_V W_O v for every head: what reads the normalized residual stream, `[*batch, head, d_model]`; and b_V's
        part, `[*batch, head]`.
        """
        heads = torch.einsum("hkd,...d->...hk", self.W_O.to(v), v)
        grouped = heads.unflatten(-2, (len(self.W_V), -1))
        reads = torch.einsum("gdk,...grk->...grd", self.W_V.to(v), grouped).flatten(-3, -2)
        if self.b_V is None:
            return reads, torch.zeros_like(reads[..., 0])
        return reads, torch.einsum("gk,...grk->...gr", self.b_V.to(v), grouped).flatten(-2)

    def read_of_one(self, v: Float[Tensor, "*batch d_model"], head: int) -> Float[Tensor, "*batch d_model"]:
        """W_V W_O v of one head: what reads the normalized residual stream, without b_V."""
        value_head = head // (self.n_heads // len(self.W_V))
        return v @ self.W_O[head].to(v).mT @ self.W_V[value_head].to(v).mT


def attention_weights(model: TransformerLensModel, layer: int) -> AttentionWeights:
    """The weights of one layer; never the model's stacked copies.

    Raises:
        UnsupportedModelError: they are not there, or not of the expected shapes.
    """
    module: Any = submodule(model, f"blocks.{layer}.attn")
    W_V, W_O, b_V, b_O = (getattr(module, name, None) for name in ("W_V", "W_O", "b_V", "b_O"))
    width = int(model.cfg.d_model)
    if not (isinstance(W_V, Tensor) and isinstance(W_O, Tensor) and _fit(W_V, W_O, width)):
        raise UnsupportedModelError(
            f"expected blocks.{layer}.attn.W_V [head, {width}, d_head] and W_O [head, d_head, {width}] on this "
            f"{type(model).__name__}; got {getattr(W_V, 'shape', None)} and {getattr(W_O, 'shape', None)}."
        )
    biases = [b.detach() if isinstance(b, Tensor) else None for b in (b_V, b_O)]
    norms = [norm_map(model, f"blocks.{layer}.{name}") for name in ("ln1", "ln1_post")]
    return AttentionWeights(W_V.detach(), W_O.detach(), biases[0], biases[1], norms[0], norms[1])


def _fit(W_V: Tensor, W_O: Tensor, width: int) -> bool:
    both_three = W_V.dim() == 3 and W_O.dim() == 3
    return both_three and W_V.shape[1] == width == W_O.shape[2] and W_O.shape[0] % W_V.shape[0] == 0
