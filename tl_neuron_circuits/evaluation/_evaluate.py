"""`evaluate`: keep the best nodes and ablate the rest, then the reverse, on held-out pairs."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import NumericalError, PairsError, SettingsError
from .._files import versions
from .._typing import checked
from ..attribution import NodeScores
from ..bases import Basis, Parts, Site, logits_of, mean_parts, name_of, reads_of, run_values, sites_of, take_apart
from ..circuits import Circuit
from ..interventions import Ablation, Kept, ablation_hooks
from ..models import TransformerLensModel
from ..tasks import Batch, Metric, PromptPairs, TokenisedPairs, logit_difference, measure, metric_name, tokenise
from ._curve import SparsityCurve, stack
from ._node_sets import RankedNodes, Ranking, chosen_sizes

Errors = Literal["nodes", "keep", "ablate"]


@checked
def evaluate(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenisedPairs,
    scores: NodeScores | Circuit,
    *,
    sizes: Sequence[int] | None = None,
    ablation: Ablation = "mean",
    ranking: Ranking = "abs",
    error: Errors = "nodes",
    basis: Basis | Sequence[Basis] | None = None,
    metric: Metric = logit_difference,
    completeness: bool = True,
    batch_size: int = 64,
    prepend_bos: bool | None = None,
    multi_token: Literal["error", "first_difference"] = "error",
    seed: int = 0,
    verbose: bool = False,
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
        ranking: by |score|, or by score ("signed").
        error: a dictionary's error: ranked as a node, always kept, or always ablated.
        basis: needed where scores of a dictionary basis were loaded from disk.
        metric: as in `attribute`.
        prepend_bos: as in `attribute`.
        multi_token: as in `attribute`.
        completeness: False saves half of the forwards and leaves completeness nan.
        batch_size: prompts in one pass. Cost: 2 + 2 x sizes forwards a batch, and one over the corrupt prompts.
        seed: of "resample".
        verbose: show progress.

    Returns:
        A `SparsityCurve` normalised by the original model.

    Raises:
        PairsError: no corrupt prompts where the ablation needs them, or a length that does not fit kept positions.
        SettingsError: the scores do not fit the model or a size is out of range.
        NumericalError: ablating everything does not change the metric, so nothing can be normalised.

    Source: Marks et al. 2025; METHODS 1.4.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> train, test = tnc.tasks.subject_verb_agreement("simple", n=32).split(0.5)
        >>> curve = tnc.evaluate(model, test, tnc.attribute(model, train), sizes=[10, 100])
        >>> list(curve.to_dataframe()["size"])
        [10, 100]
    """
    if isinstance(scores, Circuit):
        sizes = [len(scores)] if sizes is None else sizes
        scores = scores.to_scores()
    basis = scores.basis if basis is None else basis
    if basis is None:
        raise SettingsError("these scores were loaded without their dictionaries: pass basis= as given to attribute.")
    tokens = tokenise(model, pairs, prepend_bos=prepend_bos, multi_token=multi_token)
    sites = _matching_sites(sites_of(model, basis), scores)
    _check(tokens, scores, ablation)
    fixed = {"keep": {"always": ("error",)}, "ablate": {"never": ("error",)}, "nodes": {}}[error]
    ranked = RankedNodes(scores, ranking, **fixed)
    sizes = chosen_sizes(sizes, len(ranked))
    run = _Evaluation(model, sites, metric, tokens, ablation, batch_size, seed)
    with tqdm(total=2 + (1 + completeness) * len(sizes), desc="evaluate", disable=not verbose, unit="run") as bar:
        full, empty = run.metric(None, bar), run.metric(ranked.best(0), bar)
        kept = [run.metric(ranked.best(size), bar) for size in sizes]
        nothing = torch.full_like(full, torch.nan)
        removed = [run.metric(ranked.all_but_best(size), bar) if completeness else nothing for size in sizes]
    _check_range(full, empty, ablation)
    settings = {
        **{key: scores.settings[key] for key in ("method", "positions", "rules", "model")},
        "basis": name_of(basis),
        "baseline": scores.settings["baseline"],
        "ablation": ablation,
        "ranking": ranking,
        "error": error,
        "metric": metric_name(metric),
        "attribution_hash": scores.settings["pairs_hash"],
        "pairs_hash": tokens.hash,
        "variance_unexplained": dict(scores.settings.get("variance_unexplained", {})),
        "seed": seed,
        "versions": versions(),
    }
    predicted = torch.tensor([ranked.sum_of_best(size) for size in sizes])
    groups = None if tokens.labels is None else tuple(tokens.labels)
    return SparsityCurve(
        tuple(sizes), stack(kept), stack(removed), full, empty, predicted, len(ranked), settings, groups
    )


class _Evaluation:
    """The pairs, in batches with their ablation values, on one model."""

    def __init__(
        self,
        model: TransformerLensModel,
        sites: tuple[Site, ...],
        metric: Metric,
        tokens: TokenisedPairs,
        ablation: Ablation,
        batch_size: int,
        seed: int,
    ) -> None:
        self._model, self._sites, self._metric, self._n = model, sites, metric, len(tokens)
        self._batches = list(tokens.batches(batch_size))
        self._bases = self._baselines(ablation, torch.Generator().manual_seed(seed))

    @property
    def n_pairs(self) -> int:
        return self._n

    @property
    def batches(self) -> list[tuple[Batch, Mapping[str, Parts | None]]]:
        return list(zip(self._batches, self._bases, strict=True))

    def metric(self, kept: Kept | None, bar: tqdm) -> Tensor:
        """The metric of every prompt with only `kept` live; the original model's for None."""
        out = torch.empty(self._n)
        for batch, base in zip(self._batches, self._bases, strict=True):
            hooks = [] if kept is None else ablation_hooks(self._sites, kept, base)
            with torch.no_grad(), self._model.hooks(fwd_hooks=hooks):
                logits = logits_of(self._model, batch.clean, batch.attention_mask)
                out[batch.index.cpu()] = measure(self._metric, logits, batch).float().cpu()
        bar.update()
        return out

    def _baselines(self, ablation: Ablation, generator: torch.Generator) -> list[Mapping[str, Parts | None]]:
        if ablation == "zero":
            return [dict.fromkeys(site.hook for site in self._sites)] * len(self._batches)
        if ablation == "mean":
            means = mean_parts(self._model, self._sites, (batch.on_corrupt() for batch in self._batches))
            return [{s.hook: means[s.hook, b.clean.shape[1]] for s in self._sites} for b in self._batches]
        own = [self._corrupt_parts(batch) for batch in self._batches]
        return [{**parts} for parts in own] if ablation == "corrupt" else self._shuffled(own, generator)

    def _corrupt_parts(self, batch: Batch) -> Mapping[str, Parts]:
        return take_apart(self._sites, run_values(self._model, batch.on_corrupt(), reads_of(self._sites)))

    def _shuffled(self, own: list[Mapping[str, Parts]], generator: torch.Generator) -> list[Mapping[str, Parts | None]]:
        """Each prompt gets the values of another prompt of its length, by a random cycle through them."""
        out: list[Mapping[str, Parts | None]] = [{} for _ in own]
        lengths = [batch.clean.shape[1] for batch in self._batches]
        for length in set(lengths):
            members = [i for i, other in enumerate(lengths) if other == length]
            sizes = [len(self._batches[i]) for i in members]
            order = torch.randperm(sum(sizes), generator=generator)
            source = torch.empty_like(order)
            source[order] = order.roll(1)
            for site in self._sites:
                nodes = torch.cat([own[i][site.hook].nodes for i in members])[
                    source.to(own[members[0]][site.hook].nodes.device)
                ]
                vectors = {
                    name: torch.cat([own[i][site.hook].vectors[name] for i in members])[source.to(nodes.device)]
                    for name in site.vectors
                }
                split = {name: vector.split(sizes) for name, vector in vectors.items()}
                for place, (i, part) in enumerate(zip(members, nodes.split(sizes), strict=True)):
                    out[i] = {**out[i], site.hook: Parts(part, {name: v[place] for name, v in split.items()})}
        return out


def _matching_sites(sites: tuple[Site, ...], scores: NodeScores) -> tuple[Site, ...]:
    found = {site.hook: site for site in sites}
    missing = [hook for hook in scores.values if hook not in found]
    if missing:
        raise SettingsError(
            f"the scores have nodes at {missing}, which this model's basis has not. Is it the same model?"
        )
    return tuple(found[hook] for hook in scores.values)


def _check(tokens: TokenisedPairs, scores: NodeScores, ablation: Ablation) -> None:
    if ablation != "zero" and tokens.corrupt is None:
        raise PairsError(
            f"ablation={ablation!r} takes values from corrupt prompts, and these pairs have none. Use 'zero'."
        )
    if scores.positions == "keep":
        length = next(iter(scores.values.values())).shape[0]
        wrong = sorted(set(tokens.lengths) - {length})
        if wrong:
            raise PairsError(
                f"the scores have {length} positions; some of these prompts have {wrong} tokens. Evaluate on prompts "
                f"of "
                f"{length} tokens, or attribute with positions='sum'."
            )
    if scores.settings.get("units") == "sum":
        raise SettingsError("scores with units='sum' name no single nodes to keep. Attribute with units='keep'.")


def _check_range(full: Tensor, empty: Tensor, ablation: Ablation) -> None:
    low, high = float(empty.double().mean()), float(full.double().mean())
    if not abs(high - low) > 1e-6 * max(abs(high), abs(low), 1e-6):
        raise NumericalError(
            f"ablating every node ({ablation}) leaves the metric where it was ({high:.6g}), so faithfulness would "
            f"divide by "
            "zero. Use a metric on which clean and ablated runs differ, or another ablation."
        )
