"""A dictionary's encoder as the linear map it is on one prompt, and its input as part of the graph.

    feature = factor * (normalized(x) @ weight + bias)

`factor` is frozen: zero where the feature does not fire (whatever decides that: a ReLU, a threshold, the k largest, a
gate), else 1, times the decoder's scale where a run-time normalization is undone. `normalized` divides by a frozen
deviation. For every architecture that SAELens saves this is exact at the prompt itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import NumericalError, PropagationError, SettingsError
from ..bases._dictionary import Dictionary
from ..bases._dictionary_basis import DictionarySite
from ..models._protocol import TransformerLensModel, hook_points
from ..models._sites import find_sites
from ..propagation._norms import is_opaque, read_norm

_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True, eq=False)
class LinearEncoder:
    """The linear map from a dictionary's input to its pre-activations."""

    dictionary: Dictionary
    weight: Float[Tensor, "d_in d_dict"]
    bias: Float[Tensor, " d_dict"]

    def normalize(self, x: Float[Tensor, "1 pos d_in"]) -> Float[Tensor, "1 pos d_in"]:
        """The input as the encoder sees it, its deviation or norm frozen."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.dictionary.dtype), torch.float32)
        x = x.to(dtype)
        how = self.dictionary.normalize_activations
        if how == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            return x / (x.detach().std(-1, keepdim=True) + 1e-5)
        if how == "constant_norm_rescale":
            return x * (x.shape[-1] ** 0.5 / x.detach().norm(dim=-1, keepdim=True))
        return x

    def factor(self, x: Tensor, nodes: Float[Tensor, "1 pos d_dict"]) -> Float[Tensor, "1 pos d_dict"]:
        """Which features fire, times the decoder's scale."""
        fires = (nodes != 0).to(nodes.dtype)
        return fires * self.dictionary.decoder_scale(x) if self.dictionary.scale_depends_on_input else fires

    def features(self, reading: Tensor, factor: Tensor) -> Float[Tensor, "1 pos d_dict"]:
        """All features, as a linear function of the reading."""
        return (reading @ self.weight.to(reading) + self.bias.to(reading)) * factor

    def check(self, features: Tensor, expected: Tensor) -> None:
        """Raise unless the linear map gives the features that the encoder gave.

        Raises:
            NumericalError: it does not.
        """
        off = float((features - expected).abs().max() / (expected.abs().max() + torch.finfo(torch.float32).tiny))
        if not off <= _ALLOWED[torch.float32]:
            raise NumericalError(
                f"{self.dictionary.name}: its features are not the linear function of its input that its kind "
                f"({self.dictionary.kind}) implies; they are off by {off:.1e} of the largest feature. Look for values "
                "that are not finite, or for an encoder of its own."
            )


def linear_encoder(dictionary: Dictionary) -> LinearEncoder:
    """The encoder's linear map.

    Raises:
        SettingsError: the dictionary has an encoder of its own, which may compute anything.
    """
    if dictionary.own_encode is not None:
        raise SettingsError(
            f"{dictionary.name} has an encoder of its own, so its features are not a known function of its input and "
            "have no incoming edges. Circuits need a dictionary with known weights: load_dictionary, or SAELens' kinds."
        )
    weight, bias = dictionary.W_enc, dictionary.b_enc
    if dictionary.r_mag is not None:  # gated: the magnitude's encoder
        weight, bias = weight * dictionary.r_mag.exp(), dictionary.b_mag
    assert bias is not None
    if dictionary.apply_b_dec_to_input:
        bias = bias - dictionary.b_dec @ weight
    return LinearEncoder(dictionary, weight.detach(), bias.detach())


class PlainReader:
    """The input is in the graph where the dictionary reads it."""

    def early_hooks(self, seen: dict[str, Tensor]) -> list[tuple[str, Callable[..., None]]]:
        return []

    def input(self, seen: dict[str, Tensor]) -> Tensor:
        """What the dictionary reads, with its past."""
        return seen["x"]


@dataclass(frozen=True, eq=False)
class NormReader:
    """The input is inside a norm that TransformerBridge computes as a whole: it is rebuilt, its scale frozen.

    What enters the norm is taken before its hook point, whose gradient `relp` replaces by that of the norm.
    """

    point: str
    rebuild: Callable[[Tensor], Tensor]
    name: str

    def early_hooks(self, seen: dict[str, Tensor]) -> list[tuple[str, Callable[..., None]]]:
        def before(module: Any, arguments: tuple[Tensor, ...]) -> None:
            seen["before"] = arguments[0]

        return [(self.point, before)]

    def input(self, seen: dict[str, Tensor]) -> Tensor:
        """What the dictionary reads, rebuilt from what enters the norm.

        Raises:
            PropagationError: it is not the value that the hook point had.
        """
        rebuilt, value = self.rebuild(seen["before"]), seen["x"].detach()
        off = float((rebuilt.detach() - value).abs().max() / (value.abs().max() + torch.finfo(torch.float32).tiny))
        if not off <= _ALLOWED.get(seen["before"].dtype, 1e-4):
            raise PropagationError(
                f"expected {self.name} to be the norm of what enters it; rebuilt, it is off by {off:.1e} of the "
                "largest value. A hook that edits it must be removed first."
            )
        return rebuilt


def find_reader(model: TransformerLensModel, site: DictionarySite) -> PlainReader | NormReader:
    """How the dictionary's input is read from the graph.

    Raises:
        SettingsError: it writes where TransformerBridge only reads a norm's input, so the residual stream goes past it.
    """
    points = hook_points(model)
    reads, writes = points[site.hook_in].name, points[site.hook].name
    for norm in find_sites(model).norms:
        if norm.input is None or norm.output is None:
            continue
        if writes == norm.input:
            raise SettingsError(
                f"{site.dictionary.name} writes at {site.hook}, which on TransformerBridge only feeds the norm: the "
                "residual stream goes past it. Use a dictionary at hook_resid_pre or hook_resid_post."
            )
        if reads not in (norm.input, norm.normalized) or not is_opaque(model, norm.path):
            continue
        frozen = read_norm(model, norm.path) if reads == norm.normalized else None

        def rebuild(x: Tensor, frozen: Any = frozen) -> Tensor:
            if frozen is None:
                return x
            _, scale = frozen.value_and_scale(x.detach())
            x = x.to(scale.dtype)
            return (x - x.mean(-1, keepdim=True) if frozen.centered else x) / scale

        return NormReader(norm.input, rebuild, site.hook_in)
    return PlainReader()
