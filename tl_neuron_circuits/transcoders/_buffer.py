"""The shuffle buffer: activations of several hook points, streamed from forward passes, served in random order.

It holds `capacity` positions. Batches are drawn without replacement; once less than half is left, the places of what
was served are filled from new forward passes and everything is shuffled again. At most one forward pass more is held.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import NumericalError, SettingsError
from ..models._protocol import TransformerLensModel
from ._sites import flat_values
from ._token_stream import TokenStream

_EMPTY_PASSES = 100


class ActivationBuffer:
    """Batches of activations by hook point; see the module's docstring."""

    def __init__(
        self,
        model: TransformerLensModel,
        stream: TokenStream,
        hooks: tuple[str, ...],
        *,
        capacity: int,
        batch_size: int,
        ignore: tuple[int, ...],
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        self._model, self._stream, self._hooks = model, stream, hooks
        self._capacity, self._batch, self._ignore, self._dtype = capacity, batch_size, ignore, dtype
        self._generator = generator
        self._rows: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._order: Int[Tensor, " position"] = torch.arange(capacity)
        self._cursor = capacity
        self.collect_seconds = 0.0
        """Time spent in forward passes, hooks included."""

    def take(self) -> dict[str, Float[Tensor, "batch width"]]:
        """The next batch, one tensor a hook point, rows aligned."""
        if self._capacity == 0:
            return self._take_pending(self._batch)
        if self._capacity - self._cursor < max(self._batch, self._capacity // 2):
            self._refill()
        index = self._order[self._cursor : self._cursor + self._batch]
        self._cursor += self._batch
        return {name: rows[index.to(rows.device)] for name, rows in self._rows.items()}

    def held(self) -> dict[str, Float[Tensor, "position width"]]:
        """Everything in the buffer (one batch without one), for statistics."""
        if self._capacity == 0:
            self._collect(self._batch)
            return self._pending
        if not self._rows:
            self._refill()
        return self._rows

    def _refill(self) -> None:
        slots = self._order[: self._cursor]
        done = 0
        while done < len(slots):
            fresh = self._take_pending(len(slots) - done, at_most=True)
            if not self._rows:
                self._rows = {name: value.new_empty(self._capacity, value.shape[1]) for name, value in fresh.items()}
            count = len(next(iter(fresh.values())))
            for name, value in fresh.items():
                self._rows[name][slots[done : done + count].to(value.device)] = value
            done += count
        self._order = torch.randperm(self._capacity, generator=self._generator)
        self._cursor = 0

    def _take_pending(self, count: int, *, at_most: bool = False) -> dict[str, Tensor]:
        self._collect(1 if at_most else count)
        taken = {name: value[:count] for name, value in self._pending.items()}
        self._pending = {name: value[count:] for name, value in self._pending.items()}
        return taken

    def _collect(self, count: int) -> None:
        """Forward passes until `count` positions are pending."""
        passes = 0
        while self._pending_count() < count:
            tokens = self._stream.take()
            start = time.perf_counter()
            fresh = flat_values(self._model, tokens, self._hooks, self._ignore, self._dtype)
            self.collect_seconds += time.perf_counter() - start
            for name, value in fresh.items():
                if not value.isfinite().all():
                    raise NumericalError(
                        f"the activations at {name} are NaN or infinite: look at the model and the tokens."
                    )
            old = self._pending
            self._pending = {name: torch.cat([old[name], fresh[name]]) if old else fresh[name] for name in self._hooks}
            passes += 1
            if passes >= _EMPTY_PASSES and not self._pending_count():
                raise SettingsError(
                    f"{passes} batches of tokens had only ignored tokens {self._ignore}: nothing to train on."
                )

    def _pending_count(self) -> int:
        return len(next(iter(self._pending.values()))) if self._pending else 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and notes from which `restore` goes on bit for bit."""
        tensors = {f"rows.{name}": value for name, value in self._rows.items()}
        tensors |= {f"pending.{name}": value for name, value in self._pending.items()}
        return tensors | {"order": self._order}, {"cursor": self._cursor, "batches": self._stream.batches}

    def restore(
        self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], devices: Mapping[str, torch.device]
    ) -> None:
        """Take up what `state` gave; `devices` says where each hook point's activations live."""
        for part, store in (("rows.", self._rows), ("pending.", self._pending)):
            own = {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
            store.update({name: value.to(devices[name]) for name, value in own.items()})
        self._order, self._cursor = tensors["order"], int(notes["cursor"])
        self._stream.skip_to(int(notes["batches"]))
