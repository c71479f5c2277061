"""`compare`: attribute and evaluate several bases with several methods, under one measure, on the same pairs."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .._errors import SettingsError
from .._files import fingerprint, versions
from .._processes import current_processes
from .._progress import progress
from .._typing import checked
from ..bases._activations import MLPOutputs, Neurons
from ..bases._site import Basis, basis_sites
from ..interventions._ablation import Ablation
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding
from ..nodes._attribute import attribute
from ..nodes._method import Method
from ..nodes._methods import as_method
from ..nodes._scores import NodeScores
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._comparison import Comparison, CurveKey
from ._curve import MIB_FRACTIONS
from ._evaluate import ErrorNodes, sparsity_curve
from ._node_sets import Ranking
from ._resume import resume

logger = logging.getLogger(__name__)
DEFAULT_METHODS: tuple[str, ...] = (
    "relp",
    "gradient",
    "integrated_gradients",
    "activation_difference",
    "random",
)
TaskPairs = PromptPairs | TokenizedPairs
Pairs = TaskPairs | Mapping[str, TaskPairs]


@holding
@checked
def compare(
    model: TransformerLensModel,
    attribution_pairs: Pairs,
    evaluation_pairs: Pairs,
    *,
    bases: Sequence[Basis] | None = None,
    methods: Sequence[str | Method] = DEFAULT_METHODS,
    sizes: Sequence[int] | None = None,
    ablation: Ablation = "mean",
    reference: Pairs | None = None,
    rankings: Sequence[Ranking] | None = None,
    error_nodes: ErrorNodes = "rank",
    metric: Metric = logit_difference,
    mib: bool = False,
    bootstrap: int = 1000,
    batch_size: int | Literal["auto"] = 64,
    seed: int = 0,
    directory: str | Path | None = None,
    verbose: bool | None = None,
) -> Comparison:
    """Sparsity curves of `bases` by `methods`: scored on one set of pairs, evaluated on another.

    Args:
        model: a HookedTransformer or TransformerBridge.
        attribution_pairs: pairs to score nodes on: one set, or several tasks by name. Positions are kept, so a task
            needs prompts of one token length.
        evaluation_pairs: pairs to judge circuits on, with the same names of tasks.
        bases: neurons and MLP outputs unless given; every basis must cover the same layers, or ablating all of it would
            mean different things.
        methods: as in `attribute`, by name or with options, such as `RelP(rules="attnlrp")`; the last two of the
            default are controls, drawn on every plot.
        sizes: numbers of nodes, those above a basis' own number left out; 20 log-spaced ones unless given.
        ablation: as in `evaluate`.
        reference: as in `evaluate`, with the same names of tasks; `attribution_pairs` themselves may be given.
        rankings: by |score| ("abs"), by score ("signed"), or both, each a curve of its own: "relp" and "relp, by sign".
            Each method's own unless given; a learned order has no other.
        error_nodes: as in `evaluate`.
        metric: as in `evaluate`.
        batch_size: prompts in one pass, for scores and for curves; "auto" as in `attribute` and `evaluate`.
        mib: also CPR (signed ranking) and CMD (|score| ranking) on MIB's grid, 20 more forwards per batch and curve.
        bootstrap: draws over lexical items (the pairs' labels) for bands and ratios.
        seed: of "resample" and of the bootstrap; for another random control give `Random(seed)` among `methods`.
        directory: save every curve as it is done; a call with the same settings, model and dictionaries
            resumes from there.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        A `Comparison`: `.to_dataframe()`, `.summary()`, `.headline()`, `.plot()`, `.plot_trust()`, `.save(path)`; its
        `.notes` are logged as warnings.

    Raises:
        SettingsError: tasks or layers do not match, two bases share a name, two methods share a label, or `bootstrap`
            is below 1.
        FileFormatError: `directory` holds something else, or another comparison.
        PairsError: the pairs do not serve the methods. Prompts in both sets are only logged: results are in-sample.

    Source: Arora et al. 2026, arXiv 2601.22594; METHODS 1.4 and 5.2.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> train, test = tnc.tasks.subject_verb_agreement("simple", n=32).split(0.5, by="label")
        >>> both = tnc.compare(tnc.load_demo_model(), train, test, methods=["relp"], sizes=[10, 100])
        >>> len(both.to_dataframe())
        4
    """
    chosen = [Neurons(), MLPOutputs()] if bases is None else list(bases)
    train, test = _by_task(attribution_pairs), _by_task(evaluation_pairs)
    means = {} if reference is None else _by_task(reference)
    if reference is not None and list(means) != list(test):
        raise SettingsError(f"expected the tasks {list(test)} in reference=; got {list(means)}.")
    _check(model, chosen, train, test)
    if bootstrap < 1:
        raise SettingsError(f"expected at least one bootstrap draw; got {bootstrap}.")
    by_label = _by_label(methods)
    plain = {
        "methods": [method.to_json() for method in by_label.values()],
        "sizes": None if sizes is None else list(sizes),
        "ablation": ablation,
    }
    plain["reference"] = {task: pairs.hash for task, pairs in means.items()} or None
    if rankings is not None:
        plain["rankings"] = list(rankings)
    plain |= {"error_nodes": error_nodes, "metric": metric_name(metric), "mib": mib, "bootstrap": bootstrap}
    settings = _provenance(model, chosen, train, test) | plain | {"seed": seed}
    ranked = _ranked(by_label, rankings)
    keys = [CurveKey(task, basis.name, name) for task in train for basis in chosen for name in ranked]
    by_name = {basis.name: basis for basis in chosen}
    processes = current_processes()
    shown = verbose if processes.first else False
    common = {"metric": metric, "batch_size": batch_size, "verbose": shown}
    judge = {**common, "ablation": ablation, "error_nodes": error_nodes, "seed": seed}
    with processes.together("compare", settings):
        begun = lambda: Comparison({}, settings) if directory is None else resume(Path(directory), settings)  # noqa: E731
        done = processes.from_first(begun)
        train, test = (  # once, not for every curve
            {task: tokenize(model, pairs) for task, pairs in sets.items()} for sets in (train, test)
        )
        curves, grid, unexplained = dict(done.curves), dict(done.mib), dict(done.unexplained)
        known: tuple[Any, NodeScores] | None = None  # of the curve before, which may be of the same scores
        for key in progress(keys, desc="compare", verbose=shown, unit="curve"):
            if key in curves:
                continue
            (method, ranking), basis = ranked[key.method], by_name[key.basis]
            same = (key.task, key.basis, method.label)
            if known is None or known[0] != same:
                known = same, attribute(model, train[key.task], method=method, basis=basis, **common)
            scores = known[1]
            fitting = None if sizes is None else [size for size in sizes if size <= len(scores)]
            judged = {**judge, "reference": means.get(key.task)}
            curves[key] = sparsity_curve(model, test[key.task], scores, sizes=fitting, ranking=ranking, **judged)
            if mib:
                grid[key] = _mib(model, test[key.task], scores, judged)
            fractions = list(scores.settings["variance_unexplained"].values())
            unexplained[key] = float(np.mean(fractions)) if fractions else 0.0
            if directory is not None and processes.first:
                Comparison(curves, settings, grid, unexplained).save(directory)
        found = Comparison({key: curves[key] for key in keys}, settings, grid, unexplained)
        for note in found.notes if processes.first else ():
            logger.warning(note)
        return found


def _provenance(
    model: TransformerLensModel,
    bases: Sequence[Basis],
    train: Mapping[str, TaskPairs],
    test: Mapping[str, TaskPairs],
) -> dict[str, Any]:
    """What was compared on what: a later call goes on only where all of it is the same."""
    return {
        "model": model_name(model),
        "weights": fingerprint(model.parameters()),
        "bases": [basis.name for basis in bases],
        "sites": {basis.name: [site.identity for site in basis_sites(model, basis)] for basis in bases},
        "attribution": {task: pairs.hash for task, pairs in train.items()},
        "evaluation": {task: pairs.hash for task, pairs in test.items()},
        "versions": versions(),
    }


def _mib(
    model: TransformerLensModel, pairs: TaskPairs, scores: NodeScores, judge: Mapping[str, Any]
) -> tuple[float, float]:
    """CPR by the signed ranking and CMD by the |score| ranking (of a learned order: by score too), on MIB's grid."""
    sizes = sorted({max(1, round(fraction * len(scores))) for fraction in MIB_FRACTIONS})
    given = {"sizes": sizes, "completeness": False, **judge}
    run = lambda ranking: sparsity_curve(model, pairs, scores, ranking=ranking, **given)  # noqa: E731
    return run("signed").cpr, run(scores.ranking).cmd


def _by_label(methods: Sequence[str | Method]) -> dict[str, Method]:
    """The methods by the label that names their curves; one that is given twice counts once."""
    if not methods:
        raise SettingsError("expected at least one method to compare; got none. Leave methods= out for the usual five.")
    by_label: dict[str, Method] = {}
    for method in map(as_method, methods):
        other = by_label.setdefault(method.label, method)
        if other.to_json() != method.to_json():
            raise SettingsError(
                f"expected methods of different labels; two different ones are both {method.label!r}, so their curves "
                "could not be told apart. Compare them in two calls."
            )
    return by_label


def _ranked(
    by_label: Mapping[str, Method], rankings: Sequence[Ranking] | None
) -> dict[str, tuple[Method, Ranking | None]]:
    """Methods and their rankings by the names of their curves: a ranking that is not the method's own is named."""
    if rankings is not None and not rankings:
        raise SettingsError("expected rankings out of 'abs' and 'signed'; got none. Leave rankings= out.")
    found: dict[str, tuple[Method, Ranking | None]] = {}
    for label, method in by_label.items():
        own: Sequence[Ranking] = [method.ranking]
        wanted = own if rankings is None or method.ranking == "signed" else rankings
        for one in wanted:
            found[label if one == method.ranking else f"{label}, by sign"] = method, one
    return found


def _by_task(pairs: Pairs) -> dict[str, TaskPairs]:
    return dict(pairs) if isinstance(pairs, Mapping) else {"task": pairs}


def _prompts(pairs: TaskPairs) -> set[Any]:
    """The clean prompts, as text or as tokens."""
    if isinstance(pairs, PromptPairs):
        return set(pairs.clean)
    return {tuple(prompt.tolist()) for prompt in pairs.clean}


def _check(
    model: TransformerLensModel,
    bases: Sequence[Basis],
    train: Mapping[str, TaskPairs],
    test: Mapping[str, TaskPairs],
) -> None:
    if list(train) != list(test) or not train:
        raise SettingsError(f"expected the same tasks in both; got {list(train)} and {list(test)}.")
    names = [basis.name for basis in bases]
    if not names:
        raise SettingsError("expected at least one basis to compare; got none. Leave bases= out for neurons and MLPs.")
    if len(set(names)) < len(names):
        raise SettingsError(f"expected bases of different names; got {names}. Give Dictionaries(..., name=...).")
    for task in train:
        shared = _prompts(train[task]) & _prompts(test[task])
        if shared:
            logger.warning(
                "%s: %d evaluation prompts are attribution prompts too: results are in-sample.", task, len(shared)
            )
    layers = {basis.name: sorted({site.layer for site in basis_sites(model, basis)}) for basis in bases}
    if len({tuple(found) for found in layers.values()}) > 1:
        raise SettingsError(
            f"expected every basis to cover the same layers; got {layers}. Restrict the others, for example "
            f"bases.Neurons(layers={min(layers.values(), key=len)}), or give dictionaries for the missing layers."
        )
