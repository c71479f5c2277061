"""Key-value caches of either model class: how they are made, and the name under which a forward pass takes them."""

import inspect
from typing import Any

import torch


def hooked_transformer_cache(model: Any, batch: int, device: torch.device | str) -> Any:
    """An empty cache of a HookedTransformer; its class has another name in TransformerLens 2."""
    import transformer_lens

    names = ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache")  # of 3 and of 2
    kind = next(getattr(transformer_lens, name) for name in names if hasattr(transformer_lens, name))
    return kind.init_cache(model.cfg, device, batch)


def takes_hooked_transformer_cache(model: Any) -> bool:
    """Whether the model is called with such a cache."""
    return "past_kv_cache" in inspect.signature(type(model).forward).parameters


def bridge_cache_argument(model: Any) -> str:
    """The argument by which the model under a TransformerBridge takes a cache of transformers."""
    known = inspect.signature(model.original_model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"
