"""What a call must leave as it found it: hooks, flags, parameters, modes and the global state of torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TORCH_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _modules(model: Any) -> dict[str, torch.nn.Module]:
    roots = {"": model, "original_model.": getattr(model, "original_model", None)}
    found = {
        prefix + name: module
        for prefix, root in roots.items()
        if isinstance(root, torch.nn.Module)
        for name, module in root.named_modules()
    }
    return found | {f"hook_dict[{name}]": point for name, point in model.hook_dict.items()}


def _snapshot(model: Any) -> dict[str, Any]:
    """Map a readable name to each thing that must not change; hooks are kept alive so that identity is meaningful."""
    state: dict[str, Any] = {}
    for name, module in _modules(model).items():
        state[f"{name} training"] = module.training
        for attribute in _TORCH_HOOKS:
            state[f"{name} {attribute}"] = list(getattr(module, attribute).items())
        for attribute in ("fwd_hooks", "bwd_hooks", "fwd_hook_handles", "bwd_hook_handles"):
            if hasattr(module, attribute):
                state[f"{name} {attribute}"] = list(getattr(module, attribute))
        for attribute in ("ctx", "is_caching", "context_level"):
            if attribute in vars(module):
                value = vars(module)[attribute]
                state[f"{name} {attribute}"] = dict(value) if isinstance(value, dict) else value
    for name, parameter in model.named_parameters():
        state[f"{name} requires_grad"] = parameter.requires_grad
        state[f"{name} grad"] = None if parameter.grad is None else (parameter.grad, parameter.grad._version)
        state[f"{name} value"] = (parameter.data_ptr(), parameter._version)
        state[f"{name} hooks"] = list((parameter._backward_hooks or {}).items())
    state |= {f"cfg.{field}": repr(value) for field, value in vars(model.cfg).items()}
    state["grad mode"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    state["default dtype"] = torch.get_default_dtype()
    state["global random state"] = torch.get_rng_state().tolist()
    return state


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor) or isinstance(after, torch.Tensor):
        return before is after
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        return len(before) == len(after) and all(_same(b, a) for b, a in zip(before, after, strict=True))
    return before is after or bool(before == after)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Assert that the block, whether it returns or raises, leaves the model and torch as it found them."""
    before = _snapshot(model)
    try:
        yield
    finally:
        after = _snapshot(model)
        changed = [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]
        assert not changed, f"left changed: {sorted(changed)}"
