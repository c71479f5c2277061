"""Norms as this package reads them: y = weight * center(x) / scale + bias.

On `TransformerBridge` most adapters call Hugging Face's norm as a whole, so only its input and output are in the graph
and the norm is rebuilt from its parameters. Elsewhere the scale is a hook point in the graph.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import UnsupportedModelError
from ..models._protocol import TransformerLensModel, submodule


@dataclass(frozen=True)
class Norm:
    """What is needed to rebuild a norm from its input. `bias` is the live parameter: it takes part in conservation."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool

    def value(self, x: Tensor) -> Tensor:
        """The norm's output at `x`, in at least float32 as Hugging Face computes it."""
        return self.value_and_scale(x)[0]

    def value_and_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the denominator `[..., 1]`."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x = x - x.mean(-1, keepdim=True) if self.centered else x
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        output = x / scale * self.weight.to(scale.dtype)
        return output if self.bias is None else output + self.bias.to(scale.dtype), scale


def is_opaque(model: TransformerLensModel, path: str) -> bool:
    """True where `TransformerBridge` calls Hugging Face's norm as a whole, its scale outside the graph.

    GPT-2's adapter computes the norm itself, so its scale can be detached.
    """
    norm: Any = submodule(model, path)
    if norm is not None and hasattr(norm, "original_component") and not hasattr(norm, "uses_rms_norm"):
        return True  # mounted as a bare module
    folding = bool(getattr(getattr(norm, "config", None), "layer_norm_folding", False))
    return bool(getattr(norm, "use_native_layernorm_autograd", False)) or folding


def read_norm(model: TransformerLensModel, path: str) -> Norm | None:
    """Read a norm module of `TransformerBridge`; None for a slot that does not normalize.

    Gemma's RMSNorm stores its weight as an offset from one. The caller compares what `value` gives with the model's
    own output, so that a convention unknown here is an error and never a number.

    Raises:
        UnsupportedModelError: the module at `path` does not say what kind of norm it is.
    """
    norm: Any = submodule(model, path)
    component = getattr(norm, "original_component", None)
    if isinstance(component, nn.Identity):
        return None
    if component is not None and not hasattr(norm, "uses_rms_norm") and "norm" in type(component).__name__.lower():
        return _read_bare(model, component)
    if norm is None or not hasattr(norm, "uses_rms_norm"):
        raise UnsupportedModelError(
            f"expected a normalization at {path}; got {type(norm).__name__}. Leave 'ln' out of the rules."
        )
    parameters = set(getattr(norm, "property_aliases", {}).values())  # none where the weight was folded away
    weight = getattr(norm, "weight", None) if "weight" in parameters else None
    bias = getattr(component, "bias", None) if "bias" in parameters else None
    rms = bool(norm.uses_rms_norm)
    offset = getattr(norm, "uses_weight_offset", rms and bool(getattr(norm.config, "rmsnorm_uses_offset", False)))
    if weight is None:
        weight = torch.ones(1, device=next(iter(model.parameters())).device)
    elif offset:
        weight = 1.0 + weight.detach()
    return Norm(weight.detach(), bias, _eps(norm, component), centered=not rms)


def _read_bare(model: TransformerLensModel, component: Any) -> Norm:
    """Read Hugging Face's own module. Whether its weight is an offset from one shows in what it makes of a vector."""
    weight, bias = getattr(component, "weight", None), getattr(component, "bias", None)
    device = next(iter(model.parameters())).device
    if weight is None:
        weight = torch.ones(1, device=device)
    centered = isinstance(component, nn.LayerNorm) or bias is not None
    eps = next((float(e) for e in (getattr(component, n, None) for n in ("eps", "variance_epsilon")) if e), 1e-5)
    norm = Norm(weight.detach(), bias, eps, centered)
    if weight.numel() == 1:
        return norm
    x = torch.linspace(1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        theirs = component(x[None])[0].float()
        shifted = Norm(1 + weight.detach(), bias, eps, centered)
        nearer = (norm.value(x).float() - theirs).abs().max() <= (shifted.value(x).float() - theirs).abs().max()
    return norm if bool(nearer) else shifted


def _eps(norm: Any, component: Any) -> float:
    candidates = (getattr(component, "eps", None), getattr(component, "variance_epsilon", None))
    value = next((c for c in candidates if c is not None), getattr(norm.config, "eps", 1e-5))
    value = float(value)
    return value if math.isfinite(value) else 1e-5
