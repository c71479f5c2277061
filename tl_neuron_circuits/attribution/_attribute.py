"""`attribute`: score every node of a basis by its effect on a metric."""

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from .._files import versions
from .._typing import checked
from ..bases import Basis, Neurons, mean_parts, name_of, reads_of, run_values, sites_of, take_apart
from ..models import TransformerLensModel
from ..propagation import ALL_RULES
from ..tasks import Batch, Metric, PromptPairs, TokenisedPairs, logit_difference, metric_name, tokenise
from . import _integrated_gradients, _patching, _relp
from ._baseline import Means, base_parts
from ._inputs import check_pairs, check_setting, chosen_nodes
from ._scores import NodeScores, require_finite
from ._setting import Baseline, Direction, MethodName, Runs, Setting
from ._total import Total


@checked
def attribute(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenisedPairs,
    *,
    method: MethodName = "relp",
    basis: Basis | Sequence[Basis] | None = None,
    metric: Metric = logit_difference,
    positions: Literal["keep", "sum"] = "keep",
    units: Literal["keep", "sum"] = "keep",
    baseline: Baseline = "corrupt",
    direction: Direction = "noising",
    rules: Sequence[str] | None = None,
    stabilizer: float | None = None,
    steps: int = 10,
    nodes: pd.DataFrame | None = None,
    batch_size: int = 32,
    prepend_bos: bool | None = None,
    multi_token: Literal["error", "first_difference"] = "error",
    seed: int = 0,
    verbose: bool = False,
) -> NodeScores:
    """Score every node of `basis` by its support for `metric`: (a_clean - a_baseline) * d metric / d a, averaged over
    pairs.

    One convention for every method: positive helps the answer; exact patching gives m(clean) - m(patched).

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: prompts with answers; `TokenisedPairs` where the model has no tokenizer.
        method: "relp"; "gradient" (AtP); "integrated_gradients" (one site at a time); "integrated_gradients_inputs";
            "patching" (exact, one forward row a node and prompt); controls "activation_difference" and "random".
        basis: one basis or several; neurons unless given.
        metric: from logits and batch to one number a prompt.
        positions: "keep" scores a node at each position (all prompts must have one token length); "sum" adds positions
            up.
        units: "sum" adds up each activation's components, for maps over layer and position (patching: whole vectors).
        baseline: what a node is compared with: its value on the corrupt prompt, zero, or its mean over the clean
            prompts (per position, among prompts of the same length).
        direction: "noising" takes gradients on the clean run; "denoising" on the corrupt run (RelP's own protocol).
        rules: of relevance propagation; by default all four for "relp" and none for the other methods.
        stabilizer: see `relp`.
        steps: of integrated gradients.
        nodes: for "patching", measure only these rows (columns hook, position, unit, kind, as `NodeScores.top` gives
            them); all others become nan.
        batch_size: prompts in one pass. Batches hold prompts of one length, so nothing is padded.
        prepend_bos: see `tasks.tokenise`.
        multi_token: see `tasks.tokenise`.
        seed: of "random".
        verbose: show progress.

    Returns:
        Scores in float32, on the model's device.

    Raises:
        UnsupportedModelError: a site of the basis is missing or did not fire; `check_model(model)` lists them.
        PairsError: no corrupt prompts where they are needed, or several lengths with positions kept.
        NumericalError: values, gradients or the metric are not finite.
        SettingsError: arguments contradict each other.

    Source: METHODS 1.2; each method's file names its paper.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> scores = tnc.attribute(model, tnc.tasks.subject_verb_agreement("simple", n=8))
        >>> len(scores.top(3))
        3
    """
    nodes_of = Neurons() if basis is None else basis
    rules = tuple((ALL_RULES if method == "relp" else ()) if rules is None else rules)
    setting = Setting(
        model,
        sites_of(model, nodes_of),
        metric,
        method,
        rules,
        stabilizer,
        steps,
        baseline,
        direction,
        positions,
        units,
    )
    check_setting(setting, batch_size, nodes)
    tokens = tokenise(model, pairs, prepend_bos=prepend_bos, multi_token=multi_token)
    check_pairs(tokens, setting)
    chosen = None if nodes is None else chosen_nodes(nodes, setting, tokens.lengths[0])
    means = mean_parts(model, setting.sites, tokens.batches(batch_size)) if baseline == "mean" else None
    total = Total(setting, seed)
    with tqdm(total=len(tokens), desc=method, disable=not verbose, unit="pair") as bar:
        for batch in tokens.batches(batch_size):
            _score(setting, batch, means, chosen, total, rows=8 * batch_size, verbose=verbose)
            bar.update(len(batch))
    settings = _provenance(setting, tokens, name_of(nodes_of), seed) | {"variance_unexplained": total.unexplained()}
    scores = total.scores(len(tokens), settings, nodes_of)
    return scores if chosen is not None else require_finite(scores)


def _score(
    setting: Setting, batch: Batch, means: Means | None, chosen: Any, total: Total, *, rows: int, verbose: bool
) -> None:
    """Add one batch to the total. `here` is the run that gradients are taken on, or that is patched."""
    here = batch if setting.direction == "noising" else batch.on_corrupt()
    method, gradients = setting.method, None
    if method in ("relp", "gradient"):
        values, gradients = _relp.propagate(setting, here)
    else:
        values = run_values(setting.model, here, reads_of(setting.sites))
    total.add_variance(values)
    runs = Runs(take_apart(setting.sites, values), base_parts(setting, batch, means))
    if method == "patching":
        total.add_scores(_patching.patch(setting, here, runs, chosen, rows, verbose))
    elif method in ("activation_difference", "random"):
        total.add_differences(runs)
    else:
        if method == "integrated_gradients":
            gradients = _integrated_gradients.per_site(setting, here, runs, values)
        elif method == "integrated_gradients_inputs":
            gradients = _integrated_gradients.along_inputs(setting, here)
        assert gradients is not None
        total.add(runs, gradients)


def _provenance(setting: Setting, tokens: TokenisedPairs, basis: str, seed: int) -> dict[str, Any]:
    """What a saved result says of how it came about."""
    copied = ("method", "positions", "units", "baseline", "direction", "stabilizer", "steps")
    return {name: getattr(setting, name) for name in copied} | {
        "metric": metric_name(setting.metric),
        "basis": basis,
        "rules": list(setting.rules),
        "seed": seed,
        "model": str(getattr(setting.model.cfg, "model_name", "unknown")),
        "n_pairs": len(tokens),
        "pairs_hash": tokens.hash,
        "lengths": sorted(set(tokens.lengths)),
        "versions": versions(),
    }
