"""CircuitLasso: every component regressed on those before it, with few of them; no intervention and no gradient.

    minimize over A:  ||H - A'H||_F^2 + penalty * ||A||_1,   A[i, j] free where i comes before j, else zero

H holds the activations of all sites, standardized. The known order replaces the search for one. An edge says that the
source predicts the target when all other earlier components are known; it is not a causal effect. Cost: one forward
pass per prompt, then a solve that does not depend on how many there were.
Source: Yin et al. 2026, arXiv 2606.16939 (no code is public; this is from the paper); METHODS 3.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from .._errors import SettingsError
from .._files import versions
from .._indices import as_count
from .._memory import available_memory
from .._options import Options
from .._processes import Processes, current_processes
from .._progress import progress
from .._typing import checked
from ..bases._site import Basis, basis_name
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._tokenized import Batch, TokenizedPairs
from ._edges import Fitted, Nodes, edge_keys, list_nodes, tables, weight_places
from ._lasso_circuit import LassoCircuit, lasso_circuit
from ._memory import gigabytes, require_memory
from ._observations import (
    Block,
    Columns,
    Components,
    Inputs,
    Noise,
    Observations,
    Observer,
    Readout,
    Regression,
    Regressors,
    Site,
    build_observer,
    build_regressions,
    check_prompts,
    gather_blocks,
    measure_size,
    observe_block,
    observe_samples,
    read_blocks,
    select_prompts,
    shared_start,
    target_blocks,
    tokenize_inputs,
    write_block,
)
from ._samples import SampledProblem, SampledStatistics, Samples
from ._solver import solve_group_lasso, solve_lasso
from ._statistics import Accumulator, Standardized, Statistics, standardize

logger = logging.getLogger(__name__)
Joint = Literal["joint", "pairs", "adjacent"]


@dataclass(frozen=True)
class Share(Options):
    """The penalty as a share of the smallest one that leaves no edge.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.8)).penalty
        Share(share=0.8)
    """

    name: ClassVar[str] = "share"
    share: float


@dataclass(frozen=True)
class MostEdges(Options):
    """The smallest penalty with at most `count` edges.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.lasso.CircuitLasso(penalty=tnc.lasso.MostEdges(50)).penalty
        MostEdges(count=50)
    """

    name: ClassVar[str] = "most_edges"
    count: int


@dataclass(frozen=True)
class HeldOut(Options):
    """The held-out error over `folds` folds of the blocks: the sparsest circuit within one standard error of the best.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.lasso.CircuitLasso().penalty
        HeldOut(folds=4)
    """

    name: ClassVar[str] = "held_out"
    folds: int = 4


Penalty = float | Share | MostEdges | HeldOut


@checked
@dataclass(frozen=True, kw_only=True)
class CircuitLasso:
    """Circuits by sparse regression.

    Args:
        penalty: the paper's lambda, for ||y - X b||^2 + lambda ||b||_1 over all observations; or `Share(.8)`,
            `MostEdges(50)`, `HeldOut()`.
        nodes: `Components()` of the model, or a basis (dictionary features, neurons).
        readout: the last node: logits of the pairs' answers ("answers"), the metric, all logits at all positions, none;
            by default "answers" for pairs and "logits" for prompts.
        regressors: positions at which sources are read, for a target at position t. "same": t alone, blind to what
            attention moves. "pooled": for targets that attend, also the mean over the positions they see. "earlier":
            each of these positions, which needs prompts of one length and multiplies the columns by it.
        joint: regress on all earlier sites jointly, on one site at a time ("pairs"), or on the nearest earlier stage.
        groups: penalize blocks from site to site as wholes (group lasso), where sites are vectors.
        shares: the path of penalties.
        blocks: how many blocks the prompts are dealt into, for held-out error and bootstrap.
        bootstrap: how many resamples of the blocks to measure the stability of edges with; 0 for none.
        skip_positions: positions at the start that are not observed; None skips the first where all prompts begin with
            the same token (BOS), whose activations dwarf all others.
        noise: for components: as the model runs, disturb every unit of every component by independent noise of this
            many of its standard deviations. Ours, not the paper's: components that are functions of one token predict
            each other exactly, so without noise nothing tells which of them the next one reads. 0 only observes.
        floor: standard deviations below this share of the largest count as this share.
        tolerance: relative duality gap of every target.
        seed: of the blocks and the bootstrap.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> lasso = tnc.lasso
        >>> layers = lasso.Components(attention="layers")
        >>> method = lasso.CircuitLasso(penalty=lasso.Share(0.8), nodes=layers, regressors="same")
        >>> found = method.fit(model, tnc.tasks.subject_verb_agreement("simple", n=16))
        >>> sorted(set(found.nodes["kind"])), len(found.edges) > 10
        (['component', 'embedding', 'logit'], True)
    """

    penalty: Penalty = HeldOut()
    nodes: Components | Basis | Sequence[Basis] = field(default=Components())
    readout: Readout | None = None
    regressors: Regressors = "pooled"
    joint: Joint = "joint"
    groups: bool = False
    shares: Sequence[float] = tuple(10 ** (-k / 5) for k in range(16))
    blocks: int = 8
    bootstrap: int = 0
    skip_positions: int | None = None
    noise: float = 0.0
    floor: float = 1e-4
    tolerance: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that the settings do not contradict each other."""
        value = self.penalty.share if isinstance(self.penalty, Share) else self.penalty
        if isinstance(value, float | int) and not 0 < value < float("inf"):
            raise SettingsError(f"expected a positive, finite penalty; got {self.penalty!r}.")
        if isinstance(self.penalty, HeldOut) and not 2 <= self.penalty.folds <= self.blocks:
            raise SettingsError(
                "the held-out error chooses the penalty: expected at least 2 folds and as many blocks; got "
                f"{self.penalty!r}, blocks={self.blocks}. Or give penalty=MostEdges(50)."
            )
        as_count(self.bootstrap, "bootstrap", 0)
        if isinstance(self.penalty, MostEdges):
            as_count(self.penalty.count, "count of most_edges", 0)
        if self.blocks < (2 if self.bootstrap else 1):
            raise SettingsError(f"expected at least one block, and two for a bootstrap; got blocks={self.blocks}.")
        if self.groups and self.joint != "joint":
            raise SettingsError("groups=True penalizes all earlier sites jointly; leave joint='joint'.")
        if self.noise < 0 or (self.noise and not isinstance(self.nodes, Components)):
            raise SettingsError(
                "expected noise of 0 or more, and none with a basis, whose nodes the model does not compute; got "
                f"noise={self.noise}, nodes={self.nodes!r}."
            )
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise SettingsError(f"expected shares between 0 and 1; got {list(self.shares)}.")

    @checked
    def fit(
        self,
        model: TransformerLensModel,
        inputs: Inputs,
        *,
        metric: Metric = logit_difference,
        batch_size: int = 32,
        prepend_bos: bool | None = None,
        resume: str | Path | None = None,
        verbose: bool | None = None,
    ) -> LassoCircuit:
        """Observe the model on `inputs` and solve: `solve(observe(...))`.

        Args:
            model: a HookedTransformer or TransformerBridge.
            inputs: prompts, tokens, or pairs, of which the clean prompts are used.
            metric: for readout="metric".
            batch_size: prompts in one forward pass.
            prepend_bos: None means the model's default.
            resume: a directory that keeps the statistics of finished blocks; a second call resumes from there.
            verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

        Raises:
            SettingsError: too few or too short prompts, or the settings do not fit them.
            UnsupportedModelError: a hook point is missing or did not fire.
            NumericalError: an activation is not finite, or a solve did not converge.
        """
        given = {"metric": metric, "batch_size": batch_size, "prepend_bos": prepend_bos}
        return self.solve(self.observe(model, inputs, **given, resume=resume, verbose=verbose), verbose=verbose)

    @holding
    @checked
    def observe(
        self,
        model: TransformerLensModel,
        inputs: Inputs,
        *,
        metric: Metric = logit_difference,
        batch_size: int = 32,
        prepend_bos: bool | None = None,
        resume: str | Path | None = None,
        verbose: bool | None = None,
    ) -> Observations:
        """The statistics alone; `+` joins those of several processes before `solve`. Arguments as in `fit`."""
        tokens = tokenize_inputs(model, inputs, prepend_bos)
        readout = self.readout or ("answers" if isinstance(inputs, PromptPairs | TokenizedPairs) else "logits")
        if readout in ("answers", "metric") and not isinstance(inputs, PromptPairs | TokenizedPairs):
            raise SettingsError(f"readout={readout!r} needs pairs with answers; got prompts. Use 'logits' or 'none'.")
        watch = build_observer(model, tokens, self.nodes, readout, metric)
        skip = shared_start(tokens) if self.skip_positions is None else self.skip_positions
        check_prompts(tokens, self.regressors, self.blocks, skip)
        parts = self.nodes if isinstance(self.nodes, Components) else Components()
        settings = {
            "method": "circuit_lasso",
            "model": model_name(model),
            "basis": "components" if isinstance(self.nodes, Components) else basis_name(self.nodes),
            "readout": readout,
            "metric": metric_name(metric),
            "answers": list(watch.answers),
            "n": len(tokens),
            "n_layers": int(model.cfg.n_layers),
            "skip_positions": skip,
            "pairs_hash": tokens.hash,
            "versions": versions(),
            "attention": parts.attention,
            "mlp": parts.mlp,
            **{name: getattr(self, name) for name in ("regressors", "blocks", "seed", "noise")},
        }
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(self.seed))
        dealt = [select_prompts(tokens, sorted(order[block :: self.blocks].tolist())) for block in range(self.blocks)]
        processes = current_processes()
        with processes.together("CircuitLasso.observe", settings):
            first = next(dealt[0].batches(1))
            how = self._fit_into_memory(watch, tokens, first, skip, resume, processes)
            joined, streamed = how == "joined", how == "streamed"
            if streamed:
                settings["streamed"] = True
            regressions = build_regressions(watch, first, self.regressors, skip, streamed)
            sources = regressions[0].sources
            every = sources if self.regressors != "pooled" else Columns(*(side.chunk(2)[0] for side in (
                sources.site, sources.unit, sources.slot)))  # fmt: skip
            targets = target_blocks(watch.sites, every) if streamed else []
            # the size of the noise is measured once, on the first prompts; draws start anew with every block, so that
            # a block is the same whichever process observes it, and when
            deviations = watch.deviations(next(dealt[0].batches(batch_size))) if self.noise else {}
            finished = {} if resume is None else read_blocks(Path(resume), settings)
            mine: dict[int, Block] = {}
            samples: list[tuple[Samples, ...]] = []
            sums = (Accumulator(), Accumulator())
            with progress(total=len(tokens), desc="observed prompts", verbose=verbose, unit="prompt") as bar:
                for block in processes.share(range(self.blocks)):
                    draws = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + block)
                    noise = Noise(self.noise, deviations, draws) if self.noise else None
                    batches = dealt[block].batches(batch_size)
                    if block in finished:
                        mine[block] = finished[block]
                    elif streamed:
                        samples.append(observe_samples(watch, batches, self.regressors, skip, noise, targets))
                    else:
                        mine[0 if joined else block] = observe_block(
                            watch, batches, self.regressors, skip, noise, sums if joined else None
                        )
                        if resume is not None:
                            write_block(Path(resume), block, mine[block], settings)
                    bar.update(len(dealt[block]))
            if streamed:
                return Observations(watch.sites, regressions, tuple(zip(*samples, strict=True)), settings)
            blocks = gather_blocks(processes, mine)
        return Observations(watch.sites, regressions, tuple(zip(*blocks, strict=True)), settings)

    def _fit_into_memory(
        self, watch: Observer, tokens: TokenizedPairs, first: Batch, skip: int, resume: str | Path | None,
        processes: Processes,
    ) -> Literal["apart", "joined", "streamed"]:  # fmt: skip
        """How blocks are kept: apart; joined as they come, where nothing asks for them; or as observations.

        Raises:
            SettingsError: none of these fits.
        """
        asked = {
            "held-out error (penalty=MostEdges(...) or Share(...))": isinstance(self.penalty, HeldOut),
            "bootstrap": self.bootstrap > 0,
            "resume": resume is not None,
            "second process": processes.count > 1,
        }
        reasons = [reason for reason, holds in asked.items() if holds]
        products = {"groups": self.groups, **{name: asked[name] for name in ("resume", "second process")}}
        no_stream = " or ".join(name for name, holds in products.items() if holds) or None
        size = measure_size(watch, tokens, first, self.regressors, skip, -(-self.blocks // processes.count))
        available = available_memory(watch.model)
        if available is None or size.bytes <= available:
            return "apart"
        one = replace(size, kept=1)
        if not reasons and one.bytes <= available:
            return "joined"
        if no_stream is None and size.streamed_bytes <= available:
            logger.warning(
                "CircuitLasso streams: products of %s sources with each other need %s, and %s are free. The %s "
                "observations are kept instead (%s), and targets solved from them block by block: the same circuit, "
                "in more time.", f"{size.sources:,}", gigabytes((size if reasons else one).bytes),
                gigabytes(available), f"{size.rows:,}", gigabytes(size.streamed_bytes),
            )  # fmt: skip
            return "streamed"
        heads = isinstance(self.nodes, Components) and self.nodes.attention == "heads"
        joins = " or ".join(reasons) or None
        require_memory(size if reasons else one, available, joins=joins, heads=heads, no_stream=no_stream)
        raise AssertionError("what does not fit was refused")

    def solve(self, observations: Observations, *, verbose: bool | None = None) -> LassoCircuit:
        """Choose the penalty and solve; the model is no longer needed.

        Penalties are alpha = penalty / (2 n) inside, which means the same for regressions of different n; a share is
        alpha over the smallest alpha that leaves no weight.

        Raises:
            SettingsError: every site is constant.
            NumericalError: a solve did not converge.
        """
        totals = observations.total()
        most = max(
            _smallest_empty(r, _standardize(s, self.floor))
            for r, s in zip(observations.regressions, totals, strict=True)
        )
        if not most > 0:
            raise SettingsError("nothing varies together: every site is constant on these prompts. Give more prompts.")
        scale = 2.0 * totals[0].n
        asked, count, errors = None, None, None
        if isinstance(self.penalty, MostEdges):
            count = self.penalty.count
        elif isinstance(self.penalty, Share):
            asked = self.penalty.share * most
        elif not isinstance(self.penalty, HeldOut):
            asked = self.penalty / scale
        path = {most, *(share * most for share in self.shares)} | (set() if asked is None else {asked})
        alphas = sorted((alpha for alpha in path if alpha >= (asked or 0.0)), reverse=True)
        if isinstance(self.penalty, HeldOut):
            errors = self._held_out_errors(observations, alphas, self.penalty.folds, verbose)
            asked = alphas[one_standard_error(errors)]

        nodes = list_nodes(observations.sites, observations.regressions)
        rows, chosen = [], None
        for alpha, fits in zip(alphas, self._fit_path(observations, alphas, verbose=verbose), strict=False):
            rows.append(_path_row(alpha, fits, most, scale, nodes))
            if alpha == asked or (count is not None and rows[-1]["n_edges"] <= count):
                chosen = (alpha, fits)
            elif count is not None:
                break
        assert chosen is not None  # the first penalty of a path leaves no edge
        alpha, fits = chosen
        if count is not None:
            alpha, fits = self._bisect(observations, alpha, fits, alphas, count, nodes, verbose)
            if alpha != chosen[0]:
                rows.append(_path_row(alpha, fits, most, scale, nodes))
                rows.sort(key=lambda row: -row["share"])
        table = pd.DataFrame(rows)
        if errors is not None:
            table["held_out_error"] = errors.mean(0).numpy()
            table["held_out_se"] = (errors.std(0) / len(errors) ** 0.5).numpy()
        node_rows, edges = tables(fits, nodes)
        edges["stability"] = self._stability(observations, alpha, nodes, edges, verbose)
        settings = {
            **observations.settings,
            "chosen_by": self.penalty.to_json() if isinstance(self.penalty, Options) else {"name": "penalty"},
            "group_lasso": self.groups,
            **{name: getattr(self, name) for name in ("joint", "bootstrap", "floor", "tolerance")},
            "penalty": scale * alpha,
            "share": alpha / most,
        }
        return lasso_circuit(node_rows, edges, table, settings)

    def _fit_path(
        self,
        observations: Observations,
        alphas: Sequence[float],
        times: Sequence[int] | None = None,
        starts: Sequence[Tensor] | None = None,
        verbose: bool | None = False,
    ) -> Iterator[list[Fitted]]:
        """Fits of all regressions, penalty by penalty in the order given, each from the last: give the largest first.

        `times` says how often each block counts.
        """
        totals = observations.total(times)
        problems = [_standardize(statistics, self.floor) for statistics in totals]
        last: list[Tensor | None] = [None] * len(problems) if starts is None else [*starts]
        for alpha in progress(alphas, desc="penalties", verbose=verbose):
            fits = []
            pairs = [*enumerate(zip(observations.regressions, problems, strict=True))]
            many = verbose if len(pairs) > 2 else False
            for k, (regression, problem) in progress(pairs, desc="blocks of targets", verbose=many):
                if isinstance(problem, SampledProblem):
                    weights, r2 = self._solve_sampled(observations.sites, regression, problem, alpha, last[k])
                else:
                    weights, r2 = self._solve_one(observations.sites, regression, problem, alpha, last[k], verbose)
                last[k] = weights
                fits.append(Fitted(regression, problem, totals[k], weights, r2))
            yield fits

    def _solve_sampled(
        self, sites: Sequence[Site], regression: Regression, problem: SampledProblem, alpha: float, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sparse weights and R2 of one block of targets: those that can have a weight at this penalty are solved."""
        live = problem.smallest_empty(regression.allowed) > alpha
        if start is not None:
            live |= torch.bincount(weight_places(start)[1], minlength=len(live)) > 0
        r2 = torch.where(problem.target_constant, torch.nan, torch.zeros_like(problem.squares))
        columns = live.nonzero().flatten()
        solved, places = r2.new_zeros(0), torch.zeros(2, 0, dtype=torch.long, device=r2.device)
        if len(columns):
            where = columns.cpu()
            side = regression.targets
            targets = Columns(*(column[where] for column in (side.site, side.unit, side.slot)))
            some = replace(regression, targets=targets, allowed=regression.allowed[:, where])
            begin = None if start is None else start.index_select(1, columns).to_dense()
            weights, r2[columns] = self._solve_one(sites, some, problem.with_cross(columns), alpha, begin, False)
            source, target = weight_places(weights)
            solved, places = weights[source, target], torch.stack([source, columns[target]])
        shape = (len(problem.gram), len(live))
        return torch.sparse_coo_tensor(places, solved, shape, check_invariants=False).coalesce(), r2

    def _solve_one(
        self, sites: Sequence[Site], regression: Regression, problem: Standardized, alpha: float, start: Tensor | None,
        verbose: bool | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Weights and R2 of one regression: by groups, jointly, or for every pair of sites."""
        device = problem.cross.device
        allowed, penalty = regression.allowed.to(device), 2 * problem.n * alpha
        if self.groups:
            groups, target_groups = (
                side.site.to(device).unique(return_inverse=True)[1] for side in (regression.sources, regression.targets)
            )
            given = {"allowed": allowed, "start": start, "tolerance": self.tolerance}
            solution = solve_group_lasso(problem, penalty, groups, target_groups, **given)
            return solution.weights, solution.r2
        if self.joint == "joint":
            given = {"allowed": allowed, "start": start, "tolerance": self.tolerance}
            solution = solve_lasso(problem, penalty, **given, verbose=verbose)
            return solution.weights, solution.r2
        weights = torch.zeros_like(problem.cross)
        r2 = torch.full_like(problem.squares, -torch.inf)
        for rows, columns in _site_pairs(sites, regression, adjacent=self.joint == "adjacent"):
            rows, columns = rows.to(device), columns.to(device)
            block = (rows[:, None], columns)
            part = replace(
                problem, gram=problem.gram[rows[:, None], rows], cross=problem.cross[block],
                squares=problem.squares[columns], scale=problem.scale[rows],
                target_scale=problem.target_scale[columns], constant=problem.constant[rows],
                target_constant=problem.target_constant[columns],
            )  # fmt: skip
            begin = None if start is None else start[block]
            solution = solve_lasso(part, penalty, allowed=allowed[block], start=begin, tolerance=self.tolerance)
            weights[block] = solution.weights
            r2[columns] = r2[columns].maximum(solution.r2)
        return weights, torch.where(torch.isinf(r2), torch.nan, r2)

    def _held_out_errors(
        self, observations: Observations, alphas: Sequence[float], folds: int, verbose: bool | None
    ) -> Float64[Tensor, "fold penalty"]:
        """Error on every fold's blocks of what was fitted to the others.

        Mean of (y - prediction)^2 in units of the target's variance on all blocks, over the targets of every
        regression, then over regressions: the readout counts as much as the rest.
        """
        n_blocks = len(observations.blocks[0])
        scales = [_standardize(total, self.floor).target_scale for total in observations.total()]
        rows = []
        for fold in progress(range(folds), desc="folds", verbose=verbose):
            held = [int(block % folds == fold) for block in range(n_blocks)]
            tests, errors = observations.total(held), []
            for fits in self._fit_path(observations, alphas, times=[1 - h for h in held], verbose=verbose):
                found: dict[bool, list[Tensor]] = {}
                for fit, test, scale in zip(fits, tests, scales, strict=True):
                    explicable = fit.regression.allowed.any(0).to(fit.weights.device) & ~fit.problem.target_constant
                    error = (_prediction_error(fit, test) / scale.square())[explicable]
                    found.setdefault(fit.regression.of_readout, []).append(error)
                joined = [torch.cat(parts) for parts in found.values()]
                means = [float(some.mean()) for some in joined if len(some)]
                errors.append(sum(means) / len(means))
            rows.append(errors)
        return torch.tensor(rows, dtype=torch.float64)

    def _bisect(
        self,
        observations: Observations,
        alpha: float,
        fits: list[Fitted],
        alphas: Sequence[float],
        count: int,
        nodes: Nodes,
        verbose: bool | None,
    ) -> tuple[float, list[Fitted]]:
        """The smallest penalty with at most `count` edges, between `alpha` and the next one of the path."""
        low = max((other for other in alphas if other < alpha), default=None)
        for _ in range(12):
            if low is None or len(edge_keys(fits, nodes)) == count:
                break
            middle = (low * alpha) ** 0.5
            (closer,) = self._fit_path(observations, [middle], starts=[fit.weights for fit in fits], verbose=verbose)
            if len(edge_keys(closer, nodes)) <= count:
                alpha, fits = middle, closer
            else:
                low = middle
        return alpha, fits

    def _stability(
        self, observations: Observations, alpha: float, nodes: Nodes, edges: pd.DataFrame, verbose: bool | None
    ) -> pd.Series:
        """Share of resamples of the blocks that have each edge."""
        if not self.bootstrap:
            return pd.Series(float("nan"), index=edges.index)
        generator = torch.Generator().manual_seed(self.seed)
        n_blocks = len(observations.blocks[0])
        place = {name: k for k, name in enumerate(nodes.names)}
        keys = [(place[s], place[t]) for s, t in zip(edges["source"], edges["target"], strict=True)]
        counts = torch.zeros(len(keys), dtype=torch.float64)
        for _ in progress(range(self.bootstrap), desc="resamples", verbose=verbose):
            draw = torch.randint(n_blocks, (n_blocks,), generator=generator)
            times = torch.bincount(draw, minlength=n_blocks).tolist()
            (fits,) = self._fit_path(observations, [alpha], times=times)
            present = edge_keys(fits, nodes)
            counts += torch.tensor([float(key in present) for key in keys], dtype=torch.float64)
        return pd.Series((counts / self.bootstrap).numpy(), index=edges.index)


def _path_row(alpha: float, fits: Sequence[Fitted], most: float, scale: float, nodes: Nodes) -> dict[str, float]:
    """The path's row of one penalty; `most` is the smallest alpha without an edge."""
    r2 = torch.cat([fit.r2[fit.regression.allowed.any(0).to(fit.r2.device)].cpu() for fit in fits])
    return {
        "penalty": scale * alpha,
        "share": alpha / most,
        "n_edges": len(edge_keys(fits, nodes)),
        "n_weights": sum(len(weight_places(fit.weights)[0]) for fit in fits),
        "r2": float(r2.nanmean()),
    }


def _standardize(statistics: Statistics | SampledStatistics, floor: float) -> Standardized | SampledProblem:
    """The lasso's problem, from products or from the observations themselves."""
    if isinstance(statistics, SampledStatistics):
        return SampledProblem(statistics, floor)
    return standardize(statistics, floor)


def _smallest_empty(regression: Regression, problem: Standardized | SampledProblem) -> float:
    """The alpha from which on the regression has no weight."""
    if isinstance(problem, SampledProblem):
        return float(problem.smallest_empty(regression.allowed).max())
    pull = (problem.cross * regression.allowed.to(problem.cross.device)).abs()
    return float(pull.max()) if pull.numel() else 0.0


def _site_pairs(sites: Sequence[Site], regression: Regression, adjacent: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns of source site and target site, for every pair of sites, or of the nearest earlier stage alone."""
    stages = [site.stage for site in sites] + [max(site.stage for site in sites) + 1]  # the readout comes last
    for target in regression.targets.site.unique().tolist():
        earlier = [s for s in regression.sources.site.unique().tolist() if stages[s] < stages[target]]
        nearest = max((stages[s] for s in earlier), default=0)
        for source in earlier:
            if not adjacent or stages[source] == nearest:
                rows = (regression.sources.site == source).nonzero().flatten()
                yield rows, (regression.targets.site == target).nonzero().flatten()


def _prediction_error(fit: Fitted, test: Statistics | SampledStatistics) -> Float64[Tensor, " target"]:
    """Mean squared error on the observations of `test`, in the targets' own units."""
    weights = fit.weights.to_dense() / fit.problem.scale[:, None] * fit.problem.target_scale
    if isinstance(test, SampledStatistics):
        return test.mean_squared_error(weights, fit.statistics.mean, fit.statistics.target_mean)
    squares = test.target_squares - 2 * (weights * test.target_products).sum(0)
    squares = squares + (weights * (test.products @ weights)).sum(0)
    shift = (test.target_mean - fit.statistics.target_mean) - (test.mean - fit.statistics.mean) @ weights
    return squares / test.n + shift.square()


def one_standard_error(errors: Float64[Tensor, "fold penalty"]) -> int:
    """The first penalty (they fall) whose mean error is within one standard error of the smallest.

    Source: Hastie, Tibshirani, Friedman 2009, 7.10.
    """
    mean = errors.mean(0)
    best = int(mean.argmin())
    spread = float(errors[:, best].std()) / len(errors) ** 0.5 if len(errors) > 1 else 0.0
    return int((mean <= mean[best] + spread).nonzero()[0])
