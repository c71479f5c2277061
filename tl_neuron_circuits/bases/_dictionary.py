"""Sparse dictionaries: SAEs, which rebuild the activation they read, and transcoders, which rebuild another one.

    features(x)   = encode(x)                                                  [..., d_dict]
    dictionary(x) = decoder_scale(x) * (features(x) @ W_dec) + bias(x) + skip(x)

With x_n the input after `normalize_activations`, minus b_dec if `apply_b_dec_to_input`, and pre = x_n @ W_enc + b_enc,
the features are, by the activation of the dictionary's kind,

    relu       relu(pre)
    jumprelu   relu(pre) where pre > threshold, else 0
    topk       relu of the k largest pre, else 0
    abstopk    the k largest |pre| with their sign, else 0
    signed_topk  the k largest pre with their sign, else 0    circuit-tracer's TopK: negative where fewer are positive
    gated      relu(exp(r_mag) * (x_n @ W_enc) + b_mag) where x_n @ W_enc + b_gate > 0, else 0

Kinds are SAELens' architectures; batch-topk and matryoshka SAEs are read as jumprelu, as SAELens saves them.

A cross-layer transcoder is one dictionary per layer. Features of layer l write `W_dec` into that layer's output and
`W_dec_later[k]` into that of layer l + 1 + k; `Dictionaries` joins the layers. What is written into layer m is
sum over l <= m of features_l @ W_dec(l -> m), plus b_dec of layer m. Source: Ameisen et al. 2025.

`W_dec` holds effective directions: a decoder that divides by its own row norms (`rescale_acts_by_decoder_norm`) is
folded on loading. So one unit of feature f writes exactly `decoder_scale(x) * W_dec[f]`. The scale is 1 except under
`normalize_activations` of "layer_norm" or "constant_norm_rescale", where it depends on the input, and `decode` needs
the input too.

Precision: everything is computed and returned in the widest of float32, the input's dtype and the dictionary's dtype:
a bfloat16 dictionary on a float32 model loses nothing but the rounding of its weights. The caller casts when writing
into a model. Weights move to the input's device for the call; `dictionary.to(device, dtype)` once saves that.

Source: the behavior of sae-lens 6.54; Rajamanoharan et al. 2024, arXiv 2404.16014 (gated) and 2407.14435 (jumprelu);
Gao et al. 2024, arXiv 2406.04093 (topk); METHODS.md 4.1 and 4.5 (transcoders, skip).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import DictionaryError

ENCODER_TENSORS: dict[str, tuple[str, ...]] = {
    "relu": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "signed_topk": ("b_enc",),
    "gated": ("r_mag", "b_gate", "b_mag"),
}
"""Per activation, the vectors `[d_dict]` it needs besides W_enc."""

NORMALIZATIONS = ("none", "expected_average_only_in", "covariance_whitening", "constant_norm_rescale", "layer_norm")
"""Values of `normalize_activations`. The first three do nothing at run time: SAELens folds them into the weights."""

LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Kind:
    """What SAELens calls an architecture: an activation, whether it reads and writes at two places, and a skip."""

    activation: str
    is_transcoder: bool = False
    has_skip: bool = False
    in_saelens: bool = True
    is_cross_layer: bool = False

    @property
    def needs_k(self) -> bool:
        """Whether the activation keeps a fixed number of features."""
        return self.activation in ("topk", "abstopk", "signed_topk")

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of every tensor that a file of this kind holds."""
        skip = ("W_skip",) if self.has_skip else ()
        later = ("W_dec_later",) if self.is_cross_layer else ()
        return ("W_enc", "W_dec", "b_dec", *ENCODER_TENSORS.get(self.activation, ()), *skip, *later)


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
    # SAELens has no topk or cross-layer transcoders: only this package reads these from a folder of its layout.
    "topk_transcoder": Kind("topk", is_transcoder=True, in_saelens=False),
    "topk_skip_transcoder": Kind("topk", is_transcoder=True, has_skip=True, in_saelens=False),
    "signed_topk_transcoder": Kind("signed_topk", is_transcoder=True, in_saelens=False),
    "signed_topk_skip_transcoder": Kind("signed_topk", is_transcoder=True, has_skip=True, in_saelens=False),
    "cross_layer_transcoder": Kind("relu", is_transcoder=True, in_saelens=False, is_cross_layer=True),
    "jumprelu_cross_layer_transcoder": Kind("jumprelu", is_transcoder=True, in_saelens=False, is_cross_layer=True),
    # A live object with an encoder of its own; never in a file.
    "custom": Kind("custom", in_saelens=False),
}

REFUSED_KINDS: dict[str, str] = {
    "temporal": "its features depend on earlier positions and its reconstruction is not W_dec times the features",
    "matching_pursuit": "its encoder is a search; load it with sae-lens and pass the object to as_dictionary",
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


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """A sparse dictionary: encoder, decoder, and the two hook points it reads and writes.

    Make one with `load_dictionary`, `as_dictionary`, or directly from tensors. Shapes: `d_in` is the width it reads,
    `d_out` the width it writes, `d_dict` the number of features. Tensors share one dtype and device.

    Attributes:
        kind: SAELens' architecture name ("standard", "gated", "topk", "jumprelu", "skip_transcoder", ...).
        hook_in: the hook point it reads, by its author's name; bases find the same place on a model.
        hook_out: the hook point it writes; equal to `hook_in` for an SAE.
        W_dec_later: what the features write into the outputs of the layers after their own, for cross-layer kinds.
        k: features kept per position, for the topk kinds.
        own_encode: the encoder of a live object, for kind "custom".
        lazy: the weights are mapped from their file, and of the decoder only the rows of active features are read.

    Raises:
        DictionaryError: tensors are missing or do not fit together, or a setting is unknown.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> eye, zeros = torch.eye(4), torch.zeros(4)
        >>> d = tnc.Dictionary("standard", eye, eye, zeros, b_enc=zeros, hook_in="blocks.0.hook_mlp_out")
        >>> d(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    kind: str
    W_enc: Float[Tensor, "d_in d_dict"]
    W_dec: Float[Tensor, "d_dict d_out"]
    b_dec: Float[Tensor, " d_out"]
    b_enc: Float[Tensor, " d_dict"] | None = None
    threshold: Float[Tensor, " d_dict"] | None = None
    r_mag: Float[Tensor, " d_dict"] | None = None
    b_gate: Float[Tensor, " d_dict"] | None = None
    b_mag: Float[Tensor, " d_dict"] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    W_dec_later: Float[Tensor, "later d_dict d_out"] | None = None
    k: int | None = None
    hook_in: str | None = None
    hook_out: str | None = None
    apply_b_dec_to_input: bool = False
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    own_encode: Callable[[Tensor], Tensor] | None = None
    lazy: bool = False

    def __post_init__(self) -> None:
        """Fill in what follows from the rest, and refuse what does not fit together."""
        if self.hook_out is None and not self._kind.is_transcoder:
            object.__setattr__(self, "hook_out", self.hook_in)
        if not self.name:
            object.__setattr__(self, "name", f"{self.kind} at {self.hook_in or 'no hook'}")
        _check_tensors(self.kind, self.name, self.tensors())
        _check_settings(self)

    @property
    def _kind(self) -> Kind:
        return kind_of(self.kind)

    @property
    def d_in(self) -> int:
        """Width of the activation it reads."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the activation it writes."""
        return self.W_dec.shape[1]

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.W_enc.device

    @property
    def n_later(self) -> int:
        """How many layers after its own its features write into."""
        return 0 if self.W_dec_later is None else len(self.W_dec_later)

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes at another hook point than it reads, or is of a kind that does."""
        return self._kind.is_transcoder or self.hook_in != self.hook_out

    @property
    def has_skip(self) -> bool:
        """Whether there is a linear path from input to output beside the features."""
        return self.W_skip is not None

    @property
    def layer(self) -> int:
        """The layer it writes into.

        Raises:
            DictionaryError: it names no hook, or a hook outside the layers.
        """
        match = re.search(r"\.(\d+)(?:\.|$)", self.hook_out or "")
        if match is None:
            raise DictionaryError(
                f"{self.name}: no layer in hook_out = {self.hook_out!r}. Name the hooks: as_dictionary(dictionary, "
                'hook_in="blocks.0.hook_mlp_out", hook_out="blocks.0.hook_mlp_out").'
            )
        return int(match.group(1))

    @property
    def scale_depends_on_input(self) -> bool:
        """Whether `decode` needs the input, because it undoes a run-time normalization (SAEs only, as in SAELens)."""
        at_run_time = self.normalize_activations in ("layer_norm", "constant_norm_rescale")
        return at_run_time and not self._kind.is_transcoder

    def encode(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch d_dict"]:
        """The features of an activation `[..., d_in]`, or `[..., head_index, d_head]` on `attn.hook_z`."""
        flat = self._flat(x)
        if self.own_encode is not None:
            return self.own_encode(flat).to(flat)
        x_n = _normalized(flat, self.normalize_activations)[0]
        if self.apply_b_dec_to_input:
            x_n = x_n - self._weight("b_dec", x_n)
        linear = x_n @ self._weight("W_enc", x_n)
        activation = self._kind.activation
        if activation == "gated":
            magnitude = (linear * self._weight("r_mag", linear).exp() + self._weight("b_mag", linear)).relu()
            return magnitude * (linear + self._weight("b_gate", linear) > 0).to(linear.dtype)
        pre = linear + self._weight("b_enc", linear)
        if activation == "jumprelu":  # no gradient reaches the threshold
            return pre.relu() * (pre > self._weight("threshold", pre)).to(pre.dtype)
        if self._kind.needs_k and self.k is not None:
            signed = activation != "topk"
            index = (pre.abs() if activation == "abstopk" else pre).topk(self.k, dim=-1, sorted=False).indices
            kept = pre.gather(-1, index)
            return torch.zeros_like(pre).scatter(-1, index, kept if signed else kept.relu())
        return pre.relu()

    def decode(
        self, features: Float[Tensor, "*batch d_dict"], x: Float[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """The reconstruction from features, without the skip.

        Args:
            features: activations of the features.
            x: the input they came from. Needed where `scale_depends_on_input`; on `attn.hook_z` it also says whether
                the result should have heads, as `x` has.

        Raises:
            DictionaryError: the scale depends on the input and `x` is not given.
        """
        dtype = self._compute_dtype(features.dtype if x is None else torch.promote_types(features.dtype, x.dtype))
        features = features.to(dtype)
        output = self.write(features, self.W_dec) + self._weight("b_dec", features)
        if self.scale_depends_on_input:
            if x is None:
                raise DictionaryError(
                    f"{self.name}: normalize_activations is {self.normalize_activations!r}, so the scale of a "
                    "reconstruction depends on the input: call decode(features, x)."
                )
            _, undo = _normalized(self._flat(x), self.normalize_activations)
            output = output if undo is None else output * undo[0] + undo[1]
        if not self._on_heads or x is None or x.shape[-1] == self.d_in:
            return output
        return output.unflatten(-1, (-1, x.shape[-1]))

    def write(
        self, features: Float[Tensor, "*batch d_dict"], decoder: Float[Tensor, "d_dict d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        """`features @ decoder`, of `W_dec` or a part of `W_dec_later`."""
        if not self.lazy or features.requires_grad:
            return features @ decoder.to(features)
        active = (features != 0).flatten(0, -2).any(0).nonzero()[:, 0]
        return features[..., active] @ decoder[active.to(decoder.device)].to(features)

    def decoder_scale(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch 1"]:
        """The factor on the rows of `W_dec` at this input: 1 unless `scale_depends_on_input`."""
        flat = self._flat(x)
        undo = _normalized(flat, self.normalize_activations)[1] if self.scale_depends_on_input else None
        return torch.ones_like(flat[..., :1]) if undo is None else undo[0]

    def bias(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What is written with every feature at zero: `b_dec`, scaled and shifted where `scale_depends_on_input`."""
        flat = self._flat(x)
        return self.decode(flat.new_zeros(*flat.shape[:-1], self.d_dict), x)

    def skip(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        """The linear path `x @ W_skip.T` of a skip transcoder; None without one."""
        if self.W_skip is None:
            return None
        flat = self._flat(x)
        return flat @ self._weight("W_skip", flat).mT

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The whole reconstruction, skip included."""
        output = self.decode(self.encode(x), x)
        skip = self.skip(x)
        return output if skip is None else output + skip

    def __call__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The same as `forward`."""
        return self.forward(x)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Dictionary":
        """A copy on another device, in another floating dtype, or both."""
        return replace(self, **{name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor it has, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __repr__(self) -> str:
        """One line."""
        where = self.hook_in if self.hook_in == self.hook_out else f"{self.hook_in} -> {self.hook_out}"
        return f"Dictionary({self.kind}, {self.d_dict:,} features, {self.d_in} -> {self.d_out}, {where}, {self.dtype})"

    def _compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(torch.promote_types(dtype, self.dtype), torch.float32)

    def _weight(self, name: str, like: Tensor) -> Tensor:
        return getattr(self, name).to(like)

    @property
    def _on_heads(self) -> bool:
        """Whether an input may come as `[..., head_index, d_head]`: by SAELens' setting or the hook's name."""
        return self.reshape_activations == "hook_z" or (self.hook_in or "").endswith("attn.hook_z")

    def _flat(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch d_in"]:
        """`x` as `[..., d_in]` in the compute dtype, heads concatenated; a last axis of d_in is flat already."""
        if self._on_heads and x.shape[-1] != self.d_in and x.ndim > 1:
            x = x.flatten(-2)
        if x.shape[-1] != self.d_in:
            raise DictionaryError(f"{self.name} reads activations of width {self.d_in}, got shape {list(x.shape)}.")
        return x.to(self._compute_dtype(x.dtype))


def _normalized(
    x: Float[Tensor, "*batch d_in"], how: str
) -> tuple[Float[Tensor, "*batch d_in"], tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]] | None]:
    """The input as the encoder sees it, and the scale and shift that undo it: `y * scale + shift`; None where nothing
    is done at run time.
    """
    if how == "layer_norm":
        # As SAELens does it: the deviation has the n - 1 denominator, and epsilon is added to it on the way in only.
        shift = x.mean(dim=-1, keepdim=True)
        deviation = (x - shift).std(dim=-1, keepdim=True)
        return (x - shift) / (deviation + LAYER_NORM_EPSILON), (deviation, shift)
    if how == "constant_norm_rescale":
        factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        return x * factor, (1 / factor, torch.zeros_like(factor))
    return x, None


def build_dictionary(
    kind: str, tensors: Mapping[str, Tensor], *, rescale_acts_by_decoder_norm: bool = False, **settings: Any
) -> Dictionary:
    """A checked dictionary from the tensors of a file or a live object, by name.

    Where the kind rescales by the decoder's row norms, they are folded, in at least float32, in which the dictionary
    then stays: the encoding is unchanged and `W_dec` effective.

    Raises:
        DictionaryError: a tensor is missing, unknown to the kind, of the wrong shape, or not finite.
    """
    names = kind_of(kind).tensors
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(unknown)}, which a {kind} does not use"] if unknown else []
        raise DictionaryError(f"A {kind} needs the tensors {', '.join(names)}; this one {' and '.join(parts)}.")
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    _check_tensors(kind, settings.get("name") or kind, tensors)
    if rescale_acts_by_decoder_norm:
        dtype = torch.promote_types(tensors["W_dec"].dtype, torch.float32)
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        norms = tensors["W_dec"].norm(dim=-1)
        # A dead row has norm 0: it stays 0 rather than become NaN.
        rows = tensors["W_dec"] / norms.clamp(min=torch.finfo(dtype).tiny)[:, None]
        tensors |= {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms, "W_dec": rows}
    dictionary = Dictionary(kind, **tensors, **settings)
    check_finite(dictionary)
    return dictionary


def check_finite(dictionary: Dictionary) -> None:
    """Refuse NaN and infinite numbers; a threshold may be infinite (a feature that never fires)."""
    for name, tensor in dictionary.tensors().items():
        outer = max(range(tensor.dim()), key=tensor.stride)  # in pieces as they lie in a file, for mapped ones
        parts = tensor.split(1024, outer) if dictionary.lazy else [tensor]
        bad = sum(int((part.isnan() if name == "threshold" else ~part.isfinite()).sum()) for part in parts)
        if bad:
            raise DictionaryError(
                f"{dictionary.name}: {bad} of {tensor.numel()} numbers of {name} are NaN or infinite: "
                "the dictionary is damaged or its training diverged."
            )


def _check_settings(dictionary: Dictionary) -> None:
    kind, name = kind_of(dictionary.kind), dictionary.name
    if kind.needs_k and not (dictionary.k and 0 < dictionary.k <= dictionary.d_dict):
        raise DictionaryError(
            f"{name}: a {dictionary.kind} needs 0 < k <= {dictionary.d_dict}, got k = {dictionary.k}."
        )
    for setting, known in (("normalize_activations", NORMALIZATIONS), ("reshape_activations", ("none", "hook_z"))):
        if (value := getattr(dictionary, setting)) not in known:
            raise DictionaryError(f"{name}: {setting} is {value!r}, expected one of {', '.join(known)}.")
    if kind.is_transcoder and dictionary.apply_b_dec_to_input:
        raise DictionaryError(
            f"{name}: apply_b_dec_to_input has no meaning for a {dictionary.kind}: b_dec belongs to the output. "
            "Fold it into b_enc (b_enc - b_dec @ W_enc) and pass apply_b_dec_to_input=False."
        )
    if dictionary.W_dec_later is not None and not kind.is_cross_layer:
        raise DictionaryError(f"{name}: W_dec_later belongs to cross-layer kinds; a {dictionary.kind} writes once.")
    if (kind.activation == "custom") != (dictionary.own_encode is not None):
        raise DictionaryError(f"{name}: kind 'custom' and own_encode go together; use as_dictionary(object).")
    tied = dictionary.apply_b_dec_to_input or dictionary.scale_depends_on_input
    if tied and dictionary.d_in != dictionary.d_out:
        raise DictionaryError(
            f"{name}: input width {dictionary.d_in} and output width {dictionary.d_out} differ, so b_dec cannot be "
            "subtracted from the input, nor the input's scale applied to the output."
        )


def _check_tensors(kind_name: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing, of the wrong shape, or on different dtypes or devices."""
    kind = kind_of(kind_name)
    for matrix in ("W_enc", "W_dec"):
        if tensors[matrix].ndim != 2:
            raise DictionaryError(f"{name}: {matrix} should have two axes, has shape {list(tensors[matrix].shape)}.")
    first, (d_dict, d_out) = tensors["W_enc"], tensors["W_dec"].shape
    d_in = first.shape[0]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_dict), "W_dec": (d_dict, d_out), "b_dec": (d_out,)}
    shapes |= {vector: (d_dict,) for vector in ENCODER_TENSORS.get(kind.activation, ())}
    if "W_skip" in tensors or kind.has_skip:
        shapes["W_skip"] = (d_out, d_in)
    if "W_dec_later" in tensors or kind.is_cross_layer:
        later = tensors.get("W_dec_later")
        shapes["W_dec_later"] = (0 if later is None else len(later), d_dict, d_out)
    for tensor_name, shape in shapes.items():
        tensor = tensors.get(tensor_name)
        if tensor is None:
            raise DictionaryError(f"{name}: a {kind_name} needs the tensor {tensor_name} {list(shape)}.")
        if tuple(tensor.shape) != shape:
            raise DictionaryError(
                f"{name}: {tensor_name} should have shape {list(shape)}, has {list(tensor.shape)}; expected "
                f"W_enc [d_in, d_dict] and W_dec [d_dict, d_out], got W_enc {list(first.shape)} and "
                f"W_dec {list(tensors['W_dec'].shape)}."
            )
        if not tensor.is_floating_point() or (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise DictionaryError(
                f"{name}: {tensor_name} is {tensor.dtype} on {tensor.device}, W_enc {first.dtype} on {first.device}: "
                "the tensors of a dictionary share one floating dtype and device."
            )
