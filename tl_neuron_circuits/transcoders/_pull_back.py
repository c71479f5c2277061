"""`pull_back`: the earlier features that move a feature most, by weights or times their mean activation over data.

    value(i, f) = W_dec[i] . r(f)   [* mean activation of i],     r(f) as in `_connections`

Unlike `connections` it goes over all earlier layers and keeps the largest and smallest values only, in chunks, so that
memory does not grow with the dictionaries. Source: Dunefsky et al. 2024, arXiv 2406.11944; METHODS.md 4.3.
"""

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._errors import SettingsError
from .._progress import show_batches
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..bases._runs import Values, values_at
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ._connections import Head, ReadVectors, probe_run, read_vectors, units_by_layer, write_vectors
from ._residual_run import ResidualRun

_WEIGHTS_AT_ONCE = 2**26
_ACTIVATIONS_AT_ONCE = 2**25


@holding
@checked
def pull_back(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    features: str | Sequence[str],
    *,
    head: Head | None = None,
    tokens: Int[Tensor, "prompt pos"] | None = None,
    k: int = 10,
    ignore_tokens: tuple[int, ...] = (),
    batch_size: int = 32,
    verbose: bool | None = None,
) -> pd.DataFrame:
    """The earlier features that excite and inhibit a feature most, by weights alone or times their mean activation.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders, at most one per layer.
        features: one label or several, such as "L3/F17".
        head: (layer, head) to read through; None is the same position.
        tokens: prompts over which activations are averaged; None ranks by weights alone.
        k: features each way, over all earlier layers.
        ignore_tokens: positions with these tokens (padding, BOS) do not count for the mean.
        batch_size: prompts per forward pass.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        Columns label, direction ("top" or "bottom"), rank (from 0), source, layer, unit, weight, mean_activation (nan
        without tokens), value (weight, or weight times mean activation).

    Raises:
        SettingsError: a feature or head does not exist, or has no dictionary before it; k below 1.
        DictionaryError: a dictionary that does not fit; see `contributions`.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> len(tnc.transcoders.pull_back(model, transcoders, "L3/F7", k=5))
        10
    """
    run = probe_run(model, dictionaries)
    means = None if tokens is None else feature_means(model, run, tokens, ignore_tokens, batch_size, verbose)
    tables = [
        strongest_sources(run, read_vectors(run, layer, units, head), means, k)
        for layer, units in units_by_layer(run, features).items()
    ]
    return pd.concat(tables, ignore_index=True)


def strongest_sources(
    run: ResidualRun, reads: ReadVectors, means: dict[int, Float[Tensor, " feature"]] | None, k: int
) -> pd.DataFrame:
    """The strongest earlier features of every read vector.

    Raises:
        SettingsError: no dictionary writes before; k below 1.
    """
    layers = [layer for layer in range(reads.mlps) if run.mlps[layer].dictionary is not None]
    if not layers or k < 1:
        raise SettingsError(f"expected k of at least 1 and a dictionary before {reads.labels[0]}; got {k}, {layers}.")
    written = [write_vectors(run, layer).to(reads.vectors) for layer in layers]
    place = [(layer, unit) for layer, part in zip(layers, written, strict=True) for unit in range(len(part))]
    step, rows = max(1, _WEIGHTS_AT_ONCE // len(place)), []
    for start in range(0, len(reads.vectors), step):
        weights = torch.cat([reads.vectors[start : start + step] @ part.mT for part in written], dim=1)
        average = None if means is None else torch.cat([means[layer] for layer in layers]).to(weights)
        values = weights if average is None else weights * average
        for number, label in enumerate(reads.labels[start : start + step]):
            for direction, largest in (("top", True), ("bottom", False)):
                best = values[number].topk(min(k, values.shape[1]), largest=largest).indices.tolist()
                for rank, index in enumerate(best):
                    layer, unit = place[index]
                    mean = float("nan") if average is None else float(average[index])
                    numbers = (float(weights[number, index]), mean, float(values[number, index]))
                    rows.append((label, direction, rank, f"L{layer}/F{unit}", layer, unit, *numbers))
    columns = ["label", "direction", "rank", "source", "layer", "unit", "weight", "mean_activation", "value"]
    return pd.DataFrame(rows, columns=columns)


def feature_means(
    model: TransformerLensModel,
    run: ResidualRun,
    tokens: Int[Tensor, "prompt pos"],
    ignore: tuple[int, ...],
    batch_size: int,
    verbose: bool | None,
) -> dict[int, Float[Tensor, " feature"]]:
    """The mean activation of every feature over all positions that count, by layer.

    Raises:
        SettingsError: no position counts.
    """
    sites = {layer: writes.site for layer, writes in enumerate(run.mlps) if writes.site is not None}
    sums = {layer: torch.zeros(site.dictionary.d_dict) for layer, site in sites.items()}
    count = 0
    names = [site.hook_in for site in sites.values()]
    for values, counts in values_by_batch(model, tokens, names, ignore, batch_size, verbose):
        count += int(counts.sum())
        for layer, site in sites.items():
            value = values[site.hook_in]
            x = value.reshape(*counts.shape, -1)[counts.to(value.device)]
            for features in encode_in_chunks(site.dictionary, x):
                sums[layer] += features.sum(0).float().cpu()
    if not count:
        raise SettingsError("expected tokens with positions that are not ignored; got none.")
    return {layer: total / count for layer, total in sums.items()}


def values_by_batch(
    model: TransformerLensModel,
    tokens: Int[Tensor, "prompt pos"],
    names: Sequence[str],
    ignore: tuple[int, ...],
    batch_size: int,
    verbose: bool | None,
) -> Iterator[tuple[Values, Bool[Tensor, "batch pos"]]]:
    """Values at hook points, batch after batch, and which positions count."""
    if batch_size < 1:
        raise SettingsError(f"expected batch_size of at least 1; got {batch_size}.")
    for part in show_batches(tokens.split(batch_size), len(tokens), desc="activations", verbose=verbose):
        part = part.to(model.cfg.device or "cpu")
        ignored = torch.tensor(ignore, dtype=part.dtype, device=part.device)
        yield values_at(model, part, names), ~torch.isin(part, ignored)


def encode_in_chunks(dictionary: Dictionary, x: Float[Tensor, "row d_in"]) -> Iterator[Float[Tensor, "row feature"]]:
    """The features of many positions, a chunk at a time."""
    step = max(1, _ACTIVATIONS_AT_ONCE // dictionary.d_dict)
    for start in range(0, len(x), step):
        yield dictionary.encode(x[start : start + step])
