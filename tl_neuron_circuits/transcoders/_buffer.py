"""The activations that dictionaries are trained on: sites, batches of tokens, and a shuffle buffer.

The buffer holds `capacity` positions. Batches are drawn without replacement; once less than half is left, the slots of
what was served are filled from new forward passes and everything is shuffled again. It never holds more than one
forward pass beyond its capacity.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import DictionaryError, NumericalError, SettingsError, UnsupportedModelError
from .._indices import as_layers
from .._processes import Processes
from ..bases._dictionary import Dictionary
from ..bases._dictionary_basis import check_fires, resolve_hooks
from ..bases._runs import values_at
from ..models._protocol import TransformerLensModel, hook_points
from ._config import TrainingConfig

_EMPTY_PASSES = 100


@dataclass(frozen=True)
class TrainingSite:
    """One layer: the hook points as the dictionary will name them, as the model names them, and their widths."""

    layer: int
    named_in: str
    named_out: str
    hook_in: str
    hook_out: str
    d_in: int
    d_out: int


def training_sites(model: TransformerLensModel, tokens: Tensor, config: TrainingConfig) -> tuple[TrainingSite, ...]:
    """The sites of `config` on the model; a forward pass over `tokens` shows that they fire.

    Raises:
        SettingsError: a layer does not exist, or a hook point's activations have heads.
        DictionaryError: the model has no such hook point.
        UnsupportedModelError: a hook point does not fire.
    """
    n_layers = int(model.cfg.n_layers)
    layers = list(range(n_layers)) if config.layers is None else as_layers(config.layers, n_layers)
    names = [(config.input_template.format(layer=n), config.hook_out.format(layer=n)) for n in layers]
    hooks = [_resolved(model, *pair) for pair in names]
    try:
        shapes = check_fires(model, tokens, [name for pair in hooks for name in pair])
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
    rows = zip(layers, names, hooks, strict=True)
    return tuple(TrainingSite(n, *named, *on, shapes[on[0]][-1], shapes[on[1]][-1]) for n, named, on in rows)


def _resolved(model: TransformerLensModel, hook_in: str, hook_out: str) -> tuple[str, str]:
    """The hook points on this model, resolved as those of the saved dictionary will be."""
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
) -> dict[str, Float[Tensor, "position width"]]:
    """Activations of one forward pass, heads concatenated, without the positions of ignored tokens."""
    kept = ~torch.isin(tokens, torch.tensor(ignore, dtype=tokens.dtype, device=tokens.device)) if ignore else None
    return values_at(model, tokens, names, kept=partial(_as_rows, kept, dtype))


def _as_rows(kept: Tensor | None, dtype: torch.dtype, value: Tensor) -> Float[Tensor, "position width"]:
    rows = value.flatten(0, 1) if kept is None else value[kept.to(value.device)]
    return rows.flatten(1).to(dtype, copy=True)  # a copy: some models go on in place


class TokenStream:
    """Batches `[prompt, position]`, endless where the source allows it.

    A tensor gives `rows` prompts at a time, in a new order every epoch that depends on `seed` and the epoch alone. A
    sequence or any other re-iterable gives its own batches again and again; an iterator gives them once. Each of
    several processes takes its share, and all together take what one would.
    """

    def __init__(
        self, source: Tensor | Iterable[Any], rows: int, seed: int, processes: Processes | None = None
    ) -> None:
        self._source, self._rows, self._seed = source, rows, seed
        self._processes = processes or Processes()
        self.batches = 0
        """How many batches were taken; all that a checkpoint needs to keep."""
        self._iterator: Iterator[Tensor] = self._iterate(0)

    def take(self) -> Int[Tensor, "prompt pos"]:
        """The next batch.

        Raises:
            SettingsError: there is none, or it is not a batch of tokens.
        """
        try:
            tokens = next(self._iterator)
        except StopIteration:
            given = "none at all" if not self.batches else f"{self.batches} batches, then no more"
            raise SettingsError(
                f"expected tokens for the whole training; the iterator gave {given}. Pass a tensor or a list, which "
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
        """Resume after `batches` batches."""
        self.batches = batches
        self._iterator = self._iterate(batches)

    def _iterate(self, skipped: int) -> Iterator[Tensor]:
        skipped *= self._processes.count
        if isinstance(self._source, Tensor):
            return self._processes.share(self._epochs(self._source, skipped))
        return self._processes.share(islice(self._repeats(self._source), skipped, None))

    def _epochs(self, tokens: Tensor, skipped: int) -> Iterator[Tensor]:
        per_epoch = -(-len(tokens) // self._rows) if tokens.ndim else 0
        while per_epoch:
            epoch, first = divmod(skipped, per_epoch)
            order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(self._seed * 1_000_003 + epoch))
            chunks = order.to(tokens.device).split(self._rows)[first:]
            yield from (tokens[chunk] for chunk in chunks)
            skipped += len(chunks)

    def _repeats(self, source: Iterable[Any]) -> Iterator[Tensor]:
        while True:
            empty = True
            for tokens in source:
                empty = False
                yield tokens
            if empty or isinstance(source, Iterator):
                return


class ActivationBuffer:
    """Shuffled batches of activations by hook point."""

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
        """The next batch, one tensor per hook point, rows aligned."""
        if self._capacity == 0:
            self._collect(self._batch)
            return self._take_pending(self._batch)
        if self._capacity - self._cursor < max(self._batch, self._capacity // 2):
            self._refill()
        index = self._order[self._cursor : self._cursor + self._batch]
        self._cursor += self._batch
        return {name: rows[index.to(rows.device)] for name, rows in self._rows.items()}

    def held(self) -> dict[str, Float[Tensor, "position width"]]:
        """Everything in the buffer (one batch if its capacity is 0), for statistics."""
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
            self._collect(1)
            fresh = self._take_pending(len(slots) - done)
            if not self._rows:
                self._rows = {name: value.new_empty(self._capacity, value.shape[1]) for name, value in fresh.items()}
            count = len(next(iter(fresh.values())))
            for name, value in fresh.items():
                self._rows[name][slots[done : done + count].to(value.device)] = value
            done += count
        self._order = torch.randperm(self._capacity, generator=self._generator)
        self._cursor = 0

    def _take_pending(self, most: int) -> dict[str, Tensor]:
        taken = {name: value[:most] for name, value in self._pending.items()}
        self._pending = {name: value[most:] for name, value in self._pending.items()}
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
                        f"the activations at {name} are NaN or infinite: check the model and the tokens."
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
        """Tensors and notes from which `restore` resumes bit for bit."""
        tensors = {f"rows.{name}": value for name, value in self._rows.items()}
        tensors |= {f"pending.{name}": value for name, value in self._pending.items()}
        return tensors | {"order": self._order}, {"cursor": self._cursor, "batches": self._stream.batches}

    def restore(
        self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], devices: Mapping[str, torch.device]
    ) -> None:
        """Return to a `state`; `devices` says where each hook point's activations live."""
        for part, store in (("rows.", self._rows), ("pending.", self._pending)):
            own = {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
            store.update({name: value.to(devices[name]) for name, value in own.items()})
        self._order, self._cursor = tensors["order"], int(notes["cursor"])
        self._stream.skip_to(int(notes["batches"]))
