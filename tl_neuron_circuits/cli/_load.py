"""Loading what MODEL names."""

import warnings
from pathlib import Path
from typing import Any

from .._errors import SettingsError
from ._terminal import say

BACKENDS = ("auto", "HookedTransformer", "TransformerBridge")
DTYPES = ("float32", "bfloat16", "float16")


def load_model(name: str, backend: str = "auto", device: str | None = None, dtype: str = "float32") -> Any:
    """A demo model, a local Hugging Face folder (TransformerBridge), or a name that TransformerLens can load.

    Args:
        name: what to load.
        backend: "HookedTransformer", "TransformerBridge", or "auto": the first of them that can.
        device: None is cuda where there is one, else the CPU; demo models stay on the CPU.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        SettingsError: nothing of that name, an unknown setting, or the installed TransformerLens lacks the class.
    """
    import torch

    from ..demo._models import DEMO_MODELS, load_demo_model

    if backend not in BACKENDS:
        raise SettingsError(f"expected --backend out of {', '.join(BACKENDS)}; got {backend!r}.")
    if dtype not in DTYPES:
        raise SettingsError(f"expected --dtype out of {', '.join(DTYPES)}; got {dtype!r}.")
    _check_device(device)
    say(f"loading {name}")
    options = {"device": device or ("cuda" if torch.cuda.is_available() else "cpu"), "dtype": getattr(torch, dtype)}
    if name in DEMO_MODELS:
        return load_demo_model(name, backend, device=device or "cpu", dtype=options["dtype"])
    loaders = {"HookedTransformer": [_hooked], "TransformerBridge": [_bridge], "auto": [_hooked, _bridge]}[backend]
    reasons = []
    for load in loaders:
        try:
            return load(name, options)
        except ImportError:
            reasons.append(f"{load.__name__.strip('_')}: not in the installed TransformerLens")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reasons.append(f"{load.__name__.strip('_')}: {(str(error).strip() or repr(error)).splitlines()[0][:200]}")
    raise SettingsError(
        f"cannot load {name!r}. Give demo-gelu, demo-swiglu, a name that TransformerLens knows or a local Hugging Face "
        "folder (with TransformerLens 3.9 or later).\n" + "\n".join(reasons)
    )


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"expected a --device that this torch can use, such as cpu or cuda; {device!r} gives: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _hooked(name: str, options: dict[str, Any]) -> Any:
    from transformer_lens import HookedTransformer

    if Path(name).is_dir():
        raise ValueError("a local folder loads as TransformerBridge")
    with warnings.catch_warnings():  # leaving TransformerLens, and what most users of versions below 4 still hold
        warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
        return HookedTransformer.from_pretrained(name, **options)


def _bridge(name: str, options: dict[str, Any]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, **options)
