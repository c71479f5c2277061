"""RelP and attribution patching: one gradient for all layers.

    score(n) = (a_clean - a_baseline) * d metric / d a

`RelP` takes the gradient under the rules of relevance propagation, `Gradient` (AtP) under none. It is taken on the
clean run, or with `direction="denoising"` on the corrupt run, as in RelP's own protocol.
Sign: positive supports the answer. Cost: two forwards and one backward per batch.
Source: Rezaei Jafari et al. 2025, arXiv 2508.21258; Syed et al. 2023 (AtP); METHODS 1.2 and 2.
"""

from dataclasses import dataclass
from typing import ClassVar

from .._errors import SettingsError
from ..bases._runs import Values
from ..propagation.rules import rule_set
from ..tasks._tokenized import Batch
from ._method import Method
from ._scope import Blocks, Means, Scope, gradients_at


@dataclass(frozen=True)
class RelP(Method):
    """Gradients under relevance propagation; `rules` and `stabilizer` as in `relp`, `check_model` as its `check`.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.RelP(rules="attnlrp").label
        'relp(rules=attnlrp)'
        >>> tnc.RelP(rules=("ln", "identity", "half")).label
        'relp(rules=ln+identity+half)'
    """

    name: ClassVar[str] = "relp"
    rules: str | tuple[str, ...] = "relp"
    stabilizer: float | None = None
    check_model: bool = True

    def check(self, scope: Scope) -> None:
        """Rules exist, and there is at least one."""
        if rule_set(self.rules, self.stabilizer).needs == ():
            raise SettingsError("expected at least one rule for RelP; got none. That is method='gradient'.")

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """One gradient under the rules, times the change of every node."""
        run = scope.first_run(batch)
        values, gradients = gradients_at(
            scope.model, run, scope.sites, scope.metric, self.rules, self.stabilizer, check=self.check_model
        )
        baselines = scope.baseline_parts(batch, means)
        return values, scope.change_times(values, baselines, gradients)


@dataclass(frozen=True)
class Gradient(Method):
    """Plain gradients: attribution patching (AtP), or gradient times activation with a zero baseline.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.Gradient().label
        'gradient'
    """

    name: ClassVar[str] = "gradient"

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """One gradient, times the change of every node."""
        values, gradients = gradients_at(scope.model, scope.first_run(batch), scope.sites, scope.metric, rules=())
        baselines = scope.baseline_parts(batch, means)
        return values, scope.change_times(values, baselines, gradients)
