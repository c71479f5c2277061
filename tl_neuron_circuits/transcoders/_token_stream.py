"""Batches of prompts from one tensor or from an iterable, in an order that can be taken up again."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import SettingsError
from .._processes import Processes


class TokenStream:
    """Batches `[prompt, position]` without end where the source allows it.

    A tensor gives `rows` prompts at a time, in a new order every epoch that depends on `seed` and the epoch alone. A
    sequence or any other re-iterable gives its own batches again and again; an iterator gives them once. Of several
    processes each takes its share, and all together what one would take.
    """

    def __init__(
        self, source: Tensor | Iterable[Any], rows: int, seed: int, processes: Processes | None = None
    ) -> None:
        self._source, self._rows, self._seed = source, rows, seed
        self._processes = processes or Processes()
        self.batches = 0
        """How many batches were taken; all that a checkpoint needs to keep."""
        self._iterator: Iterator[Tensor] = self._forever(0)

    def take(self) -> Int[Tensor, "prompt pos"]:
        """The next batch.

        Raises:
            SettingsError: there is none, or it is not a batch of tokens.
        """
        try:
            tokens = next(self._iterator)
        except StopIteration:
            found = "none at all" if not self.batches else f"{self.batches} batches, then no more"
            raise SettingsError(
                f"expected tokens for the whole training; the iterator gave {found}. Pass a tensor or a list, which "
                "are read again and again, or lower TrainingConfig.steps."
            ) from None
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
            what = f"a tensor {tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)[:60]
            raise SettingsError(
                f"expected batches of tokens [prompt, position]; got {what}. model.to_tokens(texts) makes them."
            )
        self.batches += 1
        return tokens

    def skip_to(self, batches: int) -> None:
        """Go on after `batches` batches, as a run that took them did."""
        self.batches = batches
        self._iterator = self._forever(batches)

    def _forever(self, skipped: int) -> Iterator[Tensor]:
        skipped *= self._processes.count
        if isinstance(self._source, Tensor):
            return self._processes.share(self._from_tensor(self._source, skipped))
        return self._processes.share(islice(self._from_iterable(self._source), skipped, None))

    def _from_tensor(self, tokens: Tensor, skipped: int) -> Iterator[Tensor]:
        per_epoch = -(-len(tokens) // self._rows) if tokens.ndim else 0
        while per_epoch:
            epoch, first = divmod(skipped, per_epoch)
            order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(self._seed * 1_000_003 + epoch))
            chunks = order.to(tokens.device).split(self._rows)[first:]
            yield from (tokens[chunk] for chunk in chunks)
            skipped += len(chunks)

    def _from_iterable(self, source: Iterable[Any]) -> Iterator[Tensor]:
        while True:
            given = 0
            for tokens in source:
                given += 1
                yield tokens
            if not given or isinstance(source, Iterator):
                return
