"""One prompt's forward pass, with everything that is not linear in the residual stream frozen.

    residual stream = embedding + positional embedding + sum over layers of (heads + b_O) + (features + error + ...)

Frozen are attention patterns, the scales of all norms, and which features fire. Then the rest is linear:

    norm      y = weight * center(x) / scale + bias, so a vector v that reads y reads x as center(weight * v) / scale,
              and the constant v . bias is left over (no centering for RMSNorm)
    head      writes A[t, s] * norm(x_s) W_V W_O at position t
    encoder   pre(f) = read_vectors[f] . norm(x) + constant(f)

The released code of the transcoder paper multiplies by one number per token instead of going through the norm, which
keeps totals but gives them to the wrong sources. Which norm stands before an encoder (with its weight or before it, the
attention's own in parallel blocks, none) is decided by the activations of the pass, never by the hook's name: what
`ln2.hook_normalized` carries differs between versions and model classes. Everything is kept in at least float32.
Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3, "our form".
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .._errors import DictionaryError, SettingsError, UnsupportedModelError
from ..bases._dictionary import LAYER_NORM_EPSILON, Dictionary
from ..bases._dictionary_basis import Dictionaries, DictionarySite
from ..bases._runs import Values, values_at
from ..bases._site import refuse_cross_layer
from ..models._protocol import TransformerLensModel, hook_points, submodule
from ..propagation._norms import read_norm
from ..tasks._text_tokens import text_tokens

Prompt = str | Int[Tensor, " pos"] | Int[Tensor, "1 pos"]

_CLOSE = {torch.float64: 1e-5, torch.float32: 1e-3}
_ROUGH = 0.05
"""How far a norm's output may be from what a dictionary reads, by dtype; relative."""


@dataclass(frozen=True, eq=False)
class NormMap:
    """A norm on the residual stream; `normalizes` is False where there is none, and everything passes unchanged."""

    weight: Float[Tensor, " d"] | None
    bias: Float[Tensor, " d"] | None
    eps: float
    centered: bool
    normalizes: bool = True

    def scale(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """The divisor at x."""
        if not self.normalizes:
            return torch.ones_like(x[..., :1])
        return (self._center(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def apply(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The norm's output."""
        y = self.along(x) / self.scale(x)
        return y if self.bias is None else y + self.bias.to(y)

    def along(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Written directions through the norm, with the scale set to one and without the bias."""
        x = self._center(x)
        return x if self.weight is None else x * self.weight.to(x)

    def back(self, v: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Vectors that read the output, as vectors that read the input, with the scale set to one: divide by it."""
        return self._center(v if self.weight is None else v * self.weight.to(v))

    def constant(self, v: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """What vectors that read the output read from the bias."""
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
        wrapped = read_norm(model, path)
        if wrapped is None:
            return NO_NORM
        weight = wrapped.weight if wrapped.weight.numel() > 1 else None
        return NormMap(weight, None if wrapped.bias is None else wrapped.bias.detach(), wrapped.eps, wrapped.centered)
    weight, bias = (getattr(norm, name, None) for name in ("w", "b"))
    eps = float(getattr(norm, "eps", getattr(model.cfg, "eps", 1e-5)))
    detached = [value.detach() if isinstance(value, Tensor) else None for value in (weight, bias)]
    return NormMap(detached[0], detached[1], eps, centered="LayerNorm" in type(norm).__name__)


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """One attention layer, from the residual stream that it reads to the one that it writes.

    A value head may serve several heads: head h reads through `W_V[h // (n_heads // n_value_heads)]`.
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

    def back(self, v: Float[Tensor, "*batch d_model"]) -> tuple[Tensor, Tensor]:
        """W_V W_O v for every head: what v reads in the normalized residual stream, `[*batch, head, d_model]`; and
        what it reads from b_V, `[*batch, head]`.
        """
        heads = torch.einsum("hkd,...d->...hk", self.W_O.to(v), v)
        grouped = heads.unflatten(-2, (len(self.W_V), -1))
        reads = torch.einsum("gdk,...grk->...grd", self.W_V.to(v), grouped).flatten(-3, -2)
        if self.b_V is None:
            return reads, torch.zeros_like(reads[..., 0])
        return reads, torch.einsum("gk,...grk->...gr", self.b_V.to(v), grouped).flatten(-2)

    def back_through(self, head: int, v: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """W_V W_O v of one head, without b_V."""
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
    if not (
        (isinstance(W_V, Tensor) and W_V.dim() == 3 and W_V.shape[1] == width)
        and (isinstance(W_O, Tensor) and W_O.dim() == 3 and W_O.shape[2] == width)
        and W_O.shape[0] % W_V.shape[0] == 0
    ):
        raise UnsupportedModelError(
            f"expected blocks.{layer}.attn.W_V [head, {width}, d_head] and W_O [head, d_head, {width}] on this "
            f"{type(model).__name__}; got {getattr(W_V, 'shape', None)} and {getattr(W_O, 'shape', None)}."
        )
    biases = [b.detach() if isinstance(b, Tensor) else None for b in (b_V, b_O)]
    norms = [norm_map(model, f"blocks.{layer}.{name}") for name in ("ln1", "ln1_post")]
    return AttentionWeights(W_V.detach(), W_O.detach(), biases[0], biases[1], norms[0], norms[1])


@dataclass(frozen=True, eq=False)
class Reading:
    """How one transcoder reads the residual stream: at which hook point, through which norm."""

    site: DictionarySite
    layer: int
    """Of the block in which it reads."""
    stream: str
    """The hook point of the residual stream that it reads."""
    norm: NormMap

    @property
    def dictionary(self) -> Dictionary:
        """The transcoder."""
        return self.site.dictionary

    def vectors(
        self, units: Int[Tensor, " unit"] | Sequence[int]
    ) -> tuple[Float[Tensor, "unit d_in"], Float[Tensor, " unit"]]:
        """The encoder's read vectors at `hook_in`, and their constants; its run-time normalization is not in them."""
        d = self.dictionary
        index = torch.as_tensor(units, dtype=torch.long, device=d.device)
        dtype = torch.promote_types(d.dtype, torch.float32)
        vectors = d.W_enc[:, index].mT.to(dtype)
        if d.r_mag is not None and d.b_mag is not None:  # gated: where it fires, the magnitude
            vectors, constants = vectors * d.r_mag[index, None].to(dtype).exp(), d.b_mag[index].to(dtype)
        else:
            constants = torch.zeros(len(index)).to(vectors) if d.b_enc is None else d.b_enc[index].to(dtype)
        if d.apply_b_dec_to_input:
            constants = constants - vectors @ d.b_dec.to(dtype)
        return vectors, constants

    def rescaled(
        self, vectors: Float[Tensor, "unit d_in"], x: Float[Tensor, " d_in"] | None
    ) -> Float[Tensor, "unit d_in"]:
        """The vectors through the dictionary's own run-time normalization, frozen at x; up to its scale for None."""
        how = self.dictionary.normalize_activations
        if how == "layer_norm":
            scale = 1.0 if x is None else x.std() + LAYER_NORM_EPSILON
            return (vectors - vectors.mean(-1, keepdim=True)) / scale
        if how == "constant_norm_rescale" and x is not None:
            return vectors * (len(x) ** 0.5 / x.norm())
        return vectors


@dataclass(frozen=True, eq=False)
class MLPWrites:
    """What one MLP writes, in terms of its dictionary; all of it is error where there is none."""

    site: DictionarySite | None
    units: Sequence[Int[Tensor, " _"]]
    """The features that fire, by position."""
    activations: Sequence[Float[Tensor, " _"]]
    error: Float[Tensor, "pos d_model"]
    skip: Float[Tensor, "pos d_model"] | None
    post: NormMap
    """The norm between what the dictionary writes and the residual stream (Gemma before its post norm), or none."""
    post_scale: Float[Tensor, "pos 1"] | None

    @property
    def dictionary(self) -> Dictionary | None:
        """The transcoder or SAE."""
        return None if self.site is None else self.site.dictionary


@dataclass(frozen=True, eq=False)
class ResidualRun:
    """The prompt, the frozen pieces, and the weights between them."""

    model: TransformerLensModel
    tokens: Int[Tensor, " pos"]
    values: Values
    """Without the batch axis."""
    readings: Mapping[int, Reading]
    """Of the transcoders, whose features can be targets, by layer of the MLP they stand for."""
    streams: Sequence[tuple[str, str]]
    """Hook points of the residual stream before each layer's attention and before its MLP."""
    mlps: Sequence[MLPWrites]
    embedding: Float[Tensor, "pos d_model"]
    positional: Float[Tensor, "pos d_model"] | None

    @property
    def n_layers(self) -> int:
        """How many blocks."""
        return len(self.mlps)

    @cached_property
    def attentions(self) -> list[AttentionWeights]:
        """The weights of every attention layer."""
        return [attention_weights(self.model, layer) for layer in range(self.n_layers)]

    @cached_property
    def attention_inputs(self) -> list[Tensor]:
        """The normalized residual stream that each attention layer's heads read, `[pos, d_model]`."""
        return [a.norm.apply(self.values[f"blocks.{layer}.hook_resid_pre"]) for layer, a in enumerate(self.attentions)]

    @cached_property
    def attention_scales(self) -> list[Tensor]:
        """The scale of the norm before each attention layer, `[pos, 1]`."""
        return [a.norm.scale(self.values[f"blocks.{layer}.hook_resid_pre"]) for layer, a in enumerate(self.attentions)]

    @cached_property
    def attention_post_scales(self) -> list[Tensor | None]:
        """The scale of the norm after each attention layer, where there is one."""
        scales: list[Tensor | None] = []
        for layer, weights in enumerate(self.attentions):
            if not weights.post.normalizes:
                scales.append(None)
                continue
            z = self.values[f"blocks.{layer}.attn.hook_z"].reshape(len(self.tokens), weights.n_heads, -1)
            written = torch.einsum("thk,hkd->td", z, weights.W_O.to(z))
            scales.append(weights.post.scale(written if weights.b_O is None else written + weights.b_O.to(z)))
        return scales

    def before_post_norm(self, layer: int, position: int, v: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """A vector that reads the residual stream, as one that reads what the layer's dictionary writes."""
        writes = self.mlps[layer]
        if writes.post_scale is None:
            return v
        return writes.post.back(v) / writes.post_scale[position].to(v)


def residual_run(model: TransformerLensModel, dictionaries: Sequence[Dictionary], tokens: Tensor) -> ResidualRun:
    """Run the model on one prompt and take its residual stream apart.

    Raises:
        DictionaryError: a dictionary does not write an MLP's output, or does not fit the model.
        UnsupportedModelError: a hook point is missing or does not fire.
    """
    points, n_layers = hook_points(model), int(model.cfg.n_layers)
    sites = _sites_by_layer(model, dictionaries)
    streams = []
    for layer in range(n_layers):
        before, middle = (f"blocks.{layer}.hook_resid_{place}" for place in ("pre", "mid"))
        parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
        streams.append((before, before if parallel or middle not in points else middle))
    has_positional = getattr(model.cfg, "positional_embedding_type", "") == "standard" and "hook_pos_embed" in points
    names = ["hook_pos_embed"] if has_positional else []
    for layer in range(n_layers):
        names += [*streams[layer], f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.attn.hook_z"]
        pre = f"blocks.{layer}.mlp.hook_pre"
        names += [pre] if pre in points else []
        names += sites[layer].reads if layer in sites else (f"blocks.{layer}.hook_mlp_out",)
    names.append(f"blocks.{n_layers - 1}.hook_resid_post")
    values = _values(model, tokens, list(dict.fromkeys(names)))
    positional = values["hook_pos_embed"] if has_positional else None
    embedding = values["blocks.0.hook_resid_pre"]
    readings = {
        layer: _reading(model, site, values, streams) for layer, site in sites.items() if site.hook_in != site.hook
    }
    mlps = [_mlp_writes(model, layer, sites.get(layer), values) for layer in range(n_layers)]
    embedding = embedding if positional is None else embedding - positional
    return ResidualRun(model, tokens[0], values, readings, streams, mlps, embedding, positional)


def _sites_by_layer(model: TransformerLensModel, dictionaries: Sequence[Dictionary]) -> dict[int, DictionarySite]:
    """The dictionaries by the layer whose MLP they stand for."""
    sites: dict[int, DictionarySite] = {}
    for site in Dictionaries(dictionaries).sites(model):
        refuse_cross_layer([site], "circuits from weights")
        dictionary = site.dictionary
        if not re.fullmatch(r"blocks\.\d+\.(hook_mlp_out|mlp\.hook_out|mlp\.out\.hook_out)", site.hook):
            raise DictionaryError(
                f"{dictionary.name} writes at {site.hook}. Circuits from weights take the residual stream apart into "
                "what MLPs and heads write, so they need dictionaries that write an MLP's output (blocks.L."
                "hook_mlp_out). For dictionaries elsewhere use attribute(model, pairs, basis=Dictionaries([...]))."
            )
        if dictionary.own_encode is not None:
            raise DictionaryError(
                f"{dictionary.name} keeps an encoder of its own, whose biases and nonlinearity cannot be read. Make a "
                "Dictionary of a known kind from its tensors, such as Dictionary('transcoder', W_enc, W_dec, b_dec, "
                "b_enc=..., hook_in=..., hook_out=...)."
            )
        if site.layer in sites:
            raise DictionaryError(
                f"expected one dictionary per layer; two write the output of layer {site.layer}'s MLP."
            )
        sites[site.layer] = site
    return sites


def _values(model: TransformerLensModel, tokens: Tensor, names: list[str]) -> Values:
    points = hook_points(model)
    absent = [name for name in names if name not in points]
    if absent:
        raise UnsupportedModelError(
            f"circuits from weights read the residual stream and attention at {absent[:4]}, which this "
            f"{type(model).__name__} lacks. Use attribute(...) or trace(...), which need gradients only."
        )
    values = values_at(model, tokens, names)
    # OPT on TransformerBridge flattens batch and positions before the MLP.
    values = {name: value if value.dim() == 2 else value[0] for name, value in values.items()}
    return {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in values.items()}


def _reading(
    model: TransformerLensModel, site: DictionarySite, values: Mapping[str, Tensor], streams: Sequence[tuple[str, str]]
) -> Reading:
    """How a transcoder reads the residual stream: the first norm whose output is what it read in this run."""
    name = site.dictionary.name
    block = re.match(r"blocks\.(\d+)\.", site.hook_in)
    if block is None:
        raise DictionaryError(f"expected {name} to read in a block; got {site.hook_in}.")
    layer, x = int(block[1]), values[site.hook_in].flatten(0, -2)
    allowed = _CLOSE.get(values[site.hook_in].dtype, _ROUGH)
    for stream, norm in _candidates(model, layer, *streams[layer]):
        expected = norm.apply(values[stream].flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32)))
        if (expected - x).norm() <= allowed * x.norm():
            return Reading(site, layer, stream, norm)
    raise DictionaryError(
        f"{name} reads {site.hook_in}, which is not a norm of the residual stream in block {layer}: circuits from "
        "weights need transcoders that read the MLP's input. Use attribute(...) or trace(...) for this one."
    )


def _candidates(model: TransformerLensModel, layer: int, before: str, middle: str) -> Iterator[tuple[str, NormMap]]:
    for path in ("ln2", "ln1"):
        norm = norm_map(model, f"blocks.{layer}.{path}")
        if norm.normalizes:
            yield middle, norm
            yield middle, norm.bare()
    yield middle, NO_NORM
    yield before, NO_NORM


def _mlp_writes(
    model: TransformerLensModel, layer: int, site: DictionarySite | None, values: Mapping[str, Tensor]
) -> MLPWrites:
    if site is None:
        return MLPWrites(None, (), (), values[f"blocks.{layer}.hook_mlp_out"], None, NO_NORM, None)
    parts = site.take_apart({name: values[name][None] for name in site.reads})
    nodes, skip = parts.nodes[0], parts.vectors.get("skip")
    units = [row.nonzero().flatten() for row in nodes]
    activations = [row[index] for row, index in zip(nodes, units, strict=True)]
    post = NO_NORM if site.hook.endswith("hook_mlp_out") else norm_map(model, f"blocks.{layer}.ln2_post")
    scale = post.scale(values[site.hook]) if post.normalizes else None
    return MLPWrites(
        site, units, activations, parts.vectors["error"][0], None if skip is None else skip[0], post, scale
    )


def one_prompt(model: TransformerLensModel, prompt: Prompt, prepend_bos: bool | None = None) -> Int[Tensor, "1 pos"]:
    """The tokens of one prompt, on the model's device.

    Raises:
        SettingsError: no tokens, or `prepend_bos` for tokens.
    """
    if isinstance(prompt, str):
        tokens = text_tokens(model, prompt, prepend_bos)
    else:
        if prepend_bos is not None:
            raise SettingsError("prepend_bos cannot be applied to tokens: put BOS into them.")
        tokens = prompt.reshape(1, -1).to(model.cfg.device or "cpu")
    if tokens.numel() == 0:
        raise SettingsError("expected a prompt of at least one token; got none.")
    return tokens
