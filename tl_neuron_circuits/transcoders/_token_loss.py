"""Next-token loss, with hook points replaced or not.

The loss is the mean of -log p(next token) over positions whose next token, and which themselves, are not ignored.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .._errors import NumericalError, SettingsError
from ..models import TransformerLensModel

Replacement = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""From the value at a hook point and the values captured before it to the value to write."""


def batches_of(tokens: Tensor | Iterable[Any], rows: int) -> Iterator[Int[Tensor, "prompt pos"]]:
    """A tensor in batches of `rows` prompts, or an iterable's own batches.

    Raises:
        SettingsError: a batch is not a tensor of tokens.
    """
    for batch in tokens.split(rows) if isinstance(tokens, Tensor) else tokens:
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.is_floating_point():
            raise SettingsError(
                f"expected tokens [prompt, position]; got {repr(batch)[:60]}. model.to_tokens(texts) makes them."
            )
        if len(batch):
            yield batch


def kept_positions(tokens: Int[Tensor, "prompt pos"], ignore: tuple[int, ...]) -> Bool[Tensor, "prompt pos"]:
    """Positions whose token is not ignored."""
    return ~torch.isin(tokens, torch.tensor(ignore, dtype=tokens.dtype, device=tokens.device))


def token_loss(
    model: TransformerLensModel,
    tokens: Int[Tensor, "prompt pos"],
    ignore: tuple[int, ...],
    replacements: Mapping[str, Replacement] | None = None,
    captures: Iterable[str] = (),
) -> tuple[float, int]:
    """Sum of the next-token losses of a batch, and how many there are; no graph is built.

    Args:
        replacements: what to write, by hook point.
        captures: hook points whose values replacements after them need.

    Raises:
        NumericalError: the loss is not finite.
        SettingsError: a replacement never happened.
    """
    values: dict[str, Tensor] = {}
    replaced: set[str] = set()
    hooks = [(name, _capture(values, name)) for name in dict.fromkeys(captures)]
    hooks += [(name, _replace(values, replaced, name, change)) for name, change in (replacements or {}).items()]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(tokens)
    missed = set(replacements or {}) - replaced
    if missed:
        raise SettingsError(f"expected {sorted(missed)} to fire in a forward; they did not, so nothing was replaced.")
    kept = kept_positions(tokens, ignore)
    targets = torch.where(kept[:, :-1] & kept[:, 1:], tokens[:, 1:], -100).to(logits.device)
    flat = logits[:, :-1].flatten(0, 1).float()
    loss = torch.nn.functional.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")
    if not loss.isfinite():
        raise NumericalError(f"the next-token loss is {float(loss)} with {sorted(replaced) or 'nothing'} replaced.")
    return float(loss), int((targets != -100).sum())


def _capture(values: dict[str, Tensor], name: str) -> Any:
    def hook(value: Tensor, hook: Any) -> None:
        values[name] = value.clone()  # some models go on in place

    return hook


def _replace(values: Mapping[str, Tensor], replaced: set[str], name: str, change: Replacement) -> Any:
    def hook(value: Tensor, hook: Any) -> Tensor:
        replaced.add(name)
        return change(value, values).to(value)

    return hook
