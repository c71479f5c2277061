"""Runs that begin after a shared prefix: few-shot prompts, computed once up to where they differ.

    the first P positions' keys and values are the model's own, whatever is ablated, if ablation changes nothing there:
    mean, resample   the first P tokens are the same in all prompts of this length, clean and corrupt
    corrupt          they are the same in the two prompts of each pair
    zero             never

There every node is what it is replaced by, so a run needs only the other positions, and attends to the P cached ones.
The caches are the libraries' own: TransformerLens' for HookedTransformer, transformers' for TransformerBridge, frozen.
Architectures and versions differ in how they treat them, so the first batch is run both ways: where the logits differ
by more than rounding, where a call fails, and where the model has hooks of the user's, all positions are run.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._memory import is_out_of_memory
from ..bases._runs import answers_only, run_logits
from ..bases._site import Parts
from ..interventions._ablation import Ablation, Kept
from ..models._key_values import bridge_cache_argument, hooked_transformer_cache, takes_hooked_transformer_cache
from ..models._protocol import TransformerLensModel, hook_points, submodule
from ..models._run_state import require_steady
from ..models._threads import held, this_thread_only
from ..tasks._metrics import Metric, reads_answers_only
from ..tasks._tokenized import Batch, TokenizedPairs

logger = logging.getLogger(__name__)
_FEWEST_RUNS, _SHORTEST = 8, 8
_ROUNDING = 1e-5  # of the largest logit

Run = Callable[[], Tensor]


class SharedPrefix:
    """The beginning that the pairs of one evaluation share, and whether this model can continue from there.

    Args:
        model: the model.
        tokens: all pairs, also those of other processes.
        ablation: what replaces nodes.
        metric: positions change, so one of the package's, which read answers alone.
        reference: pairs whose corrupt prompts the means come from, where it is not these.
    """

    def __init__(
        self, model: TransformerLensModel, tokens: TokenizedPairs, ablation: Ablation, metric: Metric,
        reference: TokenizedPairs | None = None,
    ) -> None:  # fmt: skip
        self._model, self._tokens, self._ablation, self._metric = model, tokens, ablation, metric
        self._sources = (tokens if reference is None else reference).corrupt or ()
        self._by_length: dict[int, int] = {}
        self._works: bool | None = None
        if not reads_answers_only(metric) or any(point.fwd_hooks for point in hook_points(model).values()):
            self._works = False

    @contextmanager
    def runs(self, batch: Batch, n: int) -> Iterator[tuple[int, Batch, Run]]:
        """For n runs of a batch: how many positions they leave out, the rest of the batch, and what runs the model."""
        start = self.length(batch) if n >= _FEWEST_RUNS and self._works is not False else 0
        if start and self._works is None:
            self._works = self._try(batch, start)
        if not start or not self._works:
            yield 0, batch, lambda: run_logits(self._model, batch.clean, batch.attention_mask)
            return
        with self._after(batch, start) as run:
            yield start, _rest(batch, start), run

    def length(self, batch: Batch) -> int:
        """How many first positions no ablation changes; 0 where so few that it would not pay."""
        if self._ablation == "zero" or batch.attention_mask is not None or batch.corrupt is None:
            return 0
        if batch.corrupt.shape != batch.clean.shape:
            return 0
        length = batch.clean.shape[1]
        if self._ablation == "corrupt":
            shared = _common(batch.clean == batch.corrupt)
        else:
            if length not in self._by_length:
                prompts = [p for p in (*self._tokens.clean, *self._sources) if len(p) == length]
                every = torch.stack(prompts)
                self._by_length[length] = _common(every == every[:1])
            shared = self._by_length[length]
        shared = min(shared, int(batch.position.min()))
        return shared if shared >= max(_SHORTEST, length // 4) else 0

    def _try(self, batch: Batch, start: int) -> bool:
        """Whether the whole model's logits are the same from the prefix."""
        with answers_only(self._model, batch, self._metric) as seen:
            whole = _at_answers(run_logits(self._model, batch.clean), seen)
        try:
            with self._after(batch, start) as run, answers_only(self._model, _rest(batch, start), self._metric) as seen:
                found = _at_answers(run(), seen)
            off = float((found - whole).abs().max() / whole.abs().max())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.info("all positions are run: no cached prefix on this model (%s)", error)
            return False
        if not off <= _ROUNDING:
            logger.info("all positions are run: from a cached prefix the logits are off by %.1e of the largest", off)
        return off <= _ROUNDING

    @contextmanager
    def _after(self, batch: Batch, start: int) -> Iterator[Run]:
        """What runs the rest of the batch from the keys and values of its first positions."""
        model: Any = self._model
        require_steady(model, gradients=False)
        first, rest = batch.clean[:, :start], batch.clean[:, start:]
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(held(model, "an evaluation from a cached prefix"))
            if takes_hooked_transformer_cache(model):
                options = _hooked_transformer_cache(model, first)
            else:
                options = stack.enter_context(_bridge_cache(model))
            narrow = replace(batch, position=torch.zeros_like(batch.position))  # its logits are not needed
            with answers_only(model, narrow, self._metric):
                model(first, **options(first))
            options(None)
            yield lambda: model(rest, **options(rest))


def after(baselines: Mapping[str, Parts | None], start: int) -> Mapping[str, Parts | None]:
    """The values of ablated nodes from a position on."""
    if not start:
        return baselines
    return {
        hook: None if base is None else base.map(lambda value: value[:, start:]) for hook, base in baselines.items()
    }


def kept_after(kept: Kept | None, start: int) -> Kept | None:
    """The masks from a position on; those that are the same at all positions have none to cut."""
    if kept is None or not start:
        return kept
    dims = {True: 2, False: 1}
    return {key: mask[start:] if mask.dim() == dims[key[1] == "node"] else mask for key, mask in kept.items()}


def _common(same: Tensor) -> int:
    """The number of first columns that are true in every row."""
    return int(same.all(0).long().cumprod(0).sum())


def _rest(batch: Batch, start: int) -> Batch:
    return replace(
        batch, clean=batch.clean[:, start:], position=batch.position - start, corrupt=None, corrupt_position=None
    )


def _at_answers(logits: Tensor, batch: Batch) -> Tensor:
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, batch.position.to(logits.device)].float()


def _hooked_transformer_cache(model: Any, first: Tensor) -> Callable[[Tensor | None], dict[str, Any]]:
    """The options of a call: the first fills the cache; None freezes it, so that the others leave it as it is."""
    cache = hooked_transformer_cache(model, len(first), first.device)

    def options(tokens: Tensor | None) -> dict[str, Any]:
        if tokens is None:
            cache.freeze()
            return {}
        return {"past_kv_cache": cache, "attention_mask": torch.ones_like(tokens)}  # else pads are looked for

    return options


@contextmanager
def _bridge_cache(model: Any) -> Iterator[Callable[[Tensor | None], dict[str, Any]]]:
    """The same with transformers' cache; its newer versions hand it to attention by a name that the bridge ignores."""
    from transformers import DynamicCache

    class Frozen(DynamicCache):
        full = False

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **more: Any) -> Any:
            if not self.full:
                return super().update(key_states, value_states, layer_idx, *args, **more)
            prefix: Any = self.layers[layer_idx]
            return torch.cat([prefix.keys, key_states], -2), torch.cat([prefix.values, value_states], -2)

    def hand_over(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
        if "cache" in options and options.get("past_key_values") is None:
            options["past_key_values"] = options.pop("cache")
        return arguments, options

    cache = Frozen()
    name = bridge_cache_argument(model)

    def options(tokens: Tensor | None) -> dict[str, Any]:
        cache.full = cache.full or tokens is None
        return {name: cache, "use_cache": True}

    attention = [submodule(model, f"blocks.{layer}.attn") for layer in range(int(model.cfg.n_layers))]
    with ExitStack() as stack:
        for module in attention:
            if module is not None:
                handle = module.register_forward_pre_hook(this_thread_only(hand_over), with_kwargs=True)
                stack.callback(handle.remove)
        yield options
