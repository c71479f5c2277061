"""Where each dictionary of a training run reads and writes on the model."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import DictionaryError, SettingsError, UnsupportedModelError
from ..bases._dictionary import Dictionary
from ..bases._dictionary_basis import check_fires, resolve_hooks
from ..bases._runs import values_at
from ..models._protocol import TransformerLensModel, hook_points
from ._config import TrainingConfig


@dataclass(frozen=True)
class TrainingSite:
    """One layer: the hook points as named in the dictionary, as found on the model, and their widths."""

    layer: int
    named_in: str
    named_out: str
    hook_in: str
    hook_out: str
    d_in: int
    d_out: int

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hook points to read, once each."""
        return tuple(dict.fromkeys((self.hook_in, self.hook_out)))


def training_sites(model: TransformerLensModel, tokens: Tensor, config: TrainingConfig) -> tuple[TrainingSite, ...]:
    """The sites of `config` on the model, seen to fire on `tokens`.

    Raises:
        SettingsError: a layer does not exist, or activations with heads are asked for.
        DictionaryError: the model has no such hook point.
        UnsupportedModelError: a hook point does not fire.
    """
    n_layers = int(model.cfg.n_layers)
    layers = tuple(range(n_layers)) if config.layers is None else config.layers
    absent = [layer for layer in layers if not 0 <= layer < n_layers]
    if absent:
        raise SettingsError(f"expected layers of 0 .. {n_layers - 1}; got {absent}.")
    names = [(config.input_template.format(layer=n), config.hook_out.format(layer=n)) for n in layers]
    found = [_resolved(model, *pair) for pair in names]
    try:
        shapes = check_fires(model, tokens, [name for pair in found for name in pair])
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error} To train elsewhere, set hook_in and hook_out of TrainingConfig."
        ) from error
    for name, shape in shapes.items():
        if len(shape) != 3 or shape[:2] != tuple(tokens.shape):
            raise SettingsError(
                f"expected [prompt, position, width] at {name}; got {list(shape)} for tokens {list(tokens.shape)}. "
                "Choose a hook point on the residual stream or on the MLP."
            )
    rows = zip(layers, names, found, strict=True)
    return tuple(TrainingSite(n, *named, *on, shapes[on[0]][-1], shapes[on[1]][-1]) for n, named, on in rows)


def _resolved(model: TransformerLensModel, hook_in: str, hook_out: str) -> tuple[str, str]:
    """The hook points on this model, found as those of a dictionary would be once it is saved."""
    width = int(model.cfg.d_model)
    zeros = torch.zeros(width)
    kind = "standard" if hook_in == hook_out else "transcoder"
    probe = Dictionary(
        kind, torch.zeros(width, 1), torch.zeros(1, width), zeros, b_enc=zeros[:1], hook_in=hook_in, hook_out=hook_out,
        name="the dictionary to train",
    )  # fmt: skip
    try:
        return resolve_hooks(model, probe)
    except DictionaryError as error:
        if hook_in in hook_points(model) and hook_out in hook_points(model):
            return hook_in, hook_out  # such as mlp.hook_post, whose width is not d_model
        raise DictionaryError(f"{error} To train elsewhere, set hook_in and hook_out of TrainingConfig.") from error


def flat_values(
    model: TransformerLensModel, tokens: Tensor, names: Iterable[str], ignore: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Activations `[position, width]` of one forward pass, heads concatenated, positions of ignored tokens left out."""
    kept = ~torch.isin(tokens, torch.tensor(ignore, dtype=tokens.dtype, device=tokens.device)) if ignore else None

    return values_at(model, tokens, names, kept=functools.partial(_flat, kept, dtype))


def _flat(kept: Tensor | None, dtype: torch.dtype, value: Tensor) -> Tensor:
    rows = value.flatten(0, 1) if kept is None else value[kept.to(value.device)]
    return rows.flatten(1).to(dtype, copy=True)  # a copy: some models go on in place


def devices_of(model: TransformerLensModel, tokens: Tensor, names: Iterable[str]) -> dict[str, torch.device]:
    """The device of each hook point's activations, seen in one forward pass."""
    values = flat_values(model, tokens, names, (), torch.float32)
    return {name: value.device for name, value in values.items()}
