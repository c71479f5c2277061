"""Features against earlier features, without a prompt: decoder . encoder, directly or through a head.

    weight(i, f) = W_dec[i] . r(f),     r(f) the encoder of f pulled back to the residual stream (norms' scale one)

Times the mean activation of i over data, it is what i contributes to f on average, up to the norms' scales and where
heads attend. Source: Dunefsky et al. 2024, arXiv 2406.11944; METHODS.md 4.3.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import SettingsError
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..models._protocol import TransformerLensModel
from ._feature_means import feature_means
from ._pulled_back import Head, PulledBack, by_layer, decoders, probed, pulled_back, reading_at, written_by
from ._residual_run import ResidualRun

_CHUNK = 2**26


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
        head: (layer, head) between them, which carries from where it attends; None is the same position.
        sources: only these features; all of them for None.
        targets: only these features; all of them for None.
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
    run = probed(model, dictionaries)
    columns = _units(targets, reading_at(run, target).dictionary.d_dict)
    rows = _units(sources, written_by(run, source).d_dict)
    reads = pulled_back(run, target, columns, head)
    _require_before(source, reads, head)
    size = len(rows) * len(columns) * reads.vectors.element_size()
    if size > max_bytes:
        raise SettingsError(
            f"expected a matrix of at most {max_bytes:,} bytes; {len(rows):,} x {len(columns):,} features take "
            f"{size:,}. Restrict sources= or targets=, raise max_bytes=, or ask for the strongest: pull_back(...)."
        )
    written = decoders(run, source, rows)
    return written.to(reads.vectors) @ reads.vectors.mT


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
) -> pd.DataFrame:
    """The earlier features that excite and inhibit a feature most, by weights alone or times their mean activation.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders, at most one a layer.
        features: one label or several, such as "L3/F17".
        head: (layer, head) to read through; None is the same position.
        tokens: prompts over which activations are averaged; None ranks by weights alone.
        k: features each way, over all earlier layers.
        ignore_tokens: positions with these tokens (padding, BOS) do not count for the mean.
        batch_size: prompts in one pass.

    Returns:
        Columns label, direction ("top" or "bottom"), rank (from 0), source, layer, unit, weight, mean_activation (nan
        without tokens), value (weight, or weight times mean activation).

    Raises:
        SettingsError: a feature or head that is not there, or has no dictionary before it; k below 1.
        DictionaryError: a dictionary that does not fit; see `contributions`.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> len(tnc.transcoders.pull_back(model, transcoders, "L3/F7", k=5))
        10
    """
    run = probed(model, dictionaries)
    means = None if tokens is None else feature_means(model, run, tokens, ignore_tokens, batch_size)
    tables = []
    for layer, units in by_layer(run, features).items():
        tables.append(pulled_table(run, pulled_back(run, layer, units, head), means, k))
    return pd.concat(tables, ignore_index=True)


def pulled_table(run: ResidualRun, reads: PulledBack, means: dict[int, Tensor] | None, k: int) -> pd.DataFrame:
    """The strongest earlier features of every read vector, in chunks of vectors.

    Raises:
        SettingsError: no dictionary writes before; k below 1.
    """
    layers = [layer for layer in range(reads.mlps) if run.mlps[layer].dictionary is not None]
    if not layers or k < 1:
        raise SettingsError(f"expected k of at least 1 and a dictionary before {reads.labels[0]}; got {k}, {layers}.")
    written = [decoders(run, layer).to(reads.vectors) for layer in layers]
    place = [(layer, unit) for layer, part in zip(layers, written, strict=True) for unit in range(len(part))]
    step, rows = max(1, _CHUNK // len(place)), []
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


def _units(given: Sequence[int] | None, width: int) -> Int[Tensor, " unit"]:
    if given is None:
        return torch.arange(width)
    if not len(given) or not all(0 <= unit < width for unit in given):
        raise SettingsError(f"expected features from 0 to {width - 1}; got {list(given)[:8]}.")
    return torch.tensor(list(given))


def _require_before(source: int, reads: PulledBack, head: Head | None) -> None:
    if not 0 <= source < reads.mlps:
        reader = "the target" if head is None else f"head {head}"
        raise SettingsError(
            f"expected a source layer below {reads.mlps}, whose MLP writes before {reader} reads; got {source}."
        )
