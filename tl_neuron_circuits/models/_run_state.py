"""The state a model may not be run in: dropout that is on, recomputed layers, weights that take no gradient, autocast.

Each makes numbers wrong without a sign (two runs of one prompt differ under dropout), or fails deep inside a pass.
"""

import weakref
from typing import Any

import torch
from torch import nn

from .._errors import PropagationError, UnsupportedModelError
from ._protocol import TransformerLensModel

_DROPOUTS: "weakref.WeakKeyDictionary[Any, list[tuple[str, weakref.ref[nn.Module], str]]]" = weakref.WeakKeyDictionary()
"""Where each model can drop values out: the modules and the field of the rate. Rates and modes are read every time."""


def require_steady(model: TransformerLensModel, *, gradients: bool) -> None:
    """Raise where a pass over `model` would not compute what the same pass computes the next time.

    Args:
        model: any TransformerLens model.
        gradients: whether a backward pass follows.

    Raises:
        UnsupportedModelError: dropout is training, or the weights can take no gradient.
        PropagationError: autocast is on, or layers are recomputed without a graph.
    """
    problems = _dropout_problems(model)
    if gradients:
        problems += _weight_problems(model)
    if problems:
        raise UnsupportedModelError(problems[0])
    if (rounding := _autocast_problem()) is not None:
        raise PropagationError(rounding)
    if gradients and (recomputed := _reentrant(model)) is not None:
        raise PropagationError(recomputed)


def state_problems(model: TransformerLensModel) -> list[str]:
    """What `require_steady` would say."""
    others = (_autocast_problem(), _reentrant(model))
    return [*_dropout_problems(model), *_weight_problems(model), *(problem for problem in others if problem)]


def _autocast_problem() -> str | None:
    """Why no rule can be trusted now: autocast rounds what a rule rebuilds, and scores move by 2 to 3%."""
    for device in ("cpu", "cuda"):
        if _autocast_is_on(device):
            return (
                f"torch.autocast({device!r}) is on: it rounds inside the model, and relevance moves by some percent. "
                "Leave it, or load the model in the dtype you want."
            )
    return None


def _autocast_is_on(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # torch before 2.4
        return torch.is_autocast_enabled() if device == "cuda" else torch.is_autocast_cpu_enabled()


def _dropout_problems(model: TransformerLensModel) -> list[str]:
    for name, reference, field in _dropouts(model):
        module = reference()
        rate = 0.0 if module is None or not module.training else getattr(module, field, 0.0)
        if isinstance(rate, float | int) and rate > 0:
            return [
                f"{name} drops values out ({field} = {rate:g}, train mode): two runs of one prompt differ, and their "
                "difference would pass for an effect. Call model.eval()."
            ]
    return []


def _dropouts(model: TransformerLensModel) -> list[tuple[str, Any, str]]:
    if model not in _DROPOUTS:
        found = []
        for name, module in nn.Module.named_modules(model):  # pyright: ignore[reportArgumentType]
            fields = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
            # Functional dropout: Hugging Face keeps its rate on the module that calls it.
            fields += [key for key, value in vars(module).items() if "dropout" in key and isinstance(value, float)]
            found += [(name, weakref.ref(module), field) for field in fields]
        _DROPOUTS[model] = found
    return _DROPOUTS[model]


def _weight_problems(model: TransformerLensModel) -> list[str]:
    first = next(iter(nn.Module.parameters(model)), None)  # pyright: ignore[reportArgumentType]
    if first is None or not first.is_inference():
        return []
    return [
        "its weights were made under torch.inference_mode() and can take no gradient. Load the model outside of it; "
        "torch.no_grad() is fine."
    ]


def _reentrant(model: TransformerLensModel) -> str | None:
    """Reentrant checkpointing runs layers without a graph, so that no hook sees a gradient."""
    for module in nn.Module.modules(model):  # pyright: ignore[reportArgumentType]
        function = vars(module).get(
            "_gradient_checkpointing_func"
        )  # getattr takes a Bridge's modules ten times as long
        if function is None or not module.training or not getattr(module, "gradient_checkpointing", False):
            continue
        if getattr(function, "keywords", {}).get("use_reentrant", True):
            return (
                "expected gradients to be enabled in every layer; reentrant gradient checkpointing runs them without a "
                "graph. Use gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}), or "
                "model.eval()."
            )
    return None
