"""Where on the residual stream a dictionary reads, and what its features read there.

A reading is affine in the residual stream once the norm's scale is frozen:

    pre(f) = reads[f] . norm(x) + constant(f)

Which norm stands between (with its weight or before it, the attention's own in parallel blocks, none) is told by the
activations of a forward pass, never by the hook's name: what `ln2.hook_normalized` carries differs between versions and
model classes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import DictionaryError
from ..bases._dictionary import Dictionary
from ..bases._dictionary_basis import Dictionaries
from ..bases._site import Site
from ..models._protocol import TransformerLensModel, hook_points
from ._norm_maps import NO_NORM, NormMap, norm_map

_LAYER = re.compile(r"blocks\.(\d+)\.")
_CLOSE = {torch.float64: 1e-5, torch.float32: 1e-3}
_ROUGH = 0.05
LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True, eq=False)
class Reading:
    """One dictionary on the model: the stream it reads, through which norm, and the features' read vectors."""

    dictionary: Dictionary
    site: Site
    hook_in: str
    layer: int
    """Of the block in which it reads."""
    stream: str
    """The hook point of the residual stream that it reads."""
    norm: NormMap

    def vectors(
        self, units: Int[Tensor, " unit"] | Sequence[int]
    ) -> tuple[Float[Tensor, "unit d_in"], Float[Tensor, " unit"]]:
        """The encoder's read vectors at `hook_in`, and their constants; its run-time normalization is not in them."""
        d = self.dictionary
        index = torch.as_tensor(units, dtype=torch.long, device=d.device)
        dtype = torch.promote_types(d.dtype, torch.float32)
        vectors = d.W_enc[:, index].mT.to(dtype)
        if d.r_mag is not None and d.b_mag is not None:  # gated: the magnitude is what a feature that fires is
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


def source_sites(model: TransformerLensModel, dictionaries: Sequence[Dictionary]) -> dict[int, Site]:
    """The dictionaries by the layer whose MLP they stand for.

    Raises:
        DictionaryError: one does not write an MLP's output, or its encoder is code of its own.
        SettingsError: there is none, or two at one hook point.
    """
    sites: dict[int, Site] = {}
    for site in Dictionaries(dictionaries).sites(model):
        dictionary: Dictionary = site.dictionary  # pyright: ignore[reportAttributeAccessIssue]
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
            raise DictionaryError(f"expected one dictionary a layer; two write the output of layer {site.layer}'s MLP.")
        sites[site.layer] = site
    return sites


def stream_names(model: TransformerLensModel) -> list[tuple[str, str]]:
    """Of every block the residual stream before attention and before the MLP: the same in parallel blocks."""
    points, parallel = hook_points(model), bool(getattr(model.cfg, "parallel_attn_mlp", False))
    names = []
    for layer in range(int(model.cfg.n_layers)):
        before, middle = (f"blocks.{layer}.hook_resid_{place}" for place in ("pre", "mid"))
        names.append((before, before if parallel or middle not in points else middle))
    return names


def reading_of(
    model: TransformerLensModel, site: Site, values: Mapping[str, Tensor], streams: Sequence[tuple[str, str]]
) -> Reading:
    """How the dictionary of a site reads the residual stream, from the values of a run.

    Raises:
        DictionaryError: it reads the MLP's output (an SAE there), or something else than the residual stream.
    """
    dictionary: Dictionary = site.dictionary  # pyright: ignore[reportAttributeAccessIssue]
    hook_in: str = site.hook_in  # pyright: ignore[reportAttributeAccessIssue]
    if hook_in == site.hook:
        raise DictionaryError(
            f"{dictionary.name} is an SAE: it reads {hook_in}, the MLP's output, and between that and earlier layers "
            "stands the MLP, so no weights connect them. Its features can be sources but not targets: use transcoders, "
            "or attribute(...) and trace(...), which go through MLPs by gradients."
        )
    found = _LAYER.match(hook_in)
    if found is None:
        raise DictionaryError(f"expected {dictionary.name} to read in a block; got {hook_in}.")
    layer, seen = int(found[1]), values[hook_in].flatten(0, -2)
    allowed = _CLOSE.get(values[hook_in].dtype, _ROUGH)
    for stream, norm in _candidates(model, layer, *streams[layer]):
        expected = norm.apply(values[stream].flatten(0, -2).to(torch.promote_types(seen.dtype, torch.float32)))
        if (expected - seen).norm() <= allowed * seen.norm():
            return Reading(dictionary, site, hook_in, layer, stream, norm)
    raise DictionaryError(
        f"{dictionary.name} reads {hook_in}, which is no frozen norm of the residual stream in block {layer}: circuits "
        "from weights need transcoders that read the MLP's input. Use attribute(...) or trace(...) for this one."
    )


def _candidates(model: TransformerLensModel, layer: int, before: str, middle: str) -> Iterator[tuple[str, NormMap]]:
    for path in ("ln2", "ln1"):
        norm = norm_map(model, f"blocks.{layer}.{path}")
        if norm.normalizes:
            yield middle, norm
            yield middle, norm.bare()
    yield middle, NO_NORM
    yield before, NO_NORM
