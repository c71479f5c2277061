"""Activations pooled over positions while features are zero, and the features' support for a probe of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..bases._runs import Values, capture, fired, logits_of, reads_of, values_at
from ..bases._site import Parts, Site
from ..models._protocol import TransformerLensModel
from ..propagation._relp import relp
from ..tasks._tokenized import TokenizedPairs
from ._probe import Probe


@dataclass(frozen=True, eq=False)
class Ablation:
    """Which units of which sites are zero, and where activations are read: their mean from position `skip` on.

    Without `errors` a site's value is what its dictionary makes of it.
    """

    sites: Sequence[Site]
    units: Mapping[str, Sequence[int]]
    hook: str
    skip: int
    batch_size: int
    errors: bool = True

    def of(self, features: pd.DataFrame) -> "Ablation":
        """The same with these features (columns hook and unit) at zero."""
        units = {str(hook): rows["unit"].tolist() for hook, rows in features.groupby("hook")}
        return replace(self, units=units)

    def hooks(self, store: Values) -> list[tuple[str, Any]]:
        """What a site reads is kept on the way; where it writes, its units are taken out of the value."""
        ablated = [site for site in self.sites if self.units.get(site.hook) or not self.errors]
        reads = [name for name in reads_of(ablated) if name not in {site.hook for site in ablated}]
        return [*(capture(store, name) for name in reads), *(self._take_out(site, store) for site in ablated)]

    def _take_out(self, site: Site, store: Values) -> tuple[str, Any]:
        units = list(self.units.get(site.hook, ()))

        def without(value: Tensor, hook: Any) -> Tensor:
            parts = site.take_apart({name: value if name == site.hook else store[name] for name in site.reads})
            nodes = parts.nodes.clone()
            nodes[..., units] = 0
            vectors = {name: v for name, v in parts.vectors.items() if self.errors or name != "error"}
            return site.put_together(Parts(nodes, vectors), value)

        return site.hook, without


def pooled_activations(
    model: TransformerLensModel, tokens: TokenizedPairs, ablation: Ablation
) -> Float[Tensor, "text d"]:
    """Mean over positions at `ablation.hook`, float32 on the CPU."""
    rows: list[Tensor] = [torch.empty(0)] * len(tokens)
    for batch in tokens.batches(ablation.batch_size):
        hooks, mask = ablation.hooks({}), batch.attention_mask
        value = values_at(model, batch.clean, [ablation.hook], attention_mask=mask, hooks=hooks)[ablation.hook]
        value = value.flatten(2)
        for row, mean in zip(batch.index.tolist(), value[:, ablation.skip :].mean(1).float().cpu(), strict=True):
            rows[row] = mean
    return torch.stack(rows)


def probe_support(
    model: TransformerLensModel,
    tokens: TokenizedPairs,
    ablation: Ablation,
    probe: Probe,
    label: Tensor,
    rules: Sequence[str],
) -> Float[Tensor, " node"]:
    """Mean over texts of sum over positions of activation * d(log odds of the text's label) / d activation, by node.

    The gradient is the model's own, or RelP's with `rules`. Nothing is ablated, and errors are kept.
    """
    total: Tensor | None = None
    names = list(dict.fromkeys([*reads_of(ablation.sites), ablation.hook]))
    for batch in tokens.batches(ablation.batch_size):
        store: Values = {}
        hooks = [_leaf(store, name) for name in names]
        with torch.enable_grad(), relp(model, rules), model.hooks(fwd_hooks=hooks):
            logits_of(model, batch.clean, batch.attention_mask)
        values = fired(store, names, model)
        pooled = values[ablation.hook].flatten(2)[:, ablation.skip :].mean(1)
        sign = 2.0 * label[batch.index.cpu()].to(pooled) - 1
        goal = (sign * (pooled @ probe.weights.to(pooled))).sum()
        hooks = [site.hook for site in ablation.sites]
        gradients = torch.autograd.grad(goal, [values[hook] for hook in hooks], allow_unused=True)
        parts = []
        for site, gradient in zip(ablation.sites, gradients, strict=True):
            nodes = site.take_apart({name: values[name].detach() for name in site.reads}).nodes[:, ablation.skip :]
            if gradient is None:  # the probe reads before this site
                parts.append(nodes.new_zeros(nodes.shape[2]))
            else:
                parts.append((nodes * site.node_gradient(gradient)[:, ablation.skip :]).sum((0, 1)))
        found = torch.cat([part.double().cpu() for part in parts])
        total = found if total is None else total + found
    assert total is not None  # there is at least one text
    return total / len(tokens)


def _leaf(store: Values, name: str) -> tuple[str, Any]:
    """Keep the value in the graph; where parameters are frozen and no graph began, begin one."""

    def keep(value: Tensor, hook: Any) -> Tensor:
        store[name] = value if value.requires_grad else value.detach().requires_grad_(True)
        return store[name]

    return name, keep
