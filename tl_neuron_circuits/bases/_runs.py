"""Forward passes and what they leave at the sites of a basis."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._errors import UnsupportedModelError
from ..models._protocol import TransformerLensModel, hook_point, submodule
from ..tasks._metrics import Metric, reads_answers_only
from ..tasks._tokenized import Batch
from ._site import Parts, Site

Values = dict[str, Tensor]


def reads_of(sites: Iterable[Site]) -> list[str]:
    """Every hook point that some site reads, once."""
    return list(dict.fromkeys(name for site in sites for name in site.reads))


def logits_of(model: TransformerLensModel, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Run the model on tokens."""
    return model(tokens) if attention_mask is None else model(tokens, attention_mask=attention_mask)


@contextmanager
def answers_only(model: TransformerLensModel, batch: Batch, metric: Metric) -> Iterator[Batch]:
    """Inside, the model unembeds only the positions that the metric reads; yields the batch as it then reads them.

    Logits are `[batch, 1, d_vocab]` there: with GPT-2's vocabulary they are a third of a forward pass, and its largest
    tensor. A metric that is not ours, or a hook at the unembedding, gets the logits of all positions.
    """
    unembed = submodule(model, "unembed")
    points = () if unembed is None else (getattr(unembed, name, None) for name in ("hook_in", "hook_out"))
    if unembed is None or not reads_answers_only(metric) or any(_hooked(point) for point in points):
        yield batch
        return

    handle = unembed.register_forward_pre_hook(functools.partial(_narrow, batch.position))
    try:
        yield replace(batch, position=torch.zeros_like(batch.position))
    finally:
        handle.remove()


def _narrow(position: Tensor, module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    residual, *others = arguments
    rows = torch.arange(len(residual), device=residual.device)
    return (residual[rows, position.to(residual.device)][:, None], *others)


def _hooked(point: Any) -> bool:
    return point is not None and bool(point.fwd_hooks or point.bwd_hooks)


def capture(store: Values, name: str) -> tuple[str, Any]:
    """A forward hook that keeps the value. Returning it keeps reshaped views (`hook_conversion`) in the graph."""
    return name, functools.partial(_keep, store, name)


def _keep(store: Values, name: str, value: Tensor, hook: Any) -> Tensor:
    store[name] = value
    return value


def run_values(model: TransformerLensModel, batch: Batch, names: Iterable[str]) -> Values:
    """Values at `names` on the batch's clean prompts, without a graph.

    Raises:
        UnsupportedModelError: a hook point did not fire.
    """
    return values_at(model, batch.clean, names, attention_mask=batch.attention_mask)


def values_at(
    model: TransformerLensModel,
    tokens: Tensor,
    names: Iterable[str],
    *,
    attention_mask: Tensor | None = None,
    hooks: Iterable[tuple[str, Any]] = (),
    kept: Callable[[Tensor], Tensor] | None = None,
) -> Values:
    """Values at `names`, without a graph; the forward pass ends at the last of them, so that no logits are computed.

    `hooks` are forward hooks of the caller's that run before the values are read; `kept` says what to keep of a value
    (all of it). Where accelerate moves weights in and out (offloading), the pass runs to its end, which puts them back.

    Raises:
        UnsupportedModelError: a hook point did not fire.
    """
    wanted = list(dict.fromkeys(names))
    store: Values = {}
    whole = not wanted or any(hasattr(module, "_hf_hook") for module in _modules(model))

    enough = None if whole else len(wanted)
    reading = [(name, functools.partial(_read, store, name, kept, enough)) for name in wanted]
    with suppress(_AllRead), torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *reading]):
        logits_of(model, tokens, attention_mask)
    return fired(store, wanted, model)


def _modules(model: TransformerLensModel) -> Iterable[torch.nn.Module]:
    return torch.nn.Module.modules(model)  # pyright: ignore[reportArgumentType]


def _read(
    store: Values,
    name: str,
    kept: Callable[[Tensor], Tensor] | None,
    enough: int | None,
    value: Tensor,
    hook: Any,
) -> Tensor:
    store[name] = value if kept is None else kept(value)
    if len(store) == enough:
        raise _AllRead
    return value


class _AllRead(Exception):
    """Every value that was asked for is there."""


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
