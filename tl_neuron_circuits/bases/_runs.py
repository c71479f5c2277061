"""Forward passes, and the values they leave at the sites of a basis."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._errors import UnsupportedModelError
from ..models._protocol import TransformerLensModel, hook_point, submodule
from ..models._run_state import require_steady
from ..models._threads import hooked, keep_value, this_thread_only
from ..tasks._metrics import Metric, reads_answers_only
from ..tasks._tokenized import Batch
from ._site import Parts, Site

Values = dict[str, Tensor]


def list_reads(sites: Iterable[Site]) -> list[str]:
    """Every hook point that some site reads, once each."""
    return list(dict.fromkeys(name for site in sites for name in site.reads))


def run_logits(model: TransformerLensModel, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Run the model on tokens.

    Raises:
        UnsupportedModelError: dropout is training.
        PropagationError: autocast is on.
    """
    require_steady(model, gradients=False)
    return model(tokens) if attention_mask is None else model(tokens, attention_mask=attention_mask)


@contextmanager
def answers_only(model: TransformerLensModel, batch: Batch, metric: Metric) -> Iterator[Batch]:
    """Inside, the model unembeds only the positions that the metric reads; yields the batch with positions to match.

    Logits are `[batch, 1, d_vocab]` there: with GPT-2's vocabulary they take a third of a forward pass, and are its
    largest tensor. A metric that is not ours, or a hook at the unembedding, gets the logits of all positions.
    """
    unembed = submodule(model, "unembed")
    points = [getattr(unembed, name, None) for name in ("hook_in", "hook_out")]
    hooked = any(point is not None and (point.fwd_hooks or point.bwd_hooks) for point in points)
    if unembed is None or hooked or not reads_answers_only(metric):
        yield batch
        return
    handle = unembed.register_forward_pre_hook(this_thread_only(partial(_keep_answers, batch.position)))
    try:
        yield replace(batch, position=torch.zeros_like(batch.position))
    finally:
        handle.remove()


def _keep_answers(position: Tensor, module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    residual, *others = arguments
    rows = torch.arange(len(residual), device=residual.device)
    return (residual[rows, position.to(residual.device)][:, None], *others)


def capture(store: Values, name: str) -> tuple[str, Any]:
    """A forward hook that keeps the value."""
    return name, partial(keep_value, store, name)


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

    `hooks` are forward hooks of the caller that run before the values are read; `kept` is applied to each value.

    Raises:
        UnsupportedModelError: a hook point did not fire.
    """
    wanted = list(dict.fromkeys(names))
    store: Values = {}
    # Where accelerate moves weights in and out (offloading), only the end of the pass puts them back.
    modules = torch.nn.Module.modules(model)  # pyright: ignore[reportArgumentType]
    to_the_end = not wanted or any(hasattr(module, "_hf_hook") for module in modules)
    count = None if to_the_end else len(wanted)
    readers = [(name, partial(_read, store, name, kept, count)) for name in wanted]
    with suppress(_AllRead), torch.no_grad(), hooked(model, [*hooks, *readers]):
        run_logits(model, tokens, attention_mask)
    return require_fired(store, wanted, model)


def _read(
    store: Values, name: str, kept: Callable[[Tensor], Tensor] | None, count: int | None, value: Tensor, hook: Any
) -> Tensor:
    """Keep the value; when `count` are there, end the pass."""
    store[name] = value if kept is None else kept(value)
    if len(store) == count:
        raise _AllRead
    return value


class _AllRead(Exception):
    """Every value that was asked for is there: ends the forward pass."""


def require_fired(store: Mapping[str, Tensor], names: Iterable[str], model: TransformerLensModel) -> Values:
    """The values, once it is known that every hook point in `names` fired.

    Raises:
        UnsupportedModelError: one is missing on this model, or did not fire.
    """
    missing = [name for name in names if name not in store]
    if missing:
        for name in missing:
            hook_point(model, name)
        raise UnsupportedModelError(
            f"expected the hook points {missing} to fire; they exist on this {type(model).__name__}, but did not. "
            "check_model(model).to_dataframe() lists the ones that fire."
        )
    return dict(store)


def take_apart(sites: Iterable[Site], values: Mapping[str, Tensor]) -> dict[str, Parts]:
    """A run's values as parts, by hook."""
    return {site.hook: site.take_apart(values) for site in sites}


def mean_parts(
    model: TransformerLensModel, sites: Iterable[Site], batches: Iterable[Batch]
) -> dict[tuple[str, int], Parts]:
    """Mean of every node over the clean prompts of `batches`, by position, among prompts of one length.

    Keys: (hook, prompt length). For the mean over corrupt prompts pass each batch's `on_corrupt()`.
    """
    sites = tuple(sites)
    sums: dict[tuple[str, int], Parts] = {}
    counts: dict[int, int] = {}
    for batch in batches:
        length = batch.clean.shape[1]
        counts[length] = counts.get(length, 0) + len(batch)
        for hook, parts in take_apart(sites, run_values(model, batch, list_reads(sites))).items():
            part = parts.map(lambda t: t.sum(0, keepdim=True, dtype=torch.promote_types(t.dtype, torch.float32)))
            before = sums.get((hook, length))
            sums[hook, length] = part if before is None else before.plus(part)
    return {key: part.map(lambda t, n=counts[key[1]]: t / n) for key, part in sums.items()}
