"""How stable a ranking is when other words had been drawn, and which scores have a sign of their own.

Pairs that share a word are not independent, so words are drawn, not pairs. x_c is the sum of a node's scores over the
pairs of one cell c (one combination of words), n_c their number, and in every draw b each word has a weight:

    mean_b = sum_c w_bc x_c / sum_c w_bc n_c      w_bc = product over the cell's words of independent Poisson(1)
    frequency(n, k) = share of draws in which node n is among the k best
    core(k) = nodes with a frequency of at least .9

The product makes a cell of two words as uncertain as both (Owen and Eckles 2012). Draws are added up as cells come,
over candidates only: nodes with |mean| + 4 se no smaller than the last rank's |mean| - se, se^2 being the sum over
kinds of words. A node that is left out would have to move by more than that to enter a draw's ranking.

False discoveries, over live nodes (a score that is not 0 somewhere), with clusters j of the first kind of word:

    t = mean / (se + s0)                          se over clusters, s0 the median se (Tusher et al. 2001)
    rate(t) = median over null sets of #{|t*| >= t} / #{|t| >= t}

Null "signs": every cluster's answers are swapped by a coin. That flips the sign of a logit difference's scores; those
of any other metric are computed anew with swapped answers. What it controls is that the sign is consistent over words,
not that a node belongs to the circuit: *consistent-sign* FDR. Where scores do not read the answers (a KL divergence,
the matching loss, activation differences) swapping them says nothing, and this null is refused by name. Null "pairs":
the t of other pairs, whose corrupt prompts change the word and not the answer, computed anew for any metric and loss; a
member must also exceed its own score there.

A learned mask is learned anew in every draw and null set (`_learned_stability.py`); its se is that over draws.

Source: METHODS 5.10; arXiv 2606.16920 and 2603.00523 on circuits under resampling.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _html
from .._errors import PairsError, SettingsError
from .._processes import current_processes
from .._progress import progress
from .._typing import checked
from ..bases._activations import Neurons
from ..bases._runs import mean_parts, run_logits
from ..bases._site import Basis, basis_name, basis_sites
from ..circuits._circuit import Circuit
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ..nodes._attribute import attribute, check_pairs, check_scope
from ..nodes._controls import ActivationDifference, Random
from ..nodes._learned_mask import LearnedMask
from ..nodes._masked_runs import select
from ..nodes._method import Method
from ..nodes._methods import as_method
from ..nodes._scope import Baseline, Means, Scope
from ..nodes._scores import NodeScores, require_finite, site_labels
from ..nodes._sums import ROWS
from ..tasks._metrics import Metric, logit_difference, measure, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._provenance import provenance
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs
from ._learned_stability import Learn, learn_draws, learned_nulls, swap_answers

_MARGIN = 4.0  # standard errors above its mean up to which a node may still enter a ranking
_TESTED = 100_000  # ranks at which false discoveries are counted
_FIELDS = {"node": "values", "error": "errors", "skip": "skips"}
Null = Literal["signs", "pairs"]


@dataclass(frozen=True, eq=False, repr=False)
class Stability:
    """Rankings of many draws of words, beside the ranking of all pairs.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=32)
        >>> found = tnc.stability(model, pairs, sizes=[5, 20], draws=50, null_draws=20)
        >>> found.to_dataframe()["size"].tolist()
        [5, 20]
        >>> core = found.core(20)
        >>> curve = tnc.evaluate(model, pairs, core, sizes=[len(core.top(20))])
        >>> 0 < curve.sizes[0] <= 20
        True
    """

    scores: NodeScores
    """Of all pairs, as `attribute` gives them."""
    sizes: tuple[int, ...]
    best: Int[Tensor, "draw rank"]
    """Index (as in `scores.flat()`) of every draw's best nodes, best first."""
    t: Float[Tensor, " node"]
    """Mean over standard error of every node; 0 where a node is not live."""
    null_counts: Float[Tensor, "null tested"]
    """How many null statistics are at least as large as the observed one of each rank."""
    other_counts: Float[Tensor, " tested"] | None
    """The same, of the null pairs."""
    other: Float[Tensor, " node"] | None
    """Scores of the null pairs."""
    settings: dict[str, Any]

    def frequency(self, size: int) -> pd.DataFrame:
        """Nodes that are among the `size` best in some draw, most frequent first: rows of `NodeScores.top`, and
        `frequency`.
        """
        index, share = self._frequencies(size)
        return self.scores._rows(index.numpy()).assign(frequency=share.numpy())

    def core(self, size: int, *, frequency: float = 0.9) -> NodeScores:
        """The scores of nodes among the `size` best in at least this share of draws; nan elsewhere.

        `evaluate(model, pairs, core, sizes=[n])` gives the curve of the n nodes that are left.
        """
        index, share = self._frequencies(size)
        return self._only(index[share >= frequency])

    def at_fdr(self, rate: float, *, null: Null = "signs") -> NodeScores:
        """The scores of as many nodes, by |t|, as have an estimated rate of false discoveries of at most `rate`.

        nan elsewhere. With "signs" this is the consistent-sign FDR: which scores have the same sign over words.

        Raises:
            SettingsError: there are no null draws, or no null pairs; or more nodes pass than ranks were tested.
        """
        rates = self.rates(null)
        passed = (rates <= rate).nonzero()
        if len(passed) and int(passed.max()) + 1 == len(rates) < int((self.t != 0).sum()):
            raise SettingsError(f"more than the {len(rates):,} nodes that were tested pass rate={rate}. Ask for less.")
        order = self.t.abs().argsort(descending=True, stable=True)[: int(passed.max()) + 1 if len(passed) else 0]
        if null == "pairs" and self.other is not None:
            order = order[self.scores.flat()[order].abs() > self.other[order].abs()]
        return self._only(order)

    def rates(self, null: Null = "signs") -> Float[Tensor, " tested"]:
        """Estimated rate of false discoveries among the 1, 2, 3, ... nodes with the largest |t|.

        Raises:
            SettingsError: there are no null draws, or no null pairs.
        """
        if null == "signs" and len(self.null_counts):
            false = self.null_counts.median(0).values
        elif null == "pairs" and self.other_counts is not None:
            false = self.other_counts
        else:
            if null == "signs" and (reason := self.settings.get("no_sign_flips")):
                raise SettingsError(f"null='signs' swaps answers, and {reason}. Use null='pairs'.")
            need = "null_draws= above 0" if null == "signs" else "null_pairs="
            raise SettingsError(f"these results have no null of {null!r}: call stability with {need}.")
        return (false / torch.arange(1, len(false) + 1)).clamp(max=1.0)

    def to_dataframe(self) -> pd.DataFrame:
        """By size: nodes in the core, and the Jaccard index of draws with the ranking of all pairs (median, 95%)."""
        whole, rows = self._ranked(), []
        for size in self.sizes:
            share = jaccard(self.best[:, :size], whole[:size].expand(len(self.best), -1))
            low, middle, high = np.percentile(share, [2.5, 50, 97.5])
            core = int((self._frequencies(size)[1] >= 0.9).sum())
            rows.append({"size": size, "core": core, "jaccard": middle, "jaccard_low": low, "jaccard_high": high})
        return pd.DataFrame(rows)

    def agreement(self, other: "Stability") -> pd.DataFrame:
        """Jaccard index of two methods' best nodes by size, of all pairs and over draws of the same words (95%).

        Raises:
            SettingsError: other nodes, sizes or draws.
        """
        same = ("pairs_hash", "basis", "positions", "clusters", "seed", "draws")
        differing = [key for key in same if self.settings[key] != other.settings[key]]
        if differing or self.sizes != other.sizes:
            raise SettingsError(
                f"expected two methods on the same draws of the same nodes; these differ in {differing or 'sizes'}. "
                "Call stability with the same arguments but method=."
            )
        rows = []
        for size in self.sizes:
            share = jaccard(self.best[:, :size], other.best[:, :size])
            both = jaccard(self._ranked()[None, :size], other._ranked()[None, :size])
            low, high = np.percentile(share, [2.5, 97.5])
            rows.append({"size": size, "jaccard": float(both[0]), "jaccard_low": low, "jaccard_high": high})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"Stability({s['method']} on {s['model']}, {s['n_pairs']} pairs of {s['n_clusters']} words, "
            f"{len(self.best)} draws, sizes {list(self.sizes)})"
        )

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.to_dataframe(), bars=("jaccard",), rows=60))

    def _ranked(self) -> Tensor:
        flat = self.scores.flat()
        return (flat.abs() if self.settings["ranking"] == "abs" else flat).argsort(descending=True, stable=True)

    def _frequencies(self, size: int) -> tuple[Tensor, Tensor]:
        if not 1 <= size <= self.best.shape[1]:
            raise SettingsError(f"expected a size from 1 to {self.best.shape[1]}, the largest asked for; got {size}.")
        index, counts = self.best[:, :size].unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        return index[order], counts[order] / len(self.best)

    def _only(self, index: Tensor) -> NodeScores:
        flat = self.scores.flat()
        kept = torch.full_like(flat, torch.nan)
        kept[index] = flat[index]
        return _as_scores(self.scores, kept)


@holding
@checked
def stability(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    *,
    method: str | Method = "relp",
    sizes: Sequence[int] = (10, 30, 100, 300),
    clusters: Sequence[Sequence[str]] | None = None,
    ranking: Literal["abs", "signed"] | None = None,
    draws: int | None = None,
    null_draws: int | None = None,
    null_pairs: PromptPairs | TokenizedPairs | Literal["same_answer"] | None = None,
    basis: Basis | Sequence[Basis] | None = None,
    metric: Metric = logit_difference,
    positions: Literal["keep", "sum"] = "keep",
    baseline: Baseline = "corrupt",
    batch_size: int = 32,
    seed: int = 0,
    verbose: bool | None = None,
) -> Stability:
    """Score nodes, and rank them again in many draws of the words that the pairs are made of.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: as in `attribute`; both directions of a contrast carry the same words.
        method: as in `attribute`, except "random". A learned mask is learned anew in every draw.
        sizes: numbers of best nodes to look at.
        clusters: kinds of words, each with one label per pair, such as [subjects, attractors, templates]; the pairs'
            own labels unless given. False discoveries use the first kind.
        ranking: as in `evaluate`.
        draws: of words; 1000 unless given, 20 of a learned mask.
        null_draws: of swapped answers, for `at_fdr`; 200 unless given, 10 of a learned mask; 0 leaves it out.
        null_pairs: pairs whose corrupt prompts change the word but not the answer, for the second null; "same_answer"
            makes them: each prompt beside another of the pairs' own, of other words and the same answer.
        basis: as in `attribute`, and so are `metric`, `positions` and `baseline`.
        batch_size: prompts in one pass.
        seed: of the draws; two calls with the same seed draw the same words.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        A `Stability`. Memory: 4 bytes per node and word. With several kinds of words all pairs are
        scored twice: for means and standard errors, and for the candidates of all draws. A metric that swapped answers
        do not turn into its negative is scored once more, with answers swapped.

    Raises:
        SettingsError: the method is "random", or sizes, draws or clusters do not fit.
        PairsError: no labels, or fewer than three of the first kind; and as `attribute`.

    Source: METHODS 5.10.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=32)
        >>> tnc.stability(model, pairs, sizes=[10], draws=100).frequency(10)["frequency"].is_monotonic_decreasing
        True
    """
    method = as_method(method)
    if isinstance(method, Random):
        raise SettingsError("expected scores of a method; random ones have no stability to measure.")
    learned = isinstance(method, LearnedMask)
    draws, null_draws = (
        default if given is None else given
        for given, default in ((draws, 20 if learned else 1000), (null_draws, 10 if learned else 200))
    )
    if draws < 2 or null_draws < 0 or not sizes or min(sizes) < 1:
        raise SettingsError(
            f"expected sizes of at least 1, at least 2 draws and no negative null_draws; got sizes={list(sizes)}, "
            f"draws={draws}, null_draws={null_draws}."
        )
    nodes_of = Neurons() if basis is None else basis
    scope = Scope(model, basis_sites(model, nodes_of), metric, baseline, "noising", positions, "keep")
    check_scope(scope, method, batch_size)
    tokens = tokenize(model, pairs)
    check_pairs(tokens, scope)
    words = _words(tokens, clusters)
    rank = ranking or method.ranking
    if rank == "abs" != method.ranking:
        raise SettingsError(f"scores of {method.name} are an order: leave ranking= out, or give 'signed'.")
    theirs = None
    if null_pairs is not None:
        theirs = _same_answer(tokens, words) if isinstance(null_pairs, str) else tokenize(model, null_pairs)
        check_pairs(theirs, scope)
    swapping = _swapping(scope, method, tokens)
    signs = null_draws if swapping in ("flips", "changes") else 0
    if learned:
        learn = lambda some: attribute(  # noqa: E731
            model, some, method=method, basis=basis, metric=metric, positions=positions, baseline=baseline,
            batch_size=batch_size, verbose=False,
        )  # fmt: skip
        scores, best, t, flips, counted, other = _from_masks(
            learn, tokens, theirs, words, max(sizes), draws, signs, seed, verbose
        )
        n_clusters, settings = len(set(words[0])), dict(scores.settings)
    else:
        settings = {
            "method": method.label, "method_options": method.to_json(), "positions": positions, "units": "keep",
            "baseline": baseline, "direction": "noising", "metric": metric_name(metric), "basis": basis_name(nodes_of),
            "batch_size": batch_size, **provenance(model, tokens),
        }  # fmt: skip
        if method.ranking != "abs":
            settings["ranking"] = method.ranking
        with current_processes().together("stability", settings):
            other = counted = None
            made = Cells(scope, method, tokens, words, batch_size, verbose)
            flat, n_clusters = made.total / len(tokens), len(made.counts)
            scores = require_finite(_as_scores(made.shape(settings, nodes_of), flat))
            deviation = standard_error(made.by_cluster, made.counts)
            best = _draw(made, flat, min(max(sizes), len(flat)), rank, draws, seed)
            t, live = statistic(flat, deviation)
            observed = t.abs()[live].sort(descending=True).values[:_TESTED]
            swapped = None
            if signs and swapping == "changes":
                anew = Cells(scope, method, swap_answers(tokens), words[:1], batch_size, verbose)
                swapped = anew.by_cluster[:, live]
            flips = flipped_counts(made.by_cluster[:, live], made.counts, observed, signs, seed + 1, swapped)
            if theirs is not None:
                null = Cells(scope, method, theirs, _words(theirs, None)[:1], batch_size, verbose)
                other = _same_nodes(null.total / len(theirs), flat)
                null_t, _ = statistic(other, standard_error(null.by_cluster, null.counts))
                counted = _count(null_t.abs()[live], observed)
    more = {
        "clusters": [list(kind) for kind in words],
        "n_clusters": n_clusters,
        "ranking": rank,
        "draws": draws,
        "seed": seed,
        **({} if swapping in ("flips", "changes") else {"no_sign_flips": swapping}),
    }
    ranked = sorted({min(size, len(scores.flat())) for size in sizes})
    return Stability(scores, tuple(ranked), best, t, flips, counted, other, settings | more)


def _from_masks(
    learn: Learn, tokens: TokenizedPairs, theirs: TokenizedPairs | None, words: Sequence[Sequence[str]], size: int,
    draws: int, null_draws: int, seed: int, shown: bool | None,
) -> tuple[NodeScores, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """A learned mask's scores, the best of each draw, t, and counts of both nulls with the second's scores."""
    scores = learn(tokens)
    flat, names = scores.flat().cpu(), list(zip(*words, strict=True))
    cells = list(dict.fromkeys(names))
    weights = draw_weights(cells, draws, seed)[:, [cells.index(name) for name in names]]
    found = learn_draws(learn, tokens, weights, size, shown)
    t, live = statistic(flat, found.deviation)
    observed = t.abs()[live].sort(descending=True).values[:_TESTED]
    count = lambda null: _count(statistic(null, found.deviation)[0].abs()[live], observed)  # noqa: E731
    rows = [count(null) for null in learned_nulls(learn, tokens, words[0], null_draws, seed + 1)]
    flips = torch.stack(rows) if rows else torch.zeros(0, len(observed))
    if theirs is None:
        return scores, found.best, t, flips, None, None
    other = _same_nodes(learn(theirs).flat().cpu(), flat)
    return scores, found.best, t, flips, count(other), other


def nodes_at_fdr(
    circuit: Circuit,
    rate: float,
    null: Null,
    found: Stability | None,
    model: TransformerLensModel | None,
    pairs: PromptPairs | TokenizedPairs | None,
) -> frozenset[str]:
    """Labels of the nodes that pass, of all that the circuit's nodes were chosen from.

    Raises:
        SettingsError: nothing to test with, or a test of other nodes.
    """
    basis, positions = circuit.settings["basis"], circuit.settings.get("positions", "keep")
    if found is None:
        pairs = pairs if pairs is not None or circuit.traced is None else circuit.traced.pairs
        asks_answers = circuit.settings["target"] == [metric_name(logit_difference)]
        if model is None or pairs is None or not asks_answers or positions != "keep":
            raise SettingsError(
                "expected a circuit of pairs, their answers as its target, with positions kept, and the model that was "
                "traced. Give model= and pairs= of a loaded circuit, else stability=tnc.stability(model, pairs, ...)."
            )
        more: dict[str, Any] = {"baseline": circuit.settings["baseline"], "null_draws": 200 * (null == "signs")}
        other = "same_answer" if null == "pairs" else None
        found = stability(model, pairs, sizes=[1], draws=2, null_pairs=other, basis=circuit.basis, **more)
    if found.settings["basis"] != basis or found.settings["positions"] != positions:
        raise SettingsError(
            f"expected stability of the circuit's nodes, basis {basis} with positions={positions!r}; got "
            f"{found.settings['basis']} with positions={found.settings['positions']!r}."
        )
    scores = found.at_fdr(rate, null=null)
    return frozenset(scores.top(len(scores))["label"])


def _same_nodes(null: Tensor, flat: Tensor) -> Tensor:
    if len(null) != len(flat):
        raise PairsError("expected null pairs of the same token length as the pairs.")
    return null


class Cells:
    """Scores summed over the pairs of each combination of words, one after the other."""

    def __init__(
        self,
        scope: Scope,
        method: Method,
        tokens: TokenizedPairs,
        words: Sequence[Sequence[str]],
        batch_size: int,
        shown: bool | None,
    ) -> None:
        self._scope, self._method, self._shown, self._size = scope, method, shown, batch_size
        self._groups = list(tokens.batches(len(tokens)))
        names = list(zip(*words, strict=True))
        self.names = list(dict.fromkeys(names))
        """The words of every cell."""
        self._member = [self.names.index(name) for name in names]
        self.kinds = len(words)
        self._means: Means | None = None
        if scope.baseline == "mean":
            self._means = mean_parts(scope.model, scope.sites, tokens.batches(batch_size))
        self._keys: list[tuple[str, str]] = []
        self._shapes: list[torch.Size] = []
        self.numbers = torch.bincount(torch.tensor(self._member), minlength=len(self.names)).double()
        """Pairs of each cell."""
        places = [[kind.index(word) for word in kind] for kind in zip(*self.names, strict=True)]
        sums: list[dict[int, Tensor]] = [{} for _ in places]
        for cell, x in self:
            for kind, place in zip(sums, places, strict=True):
                kind[place[cell]] = kind[place[cell]] + x if place[cell] in kind else x
        clusters = [torch.stack(list(kind.values())) for kind in sums]
        counts = [
            torch.stack([self.numbers[torch.tensor(place) == word].sum() for word in kind])
            for kind, place in zip(sums, places, strict=True)
        ]
        self.by_cluster, self.counts = clusters[0], counts[0]
        """Scores summed over the pairs of each word of the first kind, and how many pairs that is."""
        self.total = self.by_cluster.sum(0)
        squares = [standard_error(*kind).square() for kind in zip(clusters, counts, strict=True) if len(kind[0]) > 1]
        self.spread = torch.stack(squares).sum(0).sqrt()
        """Standard error of every node's mean over all kinds of words."""

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Every cell with its sums of all nodes."""
        bar = progress(range(len(self.names)), desc="stability", verbose=self._shown, unit="cell")
        for cell in bar:
            total: Tensor | None = None
            for batch in self._batches(cell):
                _, blocks = self._method.score(self._scope, batch, self._means, rows=ROWS * self._size, verbose=False)
                blocks = self._method.finish(blocks, 1)
                self._keys, self._shapes = list(blocks), [block.shape for block in blocks.values()]
                flat = torch.cat([block.reshape(-1).float().cpu() for block in blocks.values()])
                total = flat if total is None else total + flat
            if total is not None:
                yield cell, total

    def _batches(self, cell: int) -> Iterator[Batch]:
        for group in self._groups:
            rows = [row for row, index in enumerate(group.index.tolist()) if self._member[index] == cell]
            for start in range(0, len(rows), self._size):
                yield select(group, rows[start : start + self._size])

    def shape(self, settings: dict[str, Any], basis: Basis | Sequence[Basis]) -> NodeScores:
        """Scores of these nodes, all zero."""
        fields: dict[str, dict[str, Tensor]] = {name: {} for name in _FIELDS.values()}
        for (hook, kind), shape in zip(self._keys, self._shapes, strict=True):
            fields[_FIELDS[kind]][hook] = torch.zeros(shape)
        settings = settings | {"variance_unexplained": {}}
        return NodeScores(**fields, sites=site_labels(self._scope.sites), settings=settings, basis=basis)


def draw_weights(names: Sequence[tuple[str, ...]], draws: int, seed: int) -> Float[Tensor, "draw cell"]:
    """Product over the words of every cell of independent Poisson(1) weights; a word has one weight in a draw."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(draws, len(names))
    for kind in zip(*names, strict=True):
        known = {word: place for place, word in enumerate(dict.fromkeys(kind))}
        drawn = torch.poisson(torch.ones(draws, len(known)), generator=generator)
        weights *= drawn[:, [known[word] for word in kind]]
    return weights


def _draw(cells: Cells, mean: Tensor, size: int, ranking: str, draws: int, seed: int) -> Int[Tensor, "draw rank"]:
    """The best nodes of every draw, as indices of nodes; draws without any pair are left out."""
    key = mean.abs() if ranking == "abs" else mean
    last = (key - cells.spread).topk(size).values[-1]
    candidates = (key + _MARGIN * cells.spread >= last).nonzero()[:, 0]
    weights = draw_weights(cells.names, draws, seed)
    sums = torch.zeros(draws, len(candidates))
    one_kind = cells.kinds == 1  # then cells are clusters, and their sums are there
    for cell, x in enumerate(cells.by_cluster) if one_kind else cells:
        sums.addr_(weights[:, cell], x[candidates])
    pairs = weights @ cells.numbers.float()
    sums = sums[pairs > 0] / pairs[pairs > 0, None]
    return candidates[(sums.abs() if ranking == "abs" else sums).topk(size, dim=1).indices]


def standard_error(by_cluster: Float[Tensor, "cluster node"], counts: Tensor) -> Float[Tensor, " node"]:
    """Of the mean over pairs, from the deviations of whole clusters."""
    n, pairs = len(by_cluster), counts.sum()
    mean = by_cluster.sum(0, dtype=torch.float64) / pairs
    squares = torch.zeros_like(mean)
    for sums, count in zip(by_cluster, counts, strict=True):
        squares += (sums.double() - count * mean).square()
    return ((n / (n - 1) * squares).sqrt() / pairs).float()


def statistic(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """t = mean / (se + s0) of every node, s0 the median se of live nodes, and which nodes are live."""
    live = (mean != 0) | (deviation > 0)
    floor = deviation[live].median() if live.any() else deviation.new_ones(())
    return torch.where(live, mean / (deviation + floor).clamp(min=torch.finfo(mean.dtype).tiny), 0.0), live


def flipped_counts(
    by_cluster: Float[Tensor, "cluster live"],
    counts: Tensor,
    observed: Tensor,
    draws: int,
    seed: int,
    swapped: Float[Tensor, "cluster live"] | None = None,
) -> Float[Tensor, "null tested"]:
    """Null counts at every observed rank, one row per draw of a coin for each cluster: its scores, or those with
    swapped answers, which are their negative unless given.
    """
    generator = torch.Generator().manual_seed(seed)
    swapped = -by_cluster if swapped is None else swapped
    rows = []
    for _ in range(draws):
        own = torch.randint(2, (len(by_cluster), 1), generator=generator).bool()
        drawn = torch.where(own, by_cluster, swapped)
        null, _ = statistic(drawn.sum(0) / counts.sum().float(), standard_error(drawn, counts))
        rows.append(_count(null.abs(), observed))
    return torch.stack(rows) if rows else torch.zeros(0, len(observed))


def _swapping(scope: Scope, method: Method, tokens: TokenizedPairs) -> str:
    """What swapped answers do to scores: "flips" their sign, "changes" them; or why they say nothing.

    Measured by the metric on a few pairs.
    """
    if isinstance(method, ActivationDifference) or getattr(method, "loss", "metric") != "metric":
        return f"scores of {method.label} do not read the answers' signs"
    batch = next(tokens.batches(8))
    if batch.wrong_answer is None:
        return "these pairs have no wrong answers to swap"
    swapped = replace(batch, answer=batch.wrong_answer, wrong_answer=batch.answer)
    with torch.no_grad():
        logits = run_logits(scope.model, batch.clean, batch.attention_mask)
        one, other = (measure(scope.metric, logits, which) for which in (batch, swapped))
    least = 1e-4 * float(one.abs().max())
    if torch.allclose(one, other, rtol=1e-4, atol=least):
        return f"the metric {metric_name(scope.metric)} does not change with them"
    flips = torch.allclose(one, -other, rtol=1e-4, atol=least) and not isinstance(method, LearnedMask)
    return "flips" if flips else "changes"


def _same_answer(tokens: TokenizedPairs, words: Sequence[Sequence[str]]) -> TokenizedPairs:
    """Each clean prompt beside the next one with other words of the first kind, the same answers and the same length.

    Raises:
        PairsError: a prompt has no such partner.
    """
    n, wrong = len(tokens), tokens.wrong_answer
    keys = list(zip(tokens.lengths, tokens.answer.tolist(), [0] * n if wrong is None else wrong.tolist(), strict=True))
    partners = []
    for index in range(n):
        others = [(index + step) % n for step in range(1, n)]
        fitting = [other for other in others if keys[other] == keys[index] and words[0][other] != words[0][index]]
        if not fitting:
            raise PairsError(
                f"pair {index} has no partner of other words with its answers and length, so null_pairs='same_answer' "
                "cannot be made. Use more pairs, or give null pairs."
            )
        partners.append(fitting[0])
    return replace(
        tokens, corrupt=[tokens.clean[partner] for partner in partners], corrupt_position=tokens.position[partners]
    )


def _count(null: Tensor, observed: Tensor) -> Float[Tensor, " tested"]:
    """How many null statistics are at least as large as each observed one."""
    return (len(null) - torch.searchsorted(null.sort().values, observed)).float()


def jaccard(first: Int[Tensor, "draw size"], second: Int[Tensor, "draw size"]) -> np.ndarray:
    """|A and B| / |A or B| of two sets per draw."""
    together = torch.cat([first, second], 1).sort(1).values
    shared = (together[:, 1:] == together[:, :-1]).sum(1)
    return (shared / (together.shape[1] - shared)).numpy()


def _as_scores(like: NodeScores, flat: Tensor) -> NodeScores:
    """These numbers as scores of the same nodes."""
    fields: dict[str, dict[str, Tensor]] = {name: {} for name in _FIELDS.values()}
    start = 0
    for hook, kind, block in like.blocks():
        fields[_FIELDS[kind]][hook] = flat[start : start + block.numel()].reshape(block.shape).to(block.device)
        start += block.numel()
    return replace(like, **fields)


def _words(tokens: TokenizedPairs, clusters: Sequence[Sequence[str]] | None) -> list[list[str]]:
    if clusters is None and tokens.labels is None:
        raise PairsError(
            "expected pairs with labels, by which they are drawn together. Give labels=, or clusters=[one label per "
            "pair]."
        )
    words = [list(kind) for kind in (clusters if clusters is not None else [tokens.labels or ()])]
    wrong = [len(kind) for kind in words if len(kind) != len(tokens)]
    if wrong or not words:
        raise SettingsError(f"expected clusters of one label per pair, {len(tokens)} each; got {wrong or 'none'}.")
    if len(set(words[0])) < 3:
        raise PairsError(
            f"expected at least three words of the first kind to draw from; got {sorted(set(words[0]))}. Use more "
            "pairs."
        )
    return words
