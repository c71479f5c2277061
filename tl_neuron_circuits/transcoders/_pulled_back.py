"""Features' read vectors on the residual stream without a prompt: norms with their scale set to one, no patterns.

So every number is what the feature would read, times (scale of the norms) and, through a head, divided by where it
attends: order and sign are right, sizes compare for one feature and one route, not between routes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from ..bases._dictionary import Dictionary
from ..models._protocol import TransformerLensModel
from ._explained import feature_of
from ._readings import Reading
from ._residual_run import ResidualRun, residual_run

Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class PulledBack:
    """Vectors that read the residual stream where `mlps` MLPs and `attentions` attention layers have written."""

    labels: tuple[str, ...]
    vectors: Float[Tensor, "feature d_model"]
    attentions: int
    mlps: int


def probed(model: TransformerLensModel, dictionaries: Sequence[Dictionary]) -> ResidualRun:
    """A short run that tells where the dictionaries read."""
    spread = torch.linspace(0, int(model.cfg.d_vocab) - 1, 10).long()[1:9]
    tokens = spread[None, : max(1, min(8, int(model.cfg.n_ctx)))].to(model.cfg.device or "cpu")
    return residual_run(model, dictionaries, tokens)


def reading_at(run: ResidualRun, layer: int) -> Reading:
    """The transcoder of a layer.

    Raises:
        SettingsError: there is none.
    """
    if layer not in run.readings:
        known = ", ".join(map(str, sorted(run.readings))) or "none"
        raise SettingsError(f"expected a layer with a transcoder ({known}); got layer {layer}.")
    return run.readings[layer]


def by_layer(run: ResidualRun, features: str | Sequence[str]) -> dict[int, list[int]]:
    """Units by layer.

    Raises:
        SettingsError: a label is none, or the feature is not there.
    """
    found: dict[int, list[int]] = {}
    for name in [features] if isinstance(features, str) else features:
        layer, unit = feature_of(name)
        width = written_by(run, layer).d_dict
        if not unit < width:
            raise SettingsError(f"expected a feature below {width} in layer {layer}; got {unit}.")
        found.setdefault(layer, []).append(unit)
    if not found:
        raise SettingsError('expected at least one feature, such as "L3/F17"; got none.')
    return found


def written_by(run: ResidualRun, layer: int) -> Dictionary:
    """The dictionary of a layer.

    Raises:
        SettingsError: there is none.
    """
    dictionary = run.mlps[layer].dictionary if 0 <= layer < run.n_layers else None
    if dictionary is None:
        known = [layer for layer, writes in enumerate(run.mlps) if writes.dictionary is not None]
        raise SettingsError(f"expected a layer with a dictionary ({known}); got layer {layer}.")
    return dictionary


def pulled_back(run: ResidualRun, layer: int, units: Sequence[int] | Tensor, head: Head | None = None) -> PulledBack:
    """The encoders of a layer's features as they read the residual stream, directly or through a head.

    Raises:
        SettingsError: the layer has no transcoder, or the head is not there or not before it.
    """
    reading = reading_at(run, layer)
    vectors = reading.norm.back(reading.rescaled(reading.vectors(units)[0], None))
    attentions = reading.layer if reading.stream.endswith("hook_resid_pre") else reading.layer + 1
    labels = tuple(f"L{layer}/F{int(unit)}" for unit in units)
    if head is None:
        return PulledBack(labels, vectors, attentions, reading.layer)
    head_layer, index = head
    if not 0 <= head_layer < attentions:
        raise SettingsError(f"expected a head of layers 0 to {attentions - 1}, before layer {layer}'s MLP; got {head}.")
    weights = run.attentions[head_layer]
    if not 0 <= index < weights.n_heads:
        raise SettingsError(f"expected a head below {weights.n_heads} in layer {head_layer}; got {head}.")
    through = weights.norm.back(weights.read_of_one(weights.post.back(vectors), index))
    return PulledBack(labels, through, head_layer, head_layer)


def decoders(run: ResidualRun, layer: int, units: Tensor | None = None) -> Float[Tensor, "feature d_model"]:
    """What a layer's features write to the residual stream, a norm after the MLP with its scale set to one included."""
    writes, dictionary = run.mlps[layer], written_by(run, layer)
    rows = dictionary.W_dec if units is None else dictionary.W_dec[units.to(dictionary.device)]
    return writes.post.along(rows.to(torch.promote_types(rows.dtype, torch.float32)))
