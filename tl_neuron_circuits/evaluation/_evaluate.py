"""`evaluate`: keep the best nodes and ablate the rest, then the reverse, on held-out pairs."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .._errors import NumericalError, PairsError, SettingsError
from .._files import versions
from .._processes import current_processes
from .._typing import checked
from ..bases._site import Basis, Site, basis_name, basis_sites
from ..circuits._circuit import Circuit
from ..interventions._ablation import Ablation
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ..nodes._scores import NodeScores
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._ablated_runs import Ablated, Evaluation, NodeSet
from ._curve import SparsityCurve, stack
from ._node_sets import Chosen, RankedNodes, Ranking, chosen_sizes

logger = logging.getLogger(__name__)
ErrorNodes = Literal["rank", "keep", "ablate"]


@holding
@checked
def evaluate(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    scores: NodeScores | Circuit,
    *,
    sizes: Sequence[int] | None = None,
    ablation: Ablation = "mean",
    reference: PromptPairs | TokenizedPairs | None = None,
    ranking: Ranking | None = None,
    error_nodes: ErrorNodes = "rank",
    basis: Basis | Sequence[Basis] | None = None,
    metric: Metric = logit_difference,
    completeness: bool = True,
    batch_size: int | Literal["auto"] = 64,
    seed: int = 0,
    verbose: bool | None = None,
) -> SparsityCurve:
    """Faithfulness and completeness of the best nodes by `scores`, at several sizes.

    Args:
        model: the model that the scores were computed on.
        pairs: held-out pairs; ablation values come from their corrupt prompts.
        scores: from `attribute`, or a circuit, whose own size is then the default of `sizes`. With positions kept, the
            pairs must have the token length of the attribution pairs.
        sizes: numbers of nodes; 20 log-spaced ones unless given. Where positions were summed, a node is a unit at all
            positions.
        ablation: value of an ablated node: "mean" over all corrupt prompts of these pairs (per position, among prompts
            of one length), "zero", "resample" (a random other corrupt prompt), "corrupt" (the pair's own).
        reference: pairs over whose corrupt prompts the means are taken, instead of those judged: with the attribution
            pairs here, no prompt judged has a part in its own baseline. For ablation="mean".
        ranking: by |score| ("abs"), or by score ("signed"). Unless given, as the scores say: by |score|, but by
            score where they are a learned order ("learned_mask", "mask_gradient"), which has no other reading.
        error_nodes: the errors of dictionaries: ranked as nodes, always kept, or always ablated.
        basis: needed where scores of a dictionary basis were loaded from disk.
        metric: as in `attribute`.
        completeness: False saves half of the forwards and leaves completeness nan.
        batch_size: prompts in one pass. Cost: 2 + 2 x sizes forwards per batch, and one over the corrupt prompts; sets
            that are the same (all nodes, none) are run once. "auto" begins with what fits into memory, and halves where
            it runs out all the same; `.settings["batch_size"]` says what was used. A beginning that all prompts share
            is run once where ablation changes nothing there.
        seed: of "resample".
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        A `SparsityCurve` normalized by the original model; its `.notes` are logged as warnings.

    Raises:
        PairsError: no corrupt prompts where the ablation needs them, or a length that does not fit kept positions.
        SettingsError: the scores do not fit the model or a size is out of range.
        NumericalError: ablating everything does not change the metric, so nothing can be normalized.

    Source: Marks et al. 2025; METHODS 1.4.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> train, test = tnc.tasks.subject_verb_agreement("simple", n=32).split(0.5)
        >>> curve = tnc.evaluate(model, test, tnc.attribute(model, train), sizes=[10, 100])
        >>> list(curve.to_dataframe()["size"])
        [10, 100]
    """
    curve = sparsity_curve(
        model, pairs, scores, sizes=sizes, ablation=ablation, reference=reference, ranking=ranking,
        error_nodes=error_nodes, basis=basis, metric=metric, completeness=completeness, batch_size=batch_size,
        seed=seed, verbose=verbose,
    )  # fmt: skip
    for note in curve.notes if current_processes().first else ():
        logger.warning(note)
    return curve


def sparsity_curve(
    model: TransformerLensModel, pairs: PromptPairs | TokenizedPairs, scores: NodeScores | Circuit, *,
    sizes: Sequence[int] | None, ablation: Ablation, reference: PromptPairs | TokenizedPairs | None,
    ranking: Ranking | None, error_nodes: ErrorNodes, metric: Metric, batch_size: int | Literal["auto"], seed: int,
    verbose: bool | None, basis: Basis | Sequence[Basis] | None = None, completeness: bool = True,
) -> SparsityCurve:  # fmt: skip
    """`evaluate` without a word, for many curves on the same pairs."""
    if isinstance(scores, Circuit):
        sizes = [len(scores)] if sizes is None else sizes
        scores = scores.to_scores()
    basis = scores.basis if basis is None else basis
    if basis is None:
        raise SettingsError("these scores were loaded without their dictionaries: pass basis= as given to attribute.")
    processes = current_processes()
    tokens = tokenize(model, pairs)
    sites = _matching_sites(basis_sites(model, basis), scores)
    means = None if reference is None else tokenize(model, reference)
    _check(tokens, scores, ablation, means)
    ranking = scores.ranking if ranking is None else ranking
    if ranking != "signed" == scores.ranking:
        raise SettingsError(
            f"scores of {scores.settings['method']} are an order, whose lowest node comes last; got ranking="
            f"{ranking!r}. Leave ranking= out, or give 'signed'."
        )
    fixed = {"keep": {"always": ("error",)}, "ablate": {"never": ("error",)}, "rank": {}}[error_nodes]
    ranked = RankedNodes(scores, ranking, **fixed)
    sizes = chosen_sizes(sizes, len(ranked))
    settings = {
        "basis": basis_name(basis),
        "ablation": ablation,
        "ranking": ranking,
        "error_nodes": error_nodes,
        "seed": seed,
    }
    settings |= {"metric": metric_name(metric), "pairs_hash": tokens.hash} | _from_scores(scores)
    settings |= {} if means is None else {"reference_hash": means.hash}
    with processes.together("evaluate", [settings, sizes, completeness]):
        half: NodeSet = lambda: ranked.best(len(ranked) // 2)  # noqa: E731
        ablated, shown = Ablated(model, sites, metric, ablation, seed, means), verbose if processes.first else False
        run = Evaluation(ablated, tokens, batch_size, processes, lambda run: run.metrics([half]), shown=shown)
        full, empty, kept, removed = _metrics(run, ranked, sizes, completeness)
        settings |= {"batch_size": run.batch_size}
    _check_range(full, empty, ablation)
    predicted = torch.tensor([ranked.sum_of_best(size) for size in sizes], dtype=torch.float32)
    groups = None if tokens.labels is None else tuple(tokens.labels)
    return SparsityCurve(
        tuple(sizes), stack(kept), stack(removed), full, empty, predicted, len(ranked), settings, groups
    )


def _metrics(
    run: Evaluation, ranked: RankedNodes, sizes: Sequence[int], completeness: bool
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Of the original model, without any node, with the best ones, and without them; each set of nodes is run once."""
    kept = [ranked.keeping(size) for size in sizes]
    removed = [ranked.keeping(size, but=True) for size in sizes if completeness]
    full, empty = Chosen("whole", 0), ranked.keeping(0)
    sets = list(dict.fromkeys([full, empty, *kept, *removed]))
    found = dict(zip(sets, run.metrics([functools.partial(ranked.masks, chosen) for chosen in sets]), strict=True))
    nothing = torch.full_like(found[full], torch.nan)
    return (
        found[full],
        found[empty],
        [found[chosen] for chosen in kept],
        [found[chosen] for chosen in removed] or [nothing for _ in sizes],
    )


def _from_scores(scores: NodeScores) -> dict[str, Any]:
    """What a curve says of the scores that it judges."""
    return {
        **{key: scores.settings[key] for key in ("method", "positions", "model", "baseline")},
        "method_options": scores.settings["method_options"],
        "attribution_hash": scores.settings["pairs_hash"],
        "variance_unexplained": dict(scores.settings.get("variance_unexplained", {})),
        "versions": versions(),
    }


def _matching_sites(sites: tuple[Site, ...], scores: NodeScores) -> tuple[Site, ...]:
    found = {site.hook: site for site in sites}
    missing = [hook for hook in scores.values if hook not in found]
    if missing:
        raise SettingsError(
            f"the scores have nodes at {missing}, which this model's basis has not. Is it the same model?"
        )
    return tuple(found[hook] for hook in scores.values)


def _check(tokens: TokenizedPairs, scores: NodeScores, ablation: Ablation, reference: TokenizedPairs | None) -> None:
    if reference is not None:
        require_reference(tokens, reference, ablation)
    elif ablation != "zero" and tokens.corrupt is None:
        raise PairsError(
            f"ablation={ablation!r} takes values from corrupt prompts, and these pairs have none. Use 'zero'."
        )
    if scores.positions == "keep":
        length = next(iter(scores.values.values())).shape[0]
        wrong = sorted(set(tokens.lengths) - {length})
        if wrong:
            raise PairsError(
                f"the scores have {length} positions; some of these prompts have {wrong} tokens. Evaluate on prompts "
                f"of {length} tokens, or attribute with positions='sum'."
            )
    if scores.settings.get("units") == "sum":
        raise SettingsError("scores with units='sum' name no single nodes to keep. Attribute with units='keep'.")


def require_reference(tokens: TokenizedPairs, reference: TokenizedPairs, ablation: Ablation) -> None:
    """Raise where means cannot be taken over the reference's corrupt prompts.

    Raises:
        SettingsError: another ablation, which takes no means.
        PairsError: the reference has no corrupt prompts, or none of a length that is judged.
    """
    if ablation != "mean":
        raise SettingsError(
            f"reference= gives pairs to take means over, and ablation={ablation!r} takes none. Leave reference= out, "
            "or use ablation='mean'."
        )
    if reference.corrupt is None:
        raise PairsError("means are taken over the corrupt prompts of reference=, and its pairs have none. Give them.")
    lacking = sorted(set(tokens.lengths) - {len(prompt) for prompt in reference.corrupt})
    if lacking:
        raise PairsError(
            f"means are taken by position among prompts of one length: reference= has no corrupt prompts of {lacking} "
            "tokens, as some of the pairs judged have. Give reference pairs of the same lengths."
        )


def _check_range(full: Tensor, empty: Tensor, ablation: Ablation) -> None:
    low, high = float(empty.double().mean()), float(full.double().mean())
    if not abs(high - low) > 1e-6 * max(abs(high), abs(low), 1e-6):
        raise NumericalError(
            f"ablating every node ({ablation}) leaves the metric where it was ({high:.6g}), so faithfulness would "
            "divide by zero. Use a metric on which clean and ablated runs differ, or another ablation."
        )
