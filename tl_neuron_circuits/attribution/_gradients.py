"""One forward and one backward: values and gradients at every site of a basis."""

from collections.abc import Iterable
from typing import Any

import torch

from ..bases import Site, Values, answers_only, capture, fired, logits_of, reads_of
from ..models import TransformerLensModel
from ..tasks import Batch, Metric, measure


def run_gradients(
    model: TransformerLensModel, batch: Batch, sites: Iterable[Site], metric: Metric, hooks: Any = ()
) -> tuple[Values, Values]:
    """Values at every hook a site reads, and the gradient of the metric's sum at every site's hook.

    One forward and one backward. The caller has entered `relp`, whose rules say what the gradient means. `hooks` run
    before the captures.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> batch = next(tnc.tasks.tokenize(model, pairs).batches(8))
        >>> with tnc.relp(model):
        ...     values, gradients = attribution.run_gradients(
        ...         model, batch, tnc.bases.Neurons().sites(model), tnc.tasks.logit_difference
        ...     )
        >>> hook = "blocks.0.mlp.hook_post"
        >>> values[hook].shape == gradients[hook].shape
        True
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
