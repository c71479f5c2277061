"""The kinds of dictionary SAELens saves, and what each computes between encoder and features.

With pre = x_n @ W_enc + b_enc, x_n the input after `normalize_activations`, minus b_dec if `apply_b_dec_to_input`:

    relu       relu(pre)
    jumprelu   relu(pre) where pre > threshold, else 0
    topk       relu of the k largest pre, else 0
    abstopk    the k largest |pre| with their sign, else 0
    gated      relu(exp(r_mag) * (x_n @ W_enc) + b_mag) where x_n @ W_enc + b_gate > 0, else 0

Batch-topk and matryoshka SAEs are saved as jumprelu. Source: the behavior of sae-lens 6.54; Rajamanoharan et al. 2024,
arXiv 2404.16014 (gated) and 2407.14435 (jumprelu); Gao et al. 2024, arXiv 2406.04093 (topk); METHODS.md 4.1 and 4.5
(transcoders, skip).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import DictionaryError

ENCODER_TENSORS: dict[str, tuple[str, ...]] = {
    "relu": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "gated": ("r_mag", "b_gate", "b_mag"),
}
"""Per activation, the vectors `[d_dict]` it needs besides W_enc."""

NORMALIZATIONS = ("none", "expected_average_only_in", "covariance_whitening", "constant_norm_rescale", "layer_norm")
"""What `normalize_activations` may say. The first three do nothing at run time: SAELens folds them into the weights."""

LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Kind:
    """What SAELens calls an architecture: an activation, reading and writing at one place or two, a skip or none."""

    activation: str
    is_transcoder: bool = False
    has_skip: bool = False
    in_saelens: bool = True

    @property
    def needs_k(self) -> bool:
        """Whether the activation keeps a fixed number of features."""
        return self.activation in ("topk", "abstopk")

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of every tensor that a file of this kind holds."""
        skip = ("W_skip",) if self.has_skip else ()
        return ("W_enc", "W_dec", "b_dec", *ENCODER_TENSORS.get(self.activation, ()), *skip)


KINDS: dict[str, Kind] = {
    "standard": Kind("relu"),
    "gated": Kind("gated"),
    "topk": Kind("topk"),
    "abstopk": Kind("abstopk"),
    "jumprelu": Kind("jumprelu"),
    "transcoder": Kind("relu", is_transcoder=True),
    "skip_transcoder": Kind("relu", is_transcoder=True, has_skip=True),
    "jumprelu_transcoder": Kind("jumprelu", is_transcoder=True),
    "jumprelu_skip_transcoder": Kind("jumprelu", is_transcoder=True, has_skip=True),
    # SAELens has no topk transcoders: these two are read by this package only.
    "topk_transcoder": Kind("topk", is_transcoder=True, in_saelens=False),
    "topk_skip_transcoder": Kind("topk", is_transcoder=True, has_skip=True, in_saelens=False),
    # A live object with an encoder of its own; never in a file.
    "custom": Kind("custom", in_saelens=False),
}

REFUSED_KINDS: dict[str, str] = {
    "temporal": "its features depend on earlier positions and its reconstruction is not W_dec times the features",
    "matching_pursuit": "its encoder is a search; load it with sae-lens and pass the object to as_dictionary",
    "batchtopk": "it is a training checkpoint; save it with save_inference_model, which writes jumprelu",
    "matryoshka_batchtopk": "it is a training checkpoint; save it with save_inference_model, which writes jumprelu",
}


def kind_of(name: str) -> Kind:
    """The kind of that name.

    Raises:
        DictionaryError: this package does not know the kind, with the reason where there is one.
    """
    if name in KINDS:
        return KINDS[name]
    known = ", ".join(kind for kind in KINDS if kind != "custom")
    reason = REFUSED_KINDS.get(name, "it is unknown")
    raise DictionaryError(
        f"A dictionary of architecture {name!r} cannot be used: {reason}. Known architectures: {known}."
    )


def top_k(values: Float[Tensor, "*batch d_dict"], k: int, *, signed: bool) -> Float[Tensor, "*batch d_dict"]:
    """The `k` largest values through a ReLU, or if `signed` the `k` largest magnitudes with sign; zero elsewhere."""
    ranked = values.abs() if signed else values
    index = ranked.topk(k, dim=-1, sorted=False).indices
    kept = values.gather(-1, index)
    return torch.zeros_like(values).scatter(-1, index, kept if signed else kept.relu())


def jump_relu(
    pre: Float[Tensor, "*batch d_dict"], threshold: Float[Tensor, " d_dict"]
) -> Float[Tensor, "*batch d_dict"]:
    """`relu(pre)` where `pre > threshold`, zero elsewhere; no gradient reaches the threshold."""
    return pre.relu() * (pre > threshold).to(pre.dtype)


def normalized(
    x: Float[Tensor, "*batch d_in"], how: str
) -> tuple[Float[Tensor, "*batch d_in"], tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]] | None]:
    """The input as the encoder sees it, and the scale and shift that bring a reconstruction back: `y * scale + shift`.

    None for both where nothing is done at run time. `layer_norm` divides by (standard deviation + 1e-5) and brings back
    by the standard deviation alone, and its deviation has the n - 1 denominator: so SAELens does it.
    """
    if how == "layer_norm":
        shift = x.mean(dim=-1, keepdim=True)
        deviation = (x - shift).std(dim=-1, keepdim=True)
        return (x - shift) / (deviation + LAYER_NORM_EPSILON), (deviation, shift)
    if how == "constant_norm_rescale":
        factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        return x * factor, (1 / factor, torch.zeros_like(factor))
    return x, None
