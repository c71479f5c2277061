"""`TokenRows`: prompts of any length in one tensor, so that thousands of them cost what their tokens cost.

A tensor per prompt would weigh more than the tokens in it, and on a GPU each would be read by its own call.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, overload

import torch
from jaxtyping import Int
from torch import Tensor

_CHUNK = 1024  # rows turned into Python integers at once


class TokenRows(Sequence[Tensor]):
    """A sequence of 1-D token tensors, stored one after the other."""

    def __init__(self, flat: Int[Tensor, " token"], lengths: tuple[int, ...]) -> None:
        self._flat, self.lengths = flat, lengths
        self._ends = torch.tensor(lengths, dtype=torch.long).cumsum(0)

    @classmethod
    def of(cls, rows: "Int[Tensor, 'row token'] | Sequence[Int[Tensor, ' _']]") -> "TokenRows":
        """Take rows as they are given: one tensor of them, or one tensor each."""
        if isinstance(rows, TokenRows):
            return rows
        if isinstance(rows, Tensor):
            return cls(rows.reshape(-1), (rows.shape[1],) * len(rows))
        return cls(torch.cat(list(rows)) if len(rows) else torch.empty(0, dtype=torch.long), tuple(map(len, rows)))

    def to(self, device: torch.device) -> "TokenRows":
        """The same rows on another device."""
        return TokenRows(self._flat.to(device), self.lengths)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        """Return one row, or a tuple of them for a slice."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        end, length = int(self._ends[index]), self.lengths[index]
        return self._flat[end - length : end]

    def __iter__(self) -> Iterator[Tensor]:
        """Go through the rows."""
        return iter(self._flat.split(list(self.lengths)))

    def __repr__(self) -> str:
        """One line: how many rows, of which lengths."""
        return f"TokenRows(n={len(self)}, tokens={len(self._flat)})"

    def lists(self) -> Iterator[list[int]]:
        """The rows as Python integers, a chunk of rows at a time from the device."""
        start = 0
        for first in range(0, len(self), _CHUNK):
            lengths = self.lengths[first : first + _CHUNK]
            numbers = self._flat[start : start + sum(lengths)].tolist()
            start += sum(lengths)
            at = 0
            for length in lengths:
                yield numbers[at : at + length]
                at += length

    def rectangle(
        self, rows: Sequence[int], pad_token: int, side: Literal["left", "right"]
    ) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"], Int[Tensor, " row"]]:
        """Some rows padded to the longest of them, their mask (1 at tokens), and by how much each moved right."""
        lengths = torch.tensor([self.lengths[row] for row in rows])
        longest = int(lengths.max())
        shift = longest - lengths if side == "left" else torch.zeros_like(lengths)
        start = self._ends[list(rows)] - lengths
        place = torch.arange(longest) - shift[:, None]
        mask = (place >= 0) & (place < lengths[:, None])
        device = self._flat.device
        tokens = self._flat[(start[:, None] + place.clamp(min=0)).clamp(max=len(self._flat) - 1).to(device)]
        mask = mask.to(device)
        return tokens.masked_fill(~mask, pad_token), mask.long(), shift.to(device)
