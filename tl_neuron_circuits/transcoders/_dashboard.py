"""`feature_dashboard`: what there is to know about one feature, from weights and from data, on one page.

With `restricted` nothing on it comes from the feature's own activations: no examples, no frequency, no largest value.
What is left (weights, earlier features, their means over data) is what a blind case study may look at: guess first,
then look. Source: Dunefsky et al. 2024, arXiv 2406.11944; METHODS.md 4.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _html
from .._errors import NumericalError, SettingsError
from .._files import write_text
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..explain._max_activating_examples import Example
from ..interventions._steering_prompts import text_pieces
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding
from ._connections import Head, probe_run, read_vectors, reading_at
from ._contributions import feature_of
from ._deembed import head_norms, logit_weights, strongest_tokens, token_embeddings
from ._pull_back import encode_in_chunks, feature_means, strongest_sources, values_by_batch
from ._residual_run import Reading, ResidualRun

_BANDS = 5
_WINDOW = 16
"""Tokens of an example before the feature's position; half as many follow."""


@dataclass(frozen=True, eq=False)
class Band:
    """Positions whose activation lies above `low` and up to `high`, and some of them as examples."""

    low: float
    high: float
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Firing:
    """How a feature fires on data: the share of positions, how many counted, the largest activation, examples."""

    frequency: float
    positions: int
    largest: float
    bands: tuple[Band, ...]
    """Strongest first."""


@dataclass(frozen=True, eq=False)
class Route:
    """One way into a feature, directly or through a head: tokens and earlier features that excite and inhibit it."""

    head: Head | None
    tokens: pd.DataFrame
    """As `deembed` gives them."""
    features: pd.DataFrame | None
    """As `pull_back` gives them, with three tokens that excite each in `reads`; None where nothing writes before."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureDashboard:
    """What `feature_dashboard` returns; `to_html` writes it as a page.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> tokens = model.to_tokens(["The capital of Texas is Austin."])
        >>> shown = tnc.transcoders.feature_dashboard(model, transcoders, "L1/F374", tokens, heads=1, k=3)
        >>> len(shown.logits), len(shown.routes)
        (6, 2)
    """

    feature: str
    model: str
    firing: Firing | None
    """None when restricted."""
    logits: pd.DataFrame
    """As `logit_weights` gives them."""
    heads: pd.DataFrame
    """Columns layer, head, norm: the norm of the feature's read vector after each head's W_V W_O, largest first."""
    routes: tuple[Route, ...]
    """Directly, then through the strongest heads."""

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained HTML file, which needs no network.

        Raises:
            SaveError: it could not be written; an older file is as it was.
        """
        from ._dashboard_page import page

        write_text(path, page(self))

    def __repr__(self) -> str:
        if self.firing is None:
            return f"FeatureDashboard({self.feature} of {self.model}, restricted)"
        fires = f"fires on {self.firing.frequency:.3%} of {self.firing.positions:,} positions"
        return f"FeatureDashboard({self.feature} of {self.model}, {fires}, up to {self.firing.largest:.3g})"

    def _repr_html_(self) -> str:
        from ._dashboard_page import body

        return _html.note(repr(self)) + body(self)


@holding
@checked
def feature_dashboard(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    feature: str,
    tokens: Int[Tensor, "prompt pos"],
    *,
    path: str | Path | None = None,
    restricted: bool = False,
    k: int = 10,
    heads: int = 3,
    examples: int = 5,
    ignore_tokens: tuple[int, ...] = (),
    batch_size: int = 32,
    seed: int = 0,
    verbose: bool | None = None,
) -> FeatureDashboard:
    """One feature's tokens, logits, earlier features, heads and examples.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders, at most one per layer.
        feature: its label, such as "L3/F17".
        tokens: prompts to look for examples in, and to average earlier features over.
        path: the HTML file to write; None for none.
        restricted: leave out everything that comes from the feature's own activations.
        k: tokens and features each way.
        heads: how many of the strongest heads are shown.
        examples: how many per band of activations; the strongest of the top band, a random choice of the others.
        ignore_tokens: positions with these tokens (padding, BOS) do not count.
        batch_size: prompts per forward pass.
        seed: for that choice.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        Everything as tables, with `.to_html(path)`.

    Raises:
        SettingsError: the feature does not exist, no position counts, or a number is below 1.
        DictionaryError: a dictionary that does not fit; see `contributions`.
        NumericalError: an activation is not finite.

    Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> tokens = model.to_tokens(["Austin is in Texas.", "The dog near the cats barks."])
        >>> tnc.transcoders.feature_dashboard(model, transcoders, "L1/F7", tokens, path="f.html", restricted=True)
        FeatureDashboard(L1/F7 of demo-gelu, restricted)
    """
    if min(k, examples) < 1 or heads < 0:
        raise SettingsError(
            f"expected k and examples of at least 1, heads of at least 0; got {k}, {examples}, {heads}."
        )
    layer, unit = feature_of(feature)
    run = probe_run(model, dictionaries)
    reading = reading_at(run, layer)
    if not unit < reading.dictionary.d_dict:
        raise SettingsError(f"expected a feature below {reading.dictionary.d_dict} in layer {layer}; got {unit}.")
    firing = None
    if not restricted:
        values = _activations(model, reading, unit, tokens, batch_size, verbose)
        counts = ~torch.isin(tokens.cpu(), torch.tensor(ignore_tokens, dtype=tokens.dtype))
        firing = _firing(model, tokens.cpu(), values, counts, examples, seed)
    norms = head_norms(run, layer, unit)
    strongest: list[Any] = [(int(row.layer), int(row.head)) for row in norms.head(heads).itertuples()]
    means = feature_means(model, run, tokens, ignore_tokens, batch_size, verbose)
    routes = tuple(_route(run, layer, unit, head, means, k) for head in (None, *strongest))
    logits = logit_weights(model, dictionaries, feature, k=k)
    name = model_name(model)
    dashboard = FeatureDashboard(f"L{layer}/F{unit}", name, firing, logits, norms, routes)
    if path is not None:
        dashboard.to_html(path)
    return dashboard


def _activations(
    model: TransformerLensModel,
    reading: Reading,
    unit: int,
    tokens: Int[Tensor, "prompt pos"],
    batch_size: int,
    verbose: bool | None,
) -> Float[Tensor, "prompt pos"]:
    """One feature's activation at every position, on the CPU."""
    parts = []
    for values, counts in values_by_batch(model, tokens, [reading.site.hook_in], (), batch_size, verbose):
        x = values[reading.site.hook_in].reshape(counts.numel(), -1)
        activations = torch.cat([features[:, unit] for features in encode_in_chunks(reading.dictionary, x)])
        parts.append(activations.float().cpu().reshape(counts.shape))
    return torch.cat(parts)


def _route(run: ResidualRun, layer: int, unit: int, head: Head | None, means: dict[int, Tensor], k: int) -> Route:
    reads = read_vectors(run, layer, [unit], head)
    tokens = strongest_tokens(run.model, reads.labels, token_embeddings(run.model), reads.vectors, k)
    if all(run.mlps[earlier].dictionary is None for earlier in range(reads.mlps)):
        return Route(head, tokens, None)
    return Route(head, tokens, _with_tokens(run, strongest_sources(run, reads, means, k)))


def _with_tokens(run: ResidualRun, features: pd.DataFrame) -> pd.DataFrame:
    """The same with what each feature reads by embedding; empty for an SAE's."""
    embedding, reads = token_embeddings(run.model), {}
    for layer, rows in features.groupby("layer", sort=False):
        if layer in run.readings:
            sources = read_vectors(run, int(layer), sorted(set(rows["unit"])))  # pyright: ignore[reportArgumentType]
            table = strongest_tokens(run.model, sources.labels, embedding, sources.vectors, 3)
            top = table[table["direction"] == "top"].groupby("label")["token"]
            reads |= top.agg(lambda tokens: " ".join(token.strip() for token in tokens)).to_dict()
    return features.assign(reads=features["source"].map(reads).fillna(""))


def _firing(
    model: TransformerLensModel,
    tokens: Int[Tensor, "prompt pos"],
    values: Float[Tensor, "prompt pos"],
    counts: Bool[Tensor, "prompt pos"],
    examples: int,
    seed: int,
) -> Firing:
    if not counts.any():
        raise SettingsError("expected tokens with positions that are not ignored; got none.")
    if not torch.isfinite(values).all():
        raise NumericalError("the feature's activations are not finite on these tokens. Run the model in float32.")
    values = torch.where(counts, values, 0.0)
    largest, generator = float(values.max()), torch.Generator().manual_seed(seed)
    bands = []
    for number in reversed(range(_BANDS)) if largest > 0 else ():
        low, high = largest * number / _BANDS, largest * (number + 1) / _BANDS
        top = number == _BANDS - 1
        places = ((values > low) & ((values <= high) | top)).nonzero()
        order = values[places[:, 0], places[:, 1]].argsort(descending=True, stable=True)
        order = order if top else order[torch.randperm(len(order), generator=generator)]
        first: dict[int, int] = {}  # one example per prompt
        for prompt, position in places[order].tolist():
            if len(first) < examples:
                first.setdefault(prompt, position)
        chosen = tuple(_example(model, tokens, values, counts, *place) for place in first.items())
        bands.append(Band(low, high, len(places), chosen))
    frequency = float((values[counts] > 0).double().mean())
    return Firing(frequency, int(counts.sum()), largest, tuple(bands))


def _example(
    model: TransformerLensModel, tokens: Tensor, values: Tensor, counts: Tensor, prompt: int, position: int
) -> Example:
    """The text around a position, without the positions that do not count."""
    pieces = text_pieces(model, tokens[prompt])
    around = range(max(0, position - _WINDOW), min(position + _WINDOW // 2, len(pieces)))
    shown = [place for place in around if counts[prompt, place]]
    texts, numbers = tuple(pieces[place] for place in shown), values[prompt, shown].tolist()
    return Example(prompt, texts, tuple(numbers), shown.index(position))
