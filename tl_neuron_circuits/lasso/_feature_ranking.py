"""Label nodes: which features of a model predict a label of its prompts.

    features z of a prompt: mean (or largest) activation over its positions;   A = lasso of the label on z, standardized
    ranking over the data: |A|;   for one prompt: |A| x |z|

The label is the last node of the order, so everything may explain it. Logistic loss for classes (`solve_labels`),
squared error for numbers (`solve_lasso`). Among features that say the same the lasso takes one: a low rank does
not mean that a feature knows less.
Source: Yin et al. 2026; METHODS 3.1 (label node, prompt-level scores).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .. import _html
from .._errors import NumericalError, SettingsError
from .._progress import show_batches
from .._typing import checked
from ..bases._runs import list_reads, run_values
from ..bases._site import Basis, basis_sites
from ..explain._prompt_scores import PromptScores
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ..nodes._scores import label as node_label
from ._observations import Inputs, shared_start, tokenize_inputs
from ._solver import check_penalty, fista, largest_eigenvalue, largest_penalty, solve_lasso
from ._statistics import Statistics, standardize

Pool = Literal["mean", "max", "last"]
Loss = Literal["logistic", "squared"]


@dataclass(frozen=True, eq=False, repr=False)
class PooledFeatures:
    """`values[i, k]`: node k of a basis on prompt i, pooled over positions; float32 on the CPU.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> basis = tnc.bases.Neurons(layers=[0])
        >>> tnc.lasso.pooled_features(tnc.load_demo_model(), ["The dogs are old."], basis).values.shape[0]
        1
    """

    values: Float[Tensor, "prompt node"]
    nodes: pd.DataFrame
    """Columns label, hook, layer, unit."""
    keys: tuple[str, ...]
    pool: Pool

    def __repr__(self) -> str:
        return f"PooledFeatures({len(self.values):,} prompts, {len(self.nodes):,} nodes)"


@holding
@checked
def pooled_features(
    model: TransformerLensModel,
    inputs: Inputs,
    basis: Basis | Sequence[Basis],
    *,
    pool: Pool = "mean",
    skip_positions: int | None = None,
    batch_size: int = 32,
    prepend_bos: bool | None = None,
    verbose: bool | None = None,
) -> PooledFeatures:
    """Every node of a basis on every prompt, as one number.

    Args:
        model: a HookedTransformer or TransformerBridge.
        inputs: prompts, tokens or pairs.
        basis: dictionaries, neurons, or several bases.
        pool: mean or largest over the positions, or the last position alone.
        skip_positions: positions at the start that are left out; None leaves out a first token that all share.
        batch_size: prompts in one forward pass.
        prepend_bos: None means the model's default.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Raises:
        SettingsError: no prompts, or one of them is skipped whole.
        UnsupportedModelError: a hook point did not fire.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> basis = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae")[:1])
        >>> tnc.lasso.pooled_features(tnc.load_demo_model(), ["The dogs are old."], basis)
        PooledFeatures(1 prompts, 768 nodes)
    """
    tokens = tokenize_inputs(model, inputs, prepend_bos)
    skip = shared_start(tokens) if skip_positions is None else skip_positions
    if skip >= min(tokens.lengths):
        raise SettingsError(f"skip_positions={skip} leaves nothing of a prompt of {min(tokens.lengths)} tokens.")
    sites = basis_sites(model, basis)
    rows, widths = [torch.empty(0)] * len(tokens), []
    for batch in show_batches(tokens.batches(batch_size), len(tokens), desc="features", verbose=verbose):
        values = run_values(model, batch, list_reads(sites))
        parts = [_pool(site.take_apart(values).nodes[:, skip:], pool).float().cpu() for site in sites]
        widths = [part.shape[1] for part in parts]
        for row, pooled in zip(batch.index.tolist(), torch.cat(parts, 1), strict=True):
            rows[row] = pooled
    nodes = pd.DataFrame(
        [
            (node_label(site.layer, site.letter, unit, -1, "node"), site.hook, site.layer, unit)
            for site, width in zip(sites, widths, strict=True)
            for unit in range(width)
        ],
        columns=["label", "hook", "layer", "unit"],
    )
    keys = tuple(" ".join(map(str, prompt.tolist())) for prompt in tokens.clean)
    return PooledFeatures(torch.stack(rows), nodes, keys, pool)


def _pool(nodes: Tensor, pool: Pool) -> Tensor:
    if pool == "mean":
        return nodes.mean(1)
    return nodes.amax(1) if pool == "max" else nodes[:, -1]


@dataclass(frozen=True, eq=False, repr=False)
class FeatureRanking:
    """Features with a weight for a label, strongest first.

    `features`: label (the node), hook, layer, unit, weight (of the feature in standard deviations; log odds, or
    standard deviations of the label), raw_weight (of the activation itself), share (of prompts it is active on).
    `n_silent` features never differ from prompt to prompt, and have none.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> basis = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae")[-1:])
        >>> texts = ["The dogs are old.", "The cats are here.", "The dog is old.", "The cat is here."]
        >>> pooled = tnc.lasso.pooled_features(tnc.load_demo_model(), texts, basis)
        >>> ranking = tnc.lasso.rank_features(pooled, [1, 1, 0, 0], n_features=3)
        >>> ranking.prompt_scores(pooled).values.shape == (4, len(ranking))
        True
    """

    features: pd.DataFrame
    penalty: float
    loss: Loss
    pool: Pool
    n_candidates: int
    n_silent: int

    def __len__(self) -> int:
        """How many features have a weight."""
        return len(self.features)

    def to_dataframe(self) -> pd.DataFrame:
        """The features, strongest first."""
        return self.features

    @checked
    def top(self, k: int) -> pd.DataFrame:
        """The `k` features with the largest |weight|."""
        return self.features.head(k)

    def prompt_scores(self, pooled: PooledFeatures) -> PromptScores:
        """|A| x |z| of the ranked features on other prompts: one column per feature, strongest over the data first.

        Raises:
            SettingsError: the features are of other hook points.

        Source: METHODS 3.1 (s = |A| x |z|), with A per unit of activation so that columns compare.
        """
        places = {label: k for k, label in enumerate(pooled.nodes["label"])}
        missing = [label for label in self.features["label"] if label not in places]
        if missing:
            raise SettingsError(f"expected the nodes that were ranked; {missing[:3]} are not among these features.")
        columns = [places[label] for label in self.features["label"]]
        weight = torch.tensor(self.features["raw_weight"].abs().to_numpy(), dtype=torch.float32)
        nodes = self.features[["label", "hook", "unit"]].assign(position=-1, polarity=0)
        scores = pooled.values[:, columns].abs() * weight
        return PromptScores(scores, nodes, pooled.keys, None, f"|weight| x |activation|, {self.loss}")

    def __repr__(self) -> str:
        best = ", ".join(self.features["label"].head(3))
        return (
            f"FeatureRanking({len(self)} of {self.n_candidates:,} features, {self.n_silent:,} silent, {self.loss}, "
            f"penalty {self.penalty:.4g}: {best}{', ...' if len(self) > 3 else ''})"
        )

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.features, bars=("weight",)))


@checked
def rank_features(
    pooled: PooledFeatures,
    labels: Sequence[int] | Sequence[float],
    *,
    n_features: int = 20,
    penalty: float | None = None,
    loss: Loss = "logistic",
    without: Sequence[str] = (),
) -> FeatureRanking:
    """Regress a label on few features of the same prompts.

    Args:
        pooled: from `pooled_features`.
        labels: one per prompt: 0 and 1 (logistic), or numbers (squared).
        n_features: without a penalty: the largest (on a path of 11, each .6 of the last) that gives this
            many features a weight; fewer where no penalty of the path gives that many.
        penalty: the paper's lambda.
        loss: "logistic" for two classes, "squared" for numbers.
        without: nodes that may not be used, such as those of an earlier ranking: others may say the same.

    Raises:
        SettingsError: labels do not fit the prompts, are all the same, or no feature ever differs.
        NumericalError: a feature is not finite, or the regression did not converge.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> basis = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("sae")[-1:])
        >>> texts = ["The dogs are old.", "The cats are here.", "The dog is old.", "The cat is here."]
        >>> pooled = tnc.lasso.pooled_features(tnc.load_demo_model(), texts, basis)
        >>> len(tnc.lasso.rank_features(pooled, [1, 1, 0, 0], n_features=3)) >= 1
        True
    """
    if len(labels) != len(pooled.values):
        raise SettingsError(f"expected one label per prompt; got {len(labels)} for {len(pooled.values)} prompts.")
    if len(set(labels)) < 2:
        raise SettingsError(f"all labels are {labels[0]!r}, so there is nothing to tell apart.")
    if n_features < 1:
        raise SettingsError(f"expected n_features of at least 1; got {n_features}.")
    y = torch.tensor(np.asarray(labels, dtype=float))[:, None]
    varies = (pooled.values != pooled.values[:1]).any(0)
    silent = int((~varies).sum())
    live = (varies & torch.tensor(~pooled.nodes["label"].isin(list(without)).to_numpy())).nonzero().flatten()
    if len(live) == 0:
        raise SettingsError(
            f"none of the {len(pooled.nodes):,} features differs between these prompts: they never fire, or always "
            "fire alike. Give other prompts, or another dictionary."
        )
    x = pooled.values[:, live].double()
    squared = standardize(Statistics.from_rows(x, y))
    largest = largest_penalty(squared)
    if loss == "logistic":  # the gradient where only the intercept is fitted: in the label's own units, without the 2
        largest = float((squared.cross * squared.target_scale).abs().max()) * len(x)
    path = [penalty] if penalty is not None else [largest * 0.6**k for k in range(1, 12)]
    weights, used, solution = torch.zeros(x.shape[1], 1, dtype=torch.float64), path[0], None
    for used in path:
        if loss == "squared":
            weights = solve_lasso(squared, used, start=weights).weights
        else:
            solution = solve_labels(x, y, used, tolerance=1e-4, start=solution)
            weights = solution.weights
        if int((weights != 0).sum()) >= n_features:
            break
    weights = weights[:, 0]
    order = weights.abs().argsort(descending=True, stable=True)
    order = order[weights[order] != 0]
    rows = pooled.nodes.iloc[live[order].tolist()].reset_index(drop=True)
    rows = rows.assign(
        weight=weights[order].numpy(),
        raw_weight=(weights / squared.scale)[order].numpy(),
        share=(pooled.values[:, live[order]] != 0).double().mean(0).numpy(),
    )
    return FeatureRanking(rows, used, loss, pooled.pool, len(pooled.nodes), silent)


# --- Label nodes: which features tell a class, by logistic regression with a lasso penalty ---
#     minimize over b, intercept:  sum of log(1 + exp(z)) - y z + penalty * ||b||_1 over observations,
#     z = X b + intercept
#
# scikit-learn's `LogisticRegression(penalty="l1", C=1 / penalty)`, the intercept free. Several labels are several
# independent regressions (one against the rest). A squared-error label is `solve_lasso` with the labels as targets.
# Source: METHODS 3.1 (label node).


@dataclass(frozen=True, eq=False)
class LabelSolution:
    """Weights of standardized features for each label, the intercepts, and duality gaps over the intercept's loss."""

    weights: Float64[Tensor, "source label"]
    intercept: Float64[Tensor, " label"]
    gap: Float64[Tensor, " label"]


def solve_labels(
    x: Float[Tensor, "n source"],
    y: Float[Tensor, "n label"],
    penalty: float,
    *,
    floor: float = 1e-4,
    tolerance: float = 1e-8,
    max_steps: int = 20_000,
    start: LabelSolution | None = None,
) -> LabelSolution:
    """Fit every label (columns of zeros and ones) on standardized features, from `start` if given (a larger penalty's).

    Raises:
        SettingsError: labels are not zeros and ones, one is the same everywhere, or the penalty is not positive.
        NumericalError: a value is not finite, or `tolerance` was not reached.
    """
    check_penalty(penalty)
    statistics = Statistics.from_rows(x)
    problem = standardize(statistics, floor)
    y = _check_labels(y.double())
    n = len(y)
    standard = (x.double() - statistics.mean) / problem.scale * ~problem.constant
    alpha = penalty / n
    share = y.mean(0)
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())

    def split(augmented: Tensor) -> tuple[Tensor, Tensor]:
        return augmented[:-1], augmented[-1]

    def gradient(augmented: Tensor) -> Tensor:
        weights, intercept = split(augmented)
        residual = torch.sigmoid(standard @ weights + intercept) - y
        return torch.cat([standard.T @ residual, residual.sum(0, keepdim=True)]) / n

    def shrink(augmented: Tensor, step: float) -> Tensor:
        weights, intercept = split(augmented)
        return torch.cat([torch.nn.functional.softshrink(weights, step * alpha), intercept[None]])

    def gap(augmented: Tensor) -> Tensor:
        weights, intercept = split(augmented)
        z = standard @ weights
        z = z + _best_intercept(z, y, intercept)
        residual = y - torch.sigmoid(z)
        pull = (standard.T @ residual).abs().amax(0) / n
        shrunk = (alpha / pull.clamp(min=1e-300)).clamp(max=1.0)
        primal = (torch.nn.functional.softplus(z) - y * z).mean(0) + alpha * weights.abs().sum(0)
        dual = _entropy(y - shrunk * residual).mean(0)
        return (primal - dual) / entropy

    first = torch.cat([standard.new_zeros(standard.shape[1], y.shape[1]), torch.logit(share)[None]])
    if start is not None:
        first = torch.cat([start.weights, start.intercept[None]])
    assert isinstance(problem.gram, Tensor)
    step = 4 / max(largest_eigenvalue(problem.gram), 1.0)
    labels = torch.arange(y.shape[1], device=y.device)
    solution, gaps = fista(first, step, gradient, shrink, gap, labels, tolerance, max_steps)
    if not float(gaps.max()) <= tolerance:
        raise NumericalError(
            f"the labels' regression did not converge: relative duality gap {float(gaps.max()):.1e}, expected "
            f"{tolerance:.1e}. Raise the penalty, max_steps or tolerance."
        )
    weights, intercept = split(solution)
    return LabelSolution(weights, _best_intercept(standard @ weights, y, intercept), gaps)


def _best_intercept(z: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The intercepts at which residuals sum to zero, by Newton's method."""
    intercept = start.clone()
    for _ in range(50):
        p = torch.sigmoid(z + intercept)
        change = (y - p).sum(0) / (p * (1 - p)).sum(0).clamp(min=1e-12)
        intercept = intercept + change.clamp(-1, 1)
        if float(change.abs().max()) < 1e-13:
            break
    return intercept


def _entropy(u: Tensor) -> Tensor:
    return -(torch.xlogy(u, u) + torch.xlogy(1 - u, 1 - u))


def _check_labels(y: Tensor) -> Tensor:
    if not bool(((y == 0) | (y == 1)).all()):
        raise SettingsError(
            f"expected labels of zeros and ones, one column per label; got {y.unique()[:5].tolist()}. "
            "Give classes as columns: torch.nn.functional.one_hot(classes)."
        )
    same = (y.mean(0) % 1 == 0).nonzero().flatten().tolist()
    if same:
        raise SettingsError(
            f"labels {same} are the same for all {len(y)} observations: nothing to tell apart. Leave them out."
        )
    return y
