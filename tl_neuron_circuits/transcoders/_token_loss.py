"""Next-token loss with hook points replaced, and how far the predictions move.

The loss is the mean of -log p(next token) over positions whose next token, and which themselves, are not ignored.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._errors import NumericalError, SettingsError
from ..models._protocol import TransformerLensModel

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


def replaced_logits(
    model: TransformerLensModel,
    tokens: Int[Tensor, "prompt pos"],
    replacements: Mapping[str, Replacement] | None = None,
    captures: Iterable[str] = (),
) -> Float[Tensor, "prompt pos d_vocab"]:
    """Logits with values at hook points replaced; no graph is built.

    Args:
        replacements: what to write, by hook point.
        captures: hook points whose values replacements after them need.

    Raises:
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
    return logits


@dataclass(frozen=True)
class LossSums:
    """Sums over next tokens: their loss, the divergence from the model's own predictions, and their number."""

    loss: float = 0.0
    divergence: float = 0.0
    count: int = 0

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "prompt pos d_vocab"],
        reference: Float[Tensor, "prompt pos d_vocab"],
        tokens: Int[Tensor, "prompt pos"],
        ignore: tuple[int, ...],
    ) -> "LossSums":
        """The sums of one batch: -log p(next token) and KL(reference || these).

        Raises:
            NumericalError: a loss is not finite.
        """
        kept = kept_positions(tokens, ignore)
        scored = (kept[:, :-1] & kept[:, 1:]).to(logits.device)
        log_p, log_reference = (x[:, :-1][scored].float().log_softmax(-1) for x in (logits, reference))
        targets = tokens[:, 1:].to(logits.device)[scored]
        loss = -log_p.gather(-1, targets[:, None]).sum()
        divergence = (log_reference.exp() * (log_reference - log_p)).sum()
        if not loss.isfinite() or not divergence.isfinite():
            raise NumericalError(f"expected a finite next-token loss; got {float(loss)}: look at the model's logits.")
        return cls(float(loss), float(divergence), len(targets))

    def __add__(self, other: "LossSums") -> "LossSums":
        """Both together."""
        return LossSums(self.loss + other.loss, self.divergence + other.divergence, self.count + other.count)


def _capture(values: dict[str, Tensor], name: str) -> Any:
    def hook(value: Tensor, hook: Any) -> None:
        values[name] = value.clone()  # some models go on in place

    return hook


def _replace(values: Mapping[str, Tensor], replaced: set[str], name: str, change: Replacement) -> Any:
    def hook(value: Tensor, hook: Any) -> Tensor:
        replaced.add(name)
        return change(value, values).to(value)

    return hook
