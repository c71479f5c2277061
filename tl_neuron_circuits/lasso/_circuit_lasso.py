"""CircuitLasso: every component regressed on those before it, with few of them; no intervention and no gradient.

    minimize over A:  ||H - A'H||_F^2 + penalty * ||A||_1,   A[i, j] free where i comes before j, else zero

H holds the activations of all sites, standardized. The known order replaces the search for one. An edge says that the
source predicts the target when all other earlier components are known; it is not a causal effect. Cost: one forward
pass per prompt, then a solve that does not depend on how many there were.
Source: Yin et al. 2026, arXiv 2606.16939 (no code is public; this is from the paper); METHODS 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from .._errors import SettingsError
from .._files import versions
from .._typing import checked
from ..bases._site import basis_name
from ..models._protocol import TransformerLensModel
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._provenance import model_name
from ..tasks._tokenized import TokenizedPairs
from ._edges import Nodes, edge_keys, edge_table, node_table, nodes_of
from ._lasso_circuit import LassoCircuit, lasso_circuit
from ._observations import (
    Inputs,
    Observations,
    Readout,
    Regressors,
    observe,
    observer,
    same_start,
    to_tokens,
)
from ._path import Fitted, Joint, Solving, fit_path, held_out_errors, one_standard_error, smallest_empty


@dataclass(frozen=True)
class Share:
    """The penalty as a share of the smallest one that leaves no edge.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.8)).penalty
        Share(share=0.8)
    """

    share: float


@dataclass(frozen=True)
class MostEdges:
    """The smallest penalty with at most so many edges.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.lasso.CircuitLasso(penalty=tnc.lasso.MostEdges(50)).penalty
        MostEdges(count=50)
    """

    count: int


@dataclass(frozen=True)
class HeldOut:
    """The held-out error over `folds` folds of the blocks: the sparsest circuit within one standard error of the best.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.lasso.CircuitLasso().penalty
        HeldOut(folds=4)
    """

    folds: int = 4


@dataclass(frozen=True)
class Components:
    """Nodes are the model's components: single heads or whole attention layers, whole MLPs or neurons in their place.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.lasso.CircuitLasso(nodes=tnc.lasso.Components(attention="layers")).nodes.mlp
        'outputs'
    """

    attention: Literal["heads", "layers"] = "heads"
    mlp: Literal["outputs", "neurons"] = "outputs"


Penalty = float | Share | MostEdges | HeldOut


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
        blocks: prompts are dealt into so many blocks, for held-out error and bootstrap.
        bootstrap: resamples of the blocks for the stability of edges; 0 leaves it out.
        skip_positions: positions at the start that are not observed; None skips the first where all prompts begin with
            the same token (BOS), whose activations dwarf all others.
        noise: for components: disturb every unit of every component, as the model runs, by independent noise of so many
            of its standard deviations. Ours, not the paper's: components that are functions of one token predict each
            other exactly, so without noise nothing tells which of them the next one reads. 0 observes alone.
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
    nodes: Any = Components()
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
                "the held-out error chooses the penalty: expected 2 folds at least and as many blocks; got "
                f"{self.penalty!r}, blocks={self.blocks}. Or give penalty=MostEdges(50)."
            )
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

    def fit(
        self,
        model: TransformerLensModel,
        inputs: Inputs,
        *,
        metric: Metric = logit_difference,
        batch_size: int = 32,
        prepend_bos: bool | None = None,
        resume: str | Path | None = None,
        verbose: bool = False,
    ) -> LassoCircuit:
        """Observe the model on `inputs` and solve: `solve(observe(...))`.

        Args:
            model: a HookedTransformer or TransformerBridge.
            inputs: prompts, tokens, or pairs, of which the clean prompts are used.
            metric: for readout="metric".
            batch_size: prompts in one forward pass.
            prepend_bos: None means the model's default.
            resume: a directory that keeps the statistics of finished blocks; a second call resumes from there.
            verbose: show progress.

        Raises:
            SettingsError: too few or too short prompts, or what the settings ask for is not there.
            UnsupportedModelError: a hook point is missing or did not fire.
            NumericalError: an activation is not finite, or a solve did not converge.
        """
        given = {"metric": metric, "batch_size": batch_size, "prepend_bos": prepend_bos}
        return self.solve(self.observe(model, inputs, **given, resume=resume, verbose=verbose), verbose=verbose)

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
        verbose: bool = False,
    ) -> Observations:
        """The statistics alone; `+` joins those of several processes before `solve`. Arguments as of `fit`."""
        tokens = to_tokens(model, inputs, prepend_bos)
        readout = self.readout or ("answers" if isinstance(inputs, PromptPairs | TokenizedPairs) else "logits")
        if readout in ("answers", "metric") and not isinstance(inputs, PromptPairs | TokenizedPairs):
            raise SettingsError(f"readout={readout!r} needs pairs with answers; got prompts. Use 'logits' or 'none'.")
        parts = self.nodes if isinstance(self.nodes, Components) else Components()
        watch = observer(
            model,
            tokens,
            basis=None if isinstance(self.nodes, Components) else self.nodes,
            attention=parts.attention,
            mlp=parts.mlp,
            readout=readout,
            metric=metric,
        )
        skip = same_start(tokens) if self.skip_positions is None else self.skip_positions
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
        return observe(
            watch,
            tokens,
            regressors=self.regressors,
            n_blocks=self.blocks,
            skip=skip,
            batch_size=batch_size,
            seed=self.seed,
            settings=settings,
            noise=self.noise,
            resume=resume,
            verbose=verbose,
        )

    def solve(self, observations: Observations, *, verbose: bool = False) -> LassoCircuit:
        """Choose the penalty and solve; nothing of the model is needed any more."""
        solving = Solving(self.joint, self.groups, self.floor, self.tolerance)
        most = smallest_empty(observations, solving)
        if not most > 0:
            raise SettingsError("nothing varies together: every site is constant on these prompts. Give more prompts.")
        scale = 2.0 * observations.total()[0].n
        alphas = self._alphas(most, scale)
        errors, wanted, count = None, None, None
        if isinstance(self.penalty, HeldOut):
            errors = held_out_errors(observations, alphas, solving, self.penalty.folds, verbose)
            wanted = alphas[one_standard_error(errors)]
        elif isinstance(self.penalty, MostEdges):
            count = self.penalty.count
        else:
            wanted = self._asked(most, scale)
        rows, chosen, nodes = [], None, None
        for alpha, fits in zip(alphas, fit_path(observations, alphas, solving, verbose=verbose), strict=False):
            nodes = nodes or nodes_of(observations.sites, fits)
            n_edges = len(edge_keys(observations.sites, fits, nodes))
            rows.append(_path_row(alpha, most, scale, fits, n_edges))
            if alpha == wanted or (count is not None and n_edges <= count):
                chosen = (alpha, fits)
            elif count is not None:
                break
        assert chosen is not None and nodes is not None  # the first penalty of a path leaves no edge
        if count is not None:
            chosen = _nearest(observations, chosen, alphas, count, solving, nodes)
        path = pd.DataFrame(rows)
        if errors is not None:
            path["held_out_error"] = errors.mean(0).numpy()
            path["held_out_se"] = (errors.std(0) / len(errors) ** 0.5).numpy()
        edges = edge_table(observations.sites, chosen[1], nodes)
        edges["stability"] = self._stability(observations, chosen[0], solving, nodes, edges)
        settings = {**observations.settings, **self._plain(), "penalty": scale * chosen[0], "share": chosen[0] / most}
        return lasso_circuit(node_table(observations.sites, nodes, chosen[1]), edges, path, settings)

    def _asked(self, most: float, scale: float) -> float | None:
        """The penalty that is asked for by its value, on the solver's scale."""
        if isinstance(self.penalty, Share):
            return self.penalty.share * most
        return None if isinstance(self.penalty, MostEdges | HeldOut) else self.penalty / scale

    def _alphas(self, most: float, scale: float) -> list[float]:
        """The path, from nothing on to the penalty that is asked for, or to the end."""
        asked = self._asked(most, scale)
        path = {most, *(share * most for share in self.shares), *([] if asked is None else [asked])}
        return sorted((alpha for alpha in path if alpha >= (asked or 0.0)), reverse=True)

    def _stability(
        self, observations: Observations, alpha: float, solving: Solving, nodes: Nodes, edges: pd.DataFrame
    ) -> pd.Series:
        """Share of resamples of the blocks that have each edge."""
        if not self.bootstrap:
            return pd.Series(float("nan"), index=edges.index)
        generator = torch.Generator().manual_seed(self.seed)
        n_blocks = len(observations.blocks[0])
        index = {name: k for k, name in enumerate(nodes.names)}
        keys = [(index[s], index[t]) for s, t in zip(edges["source"], edges["target"], strict=True)]
        seen = torch.zeros(len(keys), dtype=torch.float64)
        for _ in range(self.bootstrap):
            draw = torch.randint(n_blocks, (n_blocks,), generator=generator)
            times = torch.bincount(draw, minlength=n_blocks).tolist()
            (fits,) = fit_path(observations, [alpha], solving, times=times)
            there = edge_keys(observations.sites, fits, nodes)
            seen += torch.tensor([float(key in there) for key in keys], dtype=torch.float64)
        return pd.Series((seen / self.bootstrap).numpy(), index=edges.index)

    def _plain(self) -> dict[str, Any]:
        chosen_by = self.penalty if isinstance(self.penalty, Share | MostEdges | HeldOut) else "penalty"
        names = ("joint", "bootstrap", "floor", "tolerance")
        return {
            "chosen_by": repr(chosen_by),
            "group_lasso": self.groups,
            **{name: getattr(self, name) for name in names},
        }


def _path_row(alpha: float, most: float, scale: float, fits: Sequence[Fitted], n_edges: int) -> dict[str, float]:
    """One penalty: how many edges and weights it leaves, and the mean R2 of targets that have a source."""
    r2 = torch.cat([fit.r2[fit.regression.allowed.any(0).to(fit.r2.device)].cpu() for fit in fits])
    return {
        "penalty": scale * alpha,
        "share": alpha / most,
        "n_edges": n_edges,
        "n_weights": sum(int(fit.weights.count_nonzero()) for fit in fits),
        "r2": float(r2.nanmean()),
    }


def _nearest(
    observations: Observations,
    chosen: tuple[float, list[Fitted]],
    alphas: Sequence[float],
    n_edges: int,
    solving: Solving,
    nodes: Nodes,
) -> tuple[float, list[Fitted]]:
    """The smallest penalty with at most `n_edges`, by bisection between two of the path."""
    smaller = [alpha for alpha in alphas if alpha < chosen[0]]
    low = max(smaller, default=None)
    for _ in range(12):
        if low is None or len(edge_keys(observations.sites, chosen[1], nodes)) == n_edges:
            break
        middle = (low * chosen[0]) ** 0.5
        starts = [fit.weights for fit in chosen[1]]
        (fits,) = fit_path(observations, [middle], solving, starts=starts)
        if len(edge_keys(observations.sites, fits, nodes)) <= n_edges:
            chosen = (middle, fits)
        else:
            low = middle
    return chosen
