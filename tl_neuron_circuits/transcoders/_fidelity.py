"""Fidelity: what next-token prediction loses when MLPs are replaced by dictionaries.

    recovered_zero = (L_zero - L) / (L_zero - L_model)     recovered_mean = (L_mean - L) / (L_mean - L_model)

with L the next-token loss, the mean of -log p(next token) over positions where neither token is ignored, when the value
at `hook_out` is replaced by the dictionary's reconstruction (skip included), by zero, or by its mean over the tokens
that baselines are fitted on. 1 is as good as the model, 0 as bad as the ablation. More than 1 is not more faithful: a
replacement simpler than the layer may predict better than it does. `divergence`, the mean KL divergence of the
predictions from the model's own, is 0 only where they are the same. FVU is the fraction of variance unexplained at
`hook_out`, L0 the mean number of active features, the dead share that of the features that never fired on these tokens.

Two linear maps from the same input to the same output are the baselines, fitted from sums over positions in float64:

    affine   y = x A + b, least squares
    rank r   the map of rank r with the least squared error: A P, with P the projection on the r leading principal
             directions of x A (reduced-rank regression; Izenman 1975)

For an SAE, which reads what it writes, affine is the identity and rank r the principal components of the output.
Source: METHODS.md 4.2.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _html
from .._errors import NumericalError, SettingsError
from .._progress import progress
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..bases._dictionary_basis import Dictionaries, DictionarySite
from ..bases._dictionary_variance import VarianceSums
from ..models._protocol import TransformerLensModel
from ..models._threads import holding, hooked
from ._buffer import flat_values

ALL = "all"
OWN = ("sae", "transcoder")
"""Names of the replacements that are dictionaries."""
_MODEL = ("", "model")
_RIDGE = 1e-9

Replacement = Callable[[Tensor], Tensor]
"""From the input at `hook_in` to the value to write at `hook_out`, heads concatenated."""


@dataclass(frozen=True, eq=False)
class CrossLayer:
    """What all layers of a cross-layer transcoder up to this one write here, from the inputs of each."""

    site: DictionarySite

    def __call__(self, x: Tensor, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """The layer's output; `inputs` by hook point."""
        assert inputs is not None
        own = self.site.dictionary
        earlier = {s.hook: s.dictionary.encode(inputs[s.hook_in].reshape(*x.shape[:-1], -1)) for s in self.site.before}
        written = self.site.written(own.encode(x), earlier)
        skip = own.skip(x)
        return written + own.b_dec.to(written) + (0 if skip is None else skip)


def _replaced(replacement: Replacement, x: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    return replacement(x, inputs) if isinstance(replacement, CrossLayer) else replacement(x)


Condition = tuple[Any, str]
"""Layer (or "all") and name of the replacement."""


@dataclass(frozen=True, eq=False, repr=False)
class Fidelity:
    """What `fidelity` returns: a row per layer and replacement, and rows of all layers together (`layer` "all").

    Columns: layer; replacement ("sae" or "transcoder", "affine", "rank 16", "mean", "zero"); kind and d_dict of the
    dictionary; l0 (of all layers: their mean), fvu, dead_share; loss, divergence, recovered_zero, recovered_mean.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("rc", n=64)
        >>> tokens = torch.stack(list(tnc.tasks.tokenize(model, pairs).clean))
        >>> measured = tnc.transcoders.fidelity(model, tnc.load_demo_dictionaries("sae"), tokens)
        >>> measured.of("sae").index.tolist()
        [0, 1, 2, 3, 'all']
    """

    table: pd.DataFrame
    model_loss: float
    tokens: int
    """How many next tokens the losses are means over."""

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def of(self, replacement: str) -> pd.DataFrame:
        """The rows of one replacement, by layer.

        Raises:
            SettingsError: there is none of that name.
        """
        rows = self.table[self.table["replacement"] == replacement]
        if rows.empty:
            raise SettingsError(f"expected one of {sorted(set(self.table['replacement']))}; got {replacement!r}.")
        return rows.set_index("layer")

    def __repr__(self) -> str:
        names = list(dict.fromkeys(self.table["replacement"]))
        layers = [layer for layer in dict.fromkeys(self.table["layer"]) if layer != ALL]
        loss = f"model loss {self.model_loss:.4f} over {self.tokens:,} tokens"
        return f"Fidelity(layers {layers}, {', '.join(names)}; {loss})"

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.table, bars=("recovered_zero",), rows=60))


@holding
@checked
def fidelity(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    tokens: Int[Tensor, "prompt pos"] | Iterable[Any],
    *,
    fit_tokens: Int[Tensor, "fit_prompt fit_pos"] | Sequence[Any] | None = None,
    baselines: bool = True,
    rank: int = 16,
    forward_rows: int = 32,
    ignore_tokens: tuple[int, ...] = (),
    verbose: bool | None = None,
) -> Fidelity:
    """Next-token loss with one layer replaced, and with all of them, beside L0, FVU and dead share.

    Args:
        model: a TransformerLens model.
        dictionaries: SAEs or transcoders, at most one per layer.
        tokens: held-out prompts; a tensor, or a list of batches.
        fit_tokens: prompts that means and linear maps are fitted on, ideally those of the training; by default
            `tokens`.
        baselines: also replace by an affine map and a map of rank `rank` from the dictionary's input to its output.
        forward_rows: prompts per forward pass, where tokens are one tensor.
        ignore_tokens: positions with these tokens (padding) do not count, though they are replaced too.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Raises:
        DictionaryError: a dictionary does not fit the model.
        SettingsError: there are no tokens, no dictionaries, or two at one hook point.
        NumericalError: a loss is not finite, or there are too few positions to fit the linear maps on.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> tokens = model.to_tokens(tnc.tasks.subject_verb_agreement("simple", n=32).clean)
        >>> measured = tnc.transcoders.fidelity(model, tnc.load_demo_dictionaries("sae")[2:3], tokens, baselines=False)
        >>> list(measured.to_dataframe()["replacement"])
        ['sae', 'mean', 'zero']
    """
    batches = list(batches_of(tokens, forward_rows))
    fit = batches if fit_tokens is None else list(batches_of(fit_tokens, forward_rows))
    return measure_fidelity(model, dictionaries, batches, fit, baselines, rank, ignore_tokens, verbose=verbose)[0]


def batches_of(tokens: Tensor | Iterable[Any], rows: int) -> Iterator[Int[Tensor, "prompt pos"]]:
    """A tensor in batches of `rows` prompts, or an iterable's own batches.

    Raises:
        SettingsError: a batch is not a tensor of tokens.
    """
    for batch in tokens.split(rows) if isinstance(tokens, Tensor) else tokens:
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.is_floating_point():
            raise SettingsError(
                f"expected tokens [prompt, position]; got {repr(batch)[:60]}. model.to_tokens(texts) makes them."
            )
        if len(batch):
            yield batch


@dataclass(frozen=True, eq=False)
class References:
    """What depends only on where dictionaries read and write: sums over tokens, and ablated losses."""

    moments: Mapping[str, "Moments"]
    sums: Mapping[Condition, "LossSums"]


def measure_fidelity(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    batches: Sequence[Tensor],
    fit: Sequence[Tensor],
    baselines: bool,
    rank: int,
    ignore: tuple[int, ...],
    known: References | None = None,
    *,
    verbose: bool | None = False,
) -> tuple[Fidelity, References]:
    """`fidelity`, and what the next call with dictionaries at the same sites need not measure again.

    Args:
        known: from such a call, on the same tokens; the table then has rows of the dictionaries alone.
    """
    sites = Dictionaries(dictionaries).sites(model)
    if not batches or not fit:
        raise SettingsError("expected at least one prompt to measure fidelity on; got none.")
    if known is None:
        moments = _moments(model, sites, progress(fit, desc="means and maps", verbose=verbose), ignore)
    else:
        moments = known.moments
    replacements = {site.hook: _replacements(site, moments[site.hook], baselines, rank) for site in sites}
    if known is not None:
        replacements = {hook: {n: each[n] for n in OWN if n in each} for hook, each in replacements.items()}
    held_out = progress(batches, desc="reconstruction", verbose=verbose)
    reconstruction = _reconstruction(model, sites, replacements, held_out, ignore)

    # Every layer alone under every replacement, then all layers together.
    conditions: dict[Condition, dict[str, Replacement]] = {_MODEL: {}}
    for site in sites:
        conditions |= {(site.layer, name): {site.hook: r} for name, r in replacements[site.hook].items()}
    names = dict.fromkeys(name for each in replacements.values() for name in each)
    for name in names if len(sites) > 1 else ():
        if all(name in each for each in replacements.values()):
            conditions[ALL, name] = {hook: each[name] for hook, each in replacements.items()}
    held_out = progress(batches, desc="losses", verbose=verbose)
    fresh = _losses(model, sites, conditions, held_out, ignore)

    sums = fresh if known is None else {**known.sums, **fresh}
    model_loss, count = sums[_MODEL].loss / sums[_MODEL].count, sums[_MODEL].count
    losses = {key: each.loss / count for key, each in sums.items()}
    rows = []
    for layer, name in fresh:
        if (layer, name) == _MODEL:
            continue
        row = {"layer": layer, "replacement": name} | reconstruction.get((layer, name), {})
        row |= {"loss": losses[layer, name], "divergence": sums[layer, name].divergence / count}
        for ablation in ("zero", "mean"):
            gap = losses[layer, ablation] - model_loss
            gained = losses[layer, ablation] - losses[layer, name]
            row[f"recovered_{ablation}"] = gained / gap if gap else float("nan")
        rows.append(row)
    order = {layer: i for i, layer in enumerate([*(site.layer for site in sites), ALL])}
    table = pd.DataFrame(rows).sort_values(
        "layer", key=lambda column: column.map(order), kind="stable", ignore_index=True
    )
    references = {key: sums[key] for key in sums if key[1] not in OWN}
    return Fidelity(table, model_loss, count), References(moments, references)


def _replacements(site: DictionarySite, moments: "Moments", baselines: bool, rank: int) -> dict[str, Replacement]:
    """What may be written at the output, as functions of the input, by name."""
    mean = (moments.y / moments.count).float()
    replacements: dict[str, Replacement] = {}
    replacements["transcoder" if site.dictionary.is_transcoder else "sae"] = (
        CrossLayer(site) if site.before else site.dictionary
    )
    if baselines:
        maps = fit_maps(moments, rank)
        replacements |= {n: m for n, m in maps.items() if site.dictionary.is_transcoder or n != "affine"}
    replacements["mean"] = lambda x: mean.to(x.device).expand(*x.shape[:-1], len(mean))
    replacements["zero"] = lambda x: torch.zeros(len(mean), device=x.device).expand(*x.shape[:-1], len(mean))
    return replacements


@torch.no_grad()
def _reconstruction(
    model: TransformerLensModel,
    sites: Sequence[DictionarySite],
    replacements: Mapping[str, Mapping[str, Replacement]],
    batches: Iterable[Tensor],
    ignore: tuple[int, ...],
) -> dict[Condition, dict[str, Any]]:
    """L0, FVU and dead share, on the model's own activations."""
    variance: dict[Condition, VarianceSums] = {}
    active = {site.layer: torch.zeros(site.dictionary.d_dict, dtype=torch.float64) for site in sites}
    for batch in batches:
        values = _values(model, sites, batch, ignore)
        for site in sites:
            x, y = values[site.hook_in], values[site.hook]
            active[site.layer] += (site.dictionary.encode(x) != 0).sum(0).double().cpu()
            for name, replacement in replacements[site.hook].items():
                sums = VarianceSums.measure(y, _replaced(replacement, x, values))
                key = site.layer, name
                variance[key] = variance[key] + sums if key in variance else sums
    measured: dict[Condition, dict[str, Any]] = {}
    for site in sites:
        for name in replacements[site.hook]:
            sums, fired = variance[site.layer, name], active[site.layer]
            own = {
                "kind": site.dictionary.kind,
                "d_dict": site.dictionary.d_dict,
                "l0": float(fired.sum()) / sums.count,
                "dead_share": float((fired == 0).double().mean()),
            }
            measured[site.layer, name] = (own if name in OWN else {}) | {"fvu": sums.unexplained}
    for name in OWN:
        counts = [each["l0"] for (_, other), each in measured.items() if other == name]
        if counts:
            measured[ALL, name] = {"l0": sum(counts) / len(counts)}
    return measured


def _values(
    model: TransformerLensModel, sites: Sequence[DictionarySite], batch: Tensor, ignore: tuple[int, ...]
) -> dict[str, Tensor]:
    return flat_values(model, batch, [name for site in sites for name in site.reads], ignore, torch.float32)


@dataclass(frozen=True)
class LossSums:
    """Sums over next tokens: their loss, the divergence from the model's own predictions, and their number."""

    loss: float = 0.0
    divergence: float = 0.0
    count: int = 0

    @classmethod
    def measure(
        cls,
        logits: Float[Tensor, "prompt pos d_vocab"],
        reference: Float[Tensor, "prompt pos d_vocab"],
        tokens: Int[Tensor, "prompt pos"],
        ignore: tuple[int, ...],
    ) -> "LossSums":
        """The sums of one batch: -log p(next token) and KL(reference || these).

        Raises:
            NumericalError: a loss is not finite.
        """
        kept = ~torch.isin(tokens, torch.tensor(ignore, dtype=tokens.dtype, device=tokens.device))
        scored = (kept[:, :-1] & kept[:, 1:]).to(logits.device)
        log_p, log_reference = (x[:, :-1][scored].float().log_softmax(-1) for x in (logits, reference))
        targets = tokens[:, 1:].to(logits.device)[scored]
        loss = -log_p.gather(-1, targets[:, None]).sum()
        divergence = (log_reference.exp() * (log_reference - log_p)).sum()
        if not loss.isfinite() or not divergence.isfinite():
            raise NumericalError(f"expected a finite next-token loss; got {float(loss)}: check the model's logits.")
        return cls(float(loss), float(divergence), len(targets))

    def __add__(self, other: "LossSums") -> "LossSums":
        """Both together."""
        return LossSums(self.loss + other.loss, self.divergence + other.divergence, self.count + other.count)


def _losses(
    model: TransformerLensModel,
    sites: Sequence[DictionarySite],
    conditions: Mapping[Condition, Mapping[str, Replacement]],
    batches: Iterable[Tensor],
    ignore: tuple[int, ...],
) -> dict[Condition, LossSums]:
    inputs = {site.hook: (site.hook_in, *(each.hook_in for each in site.before)) for site in sites}
    sums = dict.fromkeys(conditions, LossSums())
    for batch in batches:
        reference = _replaced_logits(model, batch, {}, inputs)
        for key, replaced in conditions.items():
            logits = _replaced_logits(model, batch, replaced, inputs) if replaced else reference
            sums[key] += LossSums.measure(logits, reference, batch, ignore)
    if not sums[_MODEL].count:
        raise SettingsError("expected prompts of at least two tokens that are not ignored; got none.")
    return sums


def _replaced_logits(
    model: TransformerLensModel,
    tokens: Tensor,
    replacements: Mapping[str, Replacement],
    inputs: Mapping[str, Sequence[str]],
) -> Float[Tensor, "prompt pos d_vocab"]:
    """Logits with the values at some hook points replaced by functions of those at their inputs."""
    values: dict[str, Tensor] = {}
    replaced: set[str] = set()

    def capture(name: str) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            values[name] = value.clone()  # some models go on in place

        return hook

    def replace(name: str, replacement: Replacement) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            replaced.add(name)
            x = value if inputs[name][0] == name else values[inputs[name][0]]
            return _replaced(replacement, x.flatten(2), values).reshape(value.shape).to(value)

        return hook

    captured = dict.fromkeys(read for name in replacements for read in inputs[name] if read != name)
    # Captures first: where two dictionaries meet, what one reads is the value before the other's replacement.
    hooks = [*((name, capture(name)) for name in captured), *((n, replace(n, r)) for n, r in replacements.items())]
    with torch.no_grad(), hooked(model, hooks):
        logits = model(tokens)
    missed = set(replacements) - replaced
    if missed:
        raise SettingsError(f"expected {sorted(missed)} to fire in a forward pass; they did not: nothing was replaced.")
    return logits


@dataclass
class Moments:
    """Sums over positions of inputs, outputs and their products, float64."""

    count: int
    x: Float[Tensor, " d_in"]
    y: Float[Tensor, " d_out"]
    xx: Float[Tensor, "d_in d_in"]
    xy: Float[Tensor, "d_in d_out"]

    @classmethod
    def measure(cls, x: Float[Tensor, "position d_in"], y: Float[Tensor, "position d_out"]) -> "Moments":
        """The sums of one batch."""
        x, y = x.double(), y.double()
        return cls(len(x), x.sum(0), y.sum(0), x.mT @ x, x.mT @ y)

    def __add__(self, other: "Moments") -> "Moments":
        """Both together."""
        sums = ((getattr(self, name) + getattr(other, name)) for name in ("count", "x", "y", "xx", "xy"))
        return Moments(*sums)


def _moments(
    model: TransformerLensModel, sites: Sequence[DictionarySite], batches: Iterable[Tensor], ignore: tuple[int, ...]
) -> dict[str, Moments]:
    sums: dict[str, Moments] = {}
    for batch in batches:
        values = _values(model, sites, batch, ignore)
        for site in sites:
            fresh = Moments.measure(values[site.hook_in], values[site.hook])
            sums[site.hook] = sums[site.hook] + fresh if site.hook in sums else fresh
    return sums


@dataclass(frozen=True, eq=False)
class LinearMap:
    """y = x @ weight + bias, in float32."""

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"]

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The map applied."""
        return x.float() @ self.weight.to(x.device) + self.bias.to(x.device)


def fit_maps(moments: Moments, rank: int) -> dict[str, LinearMap]:
    """The best affine map and the best of rank `rank`, by name ("affine", "rank 16").

    Raises:
        NumericalError: there are fewer positions than unknowns of the map.
    """
    n, d_in = moments.count, len(moments.x)
    if n <= d_in:
        raise NumericalError(f"expected more than {d_in} positions to fit an affine map on; got {n}: pass more tokens.")
    mean_x, mean_y = moments.x / n, moments.y / n
    xx = moments.xx / n - torch.outer(mean_x, mean_x)
    xy = moments.xy / n - torch.outer(mean_x, mean_y)
    # A trace of ridge: inputs after a norm are linearly dependent (they have no mean).
    ridge = _RIDGE * xx.diagonal().mean() * torch.eye(d_in, dtype=xx.dtype, device=xx.device)
    weight = torch.linalg.solve(xx + ridge, xy)
    leading = torch.linalg.eigh(weight.mT @ xx @ weight).eigenvectors[:, -rank:]
    low = weight @ leading @ leading.mT
    maps = {"affine": weight, f"rank {rank}": low}
    return {name: LinearMap(w.float(), (mean_y - mean_x @ w).float()) for name, w in maps.items()}
