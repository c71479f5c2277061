"""Integrated gradients, over one site at a time or over the token embeddings.

    score(n) = (a_clean - a_base) * mean_k d metric / d a |_{x = clean + k/K (base - clean)},  k = 0 .. K-1

`IntegratedGradients`: x is the whole activation of n's site; the rest of the network runs on the clean prompt. A
dictionary's decoder is linear, so moving its nodes together is moving the activation they make up.
`IntegratedGradientsInputs`: x is the token embeddings, so that one path serves all sites.
Left Riemann sum: it includes the clean end, so K = 1 is attribution patching (`Gradient`).
Sign: positive supports the answer. Cost: K forwards and backwards, times the number of sites for the first.
Source: Marks et al. 2025, arXiv 2403.19647; Hanna et al. 2024, arXiv 2403.17806; METHODS 1.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._errors import PairsError, SettingsError
from ..bases._runs import Values, answers_only, run_logits, run_values
from ..bases._site import Parts, Site
from ..propagation._gradients import gradients_by_name
from ..propagation._relp import relp
from ..propagation.rules import rule_set
from ..tasks._metrics import measure
from ..tasks._tokenized import Batch
from ._method import Method
from ._scope import Blocks, Means, Scope, gradients_at


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """Gradients averaged along each site's own path; `rules` as in `relp`, none by default.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.IntegratedGradients(steps=20).label
        'integrated_gradients(steps=20)'
    """

    name: ClassVar[str] = "integrated_gradients"
    steps: int = 10
    rules: str | tuple[str, ...] = ()

    def check(self, scope: Scope) -> None:
        """At least one step, known rules, and no denoising."""
        self.at_least_one("steps")
        self.no_denoising(scope)
        rule_set(self.rules)

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool
    ) -> tuple[Values, Blocks]:
        """The mean gradient at every site, along that site's own path, times the change of every node."""
        values, baselines = scope.values(batch), scope.baseline_parts(batch, means)
        gradients = {site.hook: self._mean_gradient(scope, batch, site, values, baselines) for site in scope.sites}
        return values, scope.change_times(values, baselines, gradients)

    def _mean_gradient(
        self, scope: Scope, batch: Batch, site: Site, values: Values, baselines: Mapping[str, Parts | None]
    ) -> Tensor:
        clean, baseline = values[site.hook], baselines[site.hook]
        end = torch.zeros_like(clean) if baseline is None else site.put_together(baseline, clean)
        mean = torch.zeros_like(clean, dtype=torch.promote_types(clean.dtype, torch.float32))
        for step in range(self.steps):
            point = torch.lerp(clean, end, step / self.steps).requires_grad_(True)
            replace = [(site.hook, lambda value, hook, point=point: point)]
            with relp(scope.model, self.rules):
                with answers_only(scope.model, batch, scope.metric) as narrowed, scope.model.hooks(fwd_hooks=replace):
                    logits = run_logits(scope.model, batch.clean, batch.attention_mask)
                total = measure(scope.metric, logits, narrowed).sum()
                gradient = gradients_by_name(total, {site.hook: point})[site.hook]
            mean += gradient / self.steps
        return mean


@dataclass(frozen=True)
class IntegratedGradientsInputs(Method):
    """Gradients averaged along one path, from the clean to the corrupt (or zero) token embeddings.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.IntegratedGradientsInputs(steps=5).label
        'integrated_gradients_inputs(steps=5)'
    """

    name: ClassVar[str] = "integrated_gradients_inputs"
    steps: int = 10
    rules: str | tuple[str, ...] = ()

    def check(self, scope: Scope) -> None:
        """At least one step, known rules, no denoising, and an end that is a run."""
        self.at_least_one("steps")
        self.no_denoising(scope)
        rule_set(self.rules)
        if scope.baseline == "mean":
            raise SettingsError(
                "integrated gradients over inputs go to the corrupt prompt or to zero, not to a mean: "
                "give baseline='corrupt' or 'zero'."
            )

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool
    ) -> tuple[Values, Blocks]:
        """The mean gradient at every site, along the path of the embeddings, times the change of every node."""
        name = "hook_embed"
        clean = run_values(scope.model, batch, [name])[name]
        if scope.baseline == "zero":
            end = torch.zeros_like(clean)
        elif batch.corrupt is None:
            raise PairsError("integrated gradients over inputs need corrupt prompts, or baseline='zero'.")
        else:
            end = run_values(scope.model, batch.on_corrupt(), [name])[name]
        values, mean_gradients = scope.values(batch), dict[str, Tensor]()
        for step in range(self.steps):
            point = torch.lerp(clean, end, step / self.steps)
            enter = (name, lambda value, hook, point=point: point.clone().requires_grad_(True))
            _, gradients = gradients_at(scope.model, batch, scope.sites, scope.metric, self.rules, hooks=[enter])
            for hook, gradient in gradients.items():
                share = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / self.steps
                mean_gradients[hook] = mean_gradients[hook] + share if hook in mean_gradients else share
        return values, scope.change_times(values, scope.baseline_parts(batch, means), mean_gradients)
