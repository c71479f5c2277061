"""How much every node varies from prompt to prompt where the answer is read: a ranking that needs no gradient.

    score(n) = var_prompts a_n(last position)                       for a vector node: E |v - E v|^2

The variance is that of the prompts at hand (divided by their number). It is not signed and knows no metric. A node is a
unit at all positions, so that `evaluate` keeps or ablates it everywhere. Source: Dunefsky et al. 2024,
arXiv 2406.11944; METHODS.md 4.4.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .._errors import NumericalError
from .._files import versions
from .._typing import checked
from ..bases import Basis, Neurons, name_of, reads_of, run_values, sites_of, take_apart
from ..models import TransformerLensModel
from ..tasks import PromptPairs, TokenisedPairs, tokenise
from ._scores import NodeScores, require_finite, site_labels


@checked
def activation_variance(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenisedPairs,
    *,
    basis: Basis | Sequence[Basis] | None = None,
    batch_size: int = 64,
    prepend_bos: bool | None = None,
    multi_token: Literal["error", "first_difference"] = "error",
) -> NodeScores:
    """Variance of every node's activation at the last token, over the clean prompts.

    With `evaluate(..., ablation="zero", error="ablate")` it gives Dunefsky et al.'s comparison of neurons and transcoder
    features: the best n are kept, the rest is zero at all positions.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: prompts, of any lengths; answers and corrupt prompts are not looked at.
        basis: one basis or several; neurons unless given.
        batch_size: prompts in one pass.
        prepend_bos: see `tasks.tokenise`.
        multi_token: see `tasks.tokenise`.

    Returns:
        Scores `[unit]` in float32 (positions "sum"), none below zero, in squared units of the activation. An affine
        skip is no node here: it belongs to the replaced MLP and is always live.

    Raises:
        UnsupportedModelError: a site of the basis is missing or did not fire.
        NumericalError: activations are not finite, or there is one prompt, of which nothing varies.

    Source: METHODS.md 4.4.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.greater_than(8)
        >>> scores = tnc.attribution.activation_variance(model, pairs, basis=tnc.bases.Neurons(layers=[2]))
        >>> metric = tnc.tasks.ProbabilityDifference.for_years(model, pairs)
        >>> tnc.evaluate(model, pairs, scores, sizes=[0, 16, 512], metric=metric, ablation="zero").sizes
        (0, 16, 512)
    """
    nodes_of = Neurons() if basis is None else basis
    sites = sites_of(model, nodes_of)
    tokens = tokenise(model, pairs, prepend_bos=prepend_bos, multi_token=multi_token)
    if len(tokens) < 2:
        raise NumericalError(f"expected at least two prompts to vary over; got {len(tokens)}.")
    sums: dict[tuple[str, str], _Sums] = {}
    for batch in tokens.batches(batch_size):
        for hook, parts in take_apart(sites, run_values(model, batch, reads_of(sites))).items():
            for kind, values in {"node": parts.nodes, **parts.vectors}.items():
                rows = torch.arange(len(batch), device=values.device)
                last = values[rows, batch.position.to(values.device)]
                sums[hook, kind] = sums.get((hook, kind), _Sums()).plus(last)
    variances = {key: each.variance for key, each in sums.items()}
    settings = {
        "method": "activation_variance",
        "positions": "sum",
        "units": "keep",
        "baseline": "none",
        "metric": "none",
        "basis": name_of(nodes_of),
        "rules": [],
        "model": str(getattr(model.cfg, "model_name", "unknown")),
        "n_pairs": len(tokens),
        "pairs_hash": tokens.hash,
        "lengths": sorted(set(tokens.lengths)),
        "versions": versions(),
    }
    errors = {hook: v.sum().float() for (hook, kind), v in variances.items() if kind == "error"}
    return require_finite(NodeScores(_of_nodes(variances), errors, {}, site_labels(sites), settings, nodes_of))


def _of_nodes(variances: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    return {hook: variance.float() for (hook, kind), variance in variances.items() if kind == "node"}


class _Sums:
    """Number, mean and squared deviations of rows, in float64, from one batch after the other (Chan et al. 1983)."""

    def __init__(self, count: int = 0, mean: Tensor | None = None, deviations: Tensor | None = None) -> None:
        self._count, self._mean, self._deviations = count, mean, deviations

    def plus(self, rows: Tensor) -> "_Sums":
        rows = rows.double()
        mean = rows.mean(0)
        deviations = (rows - mean).square().sum(0)
        if self._mean is None or self._deviations is None:
            return _Sums(len(rows), mean, deviations)
        count, step = self._count + len(rows), mean - self._mean
        share = self._count * len(rows) / count
        return _Sums(
            count, self._mean + step * len(rows) / count, self._deviations + deviations + share * step.square()
        )

    @property
    def variance(self) -> Tensor:
        assert self._deviations is not None
        return self._deviations / self._count
