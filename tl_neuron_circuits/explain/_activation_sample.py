"""What `describe` keeps of a stream of activations: as much for a billion tokens as for a few thousand.

A position's key is a hash of its place in the stream, and the positions with the `size` smallest keys are kept. That is
a uniform sample, and the whole stream as long as it fits; it depends neither on batches nor on interruptions. Beside it
stand the windows around the largest and the smallest activations of every node, a few windows drawn by chance, and the
extremes. The first position of a piece of text (BOS, or a token out of its context) is read and never counted: nothing
precedes it, and many models have extreme activations there.
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from .._errors import NumericalError

BEFORE, AFTER = 12, 4
WINDOW = BEFORE + 1 + AFTER
MISSING = -1
"""The token of a window where there is no text."""
SIGNS = (1, -1)
_RANDOM_WINDOWS = 8
_NOWHERE = np.iinfo(np.int64).max
_ARRAYS = (
    *("tokens", "values", "low", "high", "window_tokens", "window_values"),
    *("best_value", "best_place", "best_piece", "best_tokens", "best_values"),
)


def mix(places: np.ndarray, seed: int) -> np.ndarray:
    """A different, evenly spread 64-bit number for every place: the finalizer of SplitMix64, which is a bijection."""
    x = places.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (seed + 1) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_tokens(tokens: np.ndarray) -> int:
    """63 bits of a hash."""
    return int.from_bytes(hashlib.sha256(tokens.astype(np.int64).tobytes()).digest()[:8], "little") >> 1


class SmallestKeys:
    """The smallest keys so far, and which slot of an array each has."""

    def __init__(self, size: int) -> None:
        self.keys = np.empty(size, dtype=np.uint64)
        self.count = 0

    def admit(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots to fill, and which of the new keys go there; of a slot named twice the last one counts."""
        size = len(self.keys)
        first = np.arange(min(size - self.count, len(keys)))
        slots = self.count + first
        self.keys[slots] = keys[first]
        self.count += len(first)
        rest = np.arange(len(first), len(keys))
        rest = rest[keys[rest] < self.keys.max()] if len(rest) else rest
        if not len(rest):
            return slots, first
        together = np.concatenate([self.keys, keys[rest]])
        kept = np.zeros(len(together), dtype=bool)
        kept[np.argpartition(together, size - 1)[:size]] = True
        free, taken = np.flatnonzero(~kept[:size]), rest[kept[size:]]
        self.keys[free] = keys[taken]
        return np.concatenate([slots, free]), np.concatenate([first, taken])


class ActivationSample:
    """One side of the texts, those for discovery or those held out; `n` nodes, `size` positions, `k` windows each."""

    def __init__(self, n: int, size: int, k: int) -> None:
        self.n_positions = 0
        self.positions, self.windows = SmallestKeys(size), SmallestKeys(_RANDOM_WINDOWS)
        self.tokens = np.empty((size, 2), dtype=np.int32)  # the token, and the one before it
        self.values = np.empty((size, n), dtype=np.float32)  # pages that are never filled take no memory
        self.low, self.high = np.full(n, np.inf, np.float32), np.full(n, -np.inf, np.float32)
        self.window_tokens = np.full((_RANDOM_WINDOWS, WINDOW), MISSING, dtype=np.int32)
        self.window_values = np.zeros((_RANDOM_WINDOWS, WINDOW, n), dtype=np.float32)
        shape = (len(SIGNS), n, 2 * k)  # twice as many as are shown: other texts may have the same window
        self.best_value = np.full(shape, -np.inf, dtype=np.float32)
        self.best_place = np.full(shape, _NOWHERE, dtype=np.int64)
        self.best_piece = np.zeros(shape, dtype=np.int64)  # a hash of its tokens: repeated texts count once
        self.best_tokens = np.full((*shape, WINDOW), MISSING, dtype=np.int32)
        self.best_values = np.zeros((*shape, WINDOW), dtype=np.float32)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
        """Take in pieces of text `[batch, pos]`, right-padded, with activations `[batch, pos, node]`.

        `places` are those of the pieces' first tokens; a token's place is that plus its position.

        Raises:
            NumericalError: an activation is NaN or infinite.
        """
        counted = np.arange(tokens.shape[1])[None, :] < lengths[:, None]
        counted[:, 0] = False
        row, pos = counted.nonzero()
        if not len(row):
            return
        flat = values[row, pos]
        if not np.isfinite(flat).all():
            raise NumericalError("an activation is NaN or infinite; check_model(model) shows where it begins.")
        self.n_positions += len(row)
        self.low, self.high = np.minimum(self.low, flat.min(0)), np.maximum(self.high, flat.max(0))
        place = places[row] + pos
        slots, chosen = self.positions.admit(mix(place, 0))
        self.tokens[slots] = np.stack([tokens[row, pos], tokens[row, pos - 1]], 1)[chosen]
        self.values[slots] = flat[chosen]
        slots, chosen = self.windows.admit(mix(place, 1))
        where, inside = _windows(pos[chosen], counted[row[chosen]])
        self.window_tokens[slots] = np.where(inside, tokens[row[chosen, None], where], MISSING)
        self.window_values[slots] = np.where(inside[..., None], values[row[chosen, None], where], 0.0)
        texts = np.array([hash_tokens(piece[:length]) for piece, length in zip(tokens, lengths, strict=True)])
        for side in range(len(SIGNS)):
            self._merge_best(side, tokens, texts, counted, places, values)

    def _merge_best(
        self, side: int, tokens: np.ndarray, texts: np.ndarray, counted: np.ndarray, places: np.ndarray,
        values: np.ndarray,
    ) -> None:  # fmt: skip
        """Put each piece's strongest position among the best so far; equal ones in the order of the stream."""
        signed = np.where(counted[..., None], SIGNS[side] * values, -np.inf)
        at = signed.argmax(1)
        peak = np.take_along_axis(signed, at[:, None], 1)[:, 0]
        peak[peak <= 0] = -np.inf
        better = (peak >= self.best_value[side].min(1)) & (peak > 0)
        nodes = np.flatnonzero(better.any(0))
        if not len(nodes):
            return
        at, peak = at[:, nodes].T, peak[:, nodes].T.astype(np.float32)  # [node, piece]
        value = np.concatenate([self.best_value[side, nodes], peak], 1)
        place = np.concatenate([self.best_place[side, nodes], np.where(peak > 0, places + at, _NOWHERE)], 1)
        piece = np.concatenate([self.best_piece[side, nodes], np.broadcast_to(texts, peak.shape)], 1)
        same = np.lexsort((place, -value, piece), axis=1)
        sorted_pieces = np.take_along_axis(piece, same, 1)
        again = np.zeros(value.shape, dtype=bool)
        np.put_along_axis(again, same[:, 1:], sorted_pieces[:, 1:] == sorted_pieces[:, :-1], 1)
        value[again] = -np.inf
        order = np.lexsort((place, -value), axis=1)[:, : self.best_value.shape[2]]
        pieces = np.arange(len(tokens))[None, :, None]
        where, inside = _windows(at, counted[None])
        new_tokens = np.where(inside, tokens[pieces, where], MISSING)
        new_values = np.where(inside, values[pieces, where, nodes[:, None, None]], 0.0)
        for own, new in ((self.best_tokens, new_tokens), (self.best_values, new_values)):
            both = np.concatenate([own[side, nodes], new.astype(own.dtype)], 1)
            own[side, nodes] = np.take_along_axis(both, order[..., None], 1)
        self.best_value[side, nodes] = np.take_along_axis(value, order, 1)
        self.best_place[side, nodes] = np.take_along_axis(place, order, 1)
        self.best_piece[side, nodes] = np.take_along_axis(piece, order, 1)

    def sampled(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `[sample, 2]` and activations `[sample, node]`."""
        return self.tokens[: self.positions.count], self.values[: self.positions.count]

    def state(self) -> dict[str, np.ndarray]:
        """Everything that `restore` needs."""
        n, m = self.positions.count, self.windows.count
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {"tokens": self.tokens[:n], "values": self.values[:n]}
        keys = {"keys": self.positions.keys[:n], "window_keys": self.windows.keys[:m]}
        return arrays | {name: key.view(np.int64) for name, key in keys.items()}

    def restore(self, state: Mapping[str, np.ndarray], n_positions: int) -> None:
        """Continue from a state."""
        self.n_positions = n_positions
        for name in _ARRAYS:
            getattr(self, name)[: len(state[name])] = state[name]
        for kept, name in ((self.positions, "keys"), (self.windows, "window_keys")):
            kept.count = len(state[name])
            kept.keys[: kept.count] = state[name].view(np.uint64)


def _windows(at: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions around `at` `[..., window]`, and which of them are counted; the others point at position 0."""
    where = at[..., None] + np.arange(-BEFORE, AFTER + 1)
    inside = (where >= 0) & (where < counted.shape[-1])
    where = np.where(inside, where, 0)
    rows = np.broadcast_to(counted, (*where.shape[:-1], counted.shape[-1]))
    inside &= np.take_along_axis(rows, where, -1)
    return np.where(inside, where, 0), inside
