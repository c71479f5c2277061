"""CircuitLasso: every component regressed on those before it, with few of them; no intervention and no gradient.

    minimize over A:  ||H - A'H||_F^2 + penalty * ||A||_1,   A[i, j] free where i comes before j, else zero

H holds the activations of all sites, standardized. The known order replaces the search for one. An edge says that the
source predicts the target when all other earlier components are known; it is no causal effect. Cost: one forward pass
a prompt, then a solve that does not depend on how many there were.
Source: Yin et al. 2026, arXiv 2606.16939 (no code is public; this is from the paper); METHODS 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from .._errors import SettingsError
from .._files import versions
from .._typing import checked
from ..bases._site import name_of
from ..models._protocol import TransformerLensModel
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._tokenized import TokenizedPairs
from ._edges import Nodes, edge_keys, edge_table, node_table, nodes_of
from ._inputs import Inputs, same_start, to_tokens
from ._lasso_circuit import LassoCircuit, lasso_circuit
from ._observations import Observations, Regressors, observe
from ._selection import Fitted, Joint, Solving, fit_path, held_out_errors, one_standard_error, smallest_empty
from ._sites import Readout, observer


@dataclass(frozen=True, kw_only=True)
class CircuitLasso:
    """Circuits by sparse regression.

    Args:
        penalty: the paper's lambda, for ||y - X b||^2 + lambda ||b||_1 over all observations.
        share: the penalty as a share of the smallest one that leaves no edge.
        n_edges: the smallest penalty with at most so many edges. At most one of the three; without any, the held-out
            error chooses: the sparsest circuit within one standard error of the best.
        basis: nodes of a basis (dictionary features, neurons) instead of the model's components.
        attention: components: single heads, or whole attention layers.
        mlp: components: whole MLPs, or single neurons in their place.
        readout: the last node: logits of the pairs' answers ("answers"), the metric, all logits at all positions, none;
            by default "answers" for pairs and "logits" for prompts.
        regressors: positions at which sources are read, for a target at position t. "same": t alone, blind to what
            attention moves. "pooled": for targets that attend, also the mean over the positions they see. "earlier":
            each of these positions, which needs prompts of one length and multiplies the columns by it.
        joint: regress on all earlier sites jointly, on one site at a time ("pairs"), or on the nearest earlier stage.
        groups: penalize blocks from site to site as wholes (group lasso), where sites are vectors.
        shares: the path of penalties.
        blocks: prompts are dealt into so many blocks, for held-out error and bootstrap.
        folds: of the held-out error, where it chooses the penalty.
        bootstrap: resamples of the blocks for the stability of edges; 0 leaves it out.
        skip_positions: positions at the start that are not observed; None skips the first where all prompts begin with
            the same token (BOS), whose activations dwarf all others.
        noise: components: disturb every unit of every component, as the model runs, by independent noise of so many of
            its standard deviations. Ours, not the paper's: components that are functions of one token predict each
            other exactly, so without noise nothing tells which of them the next one reads. 0 observes alone.
        floor: standard deviations below this share of the largest count as this share.
        tolerance: relative duality gap of every target.
        seed: of the blocks and the bootstrap.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> method = tnc.lasso.CircuitLasso(share=0.8, attention="layers", regressors="same")
        >>> found = method.fit(model, tnc.tasks.subject_verb_agreement("simple", n=16))
        >>> sorted(set(found.nodes["kind"])), len(found.edges) > 10
        (['component', 'embedding', 'logit'], True)
    """

    penalty: float | None = None
    share: float | None = None
    n_edges: int | None = None
    basis: Any = None
    attention: Literal["heads", "layers"] = "heads"
    mlp: Literal["outputs", "neurons"] = "outputs"
    readout: Readout | None = None
    regressors: Regressors = "pooled"
    joint: Joint = "joint"
    groups: bool = False
    shares: Sequence[float] = tuple(10 ** (-k / 5) for k in range(16))
    blocks: int = 8
    folds: int = 4
    bootstrap: int = 0
    skip_positions: int | None = None
    noise: float = 0.0
    floor: float = 1e-4
    tolerance: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that the settings do not contradict each other."""
        chosen = [name for name in ("penalty", "share", "n_edges") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise SettingsError(f"expected one of penalty, share and n_edges at most; got {chosen}.")
        if not chosen and not 2 <= self.folds <= self.blocks:
            raise SettingsError(
                f"the held-out error chooses the penalty: expected 2 folds at least and as many blocks; got folds="
                f"{self.folds}, blocks={self.blocks}. Or give n_edges=."
            )
        if self.blocks < (2 if self.bootstrap else 1):
            raise SettingsError(f"expected at least one block, and two for a bootstrap; got blocks={self.blocks}.")
        if self.groups and self.joint != "joint":
            raise SettingsError("groups=True penalizes all earlier sites jointly; leave joint='joint'.")
        if self.noise < 0 or (self.noise and self.basis is not None):
            raise SettingsError(
                f"expected noise of 0 or more, and none with a basis, whose nodes the model does not compute; got "
                f"noise={self.noise}, basis={self.basis!r}."
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
            resume: a directory that keeps the statistics of finished blocks; a second call goes on from there.
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
        watch = observer(
            model,
            tokens,
            basis=self.basis,
            attention=self.attention,
            mlp=self.mlp,
            readout=readout,
            metric=metric,
        )
        skip = same_start(tokens) if self.skip_positions is None else self.skip_positions
        settings = {
            "method": "circuit_lasso",
            "model": str(getattr(model.cfg, "model_name", "unknown")),
            "basis": "components" if self.basis is None else name_of(self.basis),
            "readout": readout,
            "metric": metric_name(metric),
            "answers": list(watch.answers),
            "n": len(tokens),
            "n_layers": int(model.cfg.n_layers),
            "skip_positions": skip,
            "pairs_hash": tokens.hash,
            "versions": versions(),
            **{name: getattr(self, name) for name in ("regressors", "attention", "mlp", "blocks", "seed", "noise")},
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
        free = self.penalty is None and self.share is None and self.n_edges is None
        errors = held_out_errors(observations, alphas, solving, self.folds, verbose) if free else None
        wanted = self._wanted(alphas, most, scale, errors)
        rows, chosen, nodes = [], None, None
        for alpha, fits in zip(alphas, fit_path(observations, alphas, solving, verbose=verbose), strict=False):
            nodes = nodes or nodes_of(observations.sites, fits)
            n_edges = len(edge_keys(observations.sites, fits, nodes))
            rows.append(_path_row(alpha, most, scale, fits, n_edges))
            if alpha == wanted or (self.n_edges is not None and n_edges <= self.n_edges):
                chosen = (alpha, fits)
            elif self.n_edges is not None:
                break
        assert chosen is not None and nodes is not None  # the first penalty of a path leaves no edge
        if self.n_edges is not None:
            chosen = _nearest(observations, chosen, alphas, self.n_edges, solving, nodes)
        path = pd.DataFrame(rows)
        if errors is not None:
            path["held_out_error"] = errors.mean(0).numpy()
            path["held_out_se"] = (errors.std(0) / len(errors) ** 0.5).numpy()
        edges = edge_table(observations.sites, chosen[1], nodes)
        edges["stability"] = self._stability(observations, chosen[0], solving, nodes, edges)
        settings = {**observations.settings, **self._plain(), "penalty": scale * chosen[0], "share": chosen[0] / most}
        return lasso_circuit(node_table(observations.sites, nodes, chosen[1]), edges, path, settings)

    def _alphas(self, most: float, scale: float) -> list[float]:
        """The path, from nothing on to the penalty that is asked for, or to the end."""
        asked = {"penalty": (self.penalty or 0) / scale, "share": (self.share or 0) * most}
        given = [value for name, value in asked.items() if getattr(self, name) is not None]
        if any(not 0 < value < float("inf") for value in given):
            raise SettingsError(f"expected a positive penalty; got penalty={self.penalty}, share={self.share}.")
        path = {most, *(share * most for share in self.shares), *given}
        return sorted((alpha for alpha in path if alpha >= max(given, default=0.0)), reverse=True)

    def _wanted(self, alphas: list[float], most: float, scale: float, errors: Tensor | None) -> float | None:
        if self.penalty is not None:
            return self.penalty / scale
        if self.share is not None:
            return self.share * most
        return None if self.n_edges is not None or errors is None else alphas[one_standard_error(errors)]

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
        names = ("n_edges", "joint", "folds", "bootstrap", "floor", "tolerance")
        return {"group_lasso": self.groups, **{name: getattr(self, name) for name in names}}


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
