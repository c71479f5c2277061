"""`connections`: features against earlier features, without a prompt: decoder . encoder, directly or through a head.

    weight(i, f) = W_dec[i] . r(f),     r(f) the encoder of f pulled back to the residual stream

Without a prompt norms have their scale set to one and there are no patterns. So every number is what the feature would
read times the scale of the norms and, through a head, divided by the attention: order and sign are right, sizes compare
for one feature and one route, not between routes. Times the mean activation of i over data, it is what i contributes to
f on average, up to these factors. Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..models._protocol import TransformerLensModel
from ._contributions import feature_of
from ._residual_run import Reading, ResidualRun, residual_run

Head = tuple[int, int]


@checked
def connections(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    source: int,
    target: int,
    *,
    head: Head | None = None,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    max_bytes: int = 2**30,
) -> Float[Tensor, "source_feature target_feature"]:
    """The weights from all features of one layer to all of a later one.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders; the source's may be an SAE on the MLP's output.
        source: the layer of the features that write.
        target: the layer of the features that read.
        head: (layer, head) between them, which reads at other positions; None is the same position.
        sources: only these features; None for all of them.
        targets: only these features; None for all of them.
        max_bytes: refuse larger matrices.

    Returns:
        `[source, target]` in at least float32: row i and column f hold W_dec[i] . r(f).

    Raises:
        SettingsError: the source does not write before the target or the head reads, or the matrix is too large.
        DictionaryError: a dictionary that does not fit; see `contributions`.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> tnc.transcoders.connections(model, transcoders, 0, 2, head=(1, 3)).shape
        torch.Size([768, 768])
    """
    run = probe_run(model, dictionaries)
    columns = _units(targets, reading_at(run, target).dictionary.d_dict)
    rows = _units(sources, dictionary_at(run, source).d_dict)
    reads = read_vectors(run, target, columns, head)
    if not 0 <= source < reads.mlps:
        reader = "the target" if head is None else f"head {head}"
        raise SettingsError(
            f"expected a source layer below {reads.mlps}, whose MLP writes before {reader} reads; got {source}."
        )
    size = len(rows) * len(columns) * reads.vectors.element_size()
    if size > max_bytes:
        raise SettingsError(
            f"expected a matrix of at most {max_bytes:,} bytes; {len(rows):,} x {len(columns):,} features take "
            f"{size:,}. Restrict sources= or targets=, raise max_bytes=, or ask for the strongest: pull_back(...)."
        )
    return write_vectors(run, source, rows).to(reads.vectors) @ reads.vectors.mT


def _units(given: Sequence[int] | None, width: int) -> Sequence[int]:
    if given is None:
        return range(width)
    if not len(given) or not all(0 <= unit < width for unit in given):
        raise SettingsError(f"expected features from 0 to {width - 1}; got {list(given)[:8]}.")
    return given


def probe_run(model: TransformerLensModel, dictionaries: Sequence[Dictionary]) -> ResidualRun:
    """A run on a few tokens, which shows where the dictionaries read."""
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


def dictionary_at(run: ResidualRun, layer: int) -> Dictionary:
    """The transcoder or SAE of a layer.

    Raises:
        SettingsError: there is none.
    """
    dictionary = run.mlps[layer].dictionary if 0 <= layer < run.n_layers else None
    if dictionary is None:
        known = [layer for layer, writes in enumerate(run.mlps) if writes.dictionary is not None]
        raise SettingsError(f"expected a layer with a dictionary ({known}); got layer {layer}.")
    return dictionary


def units_by_layer(run: ResidualRun, features: str | Sequence[str]) -> dict[int, list[int]]:
    """Features given by labels.

    Raises:
        SettingsError: a label is not a feature's, or the feature does not exist.
    """
    units: dict[int, list[int]] = {}
    for name in [features] if isinstance(features, str) else features:
        layer, unit = feature_of(name)
        width = dictionary_at(run, layer).d_dict
        if not unit < width:
            raise SettingsError(f"expected a feature below {width} in layer {layer}; got {unit}.")
        units.setdefault(layer, []).append(unit)
    if not units:
        raise SettingsError('expected at least one feature, such as "L3/F17"; got none.')
    return units


@dataclass(frozen=True, eq=False)
class ReadVectors:
    """Vectors that read the residual stream where `mlps` MLPs and `attentions` attention layers have written."""

    labels: tuple[str, ...]
    vectors: Float[Tensor, "feature d_model"]
    attentions: int
    mlps: int


def read_vectors(run: ResidualRun, layer: int, units: Sequence[int], head: Head | None = None) -> ReadVectors:
    """The encoders of a layer's features as they read the residual stream, directly or through a head.

    Raises:
        SettingsError: the layer has no transcoder, or the head does not exist or is not before it.
    """
    reading = reading_at(run, layer)
    vectors = reading.norm.back(reading.rescaled(reading.vectors(units)[0], None))
    attentions = reading.layer if reading.stream.endswith("hook_resid_pre") else reading.layer + 1
    labels = tuple(f"L{layer}/F{unit}" for unit in units)
    if head is None:
        return ReadVectors(labels, vectors, attentions, reading.layer)
    head_layer, index = head
    if not 0 <= head_layer < attentions:
        raise SettingsError(f"expected a head of layers 0 to {attentions - 1}, before layer {layer}'s MLP; got {head}.")
    weights = run.attentions[head_layer]
    if not 0 <= index < weights.n_heads:
        raise SettingsError(f"expected a head below {weights.n_heads} in layer {head_layer}; got {head}.")
    through = weights.norm.back(weights.back_through(index, weights.post.back(vectors)))
    return ReadVectors(labels, through, head_layer, head_layer)


def write_vectors(run: ResidualRun, layer: int, units: Sequence[int] | None = None) -> Float[Tensor, "feature d_model"]:
    """What a layer's features write to the residual stream, through a norm after the MLP with its scale set to one."""
    dictionary = dictionary_at(run, layer)
    rows = dictionary.W_dec if units is None else dictionary.W_dec[torch.as_tensor(units, device=dictionary.device)]
    return run.mlps[layer].post.along(rows.to(torch.promote_types(rows.dtype, torch.float32)))
