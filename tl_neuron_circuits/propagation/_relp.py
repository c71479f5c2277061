"""`relp`: inside the context, gradients through the model are RelP's; every forward value stays bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .._errors import PropagationError, SettingsError
from .._typing import checked
from ..models._protocol import TransformerLensModel, hook_points
from ..models._sites import find_sites, require
from ._rules import ALL_RULES, check_rules
from ._session import Session


@checked
def relp(model: TransformerLensModel, rules: Sequence[str] = ALL_RULES, *, stabilizer: float | None = None) -> "Relp":
    """Replace the backward pass of `model` by relevance propagation, for the length of a `with` block.

    Only gradients change, so the whole of TransformerLens works inside: `run_with_cache(incl_bwd=True)`, `hooks` with
    `bwd_hooks`, or `torch.autograd.grad` on activations captured by a forward hook. Parameters are frozen meanwhile.

    Args:
        model: any TransformerLens model with dense MLPs.
        rules: out of "ln", "identity", "half", "attention"; `()` is the plain gradient.
        stabilizer: use f(x) / (x + sign(x) * stabilizer) in the identity rule instead of the exact ratio. Only for
            parity with the published fork (1e-6), whose gradients differ by up to 7e-3 near zero.

    Returns:
        A context manager that leaves hooks, flags and `requires_grad` as it found them, also when something raises.

    Raises:
        UnsupportedModelError: on entering, listing what the model lacks and the remedy.
        PropagationError: gradients are disabled, hooks were removed inside, or a rule did not stand for what the model
            computed.
        NumericalError: the model computed values that are not finite.
        SettingsError: an unknown rule.

    Source: Rezaei Jafari et al. 2025, arXiv 2508.21258; Arora et al. 2026, arXiv 2601.22594.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> with tnc.relp(model):
        ...     logits, cache = model.run_with_cache("the dog", incl_bwd=False)
    """
    if stabilizer is not None and not 0 < stabilizer < 1:
        raise SettingsError(f"expected a stabilizer between 0 and 1, such as 1e-6, or None; got {stabilizer}.")
    return Relp(model, check_rules(tuple(rules)), stabilizer)


class Relp:
    """The context manager that `relp` returns; it can be entered again after it was left, but not inside itself."""

    def __init__(self, model: TransformerLensModel, rules: tuple[str, ...], stabilizer: float | None) -> None:
        self._model, self._rules, self._stabilizer = model, rules, stabilizer
        self._session: Session | None = None

    def __enter__(self) -> None:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise PropagationError(
                "expected gradients to be enabled; relp was entered under torch.no_grad(), inference_mode() or "
                "set_grad_enabled(False). Call it outside of those."
            )
        points = hook_points(self._model)
        sites = find_sites(self._model, points)
        require(sites, rules=self._rules)
        if self._session is not None or getattr(self._model, _MARK, False):
            raise PropagationError("relp is active on this model already; rules cannot be stacked. Leave it first.")
        session = Session(self._model, points, sites, self._rules, self._stabilizer)
        try:
            session.install()
        except BaseException:
            session.remove()
            raise
        self._session = session
        object.__setattr__(self._model, _MARK, True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        object.__delattr__(self._model, _MARK)
        complete = session.remove()
        if error is not None:
            return
        session.checks.verify(whole_forward=False)
        if not complete:
            raise PropagationError(
                "hooks of relp were removed inside its context (model.reset_hooks()?), so gradients taken since were "
                "not "
                "RelP's. Call reset_hooks before entering relp."
            )


_MARK = "_relp_is_active"


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
