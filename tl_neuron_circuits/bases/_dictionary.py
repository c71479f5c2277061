"""Sparse dictionaries: SAEs, which rebuild the activation they read, and transcoders, which rebuild another one.

    features(x) = encode(x)                                          [..., d_dict], see `_dictionary_kinds`
    dictionary(x) = decoder_scale(x) * (features(x) @ W_dec) + bias(x) + skip(x)

`W_dec` holds effective directions: a decoder that divides by its own row norms (`rescale_acts_by_decoder_norm`) is
folded on loading. So one unit of feature f writes exactly `decoder_scale(x) * W_dec[f]`. The scale is 1 except under
`normalize_activations` of "layer_norm" or "constant_norm_rescale", where it depends on the input, and `decode` needs
the input too.

Precision: everything is computed and returned in the widest of float32, the input's dtype and the dictionary's dtype:
a bfloat16 dictionary on a float32 model loses nothing but the rounding of its weights. The caller casts when it writes
into a model. Weights move to the input's device for the call; `dictionary.to(device, dtype)` once saves that.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import DictionaryError
from ._dictionary_checks import check_settings, check_tensors
from ._dictionary_kinds import Kind, jump_relu, kind_of, normalized, top_k


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """A sparse dictionary: encoder, decoder, and the two hook points it reads and writes.

    Make one with `load_dictionary`, `as_dictionary`, or directly from tensors. Shapes: `d_in` is the width it reads,
    `d_out` the width it writes, `d_dict` the number of features. Tensors share one dtype and device.

    Attributes:
        kind: SAELens' architecture name ("standard", "gated", "topk", "jumprelu", "skip_transcoder", ...).
        hook_in: the hook point read, as its maker named it; `resolve_hooks` finds it on a model.
        hook_out: the hook point written; equal to `hook_in` for an SAE.
        k: features kept per position, for the topk kinds.
        own_encode: the encoder of a live object, for kind "custom".

    Raises:
        DictionaryError: tensors are missing, do not fit together, or a setting is unknown.

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
    k: int | None = None
    hook_in: str | None = None
    hook_out: str | None = None
    apply_b_dec_to_input: bool = False
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    own_encode: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Fill in what follows from the rest, and refuse what does not fit together."""
        if self.hook_out is None and not self._kind.is_transcoder:
            object.__setattr__(self, "hook_out", self.hook_in)
        if not self.name:
            object.__setattr__(self, "name", f"{self.kind} at {self.hook_in or 'no hook'}")
        check_tensors(self.kind, self.name, self.tensors())
        check_settings(self)

    @property
    def _kind(self) -> Kind:
        return kind_of(self.kind)

    @property
    def d_in(self) -> int:
        """Width of the activation read."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the activation written."""
        return self.W_dec.shape[1]

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the weights are kept in."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """The device the weights are kept on."""
        return self.W_enc.device

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes at another hook point than it reads, or is of a kind that does."""
        return self._kind.is_transcoder or self.hook_in != self.hook_out

    @property
    def has_skip(self) -> bool:
        """Whether there is an affine path from input to output beside the features."""
        return self.W_skip is not None

    @property
    def layer(self) -> int:
        """The layer it writes into.

        Raises:
            DictionaryError: its hook is not known or belongs to no layer.
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
        """Whether `decode` needs the input, because a run-time normalization is undone."""
        return self._rescales and not self._kind.is_transcoder

    @property
    def _rescales(self) -> bool:
        return self.normalize_activations in ("layer_norm", "constant_norm_rescale")

    @property
    def _on_heads(self) -> bool:
        """Whether an input may come as `[..., head_index, d_head]`: by SAELens' setting or the name of the hook."""
        return self.reshape_activations == "hook_z" or (self.hook_in or "").endswith("attn.hook_z")

    def encode(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch d_dict"]:
        """The features of an activation `[..., d_in]`, or `[..., head_index, d_head]` on `attn.hook_z`."""
        flat = self._flat(x)
        if self.own_encode is not None:
            return self.own_encode(flat).to(flat)
        seen = normalized(flat, self.normalize_activations)[0]
        if self.apply_b_dec_to_input:
            seen = seen - self._weight("b_dec", seen)
        return self._activate(seen @ self._weight("W_enc", seen))

    def _activate(self, linear: Float[Tensor, "*batch d_dict"]) -> Float[Tensor, "*batch d_dict"]:
        activation = self._kind.activation
        if activation == "gated":
            magnitude = (linear * self._weight("r_mag", linear).exp() + self._weight("b_mag", linear)).relu()
            return magnitude * (linear + self._weight("b_gate", linear) > 0).to(linear.dtype)
        pre = linear + self._weight("b_enc", linear)
        if activation == "jumprelu":
            return jump_relu(pre, self._weight("threshold", pre))
        if self.k is not None and self._kind.needs_k:
            return top_k(pre, self.k, signed=activation == "abstopk")
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
        output = features @ self._weight("W_dec", features) + self._weight("b_dec", features)
        if self.scale_depends_on_input:
            if x is None:
                raise DictionaryError(
                    f"{self.name}: normalize_activations is {self.normalize_activations!r}, so the scale of a "
                    "reconstruction depends on the input: call decode(features, x)."
                )
            _, undo = normalized(self._flat(x), self.normalize_activations)
            output = output if undo is None else output * undo[0] + undo[1]
        return self._with_heads(output, x)

    def decoder_scale(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch 1"]:
        """What a row of `W_dec` is multiplied with at this input: 1 unless `scale_depends_on_input`."""
        flat = self._flat(x)
        undo = normalized(flat, self.normalize_activations)[1] if self.scale_depends_on_input else None
        return torch.ones_like(flat[..., :1]) if undo is None else undo[0]

    def bias(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What is written with every feature at zero: `b_dec`, scaled and shifted where `scale_depends_on_input`."""
        flat = self._flat(x)
        return self.decode(flat.new_zeros(*flat.shape[:-1], self.d_dict), x)

    def skip(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        """The affine path `x @ W_skip.T` of a skip transcoder; None without one."""
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

    def _flat(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch d_in"]:
        """`x` as `[..., d_in]` in the dtype of computation, heads concatenated; a last axis of d_in is flat already."""
        if self._on_heads and x.shape[-1] != self.d_in and x.ndim > 1:
            x = x.flatten(-2)
        if x.shape[-1] != self.d_in:
            raise DictionaryError(f"{self.name} reads activations of width {self.d_in}, got shape {list(x.shape)}.")
        return x.to(self._compute_dtype(x.dtype))

    def _with_heads(self, output: Float[Tensor, "*batch d_out"], x: Tensor | None) -> Float[Tensor, "..."]:
        if not self._on_heads or x is None or x.shape[-1] == self.d_in:
            return output
        return output.unflatten(-1, (-1, x.shape[-1]))
