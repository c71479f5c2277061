"""Training of transcoders and SAEs: stream activations, step every layer's dictionary, report, keep checkpoints.

    repeat `steps` times:
        batch = the next positions from the shuffle buffer of activations                               (`_buffer`)
        for every layer: one step on unexplained variance + sparsity cost + what dead features leave    (`_trainee`)
        every `log_every` steps a row of the report, every `checkpoint_every` steps a checkpoint

All layers learn from the same forward passes. All randomness comes from generators seeded by `config.seed`, and all
state is in the checkpoints, the shuffle buffer included: a resumed run equals an uninterrupted one bit for bit on the
same machine. Started as several processes (`accelerate launch`, `torchrun`), each reads its share of the token batches
into its share of the buffer, gradients are averaged, all have the same weights, and the first one writes.

A checkpoint is one file, `checkpoint-00000500/checkpoint.safetensors`. It appears whole, and older ones are removed
only after that: a process that is killed while writing leaves the earlier ones as they were.
Source: METHODS.md 4.1, 4.5.
"""

import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from .. import _html
from .._errors import FileFormatError, NeuronCircuitsError, SaveError, SettingsError
from .._files import fingerprint, read_directory, remove_empty, reserved, versions, write_directory
from .._indices import as_integer
from .._memory import available_memory
from .._processes import Processes, current_processes
from .._progress import progress
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..bases._dictionary_files import save_dictionary
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding
from ._buffer import ActivationBuffer, TokenStream, TrainingSite, flat_values, training_sites
from ._config import TrainingConfig
from ._trainee import MEASURES, Scaling, Trainee


@dataclass(frozen=True, eq=False, repr=False)
class TrainingReport:
    """The dictionaries that `train` made, and how the training went.

    Attributes:
        dictionaries: one per layer, by layer.
        config: the settings.
        history: a row per layer every `log_every` steps: step, layer, loss, l0 (features that fire),
            variance_explained, dead_share; means over the steps since the previous row, on the batches trained on.
        positions: activations trained on; a position of a prompt counts each time it was in a batch.
        seconds: where the time went: "collect" (forward passes with hooks), "update" (weights), "total".

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("rc", n=64)
        >>> tokens = torch.stack(list(tnc.tasks.tokenize(model, pairs).clean))
        >>> config = tnc.transcoders.TrainingConfig(layers=(0,), d_dict=64, steps=20, batch_size=64, buffer_size=256)
        >>> report = tnc.transcoders.train(model, tokens, config, verbose=False)
        >>> [folder.name for folder in report.save("mine")]
        ['layer-00']
    """

    dictionaries: tuple[Dictionary, ...]
    config: TrainingConfig
    history: Sequence[Mapping[str, Any]]
    positions: int
    seconds: Mapping[str, float]

    def __getitem__(self, layer: int) -> Dictionary:
        """The dictionary of a layer."""
        layer = as_integer(layer, "layer")
        by_layer = {dictionary.layer: dictionary for dictionary in self.dictionaries}
        if layer not in by_layer:
            raise KeyError(f"no dictionary of layer {layer} was trained; there are those of {sorted(by_layer)}.")
        return by_layer[layer]

    def to_dataframe(self) -> pd.DataFrame:
        """The history as a table."""
        return pd.DataFrame(list(self.history))

    def save(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every dictionary as a SAELens folder, `path/layer-00` and so on; `load_dictionary` reads them.

        Raises:
            FileFormatError: a folder exists and `overwrite` is not given.
        """
        return [
            save_dictionary(dictionary, Path(path) / f"layer-{dictionary.layer:02d}", overwrite=overwrite)
            for dictionary in self.dictionaries
        ]

    def __repr__(self) -> str:
        last = self.to_dataframe().groupby("layer").last()
        return (
            f"TrainingReport({len(self.dictionaries)} x {self.config.dictionary_kind}, {self.config.d_dict} features, "
            f"{self.positions:,} positions, L0 {last['l0'].mean():.1f}, "
            f"variance explained {last['variance_explained'].mean():.3f}, {self.seconds['total']:.0f} s)"
        )

    def _repr_html_(self) -> str:
        last = self.to_dataframe().groupby("layer").last().reset_index()
        return _html.block(repr(self), _html.table(last, bars=("variance_explained",), rows=60))


@holding
@checked
def train(
    model: TransformerLensModel,
    tokens: Int[Tensor, "prompt pos"] | Iterable[Any],
    config: TrainingConfig | None = None,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    verbose: bool | None = None,
) -> TrainingReport:
    """Train one dictionary per layer on the model's own activations.

    Args:
        model: a TransformerLens model; it is only run forward.
        tokens: prompts as one tensor, or an iterable of such tensors, each one forward pass. A tensor or a list is read
            again and again; an iterator must last for the whole training.
        config: settings.
        directory: where checkpoints go; None for none.
        resume: continue from the newest checkpoint there, with the same settings, model, tokens and number of
            processes; a tensor or a list of tokens is checked, any other iterable must give the same batches again.
        verbose: a progress bar with loss, L0, variance explained and share of dead features. None: after two
            seconds, in a notebook or a terminal.

    Raises:
        SettingsError: settings or tokens cannot be used, the iterator is empty or ends early, or the checkpoints are
            of other settings, another model or other tokens.
        DictionaryError: the model has no such hook point.
        UnsupportedModelError: a hook point did not fire.
        NumericalError: a layer is dead, or the loss or weights are not finite; earlier checkpoints are unchanged.
        FileFormatError: a checkpoint could not be read or written.
        ProcessesError: another process raised or died.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=32)
        >>> small = {"d_dict": 64, "k": 4, "steps": 20, "batch_size": 64, "buffer_size": 256}
        >>> config = tnc.transcoders.TrainingConfig(layers=(0,), **small)
        >>> report = tnc.transcoders.train(model, model.to_tokens(pairs.clean), config, verbose=False)
        >>> report[0].kind, report[0].d_dict, report.positions
        ('jumprelu_transcoder', 64, 1280)
    """
    config = TrainingConfig() if config is None else config
    folder = None if directory is None else Path(directory)
    if resume and folder is None:
        raise SettingsError("resume=True needs the directory with the checkpoints: train(..., directory=...).")
    processes = current_processes()
    with processes.together("train", config.to_json()), reserved(folder if processes.first else None):
        training = _Training(model, tokens, config, processes)
        if resume and folder is not None:
            training.restore(folder)
        else:
            training.begin(folder)
        shown = verbose if processes.first else False
        with progress(total=config.steps, initial=training.step, desc=config.dictionary_kind, verbose=shown) as bar:
            while training.step < config.steps:
                try:
                    training.advance()
                except NeuronCircuitsError as error:
                    kept = [] if folder is None else checkpoints(folder)
                    if kept:
                        error.args = (f"{error} The checkpoint {kept[-1]} is unchanged.",)
                    raise
                bar.update()
                if training.history and training.step % config.log_every == 0:
                    bar.set_postfix(training.newest(), refresh=False)
                if folder is not None and training.checkpoint_is_due:
                    training.write(folder)
        return training.report()


def _require_memory(
    sites: Sequence[TrainingSite], config: TrainingConfig, processes: int, available: int | None
) -> None:
    """Raise where the weights of all layers, with gradients and Adam's moments, and the buffer cannot fit.

    Raises:
        SettingsError: with the sizes, and the settings that help.
    """
    weights = 16 * sum(config.d_dict * (site.d_in + site.d_out) for site in sites)
    width = sum(site.d_in + (site.d_out if site.hook_out != site.hook_in else 0) for site in sites)
    value = 2 if config.precision == "bfloat16" else 4
    buffer = value * width * (config.buffer_size // processes)
    if available is None or weights + buffer <= available:
        return
    raise SettingsError(
        f"expected a training that fits into memory: {len(sites)} dictionaries of {config.d_dict:,} features need "
        f"{weights / 1e9:.3g} GB (weights, gradients, moments) and a buffer of {config.buffer_size:,} positions "
        f"{buffer / 1e9:.3g} GB; {available / 1e9:.3g} GB are free. Train fewer layers at a time (layers=), or give a "
        "smaller d_dict or buffer_size" + (", or precision='bfloat16'." if value == 4 else ".")
    )


class _Training:
    """Everything that changes during one call of `train`."""

    def __init__(self, model: TransformerLensModel, tokens: Any, config: TrainingConfig, processes: Processes) -> None:
        count = processes.count
        if config.batch_size % count or 0 < config.buffer_size // count < 2 * config.batch_size // count:
            raise SettingsError(
                f"expected batch_size to be a multiple of the {count} processes, and buffer_size at least two batches; "
                f"got {config.batch_size} and {config.buffer_size}."
            )
        self._model, self._config, self._processes = model, config, processes
        self._material = {
            "model": f"{model_name(model)} {fingerprint(model.parameters())}",
            "tokens": _tokens_identity(tokens),
            "processes": count,
        }
        # The first batch shows that the sites fire; an iterator gets it back.
        first = TokenStream(tokens, config.forward_rows, config.seed).take()
        source = chain([first], tokens) if isinstance(tokens, Iterator) else tokens
        self._first = first[:1]
        self._sites = training_sites(model, self._first, config)
        self._hooks = tuple(dict.fromkeys(name for site in self._sites for name in (site.hook_in, site.hook_out)))
        _require_memory(self._sites, config, count, available_memory(model))
        self._generator = torch.Generator().manual_seed(config.seed)
        self._buffer = ActivationBuffer(
            model,
            TokenStream(source, config.forward_rows, config.seed, processes),
            self._hooks,
            capacity=config.buffer_size // count,
            batch_size=config.batch_size // count,
            ignore=config.ignore_tokens,
            dtype=torch.bfloat16 if config.precision == "bfloat16" else torch.float32,
            generator=self._generator,
        )
        self._trainees: list[Trainee] = []
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._sums = {site.layer: dict.fromkeys(MEASURES, 0.0) for site in self._sites}
        self._seconds = {"collect": 0.0, "update": 0.0, "total": 0.0}

    def begin(self, folder: Path | None) -> None:
        """Fresh weights, and units measured on the first fill of the buffer."""
        if folder is not None:
            self._processes.from_first(lambda: _make_fresh(folder))
        start = time.perf_counter()
        sample = self._buffer.held()
        scalings = [
            Scaling.measure(sample[site.hook_in], sample[site.hook_out], site, self._processes) for site in self._sites
        ]
        self._make_trainees(scalings)
        self._seconds["total"] += time.perf_counter() - start

    def _make_trainees(self, scalings: Sequence[Scaling]) -> None:
        for site, scaling in zip(self._sites, scalings, strict=True):
            self._trainees.append(Trainee(site, self._config, scaling, self._generator, self._processes))

    def advance(self) -> None:
        """One batch, one step of every dictionary, and a row of history where one is due."""
        config, start, collected = self._config, time.perf_counter(), self._buffer.collect_seconds
        batch = self._buffer.take()
        start_update = time.perf_counter()
        for site, trainee in zip(self._sites, self._trainees, strict=True):
            measured = trainee.step(batch[site.hook_in], batch[site.hook_out], self.step)
            for name, value in measured.items():
                self._sums[site.layer][name] += value
        self._seconds["update"] += time.perf_counter() - start_update
        self.step += 1
        for trainee in self._trainees if self.checkpoint_is_due else ():
            trainee.check_weights(self.step)
        if self.step % config.log_every == 0 or self.step == config.steps:
            since = (self.step - 1) % config.log_every + 1
            everywhere = self._processes.gather(self._sums)
            for layer in self._sums:
                means = {n: sum(sums[layer][n] for sums in everywhere) / len(everywhere) / since for n in MEASURES}
                self.history.append({"step": self.step, "layer": layer} | means)
                self._sums[layer] = dict.fromkeys(MEASURES, 0.0)
        self._seconds["total"] += time.perf_counter() - start
        self._seconds["collect"] += self._buffer.collect_seconds - collected

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether the weights are worth keeping now."""
        return self.step % self._config.checkpoint_every == 0 or self.step == self._config.steps

    def newest(self) -> dict[str, str]:
        """The last measures, means over layers, for the progress bar."""
        rows = self.history[-len(self._sites) :]
        return {name: f"{sum(row[name] for row in rows) / len(rows):.3g}" for name in MEASURES}

    def report(self) -> TrainingReport:
        """The dictionaries as they are now, in the model's units."""
        positions = self.step * self._config.batch_size
        metadata = {
            "model_name": model_name(self._model),
            "training": self._config.to_json(),
            "training_positions": positions,
            "versions": versions(),
        }
        made = sorted((trainee.dictionary(metadata) for trainee in self._trainees), key=lambda d: d.layer)
        return TrainingReport(tuple(made), self._config, tuple(self.history), positions, dict(self._seconds))

    def write(self, folder: Path) -> None:
        """A checkpoint: the weights by the first process, after every other one has written its own buffer."""
        first, keep = self._processes.first, self._config.keep_checkpoints
        buffer_tensors, buffer_notes = self._buffer.state()
        tensors = {f"buffer.{name}": value for name, value in buffer_tensors.items()}
        for site, trainee in zip(self._sites, self._trainees, strict=True) if first else ():
            tensors |= {f"{site.layer}.{name}": value for name, value in trainee.state().items()}
        tensors["generator"] = self._generator.get_state()
        notes = {
            "config": self._config.to_json(),
            "material": self._material,
            "buffer": buffer_notes,
            "history": self.history,
            "sums": {str(layer): sums for layer, sums in self._sums.items()},
            "sites": [[site.named_in, site.named_out] for site in self._sites],
            "seconds": self._seconds,
            "positions": self.step * self._config.batch_size,
        }
        if not first:
            # One more than the first process keeps, which may be killed before it writes its own.
            own = _process_folder(folder, self._processes.rank)
            own.mkdir(parents=True, exist_ok=True)
            write_checkpoint(own, self.step, tensors, notes, keep + 1 if keep else 0)
        self._processes.gather("written")
        if first:
            write_checkpoint(folder, self.step, tensors, notes, keep)
        self._processes.gather("written")

    def restore(self, folder: Path) -> None:
        """Return to the newest checkpoint: the first process' weights, and this one's buffer and sums."""
        path = self._processes.from_first(lambda: newest_checkpoint(folder))
        tensors, notes = read_checkpoint(path, self._config, self._material)
        if not self._processes.first:
            path = _process_folder(folder, self._processes.rank) / path.name
            own, notes = read_checkpoint(path, self._config, self._material)
            tensors = {name: value for name, value in tensors.items() if not name.startswith("buffer.")} | own
        values = flat_values(self._model, self._first, self._hooks, (), torch.float32)
        devices = {name: value.device for name, value in values.items()}
        scalings = []
        for site in self._sites:
            own = _part(tensors, f"{site.layer}.scaling.")
            scalings.append(Scaling(**{name: value.to(devices[site.hook_in]) for name, value in own.items()}))
        self._make_trainees(scalings)
        for site, trainee in zip(self._sites, self._trainees, strict=True):
            trainee.restore(_part(tensors, f"{site.layer}."))
        self._buffer.restore(_part(tensors, "buffer."), notes.buffer, devices)
        self._generator.set_state(tensors["generator"])
        self.step, self.history = notes.step, notes.history
        self._sums = {int(layer): sums for layer, sums in notes.sums.items()}
        self._seconds = notes.seconds


def _tokens_identity(tokens: Any) -> str | None:
    """A fingerprint of tokens that can be read without using them up."""
    if isinstance(tokens, Tensor):
        return fingerprint([tokens])
    every = tokens if isinstance(tokens, list | tuple) else []
    return fingerprint(every) if every and all(isinstance(each, Tensor) for each in every) else None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _process_folder(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank}"


def _make_fresh(folder: Path) -> None:
    found = checkpoints(folder)
    if found:
        raise SettingsError(
            f"{folder} already holds checkpoints ({found[-1].name}). To continue that run with the same settings, pass "
            "resume=True; for another, choose another directory."
        )
    folder.mkdir(parents=True, exist_ok=True)


SCHEMA = 3
_NAME = re.compile(r"checkpoint-(\d{8})")


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    step: int
    config: dict[str, Any]
    material: dict[str, Any]
    buffer: dict[str, int]
    history: list[dict[str, Any]]
    sums: dict[str, dict[str, float]]
    sites: list[list[str | None]]
    seconds: dict[str, float]
    positions: int


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    written = (file.parent for file in folder.glob("checkpoint-*/checkpoint.safetensors"))
    return sorted(path for path in written if _NAME.fullmatch(path.name))


def newest_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint in a folder.

    Raises:
        FileFormatError: there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise FileFormatError(
            f"expected checkpoints in {folder} to resume from; there is none. Pass resume=False to start."
        )
    return found[-1]


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], keep: int
) -> Path:
    """Write the state after `step` steps.

    Raises:
        SaveError: it could not be written (a full disk, no permission); the earlier checkpoints are unchanged.
    """
    path = folder / f"checkpoint-{step:08d}"
    try:
        write_directory(path, "checkpoint", SCHEMA, tensors, dict(notes) | {"step": step})
    except SaveError as error:
        earlier = checkpoints(folder)
        remedy = f"{earlier[-1]} is whole: make room and pass resume=True" if earlier else "make room and start again"
        failure = SaveError(f"the checkpoint {path} could not be written; {remedy}. {error}")
        failure.errno = error.errno
        raise failure from error
    kept = checkpoints(folder)[-keep:]
    for old in folder.glob("checkpoint-*") if keep else ():
        if (old / "checkpoint.safetensors").exists() and _NAME.fullmatch(old.name) and old not in kept:
            shutil.rmtree(old, ignore_errors=True)
        elif _NAME.fullmatch(old.name):
            remove_empty(old)
    return path


def read_checkpoint(
    path: Path, config: TrainingConfig, material: Mapping[str, Any]
) -> tuple[dict[str, Tensor], _Notes]:
    """A checkpoint of a run with these settings, on this model and these tokens.

    Args:
        material: what else must be as it was, by name: the model, the tokens, the number of processes.

    Raises:
        SettingsError: it belongs to other settings, another model or other tokens.
        FileFormatError: it is damaged.
    """
    tensors, notes = read_directory(path, "checkpoint", SCHEMA, _Notes)
    for name, value in material.items():
        if notes.material.get(name) != value:
            raise SettingsError(
                f"{path} was written with different {name} ({notes.material.get(name)} there, {value} now). Resume "
                "with what it was trained on, or choose another directory."
            )
    now = config.to_json()
    other = {name: value for name, value in notes.config.items() if now.get(name) != value}
    if other or set(notes.config) != set(now):
        raise SettingsError(
            f"{path} was written with other settings: {other} there, "
            f"{ {name: now.get(name) for name in other} } now. Resume with its settings, or choose another directory."
        )
    return tensors, notes
