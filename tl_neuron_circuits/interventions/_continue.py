"""Continue prompts greedily under hooks, with the model's key-value cache where that gives the same text.

The first pass reads the prompt, every later one a single token; keys and values of the prompt stay as the prompt's pass
computed them, steered. The first such pass is compared with a pass over the whole text. Where their logits differ, or
the model cannot be run this way, every token gets a pass over the whole text instead: slower, and right.

The comparison is needed. With transformers 5.24 a TransformerBridge of TransformerLens 3.9 or 4.3 looks for its cache
under a name that most architectures no longer use, and generated tokens then see nothing but themselves. Here a
pre-hook on every attention module hands the cache over under both names.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models._key_values import bridge_cache_argument, hooked_transformer_cache, takes_hooked_transformer_cache
from ..models._protocol import TransformerLensModel
from ..models._threads import hooked
from ._ablation import Hooks
from ._steering_prompts import text_of

logger = logging.getLogger(__name__)

# A pass of one token instead of the whole text moves logits by rounding alone; a lost prompt moves them by their size.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_COARSE = 5e-2
Pass = Callable[[Int[Tensor, "batch new"], int], Float[Tensor, "batch new d_vocab"]]
"""Logits of tokens that come after the given number of others, which earlier calls have read."""


def continue_greedily(
    model: TransformerLensModel, tokens: Int[Tensor, "batch pos"], n: int, hooks: Hooks, *, cache: bool = True
) -> list[str]:
    """Greedy continuations of every row by `n` tokens, or up to the end-of-text token."""
    if not n:
        return [""] * len(tokens)
    end = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    with torch.no_grad(), hooked(model, hooks):
        text = _with_cache(model, tokens, n, end) if cache and n > 2 else None
        if text is None:
            text = _extend(tokens, n, end, lambda text: model(text)[:, -1])
    continued = []
    for row in text[:, tokens.shape[1] :]:
        ends = (row == end).nonzero() if end is not None else []
        continued.append(text_of(model, row[: int(ends[0])] if len(ends) else row))
    return continued


def _extend(
    text: Int[Tensor, "batch pos"], n: int, end: int | None, next_logits: Callable[[Tensor], Tensor]
) -> Int[Tensor, "batch more"]:
    """`n` tokens more, and nothing but `end` after the first `end`."""
    ended = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for _ in range(n):
        best = next_logits(text).argmax(-1).to(text)
        if end is not None:
            best = torch.where(ended, torch.full_like(best, end), best)
            ended = ended | (best == end)
        text = torch.cat([text, best[:, None]], dim=1)
        if end is not None and bool(ended.all()):
            break
    return text


def _with_cache(model: Any, tokens: Tensor, n: int, end: int | None) -> Int[Tensor, "batch more"] | None:
    """None where the model has no cache that gives what passes over the whole text give."""
    for both_names in (False, True):
        with _cached_pass(model, len(tokens), both_names) as one_pass:
            known = None if one_pass is None else _probe(model, tokens, one_pass)
            if one_pass is None or known is None:
                continue

            def next_logits(text: Tensor, known: dict[int, Tensor] = known, one_pass: Pass = one_pass) -> Tensor:
                seen = text.shape[1] - 1
                return known[seen + 1] if seen + 1 in known else one_pass(text[:, -1:], seen)[:, -1]

            return _extend(tokens, n, end, next_logits)
    return None


def _probe(model: Any, tokens: Tensor, one_pass: Pass) -> dict[int, Tensor] | None:
    """Next-token logits after the prompt and after one token more, by length; None where the cache spoils them."""
    length = tokens.shape[1]
    try:
        first = one_pass(tokens, 0)[:, -1]
        text = torch.cat([tokens, first.argmax(-1)[:, None].to(tokens)], dim=1)
        second = one_pass(text[:, -1:], length)[:, -1]
    except Exception as error:  # noqa: BLE001 (what a lost cache leads to; any other error comes again without one)
        logger.debug("a key-value cache failed: %s", error)
        return None
    expected = model(text)[:, -1]
    size = (expected - expected.mean(-1, keepdim=True)).float().abs().max()
    apart = float((second - expected).float().abs().max() / size)
    if not apart <= _TOLERANCE.get(expected.dtype, _COARSE):
        logger.debug("a key-value cache moved logits by %.2g of their size", apart)
        return None
    return {length: first, length + 1: second}


@contextmanager
def _cached_pass(model: Any, batch: int, both_names: bool) -> Iterator[Pass | None]:
    """Passes that share one cache, or None where nothing of the kind is known for this model."""
    hooked_transformer = takes_hooked_transformer_cache(model)
    attention = [module for module in model.modules() if hasattr(module, "_update_kv_cache")]
    with ExitStack() as stack:
        if hooked_transformer and not both_names:
            yield _pass_of_hooked_transformer(model, batch)
        elif attention and hasattr(model, "original_model"):
            for module in attention if both_names else ():
                stack.callback(module.register_forward_pre_hook(_under_both_names, with_kwargs=True).remove)
            yield _pass_of_bridge(model, batch)
        else:
            yield None


def _pass_of_hooked_transformer(model: Any, batch: int) -> Pass:
    cache = hooked_transformer_cache(model, batch, model.cfg.device)
    return lambda tokens, seen: model(tokens, past_kv_cache=cache, attention_mask=torch.ones_like(tokens))


def _pass_of_bridge(model: Any, batch: int) -> Pass:
    from transformers import DynamicCache

    original, options = model.original_model, {}
    if "config" in inspect.signature(DynamicCache).parameters:
        options["config"] = original.config.get_text_config()
    cache, known = DynamicCache(**options), inspect.signature(original.forward).parameters
    name = bridge_cache_argument(model)

    def one_pass(tokens: Tensor, seen: int) -> Tensor:
        mask = torch.ones(batch, seen + tokens.shape[1], dtype=torch.long, device=tokens.device)
        places = torch.arange(seen, mask.shape[1], device=tokens.device).expand(batch, -1)
        more = {"position_ids": places} if "position_ids" in known else {}
        return model(tokens, attention_mask=mask, use_cache=True, **{name: cache}, **more)

    return one_pass


def _under_both_names(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The cache that transformers hands to attention as `cache`, where TransformerLens looks for it."""
    return args, {**options, "past_key_values": options.get("cache")}
