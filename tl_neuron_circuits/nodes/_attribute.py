"""`attribute`: score every node of a basis by its effect on a metric.

The six steps from here to a rule's formula, the model's forward pass between the third and the fourth:

    attribute            this file: batches, sums, means over pairs
    RelP.score           nodes/_relp.py: gradient times change
    gradients_at         nodes/_scope.py: one forward and one backward under `relp`
    Wiring._relay        propagation/_wiring.py: the pass reaches the end of a piece; backward, `Relay` stands for it
    GatedPiece.freeze    propagation/rules.py: the rules of that piece, one after the other
    HalfRule.factors     propagation/rules.py: g * b / 2, g * a / 2
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from .._errors import PairsError, SettingsError
from .._files import fingerprint
from .._memory import Halving
from .._processes import current_processes
from .._progress import progress
from .._typing import check_arguments, checked
from ..bases._activations import Neurons
from ..bases._site import Basis, basis_name, basis_sites
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ..tasks._chat import special_positions
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._provenance import provenance, require_corrupt
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._learned_mask import LearnedMask
from ._memory import MemoryEstimate, fitting_batch, measured
from ._method import Method
from ._methods import MethodName, as_method
from ._resume import SavedSums
from ._scope import Baseline, Blocks, Direction, Scope, shared_means
from ._scores import NodeScores, require_finite, site_labels, without_positions
from ._sums import ROWS, Sums, unexplained_sums

_FIELD = {"node": "values", "error": "errors", "skip": "skips"}


@holding
@checked
def attribute(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    *,
    method: MethodName | str | Method = "relp",
    basis: Basis | Sequence[Basis] | None = None,
    metric: Metric = logit_difference,
    positions: Literal["keep", "sum"] = "keep",
    units: Literal["keep", "sum"] = "keep",
    baseline: Baseline = "corrupt",
    direction: Direction = "noising",
    skip_special: bool = False,
    batch_size: int | Literal["auto"] = 32,
    resume: str | Path | None = None,
    verbose: bool | None = None,
) -> NodeScores:
    """Score every node of `basis` by its support for `metric`: (a_clean - a_baseline) * d metric / d a, averaged over
    pairs.

    One convention for every method: positive helps the answer; exact patching gives m(clean) - m(patched).
    Under `accelerate launch` every process makes this call, scores its share of the pairs, and gets the same result.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: prompts with answers; `tasks.tokenize(model, pairs, ...)` where tokenizing needs options; tokens where
            the model has no tokenizer.
        method: "relp"; "gradient" (AtP); "integrated_gradients" (one site at a time); "integrated_gradients_inputs";
            "patching" (exact, one forward row per node and prompt); "learned_mask", whose
            scores are a learned order, and "mask_gradient", the same without learning; controls "activation_difference"
            and "random". Or one of these with options: `RelP(rules="attnlrp")`, `LearnedMask(steps=150)`,
            `Patching(nodes)`.
        basis: one basis or several; neurons unless given.
        metric: from logits and batch to one number per prompt.
        positions: "keep" scores a node at each position (all prompts must have one token length); "sum" adds positions
            up.
        units: "sum" adds up each activation's components, for maps over layer and position (patching: whole vectors).
        baseline: what a node is compared with: its value on the corrupt prompt, zero, or its mean over the clean
            prompts (per position, among prompts of the same length).
        direction: "noising" takes gradients on the clean run; "denoising" on the corrupt run (RelP's own protocol).
        skip_special: give no scores (nan) at special tokens, such as BOS and those between the turns of a chat; needs
            positions="keep".
        batch_size: prompts in one pass. Batches hold prompts of one length, so nothing is padded. "auto" begins with
            what `estimate_memory` says fits, and halves where memory runs out all the same; `.settings["batch_size"]`
            says what was used.
        resume: a directory in which the sums so far are kept; the same call resumes from there after it was stopped,
            and gives the same scores. Remove it when they are saved. A learned mask may go on with more steps.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

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
    method = as_method(method)
    basis = Neurons() if basis is None else basis
    scope = Scope(model, basis_sites(model, basis), metric, baseline, direction, positions, units)
    check_scope(scope, method, batch_size)
    if skip_special and positions == "sum":
        raise SettingsError("skip_special leaves out positions, and positions='sum' adds them up. Keep the positions.")
    if skip_special and isinstance(method, LearnedMask):
        raise SettingsError("a learned mask ranks the nodes of all positions together; leave out skip_special.")
    processes = current_processes()
    tokens = tokenize(model, pairs)
    settings = _provenance(scope, method, tokens, basis_name(basis))
    shown = verbose if processes.first else False
    with processes.together("attribute", settings):
        check_pairs(tokens, scope)
        if isinstance(method, LearnedMask):
            return _learn(method, scope, tokens, settings, basis, batch_size, resume, shown)
        identity = {} if resume is None else _identity(scope, settings, batch_size)
        saved = None if resume is None else SavedSums(resume, identity, processes)
        planned = [size for size in processes.gather(saved and saved.planned) if size]
        size = planned[0] if planned else fitting_batch(scope, method, tokens, batch_size, processes)
        batches = Halving(processes.fair(size, len(tokens)), batch_size == "auto")

        sums, done, planned = Sums(), 0, batches.size
        if saved is not None and (found := saved.read(scope.sites)) is not None:
            sums, done, planned, batches.size = found
        means = None
        if baseline == "mean":
            means = shared_means(model, scope.sites, processes.share(tokens.batches(planned)), processes)
        number = 0
        with progress(total=len(tokens), desc=method.label, verbose=shown, unit="pair") as bar:
            for number, batch in enumerate(processes.share(tokens.batches(planned)), 1):
                if number > done:
                    for attempt in batches.pieces(batch):  # a batch that memory does not hold is halved
                        with attempt as piece:
                            rows = ROWS * batches.size
                            values, blocks = method.score(scope, piece, means, rows=rows, verbose=shown)
                            sums.add(Sums(blocks, unexplained_sums(scope.sites, values)))
                            del values, blocks  # or they are held beside the next piece
                    if saved is not None:
                        saved.write(sums, number, planned, batches.size)
                bar.update(min(len(batch) * processes.count, len(tokens) - bar.n))
        if saved is not None and number > done:
            saved.write(sums, number, planned, batches.size, last=True)
        sums = sums.over_processes(processes)

        used = min(processes.gather(batches.size))
        settings |= {"batch_size": used, "variance_unexplained": sums.variance_unexplained()}
        scores = _scores(scope, method.finish(sums.blocks, len(tokens)), settings, basis)
        scores = require_finite(scores) if method.measures_all else scores
        return without_positions(scores, special_positions(model, tokens)) if skip_special else scores


def _learn(
    method: LearnedMask,
    scope: Scope,
    tokens: TokenizedPairs,
    settings: dict[str, Any],
    basis: Basis | Sequence[Basis],
    batch_size: int | Literal["auto"],
    resume: str | Path | None,
    shown: bool | None,
) -> NodeScores:
    """Scores that come out of many steps instead of one pass over the pairs."""
    processes = current_processes()
    fewest = replace(method, steps=1)  # a run with more steps resumes one with fewer
    same = settings | {"method": fewest.label, "method_options": fewest.to_json()}
    identity = {} if resume is None else _identity(scope, same, batch_size) | {"processes": processes.count}
    size = fitting_batch(scope, method, tokens, batch_size, processes)
    batches = Halving(processes.fair(size, len(tokens)), batch_size == "auto")
    shares = tuple(processes.share(tokens.batches(batches.size)))
    means = shared_means(scope.model, scope.sites, shares, processes) if scope.baseline == "mean" else None
    sums = Sums()
    if any(site.vectors for site in scope.sites):
        for batch in shares:
            sums.add(Sums({}, unexplained_sums(scope.sites, scope.values(batch))))
        sums = sums.over_processes(processes)
    blocks, learning = method.learn(
        scope, tokens, means, processes, batches, resume=resume, identity=identity, shown=shown
    )
    settings |= {"batch_size": min(processes.gather(batches.size)), "learning": learning}
    settings |= {"variance_unexplained": sums.variance_unexplained()}
    return require_finite(_scores(scope, blocks, settings, basis))


def _scores(scope: Scope, blocks: Blocks, settings: Mapping[str, Any], basis: Basis | Sequence[Basis]) -> NodeScores:
    fields: dict[str, dict[str, Tensor]] = {name: {} for name in _FIELD.values()}
    for (hook, kind), block in blocks.items():
        fields[_FIELD[kind]][hook] = block
    return NodeScores(**fields, sites=site_labels(scope.sites), settings=settings, basis=basis)


def check_scope(scope: Scope, method: Method, batch_size: int | str) -> None:
    """Raise for arguments that contradict each other.

    Raises:
        SettingsError: with the way out.
    """
    if batch_size != "auto" and int(batch_size) < 1:
        raise SettingsError(f"expected batch_size to be at least 1, or 'auto'; got {batch_size}.")
    if scope.direction == "denoising" and scope.baseline != "corrupt":
        raise SettingsError(
            "direction='denoising' compares the corrupt run with the clean one: it needs baseline='corrupt'; got "
            f"baseline={scope.baseline!r}."
        )
    method.check(scope)


def check_pairs(tokens: TokenizedPairs, scope: Scope) -> None:
    """Raise for pairs that do not serve the question.

    Raises:
        PairsError: no corrupt prompts where they are needed, or of another length; several lengths with positions kept.
    """
    if scope.baseline == "corrupt":
        require_corrupt(tokens, "baseline='corrupt'", instead="baseline='zero' or 'mean'")
    lengths = sorted(set(tokens.lengths))
    if scope.positions == "keep" and len(lengths) > 1:
        counts = {length: tokens.lengths.count(length) for length in lengths}
        raise PairsError(
            f"positions='keep' needs prompts of one token length; got {counts} (length: prompts). Use "
            "positions='sum', or keep the prompts of one length: tasks.keep_fitting(model, pairs, same_length=True)."
        )


def _identity(scope: Scope, settings: dict[str, Any], batch_size: int | str) -> dict[str, Any]:
    """What must be the same for a call to resume from sums on disk."""
    return settings | {
        "batch_size": batch_size,
        "weights": fingerprint(scope.model.parameters()),
        "sites": [site.identity for site in scope.sites],
    }


def _provenance(scope: Scope, method: Method, tokens: TokenizedPairs, basis: str) -> dict[str, Any]:
    """What a saved result says of how it came about."""
    return {
        "method": method.label,
        "method_options": method.to_json(),
        "positions": scope.positions,
        "units": scope.units,
        "baseline": scope.baseline,
        "direction": scope.direction,
        "metric": metric_name(scope.metric),
        "basis": basis,
        **({"ranking": method.ranking} if method.ranking != "abs" else {}),
        **provenance(scope.model, tokens),
    }


@holding
@checked
def estimate_memory(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    *,
    batch_size: int = 32,
    available: int | None = None,
    **arguments: Any,
) -> MemoryEstimate:
    """Bytes that `attribute` with these arguments needs beside the model, measured on a few prompts.

    Memory does not grow with the number of pairs, only with the batch, the length of the longest prompt and what is
    kept of a run.

    Args:
        model: as in `attribute`.
        pairs: as in `attribute`.
        batch_size: prompts in one pass.
        available: bytes to judge by; what is free on the model's devices unless given.
        arguments: any others of `attribute`, by name.

    Returns:
        A `MemoryEstimate`: `.needed`, `.fits`, `.largest_batch`, `.to_dataframe()`.

    Raises:
        SettingsError: arguments contradict each other.
        PairsError: as `attribute`.
        TypeError: an argument that `attribute` does not have.

    Source: ours; docs/how-to/large-models.md says what it was compared with.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> estimate = tnc.estimate_memory(model, tnc.tasks.subject_verb_agreement("simple", n=8), batch_size=8)
        >>> estimate.at(16) > estimate.needed
        True
    """
    given = check_arguments(attribute, {"model": model, "pairs": pairs, **arguments})
    method = as_method(given["method"])
    basis = Neurons() if given["basis"] is None else given["basis"]
    sites = basis_sites(model, basis)
    scope = Scope(model, sites, *(given[name] for name in ("metric", "baseline", "direction", "positions", "units")))
    check_scope(scope, method, batch_size)
    tokens = tokenize(model, pairs)
    check_pairs(tokens, scope)
    return measured(scope, method, tokens, batch_size, available, verbose=given["verbose"])


def _shared_signature() -> inspect.Signature:
    """`attribute`'s arguments and `available`, as `help(estimate_memory)` shows them."""
    own, theirs = inspect.signature(estimate_memory), inspect.signature(attribute)
    shared = [own.parameters.get(name, parameter) for name, parameter in theirs.parameters.items()]
    return own.replace(parameters=[*shared, own.parameters["available"]])


estimate_memory.__signature__ = _shared_signature()  # pyright: ignore[reportFunctionMemberAccess]
