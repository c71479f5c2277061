"""`relp`: inside the context, gradients through the model are RelP's; every forward value stays bit for bit.

From `relp` to a formula: `Relp.__enter__` installs `Wiring`, which has every piece freeze its constants in the forward
pass: `GatedPiece.freeze`, say, asks `IdentityRule.apply` and `HalfRule.factors`. `Relay.backward` multiplies by them.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .._errors import PropagationError
from .._typing import checked
from ..models._protocol import TransformerLensModel, hook_points
from ..models._run_state import require_steady
from ..models._sites import find_sites, require
from ..models._threads import release, take
from ._conservation import require_conservation
from ._wiring import Wiring
from .rules import RULE_SETS, RuleSet, rule_set

_ACTIVE: "weakref.WeakSet[TransformerLensModel]" = weakref.WeakSet()
"""Models that `relp` is active on. Not a mark on the model itself, which would be copied and pickled with it."""


@checked
def relp(
    model: TransformerLensModel,
    rules: str | Sequence[str] = "relp",
    *,
    stabilizer: float | None = None,
    check: bool = True,
) -> "Relp":
    """Replace the backward pass of `model` by relevance propagation, for the length of a `with` block.

    Only gradients change, so the whole of TransformerLens works inside: `run_with_cache(incl_bwd=True)`, `hooks` with
    `bwd_hooks`, or `torch.autograd.grad` on activations captured by a forward hook. Parameters are frozen meanwhile.
    Inside a piece that a rule stands for as a whole (between `hook_pre` and `hook_post`) there is no gradient.

    Args:
        model: any TransformerLens model with dense MLPs.
        rules: a named set, "relp", "cp", "attnlrp" or "gim" (`propagation/rules.py` has the table), or a tuple out of
            "ln", "identity", "half", "attention"; `()` is the plain gradient.
        stabilizer: use f(x) / (x + sign(x) * stabilizer) in the identity rule instead of the exact ratio. Only for
            parity with the published fork (1e-6), whose gradients differ by up to 7e-3 near zero.
        check: measure on first use that relevance is conserved on this model: all four rules, a short input, users'
            hooks set aside; again when its weights or flags change. False goes on where it is not.

    Returns:
        A context manager that leaves hooks, flags and `requires_grad` as it found them, also when something raises.

    Raises:
        UnsupportedModelError: on entering, listing what the model lacks and the remedy; relevance is not conserved;
            dropout is training.
        PropagationError: gradients are disabled, autocast is on, layers are recomputed without a graph, another thread
            is using the model, or a rule did not stand for what the model computed.
        NumericalError: the model computed values that are not finite.
        SettingsError: an unknown rule.

    Source: Rezaei Jafari et al. 2025, arXiv 2508.21258; Arora et al. 2026, arXiv 2601.22594.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> with tnc.relp(model):
        ...     logits, cache = model.run_with_cache("the dog", incl_bwd=False)
    """
    return Relp(model, rule_set(rules, stabilizer), check)


class Relp:
    """The context manager that `relp` returns; it can be entered again after it was left, but not inside itself."""

    def __init__(self, model: TransformerLensModel, rules: RuleSet, check: bool = True) -> None:
        self._model, self._rules, self._check = model, rules, check
        self._wiring: Wiring | None = None

    def __enter__(self) -> None:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise PropagationError(
                "expected gradients to be enabled; relp was entered under torch.no_grad(), inference_mode() or "
                "set_grad_enabled(False). Call it outside of those."
            )
        take(self._model, "relp")
        try:
            self._install()
        except BaseException:
            release(self._model)
            raise

    def _install(self) -> None:
        require_steady(self._model, gradients=True)
        points = hook_points(self._model)  # looked up once: TransformerBridge builds them anew every time
        sites = find_sites(self._model, points)
        require(sites, self._rules.needs)
        if self._model in _ACTIVE:
            raise PropagationError("relp is active on this model already; rules cannot be stacked. Leave it first.")
        if self._check and self._rules != RuleSet():
            require_conservation(self._model, self._rules.needs, Relp(self._model, RULE_SETS["relp"], check=False))
        wiring = Wiring(self._model, points, sites, self._rules)
        try:
            wiring.install()
        except BaseException:
            wiring.remove()
            raise
        self._wiring = wiring
        _ACTIVE.add(self._model)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        wiring, self._wiring = self._wiring, None
        if wiring is None:
            return
        _ACTIVE.discard(self._model)
        try:
            wiring.remove()
        finally:
            release(self._model)
        if error is None:
            wiring.checks.verify(whole_forward=False)


@contextmanager
def frozen(model: TransformerLensModel) -> Iterator[None]:
    """Parameters without `requires_grad` inside the context, as found afterwards: no graph is kept for them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
