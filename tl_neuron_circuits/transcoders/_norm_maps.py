"""Norms as the linear maps that they are once their scale is frozen: y = weight * center(x) / scale + bias.

Pulled back, a vector v that reads y reads x as center(weight * v) / scale, and the constant v . bias is left over (no
centering for RMSNorm). The released code of the transcoder paper multiplies by one number a token instead, which keeps
totals but gives them to the wrong sources. Source: METHODS.md 4.3, "our form".
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..models._protocol import TransformerLensModel, submodule
from ..propagation._norms import read_norm


@dataclass(frozen=True, eq=False)
class NormMap:
    """A norm on the residual stream; `normalizes` is False where there is none, and everything passes as it is."""

    weight: Float[Tensor, " d"] | None
    bias: Float[Tensor, " d"] | None
    eps: float
    centered: bool
    normalizes: bool = True

    def scale(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """What x is divided by."""
        if not self.normalizes:
            return torch.ones_like(x[..., :1])
        return (self._center(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def apply(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The norm's output."""
        y = self.along(x) / self.scale(x)
        return y if self.bias is None else y + self.bias.to(y)

    def along(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Directions on their way through, with the scale set to one and without the bias."""
        x = self._center(x)
        return x if self.weight is None else x * self.weight.to(x)

    def back(self, v: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Vectors that read the output, as they read the input with the scale set to one: divide by the scale."""
        return self._center(v if self.weight is None else v * self.weight.to(v))

    def constant(self, v: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """What vectors that read the output read of the bias."""
        return torch.zeros_like(v[..., 0]) if self.bias is None else v @ self.bias.to(v)

    def bare(self) -> "NormMap":
        """The same without weight and bias: what `hook_normalized` sees."""
        return replace(self, weight=None, bias=None)

    def _center(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centered else x


NO_NORM = NormMap(None, None, 0.0, centered=False, normalizes=False)


def norm_map(model: TransformerLensModel, path: str) -> NormMap:
    """The norm at `path` (`blocks.0.ln2`, `ln_final`) of either model class; `NO_NORM` where there is none."""
    norm: Any = submodule(model, path)
    if norm is None or isinstance(norm, nn.Identity):
        return NO_NORM
    if hasattr(norm, "original_component"):  # TransformerBridge
        found = read_norm(model, path)
        if found is None:
            return NO_NORM
        weight = found.weight if found.weight.numel() > 1 else None
        return NormMap(weight, None if found.bias is None else found.bias.detach(), found.eps, found.centered)
    weight, bias = (getattr(norm, name, None) for name in ("w", "b"))
    eps = float(getattr(norm, "eps", getattr(model.cfg, "eps", 1e-5)))
    detached = [value.detach() if isinstance(value, Tensor) else None for value in (weight, bias)]
    return NormMap(detached[0], detached[1], eps, centered="LayerNorm" in type(norm).__name__)
