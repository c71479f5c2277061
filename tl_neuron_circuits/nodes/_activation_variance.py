"""How much every node varies from prompt to prompt where the answer is read: a ranking that needs no gradient.

    score(n) = var_prompts a_n(last position)                       for a vector node: E |v - E v|^2

The variance is that of the prompts at hand (divided by their number). It is not signed and knows no metric. A node is a
unit at all positions, so that `evaluate` keeps or ablates it everywhere. Source: Dunefsky et al. 2024,
arXiv 2406.11944; METHODS.md 4.4.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._errors import NumericalError
from .._processes import current_processes
from .._progress import show_batches
from .._typing import checked
from ..bases._activations import Neurons
from ..bases._runs import list_reads, run_values, take_apart
from ..bases._site import Basis, Parts, basis_name, basis_sites
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ..tasks._pairs import PromptPairs
from ..tasks._provenance import provenance
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs
from ._scores import NodeScores, require_finite, site_labels


@holding
@checked
def activation_variance(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    *,
    basis: Basis | Sequence[Basis] | None = None,
    batch_size: int = 64,
    verbose: bool | None = None,
) -> NodeScores:
    """Variance of every node's activation at the last token, over the clean prompts.

    With `evaluate(..., ablation="zero", error_nodes="ablate")` it gives Dunefsky et al.'s comparison of neurons and
    transcoder features: the best n are kept, the rest is zero at all positions.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: prompts, of any lengths; answers and corrupt prompts are not looked at.
        basis: one basis or several; neurons unless given.
        batch_size: prompts in one pass.
        verbose: as in `attribute`.

    Returns:
        Scores `[unit]` in float32 (positions "sum"), none below zero, in squared units of the activation. An affine
        skip is not a node here: it belongs to the replaced MLP and is always live.

    Raises:
        UnsupportedModelError: a site of the basis is missing or did not fire.
        NumericalError: activations are not finite, or there is one prompt, of which nothing varies.

    Source: METHODS.md 4.4.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.greater_than(8)
        >>> scores = tnc.nodes.activation_variance(model, pairs, basis=tnc.bases.Neurons(layers=[2]))
        >>> metric = tnc.tasks.ProbabilityDifference.for_years(model, pairs)
        >>> tnc.evaluate(model, pairs, scores, sizes=[0, 16, 512], metric=metric, ablation="zero").sizes
        (0, 16, 512)
    """
    nodes_of = Neurons() if basis is None else basis
    sites = basis_sites(model, nodes_of)
    tokens = tokenize(model, pairs)
    if len(tokens) < 2:
        raise NumericalError(f"expected at least two prompts to vary over; got {len(tokens)}.")
    processes = current_processes()
    with processes.together("activation_variance", {"basis": basis_name(nodes_of), "pairs": tokens.hash}):
        sums: dict[tuple[str, str, str], Tensor] = {}
        batches = processes.share(tokens.batches(processes.fair(batch_size, len(tokens))))
        shown = verbose if processes.first else False
        for batch in show_batches(batches, -(-len(tokens) // processes.count), desc="variance", verbose=shown):
            _add(sums, take_apart(sites, run_values(model, batch, list_reads(sites))), batch)
        variances = _variances(processes.total(sums), len(tokens))
    settings = {
        "method": "activation_variance",
        "positions": "sum",
        "units": "keep",
        "baseline": "none",
        "metric": "none",
        "basis": basis_name(nodes_of),
        "method_options": {"name": "activation_variance"},
        **provenance(model, tokens),
    }
    nodes = {hook: variance for (hook, kind), variance in variances.items() if kind == "node"}
    errors = {hook: variance.sum() for (hook, kind), variance in variances.items() if kind == "error"}
    return require_finite(NodeScores(nodes, errors, {}, site_labels(sites), settings, nodes_of))


def _add(sums: dict[tuple[str, str, str], Tensor], found: Mapping[str, Parts], batch: Batch) -> None:
    """Add the last tokens' values and their squares, in float64."""
    for hook, parts in found.items():
        for kind, values in {"node": parts.nodes, **parts.vectors}.items():
            rows = torch.arange(len(batch), device=values.device)
            last = values[rows, batch.position.to(values.device)].double()
            for power, fresh in (("sum", last.sum(0)), ("squares", last.square().sum(0))):
                key = hook, kind, power
                sums[key] = sums[key] + fresh if key in sums else fresh


def _variances(sums: Mapping[tuple[str, str, str], Tensor], count: int) -> dict[tuple[str, str], Tensor]:
    """By hook point and kind."""
    found: dict[tuple[str, str], Tensor] = {}
    for hook, kind, power in sums:
        if power == "sum":
            squares, mean = sums[hook, kind, "squares"] / count, sums[hook, kind, "sum"] / count
            found[hook, kind] = (squares - mean.square()).clamp(min=0).float()
    return found
