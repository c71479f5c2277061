"""`attribute`: score every node of a basis by its effect on a metric."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from .._files import fingerprint, versions
from .._memory import Halving
from .._processes import here
from .._typing import checked
from ..bases._activations import Neurons
from ..bases._site import Basis, name_of, sites_of
from ..models._protocol import TransformerLensModel
from ..propagation.rules import ALL_RULES
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._inputs import check_pairs, check_setting, chosen_nodes
from ._memory import fitting_batch
from ._partial import Partial
from ._run import Run
from ._scores import NodeScores, require_finite
from ._setting import Baseline, Direction, MethodName, Setting


@checked
def attribute(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
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
    batch_size: int | Literal["auto"] = 32,
    prepend_bos: bool | None = None,
    multi_token: Literal["error", "first_difference"] = "error",
    seed: int = 0,
    resume: str | Path | None = None,
    verbose: bool = False,
) -> NodeScores:
    """Score every node of `basis` by its support for `metric`: (a_clean - a_baseline) * d metric / d a, averaged over
    pairs.

    One convention for every method: positive helps the answer; exact patching gives m(clean) - m(patched).
    Under `accelerate launch` every process makes this call, scores its share of the pairs, and gets the same result.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: prompts with answers; `TokenizedPairs` where the model has no tokenizer.
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
        batch_size: prompts in one pass. Batches hold prompts of one length, so nothing is padded. "auto" begins with
            what `estimate_memory` says fits, and halves where memory runs out all the same; `.settings["batch_size"]`
            says what was used.
        prepend_bos: see `tasks.tokenize`.
        multi_token: see `tasks.tokenize`.
        seed: of "random".
        resume: a directory in which the sums so far are kept; the same call goes on from there after it was stopped,
            and gives the same scores. Remove it when they are saved.
        verbose: show progress.

    Returns:
        Scores in float32, those of each hook on its layer's device.

    Raises:
        UnsupportedModelError: a site of the basis is missing or did not fire; `check_model(model)` lists them.
        PairsError: no corrupt prompts where they are needed, or several lengths with positions kept.
        NumericalError: values, gradients or the metric are not finite.
        SettingsError: arguments contradict each other, or the batch does not fit into memory (`estimate_memory`).
        FileFormatError: `resume` holds something else, or another attribution.
        ProcessesError: another of the processes raised, died or hangs.

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
    sites = sites_of(model, nodes_of)
    setting = Setting(model, sites, metric, method, rules, stabilizer, steps, baseline, direction, positions, units)
    check_setting(setting, batch_size, nodes)
    processes = here()
    tokens = tokenize(model, pairs, prepend_bos=prepend_bos, multi_token=multi_token)
    settings = _provenance(setting, tokens, name_of(nodes_of), seed)
    with processes.together("attribute", settings):
        check_pairs(tokens, setting)
        chosen = None if nodes is None else chosen_nodes(nodes, setting, tokens.lengths[0])
        same = {} if resume is None else _identity(setting, settings, batch_size, nodes)
        partial = None if resume is None else Partial(resume, same, processes)
        planned = [size for size in processes.gather(partial and partial.planned) if size]
        size = planned[0] if planned else fitting_batch(setting, tokens, batch_size, processes)
        run = Run(setting, tokens, Halving(size, batch_size == "auto"), chosen, seed, processes, verbose)
        total = run.total(partial)
        found = {"batch_size": run.batches.size, "variance_unexplained": total.unexplained()}
        scores = total.scores(len(tokens), settings | found, nodes_of)
        return scores if chosen is not None else require_finite(scores)


def _identity(
    setting: Setting, settings: dict[str, Any], batch_size: int | str, nodes: pd.DataFrame | None
) -> dict[str, Any]:
    """What must be the same for sums on disk to be gone on with."""
    return settings | {
        "batch_size": batch_size,
        "weights": fingerprint(setting.model.parameters()),
        "sites": [site.identity for site in setting.sites],
        "nodes": None if nodes is None else hashlib.sha256(nodes.to_json().encode()).hexdigest(),
    }


def _provenance(setting: Setting, tokens: TokenizedPairs, basis: str, seed: int) -> dict[str, Any]:
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
