"""What this package asks of a model: the part that `HookedTransformer` and `TransformerBridge` share.

The members are only `cfg` and methods found on the class. Module attributes such as `blocks` would make `isinstance`
False on Python 3.12 and later (protocol checks read attributes statically), and `W_in` evaluated is a stacked copy.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, runtime_checkable

from torch import nn

from .._errors import UnsupportedModelError


@runtime_checkable
class TransformerLensModel(Protocol):
    """A TransformerLens model: `HookedTransformer` (2.16 to 3.x) or `TransformerBridge` (3.9 and later).

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import models
        >>> model = tnc.load_demo_model()
        >>> isinstance(model, models.TransformerLensModel)
        True
    """

    @property
    def cfg(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def hooks(self, *args: Any, **kwargs: Any) -> Any: ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_submodule(self, *args: Any, **kwargs: Any) -> Any: ...


def model_name(model: TransformerLensModel) -> str:
    """The name that the model's configuration gives, or "unknown"; of a local path only the last part.

    Where a model lies on a disk says nothing to others, and may say more than its owner wants.
    """
    return without_folders(str(getattr(model.cfg, "model_name", None) or "unknown"))


def without_folders(name: str) -> str:
    """Of a local path the last part, or the repository's name in a hub cache; any other name as it is."""
    is_path = name.startswith((".", "~")) or PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    if not is_path and not Path(name).is_dir():  # "openai-community/gpt2" is a name, unless it is a folder here
        return name
    parts = PureWindowsPath(Path(name).expanduser().resolve()).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):  # a folder of the hub's cache
        return parts[-3].removeprefix("models--").replace("--", "/")
    return parts[-1] if parts else name


def hook_points(model: TransformerLensModel) -> dict[str, Any]:
    """Every hook point of the model by name, aliases included (`blocks.0.mlp.hook_post` on both model classes)."""
    return model.hook_dict  # pyright: ignore[reportAttributeAccessIssue]


def hook_point(model: TransformerLensModel, name: str) -> Any:
    """The hook point called `name`.

    Raises:
        UnsupportedModelError: the model has no hook point of that name.
    """
    points = hook_points(model)
    if name not in points:
        layer = ".".join(name.split(".")[:-1])
        near = [other for other in points if other.startswith(layer)][:8] or list(points)[:8]
        raise UnsupportedModelError(
            f"expected the hook point {name!r}; {type(model).__name__} has none of that name. "
            f"Near it: {near}. check_model(model) lists the sites that exist."
        )
    return points[name]


def submodule(model: TransformerLensModel, path: str) -> nn.Module | None:
    """The module at a canonical path such as `blocks.0.ln1`, None where the model has none."""
    module: Any = model
    for name in path.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name, None)
        if module is None:
            return None
    return module
