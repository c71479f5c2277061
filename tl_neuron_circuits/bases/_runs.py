"""Forward passes and what they leave at the sites of a basis."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._errors import UnsupportedModelError
from ..models import TransformerLensModel, hook_point
from ..tasks import Batch
from ._site import Parts, Site

Values = dict[str, Tensor]


def reads_of(sites: Iterable[Site]) -> list[str]:
    """Every hook point that some site reads, once."""
    return list(dict.fromkeys(name for site in sites for name in site.reads))


def logits_of(model: TransformerLensModel, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Run the model on tokens."""
    return model(tokens) if attention_mask is None else model(tokens, attention_mask=attention_mask)


def capture(store: Values, name: str) -> tuple[str, Any]:
    """A forward hook that keeps the value. Returning it keeps reshaped views (`hook_conversion`) in the graph."""

    def keep(value: Tensor, hook: Any) -> Tensor:
        store[name] = value
        return value

    return name, keep


def run_values(model: TransformerLensModel, batch: Batch, names: Iterable[str]) -> Values:
    """Values at `names` on the batch's clean prompts, without a graph.

    Raises:
        UnsupportedModelError: a hook point did not fire.
    """
    store: Values = {}
    with torch.no_grad(), model.hooks(fwd_hooks=[capture(store, name) for name in names]):
        logits_of(model, batch.clean, batch.attention_mask)
    return fired(store, names, model)


def fired(store: Mapping[str, Tensor], names: Iterable[str], model: TransformerLensModel) -> Values:
    """The store, once every hook point in `names` is in it."""
    missing = [name for name in names if name not in store]
    if missing:
        for name in missing:
            hook_point(model, name)
        raise UnsupportedModelError(
            f"expected the hook points {missing} to fire; they exist on this {type(model).__name__} but did not. "
            "check_model(model).to_dataframe() lists the ones that fire."
        )
    return dict(store)


def take_apart(sites: Iterable[Site], values: Mapping[str, Tensor]) -> dict[str, Parts]:
    """A run's values as parts, by hook."""
    return {site.hook: site.take_apart(values) for site in sites}


def mean_parts(
    model: TransformerLensModel, sites: Iterable[Site], batches: Iterable[Batch]
) -> dict[tuple[str, int], Parts]:
    """Mean of every node over the clean prompts of `batches`, per position, among prompts of one length.

    Keys: (hook, prompt length). For the mean over corrupt prompts give `batch.on_corrupt()` of each.
    """
    sites = tuple(sites)
    sums: dict[tuple[str, int], Parts] = {}
    counts: dict[int, int] = {}
    for batch in batches:
        length = batch.clean.shape[1]
        counts[length] = counts.get(length, 0) + len(batch)
        for hook, parts in take_apart(sites, run_values(model, batch, reads_of(sites))).items():
            part = parts.map(lambda t: t.sum(0, keepdim=True, dtype=torch.promote_types(t.dtype, torch.float32)))
            seen = sums.get((hook, length))
            sums[hook, length] = part if seen is None else seen.plus(part)
    return {key: part.map(lambda t, n=counts[key[1]]: t / n) for key, part in sums.items()}
