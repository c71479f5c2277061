"""Training of transcoders and SAEs: stream activations, step every layer's dictionary, report, keep checkpoints.

All layers learn from the same forward passes. Everything drawn comes from generators seeded by `config.seed`, and all
state is in the checkpoints, the shuffle buffer included: a resumed run equals an uninterrupted one bit for bit on the
same machine. Started as several processes (`accelerate launch`, `torchrun`), each reads its share of the token batches
into its share of the buffer, gradients are averaged, all have the same weights, and the first one writes.
Source: METHODS.md 4.1, 4.5; `_features`, `_dead_features` and `_scaling` give the formulas.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import NeuronCircuitsError, SettingsError
from .._files import fingerprint, versions
from .._processes import Processes, here
from .._typing import checked
from ..models._protocol import TransformerLensModel
from ._buffer import ActivationBuffer
from ._checkpoint import check_fresh, checkpoints, newest_checkpoint, read_checkpoint, write_checkpoint
from ._config import TrainingConfig
from ._report import TrainingReport
from ._scaling import Scaling
from ._sites import TrainingSite, devices_of, training_sites
from ._token_stream import TokenStream
from ._trainee import MEASURES, Trainee


@checked
def train(
    model: TransformerLensModel,
    tokens: Int[Tensor, "prompt pos"] | Iterable[Any],
    config: TrainingConfig | None = None,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    verbose: bool = True,
) -> TrainingReport:
    """Train one dictionary a layer on the model's own activations.

    Args:
        model: a TransformerLens model; it is only run forward.
        tokens: prompts as one tensor, or an iterable of such tensors, each one forward pass. A tensor or a list is read
            again and again; an iterator must last for the whole training.
        config: settings.
        directory: where checkpoints go; None for none.
        resume: go on from the newest checkpoint there, with the same settings, model, tokens and number of processes;
            a tensor or a list of tokens is recognized, any other iterable must give the same batches again.
        verbose: show a progress bar with loss, L0, variance explained and share of dead features.

    Raises:
        SettingsError: settings or tokens cannot be used, the iterator is empty or ends early, or the checkpoints are
            of other settings, another model or other tokens.
        DictionaryError: the model has no such hook point.
        UnsupportedModelError: a hook point did not fire.
        NumericalError: a layer is dead, or the loss or weights are not finite; earlier checkpoints are as they were.
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
    processes = here()
    with processes.together("train", config.to_json()):
        run = _Run(model, tokens, config, Path(directory) if directory is not None else None, processes)
        run.start(resume)
        return run.finish(verbose and processes.first)


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        model: TransformerLensModel,
        tokens: Any,
        config: TrainingConfig,
        directory: Path | None,
        processes: Processes,
    ) -> None:
        self._model, self._config, self._directory, self._processes = model, config, directory, processes
        count = processes.count
        if config.batch_size % count or 0 < config.buffer_size // count < 2 * config.batch_size // count:
            raise SettingsError(
                f"expected batch_size to be a multiple of the {count} processes, and buffer_size at least two batches; "
                f"got {config.batch_size} and {config.buffer_size}."
            )
        self._material = {"model": _model_identity(model), "tokens": _tokens_identity(tokens), "processes": count}
        first, source = _peek(tokens, config)
        self._first = first
        self._sites: tuple[TrainingSite, ...] = training_sites(model, first, config)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._buffer = ActivationBuffer(
            model,
            TokenStream(source, config.forward_rows, config.seed, processes),
            tuple(dict.fromkeys(name for site in self._sites for name in site.hooks)),
            capacity=config.buffer_size // count,
            batch_size=config.batch_size // count,
            ignore=config.ignore_tokens,
            dtype=torch.bfloat16 if config.precision == "bfloat16" else torch.float32,
            generator=self._generator,
        )
        self._step = 0
        self._trainees: list[Trainee] = []
        self._history: list[dict[str, Any]] = []
        self._sums = {site.layer: dict.fromkeys(MEASURES, 0.0) for site in self._sites}
        self._seconds = {"collect": 0.0, "update": 0.0, "total": 0.0}

    def start(self, resume: bool) -> None:
        """Fresh weights and statistics, or those of the newest checkpoint."""
        if resume and self._directory is None:
            raise SettingsError("resume=True needs the directory with the checkpoints: train(..., directory=...).")
        if resume and self._directory is not None:
            tensors, notes = self._read(self._directory)
            devices = devices_of(self._model, self._first, [name for site in self._sites for name in site.hooks])
            for site in self._sites:
                own = _part(tensors, f"{site.layer}.scaling.").items()
                scaling = Scaling(**{name: value.to(devices[site.hook_in]) for name, value in own})
                self._trainees.append(self._trainee(site, scaling))
            self._restore(tensors, notes, devices)
            return
        if self._directory is not None:
            self._processes.from_first(lambda: _begin(self._directory))
        begin = time.perf_counter()
        sample = self._buffer.held()
        scalings = [
            Scaling.of(sample[site.hook_in], sample[site.hook_out], site, self._processes) for site in self._sites
        ]
        self._trainees = [self._trainee(*pair) for pair in zip(self._sites, scalings, strict=True)]
        self._seconds["total"] += time.perf_counter() - begin

    def finish(self, verbose: bool) -> TrainingReport:
        """All steps that are left."""
        config = self._config
        with tqdm(total=config.steps, initial=self._step, disable=not verbose, desc=config.dictionary_kind) as bar:
            while self._step < config.steps:
                begin, collected = time.perf_counter(), self._buffer.collect_seconds
                self._advance()
                self._seconds["total"] += time.perf_counter() - begin
                self._seconds["collect"] += self._buffer.collect_seconds - collected
                bar.update()
                if self._history and self._step % config.log_every == 0:
                    bar.set_postfix(self._newest(), refresh=False)
                if self._directory is not None and self._due():
                    self._write(self._directory)
        dictionaries = tuple(trainee.dictionary(self._metadata()) for trainee in self._trainees)
        dictionaries = tuple(sorted(dictionaries, key=lambda dictionary: dictionary.layer))
        positions = self._step * config.batch_size
        return TrainingReport(dictionaries, config, tuple(self._history), positions, dict(self._seconds))

    def _advance(self) -> None:
        config = self._config
        try:
            batch = self._buffer.take()
            begin = time.perf_counter()
            for site, trainee in zip(self._sites, self._trainees, strict=True):
                measured = trainee.step(batch[site.hook_in], batch[site.hook_out], self._step)
                for name, value in measured.items():
                    self._sums[site.layer][name] += value
            self._seconds["update"] += time.perf_counter() - begin
            self._step += 1
            for trainee in self._trainees if self._due() else ():
                trainee.check_weights(self._step)
        except NeuronCircuitsError as error:
            kept = checkpoints(self._directory) if self._directory is not None else []
            if kept:
                error.args = (f"{error} The checkpoint {kept[-1]} is as it was.",)
            raise
        if self._step % config.log_every == 0 or self._step == config.steps:
            since = (self._step - 1) % config.log_every + 1
            for layer, own in self._sums.items():
                sums = self._processes_mean(own)
                self._history.append({"step": self._step, "layer": layer} | {n: s / since for n, s in sums.items()})
                self._sums[layer] = dict.fromkeys(MEASURES, 0.0)

    def _newest(self) -> dict[str, str]:
        rows = self._history[-len(self._sites) :]
        return {name: f"{sum(row[name] for row in rows) / len(rows):.3g}" for name in MEASURES}

    def _trainee(self, site: TrainingSite, scaling: Scaling) -> Trainee:
        device = scaling.mean_in.device
        return Trainee(site, self._config, scaling, self._generator, device, self._processes)

    def _due(self) -> bool:
        return self._step % self._config.checkpoint_every == 0 or self._step == self._config.steps

    def _processes_mean(self, sums: dict[str, float]) -> dict[str, float]:
        if self._processes.count == 1:
            return sums
        everywhere = self._processes.gather(sums)
        return {name: sum(each[name] for each in everywhere) / len(everywhere) for name in sums}

    def _write(self, directory: Path) -> None:
        """The weights by the first process, after every other one has written its own buffer."""
        first, keep = self._processes.first, self._config.keep_checkpoints
        buffer_tensors, buffer_notes = self._buffer.state()
        tensors = {f"buffer.{name}": value for name, value in buffer_tensors.items()}
        for site, trainee in zip(self._sites, self._trainees, strict=True) if first else ():
            tensors |= {f"{site.layer}.{name}": value for name, value in trainee.state().items()}
        notes = {
            "config": self._config.to_json(),
            "material": self._material,
            "buffer": buffer_notes,
            "history": self._history,
            "sums": {str(layer): sums for layer, sums in self._sums.items()},
            "sites": [[site.named_in, site.named_out] for site in self._sites],
            "seconds": self._seconds,
            "positions": self._step * self._config.batch_size,
        }
        tensors["generator"] = self._generator.get_state()
        if not first:
            # One more than the first process keeps, which may be killed before it writes its own.
            folder = directory / f"process-{self._processes.rank}"
            folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(folder, self._step, tensors, notes, keep + 1 if keep else 0)
        self._processes.gather("written")
        if first:
            write_checkpoint(directory, self._step, tensors, notes, keep)
        self._processes.gather("written")

    def _read(self, directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The newest checkpoint: the first process' weights, and this one's buffer and sums."""
        path = self._processes.from_first(lambda: newest_checkpoint(directory))
        tensors, notes = read_checkpoint(path, self._config, self._material)
        if self._processes.first:
            return tensors, notes
        path = directory / f"process-{self._processes.rank}" / path.name
        own, own_notes = read_checkpoint(path, self._config, self._material)
        return {n: v for n, v in tensors.items() if not n.startswith("buffer.")} | own, own_notes

    def _restore(self, tensors: dict[str, Tensor], notes: dict[str, Any], devices: dict[str, torch.device]) -> None:
        for site, trainee in zip(self._sites, self._trainees, strict=True):
            trainee.restore(_part(tensors, f"{site.layer}."))
        self._buffer.restore(_part(tensors, "buffer."), notes["buffer"], devices)
        self._generator.set_state(tensors["generator"])
        self._step, self._history = int(notes["step"]), list(notes["history"])
        self._sums = {int(layer): dict(sums) for layer, sums in notes["sums"].items()}
        self._seconds = dict(notes["seconds"])

    def _metadata(self) -> dict[str, Any]:
        return {
            "model_name": str(getattr(self._model.cfg, "model_name", "")),
            "training": self._config.to_json(),
            "training_positions": self._step * self._config.batch_size,
            "versions": versions(),
        }


def _begin(directory: Path | None) -> None:
    if directory is not None:
        check_fresh(directory)
        directory.mkdir(parents=True, exist_ok=True)


def _model_identity(model: TransformerLensModel) -> str:
    return f"{getattr(model.cfg, 'model_name', '')} {fingerprint(model.parameters())}"


def _tokens_identity(tokens: Any) -> str | None:
    """Of tokens that can be looked at without using them up."""
    if isinstance(tokens, Tensor):
        return fingerprint([tokens])
    every = tokens if isinstance(tokens, list | tuple) else []
    return fingerprint(every) if every and all(isinstance(each, Tensor) for each in every) else None


def _peek(tokens: Any, config: TrainingConfig) -> tuple[Tensor, Any]:
    """The first batch, to see that the sites fire, and a source that still has it."""
    stream = TokenStream(tokens, config.forward_rows, config.seed)
    first = stream.take()
    return first[:1], chain([first], tokens) if isinstance(tokens, Iterator) else tokens


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
