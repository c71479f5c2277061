"""Integrated gradients, over one site at a time or over the token embeddings.

    score(n) = (a_clean - a_base) * mean_k d metric / d a |_{x = clean + k/K (base - clean)},  k = 0 .. K-1

`IntegratedGradients`: x is the whole activation of n's site; the rest of the network runs on the clean prompt. A
dictionary's decoder is linear, so moving its nodes together is moving the activation they make up.
`IntegratedGradientsInputs`: x is the token embeddings, so that one path serves all sites.
`Conductance`: the same path, but each step's gradient times what that step changes of the node:

    score(n) = sum_k d metric / d a (x_k) * (a(x_k) - a(x_{k-1})),  x_k = base + k/K (clean - base),  k = 1 .. K

Left Riemann sum: it includes the clean end, so K = 1 is attribution patching (`Gradient`).
Sign: positive supports the answer. Cost: K forwards and backwards, times the number of sites for the first.
Source: Marks et al. 2025, arXiv 2403.19647; Hanna et al. 2024, arXiv 2403.17806; Dhamdhere et al. 2019
(conductance); METHODS 1.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._errors import PairsError, SettingsError
from .._progress import progress
from ..bases._runs import Values, answers_only, run_logits, run_values, take_apart
from ..bases._site import Parts, Site, refuse_cross_layer
from ..models._threads import hooked
from ..propagation._gradients import gradients_by_name
from ..propagation._relp import relp
from ..propagation.rules import rule_set
from ..tasks._metrics import measure
from ..tasks._tokenized import Batch
from ._method import Method
from ._scope import Blocks, Means, Scope, gradients_at


@dataclass(frozen=True)
class _AlongPath(Method):
    """`steps` points of a path from the clean run to a baseline, and the rules of the gradients there."""

    steps: int = 10
    rules: str | tuple[str, ...] = ()

    def check(self, scope: Scope) -> None:
        """At least one step, known rules, and no denoising."""
        self.at_least_one("steps")
        self.no_denoising(scope)
        rule_set(self.rules)


@dataclass(frozen=True)
class IntegratedGradients(_AlongPath):
    """Gradients averaged along each site's own path; `rules` as in `relp`, none by default.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.IntegratedGradients(steps=20).label
        'integrated_gradients(steps=20)'
    """

    name: ClassVar[str] = "integrated_gradients"

    def check(self, scope: Scope) -> None:
        """At least one step, known rules, no denoising, and nodes that write to one place."""
        refuse_cross_layer(scope.sites, "integrated gradients of one site at a time")
        super().check(scope)

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """The mean gradient at every site, along that site's own path, times the change of every node."""
        values, baselines = scope.values(batch), scope.baseline_parts(batch, means)
        gradients = {
            site.hook: self._mean_gradient(scope, batch, site, values, baselines)
            for site in progress(scope.sites, desc="paths", verbose=verbose)
        }
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
                with answers_only(scope.model, batch, scope.metric) as narrowed, hooked(scope.model, replace):
                    logits = run_logits(scope.model, batch.clean, batch.attention_mask)
                total = measure(scope.metric, logits, narrowed).sum()
                gradient = gradients_by_name(total, {site.hook: point})[site.hook]
            mean += gradient / self.steps
        return mean


@dataclass(frozen=True)
class IntegratedGradientsInputs(_AlongPath):
    """Gradients averaged along one path, from the clean to the corrupt (or zero) token embeddings.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.IntegratedGradientsInputs(steps=5).label
        'integrated_gradients_inputs(steps=5)'
    """

    name: ClassVar[str] = "integrated_gradients_inputs"

    def check(self, scope: Scope) -> None:
        """At least one step, known rules, no denoising, and an end that is a run."""
        super().check(scope)
        if scope.baseline == "mean":
            raise SettingsError(
                "integrated gradients over inputs go to the corrupt prompt or to zero, not to a mean: "
                "give baseline='corrupt' or 'zero'."
            )

    def _ends(self, scope: Scope, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        """The clean embeddings and those that the path leads to."""
        clean = run_values(scope.model, batch, [name])[name]
        if scope.baseline == "zero":
            return clean, torch.zeros_like(clean)
        if batch.corrupt is None:
            raise PairsError("integrated gradients over inputs need corrupt prompts, or baseline='zero'.")
        return clean, run_values(scope.model, batch.on_corrupt(), [name])[name]

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """The mean gradient at every site, along the path of the embeddings, times the change of every node."""
        name = "hook_embed"
        clean, end = self._ends(scope, batch, name)
        values, mean_gradients = scope.values(batch), dict[str, Tensor]()
        for step in progress(range(self.steps), desc="steps", verbose=verbose):
            point = torch.lerp(clean, end, step / self.steps)
            enter = (name, lambda value, hook, point=point: point.clone().requires_grad_(True))
            _, gradients = gradients_at(scope.model, batch, scope.sites, scope.metric, self.rules, hooks=[enter])
            for hook, gradient in gradients.items():
                share = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / self.steps
                mean_gradients[hook] = mean_gradients[hook] + share if hook in mean_gradients else share
        return values, scope.change_times(values, scope.baseline_parts(batch, means), mean_gradients)


@dataclass(frozen=True)
class Conductance(IntegratedGradientsInputs):
    """What flows through each node along the path of the embeddings: gradients times the node's own steps.

    Over all nodes of a layer through which everything passes the scores sum to the metric's change, as K grows. With
    `baseline="zero"` the path starts at zero embeddings, and the node's value there is its first.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.nodes.Conductance(steps=20).label
        'conductance(steps=20)'
    """

    name: ClassVar[str] = "conductance"

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """The sum over steps, the corrupt (or zero) end first: K + 1 forwards and backwards."""
        name = "hook_embed"
        clean, base = self._ends(scope, batch, name)
        total: Blocks = {}
        before: dict[str, Parts | None] = {}
        for step in progress(range(self.steps + 1), desc="steps", verbose=verbose):
            point = torch.lerp(base, clean, step / self.steps)
            enter = (name, lambda value, hook, point=point: point.clone().requires_grad_(True))
            values, gradients = gradients_at(scope.model, batch, scope.sites, scope.metric, self.rules, hooks=[enter])
            if before:
                for key, block in scope.change_times(values, before, gradients).items():
                    total[key] = total[key] + block if key in total else block
            before = dict(take_apart(scope.sites, values))
        return scope.values(batch), total
