"""One forward and one backward: values and gradients at every site of a basis."""

from collections.abc import Iterable
from typing import Any

import torch

from ..bases._runs import Values, answers_only, capture, fired, logits_of, reads_of
from ..bases._site import Site
from ..models._protocol import TransformerLensModel
from ..tasks._metrics import Metric, measure
from ..tasks._tokenized import Batch


def run_gradients(
    model: TransformerLensModel, batch: Batch, sites: Iterable[Site], metric: Metric, hooks: Any = ()
) -> tuple[Values, Values]:
    """Values at every hook a site reads, and the gradient of the metric's sum at every site's hook.

    One forward and one backward. The caller has entered `relp`, whose rules say what the gradient means. `hooks` run
    before the captures.
    """
    sites = tuple(sites)
    names = reads_of(sites)
    store: Values = {}
    reading = [capture(store, name) for name in names]
    with answers_only(model, batch, metric) as seen, model.hooks(fwd_hooks=[*hooks, *reading]):
        logits = logits_of(model, batch.clean, batch.attention_mask)
    fired(store, names, model)
    total = measure(metric, logits, seen).sum()
    del logits
    targets = [store[site.hook] for site in sites]
    gradients = torch.autograd.grad(total, targets)
    values = {name: value.detach() for name, value in store.items()}
    return values, {site.hook: gradient for site, gradient in zip(sites, gradients, strict=True)}
