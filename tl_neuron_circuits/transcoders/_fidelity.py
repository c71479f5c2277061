"""Fidelity: what next-token prediction loses when MLPs are replaced by dictionaries.

    recovered_zero = (L_zero - L) / (L_zero - L_model)     recovered_mean = (L_mean - L) / (L_mean - L_model)

with L the next-token loss with the value at `hook_out` replaced by the dictionary's reconstruction (skip included), by
zero, or by its mean over the tokens that baselines are fitted on. 1 is as good as the model, 0 as bad as the ablation.
More than 1 is not more faithful: a replacement simpler than the layer may predict better than it does. `divergence`,
the mean KL divergence of the predictions from the model's own, is 0 only where they are the same. FVU is the fraction
of variance unexplained at `hook_out`, L0 the mean number of active features, the dead share that of the features that
never fired on these tokens. Source: METHODS.md 4.2.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from .. import _html
from .._errors import SettingsError
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..bases._dictionary_basis import Dictionaries
from ..bases._dictionary_variance import VarianceSums
from ..models._protocol import TransformerLensModel
from ._buffer import flat_values
from ._linear_maps import LinearMap, Moments, fit_maps
from ._token_loss import LossSums, Replacement, batches_of, replaced_logits

ALL = "all"
OWN = ("sae", "transcoder")
MODEL = ("", "model")


@dataclass(frozen=True, eq=False, repr=False)
class Fidelity:
    """What `fidelity` returns: a row a layer and replacement, and of all layers together (`layer` "all").

    Columns: layer; replacement ("sae" or "transcoder", "affine", "rank 16", "mean", "zero"); kind and d_dict of the
    dictionary; l0 (of all layers: their mean), fvu, dead_share; loss, divergence, recovered_zero, recovered_mean.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("rc", n=64)
        >>> tokens = torch.stack(list(tnc.tasks.tokenize(model, pairs).clean))
        >>> found = tnc.transcoders.fidelity(model, tnc.load_demo_dictionaries("sae"), tokens)
        >>> found.of("sae").index.tolist()
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


@dataclass(frozen=True, eq=False)
class _Site:
    dictionary: Dictionary
    hook_in: str
    hook_out: str
    layer: int


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
) -> Fidelity:
    """Next-token loss with one layer replaced, and with all of them, beside L0, FVU and dead share.

    Args:
        model: a TransformerLens model.
        dictionaries: SAEs or transcoders, at most one a layer.
        tokens: held-out prompts; a tensor, or a list of batches.
        fit_tokens: prompts that means and linear maps are fitted on, best those of the training; `tokens` by default.
        baselines: also replace by an affine map and a map of rank `rank` from the dictionary's input to its output.
        forward_rows: prompts a forward pass, where tokens are one tensor.
        ignore_tokens: positions with these tokens (padding) do not count, though they are replaced too.

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
    return measure_fidelity(model, dictionaries, batches, fit, baselines, rank, ignore_tokens)[0]


@dataclass(frozen=True, eq=False)
class References:
    """What does not depend on a dictionary but on where it reads and writes: sums over tokens, and ablated losses."""

    moments: Mapping[str, Moments]
    sums: Mapping[tuple[Any, str], LossSums]


def measure_fidelity(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    batches: Sequence[Tensor],
    fit: Sequence[Tensor],
    baselines: bool,
    rank: int,
    ignore_tokens: tuple[int, ...],
    known: References | None = None,
) -> tuple[Fidelity, References]:
    """`fidelity`, and what the next call with dictionaries of the same sites need not measure again.

    Args:
        known: from such a call, on the same tokens; the table then has rows of the dictionaries alone.
    """
    found = Dictionaries(dictionaries).sites(model)
    sites = [_Site(s.dictionary, s.hook_in, s.hook, s.layer) for s in found]  # pyright: ignore[reportAttributeAccessIssue]
    if not batches or not fit:
        raise SettingsError("expected at least one prompt to measure fidelity on; got none.")
    moments = _moments(model, sites, fit, ignore_tokens) if known is None else known.moments
    functions = {site.hook_out: _functions(site, moments[site.hook_out], baselines, rank) for site in sites}
    if known is not None:
        functions = {hook: {name: each[name] for name in OWN if name in each} for hook, each in functions.items()}
    measured = _measures(model, sites, functions, batches, ignore_tokens)
    fresh = _losses(model, sites, _conditions(sites, functions), batches, ignore_tokens)
    sums = fresh if known is None else {**known.sums, **fresh}
    model_loss, count = sums[MODEL].loss / sums[MODEL].count, sums[MODEL].count
    losses = {key: each.loss / count for key, each in sums.items()}
    rows = [
        {"layer": layer, "replacement": name}
        | measured.get((layer, name), {})
        | {"loss": losses[layer, name], "divergence": sums[layer, name].divergence / count}
        | {f"recovered_{a}": _recovered(losses[layer, a], losses[layer, name], model_loss) for a in ("zero", "mean")}
        for layer, name in fresh
        if (layer, name) != MODEL
    ]
    table = pd.DataFrame(rows)
    order = {layer: i for i, layer in enumerate([*(site.layer for site in sites), ALL])}
    table = table.sort_values("layer", key=lambda column: column.map(order), kind="stable", ignore_index=True)
    references = {key: sums[key] for key in sums if key[1] not in OWN}
    return Fidelity(table, model_loss, count), References(moments, references)


def _recovered(ablated: float, loss: float, model_loss: float) -> float:
    gap = ablated - model_loss
    return (ablated - loss) / gap if gap else float("nan")


def _functions(site: _Site, moments: Moments, baselines: bool, rank: int) -> dict[str, Any]:
    """What may be written at the output, as functions of the input."""
    is_transcoder = site.dictionary.is_transcoder
    mean = moments.mean
    functions: dict[str, Any] = {"transcoder" if is_transcoder else "sae": site.dictionary}
    if baselines:
        maps: Mapping[str, LinearMap] = fit_maps(moments, rank)
        functions |= {name: map_ for name, map_ in maps.items() if is_transcoder or name != "affine"}
    functions["mean"] = lambda x: mean.to(x.device).expand(*x.shape[:-1], len(mean))
    functions["zero"] = lambda x: torch.zeros(len(mean), device=x.device).expand(*x.shape[:-1], len(mean))
    return functions


def _moments(
    model: TransformerLensModel, sites: Sequence[_Site], batches: Iterable[Tensor], ignore: tuple[int, ...]
) -> dict[str, Moments]:
    names = [name for site in sites for name in (site.hook_in, site.hook_out)]
    sums: dict[str, Moments] = {}
    for batch in batches:
        values = flat_values(model, batch, names, ignore, torch.float32)
        for site in sites:
            fresh = Moments.of(values[site.hook_in], values[site.hook_out])
            sums[site.hook_out] = sums[site.hook_out] + fresh if site.hook_out in sums else fresh
    return sums


@torch.no_grad()
def _measures(
    model: TransformerLensModel,
    sites: Sequence[_Site],
    functions: Mapping[str, Mapping[str, Any]],
    batches: Iterable[Tensor],
    ignore: tuple[int, ...],
) -> dict[tuple[Any, str], dict[str, Any]]:
    """L0, FVU and dead share by layer and replacement, on the model's own activations."""
    names = [name for site in sites for name in (site.hook_in, site.hook_out)]
    variance: dict[tuple[Any, str], VarianceSums] = {}
    active = {site.layer: torch.zeros(site.dictionary.d_dict, dtype=torch.float64) for site in sites}
    for batch in batches:
        values = flat_values(model, batch, names, ignore, torch.float32)
        for site in sites:
            x, y = values[site.hook_in], values[site.hook_out]
            active[site.layer] += (site.dictionary.encode(x) != 0).sum(0).double().cpu()
            for name, function in functions[site.hook_out].items():
                sums = VarianceSums.measure(y, function(x))
                key = site.layer, name
                variance[key] = variance[key] + sums if key in variance else sums
    measured: dict[tuple[Any, str], dict[str, Any]] = {}
    for site in sites:
        for name in functions[site.hook_out]:
            sums, fired = variance[site.layer, name], active[site.layer]
            own = {
                "kind": site.dictionary.kind,
                "d_dict": site.dictionary.d_dict,
                "l0": float(fired.sum()) / sums.count,
                "dead_share": float((fired == 0).double().mean()),
            }
            measured[site.layer, name] = (own if name in OWN else {}) | {"fvu": sums.unexplained}
    for name in OWN:
        active_features = [each["l0"] for (_, other), each in measured.items() if other == name]
        if active_features:
            measured[ALL, name] = {"l0": sum(active_features) / len(active_features)}
    return measured


def _conditions(
    sites: Sequence[_Site], functions: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[Any, str], dict[str, Any]]:
    """What is written at which hook point, by layer and name: every layer alone, then all together."""
    names = dict.fromkeys(name for each in functions.values() for name in each)
    conditions: dict[tuple[Any, str], dict[str, Any]] = {MODEL: {}}
    for site in sites:
        conditions |= {(site.layer, name): {site.hook_out: f} for name, f in functions[site.hook_out].items()}
    for name in names if len(sites) > 1 else ():
        if all(name in each for each in functions.values()):
            conditions[ALL, name] = {hook: each[name] for hook, each in functions.items()}
    return conditions


def _losses(
    model: TransformerLensModel,
    sites: Sequence[_Site],
    conditions: Mapping[tuple[Any, str], Mapping[str, Any]],
    batches: Iterable[Tensor],
    ignore: tuple[int, ...],
) -> dict[tuple[Any, str], LossSums]:
    inputs = {site.hook_out: site.hook_in for site in sites}
    sums = dict.fromkeys(conditions, LossSums())
    for batch in batches:
        reference = replaced_logits(model, batch)
        for key, replaced in conditions.items():
            captures = [inputs[hook] for hook in replaced if inputs[hook] != hook]
            replacements = {hook: _replacement(function, inputs[hook], hook) for hook, function in replaced.items()}
            logits = replaced_logits(model, batch, replacements, captures) if replaced else reference
            sums[key] += LossSums.of(logits, reference, batch, ignore)
    if not sums[MODEL].count:
        raise SettingsError("expected prompts of at least two tokens that are not ignored; got none.")
    return sums


def _replacement(function: Any, hook_in: str, hook_out: str) -> Replacement:
    def write(value: Tensor, captured: Mapping[str, Tensor]) -> Tensor:
        x = value if hook_in == hook_out else captured[hook_in]
        return function(x.flatten(2)).reshape(value.shape)  # heads concatenated

    return write
