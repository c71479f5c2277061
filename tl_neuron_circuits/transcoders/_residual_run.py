"""One prompt's forward pass, taken apart into what writes to the residual stream and what is frozen.

    residual stream = embedding + positional embedding + sum over layers of (heads + b_O) + (features + error + ...)

Frozen: attention patterns, the scales of all norms, which features fire. What is kept is in at least float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError, UnsupportedModelError
from ..bases._dictionary import Dictionary
from ..bases._runs import Values, values_at
from ..bases._site import Site
from ..models._protocol import TransformerLensModel, hook_points
from ._attention_weights import AttentionWeights, attention_weights
from ._norm_maps import NO_NORM, NormMap, norm_map
from ._readings import Reading, reading_of, source_sites, stream_names

Prompt = str | Int[Tensor, " pos"] | Int[Tensor, "1 pos"]


@dataclass(frozen=True, eq=False)
class Features:
    """The features of one layer that fire, on one prompt."""

    units: Sequence[Int[Tensor, " _"]]
    """By position."""
    values: Sequence[Float[Tensor, " _"]]


@dataclass(frozen=True, eq=False)
class MLPWrites:
    """What one MLP writes, in terms of its dictionary; the error is all of it where there is none."""

    dictionary: Dictionary | None
    hook_in: str
    """What the dictionary reads; empty without one."""
    features: Features | None
    error: Float[Tensor, "pos d_model"]
    skip: Float[Tensor, "pos d_model"] | None
    post: NormMap
    """The norm between what the dictionary writes and the residual stream (Gemma before its post norm), or none."""
    post_scale: Float[Tensor, "pos 1"] | None


@dataclass(frozen=True, eq=False)
class ResidualRun:
    """The prompt, the frozen pieces, and the weights between them."""

    model: TransformerLensModel
    tokens: Int[Tensor, " pos"]
    values: Values
    """Without the batch axis."""
    readings: Mapping[int, Reading]
    """Of the dictionaries that can be targets, by layer of the MLP they stand for."""
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
        found: list[Tensor | None] = []
        for layer, weights in enumerate(self.attentions):
            if not weights.post.normalizes:
                found.append(None)
                continue
            z = self.values[f"blocks.{layer}.attn.hook_z"].reshape(len(self.tokens), weights.n_heads, -1)
            written = torch.einsum("thk,hkd->td", z, weights.W_O.to(z))
            found.append(weights.post.scale(written if weights.b_O is None else written + weights.b_O.to(z)))
        return found

    def write_vector(self, layer: int, position: int, v: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """A vector that reads the residual stream, as it reads what an MLP's dictionary writes."""
        writes = self.mlps[layer]
        if writes.post_scale is None:
            return v
        return writes.post.back(v) / writes.post_scale[position].to(v)

    def neuron(self, layer: int, unit: int, position: int) -> float:
        """What enters a neuron's nonlinearity."""
        return float(self.values[f"blocks.{layer}.mlp.hook_pre"][position, unit])

    def pattern(self, layer: int) -> Float[Tensor, "head query key"]:
        """Where a layer's heads attend to."""
        return self.values[f"blocks.{layer}.attn.hook_pattern"]


def residual_run(model: TransformerLensModel, dictionaries: Sequence[Dictionary], tokens: Tensor) -> ResidualRun:
    """Run the model on one prompt and take its residual stream apart.

    Raises:
        DictionaryError: a dictionary does not write an MLP's output, or does not fit the model.
        UnsupportedModelError: a hook point is missing or does not fire.
    """
    sites, streams = source_sites(model, dictionaries), stream_names(model)
    n_layers, points = int(model.cfg.n_layers), hook_points(model)
    positional = getattr(model.cfg, "positional_embedding_type", "") == "standard" and "hook_pos_embed" in points
    names = ["hook_pos_embed"] if positional else []
    for layer in range(n_layers):
        names += [*streams[layer], f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.attn.hook_z"]
        pre = f"blocks.{layer}.mlp.hook_pre"
        names += [pre] if pre in points else []
        names += sites[layer].reads if layer in sites else (f"blocks.{layer}.hook_mlp_out",)
    names.append(f"blocks.{n_layers - 1}.hook_resid_post")
    raw = _values(model, tokens, list(dict.fromkeys(names)))
    values = {name: value[0] for name, value in raw.items()}
    embedding = values["blocks.0.hook_resid_pre"]
    places = values["hook_pos_embed"] if positional else None
    readings = {
        layer: reading_of(model, site, values, streams)
        for layer, site in sites.items()
        if site.hook_in != site.hook  # pyright: ignore[reportAttributeAccessIssue]
    }
    mlps = [_writes(model, layer, sites.get(layer), values) for layer in range(n_layers)]
    return ResidualRun(
        model, tokens[0], values, readings, streams, mlps, embedding if places is None else embedding - places, places
    )


def _values(model: TransformerLensModel, tokens: Tensor, names: list[str]) -> Values:
    points = hook_points(model)
    absent = [name for name in names if name not in points]
    if absent:
        raise UnsupportedModelError(
            f"circuits from weights read the residual stream and attention at {absent[:4]}, which this "
            f"{type(model).__name__} lacks. Use attribute(...) or trace(...), which need gradients only."
        )
    found = values_at(model, tokens, names)
    # OPT on TransformerBridge flattens batch and positions before the MLP.
    found = {name: value[None] if value.dim() == 2 else value for name, value in found.items()}
    return {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in found.items()}


def _writes(model: TransformerLensModel, layer: int, site: Site | None, values: Mapping[str, Tensor]) -> MLPWrites:
    if site is None:
        return MLPWrites(None, "", None, values[f"blocks.{layer}.hook_mlp_out"], None, NO_NORM, None)
    parts = site.take_apart({name: values[name][None] for name in site.reads})
    nodes = parts.nodes[0]
    units = [row.nonzero().flatten() for row in nodes]
    features = Features(units, [row[index] for row, index in zip(nodes, units, strict=True)])
    post = NO_NORM if site.hook.endswith("hook_mlp_out") else norm_map(model, f"blocks.{layer}.ln2_post")
    scale = post.scale(values[site.hook]) if post.normalizes else None
    skip = parts.vectors.get("skip")
    dictionary: Dictionary = site.dictionary  # pyright: ignore[reportAttributeAccessIssue]
    error = parts.vectors["error"][0]
    hook_in: str = site.hook_in  # pyright: ignore[reportAttributeAccessIssue]
    return MLPWrites(dictionary, hook_in, features, error, None if skip is None else skip[0], post, scale)


def one_prompt(model: TransformerLensModel, prompt: Prompt, prepend_bos: bool | None = None) -> Int[Tensor, "1 pos"]:
    """The tokens of one prompt, on the model's device.

    Raises:
        SettingsError: no tokens, or `prepend_bos` for tokens.
    """
    if isinstance(prompt, str):
        options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        tokens = model.to_tokens(prompt, **options)
    else:
        if prepend_bos is not None:
            raise SettingsError("prepend_bos cannot be applied to tokens: put BOS into them.")
        tokens = prompt.reshape(1, -1).to(model.cfg.device or "cpu")
    if tokens.numel() == 0:
        raise SettingsError("expected a prompt of at least one token; got none.")
    return tokens
