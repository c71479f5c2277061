"""Training of transcoders and SAEs: stream activations, step every layer's dictionary, report, keep checkpoints.

All layers learn from the same forward passes. Everything drawn comes from generators seeded by `config.seed`, and all
state is in the checkpoints, the shuffle buffer included: a resumed run equals an uninterrupted one bit for bit on the
same machine. Source: METHODS.md 4.1, 4.5; `_features`, `_dead_features` and `_scaling` give the formulas.
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
from .._files import versions
from .._typing import checked
from ..models import TransformerLensModel
from ._buffer import ActivationBuffer
from ._checkpoint import check_fresh, checkpoints, read_checkpoint, write_checkpoint
from ._config import TrainingConfig
from ._report import TrainingReport
from ._scaling import Scaling
from ._sites import TrainingSite, training_sites
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
        resume: go on from the newest checkpoint there. An iterable must give the same batches again.
        verbose: show a progress bar with loss, L0, variance explained and share of dead features.

    Raises:
        SettingsError: settings or tokens cannot be used, the iterator is empty or ends early, or the checkpoints are
            of other settings.
        DictionaryError: the model has no such hook point.
        UnsupportedModelError: a hook point did not fire.
        NumericalError: a layer is dead, or the loss is not finite; earlier checkpoints are as they were.
        FileFormatError: a checkpoint could not be read or written.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("rc", n=64)
        >>> tokens = torch.stack(list(tnc.tasks.tokenise(model, pairs).clean))
        >>> config = tnc.transcoders.TrainingConfig(layers=(0,), d_dict=64, steps=20, batch_size=64, buffer_size=256)
        >>> report = tnc.transcoders.train(model, tokens, config, verbose=False)
        >>> report[0].kind, report[0].d_dict
        ('jumprelu_transcoder', 64)
    """
    run = _Run(model, tokens, config or TrainingConfig(), Path(directory) if directory is not None else None)
    run.start(resume)
    return run.finish(verbose)


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self, model: TransformerLensModel, tokens: Any, config: TrainingConfig, directory: Path | None
    ) -> None:
        self._model, self._config, self._directory = model, config, directory
        self._device = next(iter(model.parameters())).device
        first, source = _peek(tokens, config)
        self._sites: tuple[TrainingSite, ...] = training_sites(model, first, config)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._buffer = ActivationBuffer(
            model,
            TokenStream(source, config.forward_rows, config.seed),
            tuple(dict.fromkeys(name for site in self._sites for name in site.hooks)),
            capacity=config.buffer_size,
            batch_size=config.batch_size,
            ignore=config.ignore_tokens,
            dtype=torch.bfloat16 if config.precision == "bfloat16" else torch.float32,
            generator=self._generator,
        )
        self._step = 0
        self._history: list[dict[str, Any]] = []
        self._sums = {site.layer: dict.fromkeys(MEASURES, 0.0) for site in self._sites}
        self._seconds = {"collect": 0.0, "update": 0.0, "total": 0.0}

    def start(self, resume: bool) -> None:
        """Fresh weights and statistics, or those of the newest checkpoint."""
        if resume and self._directory is None:
            raise SettingsError("resume=True needs the directory with the checkpoints: train(..., directory=...).")
        if resume and self._directory is not None:
            tensors, notes = read_checkpoint(self._directory, self._config)
            scalings = [Scaling(**_part(tensors, f"{site.layer}.scaling.")) for site in self._sites]
            self._trainees = [self._trainee(*pair) for pair in zip(self._sites, scalings, strict=True)]
            self._restore(tensors, notes)
            return
        if self._directory is not None:
            check_fresh(self._directory)
            self._directory.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        sample = self._buffer.held()
        scalings = [Scaling.of(sample[site.hook_in], sample[site.hook_out], site) for site in self._sites]
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
                if self._directory is not None and (
                    self._step % config.checkpoint_every == 0 or self._step == config.steps
                ):
                    self._write()
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
        except NeuronCircuitsError as error:
            kept = checkpoints(self._directory) if self._directory is not None else []
            if kept:
                error.args = (f"{error} The checkpoint {kept[-1]} is as it was.",)
            raise
        self._step += 1
        if self._step % config.log_every == 0 or self._step == config.steps:
            since = (self._step - 1) % config.log_every + 1
            for layer, sums in self._sums.items():
                self._history.append({"step": self._step, "layer": layer} | {n: s / since for n, s in sums.items()})
                self._sums[layer] = dict.fromkeys(MEASURES, 0.0)

    def _newest(self) -> dict[str, str]:
        rows = self._history[-len(self._sites) :]
        return {name: f"{sum(row[name] for row in rows) / len(rows):.3g}" for name in MEASURES}

    def _trainee(self, site: TrainingSite, scaling: Scaling) -> Trainee:
        device = scaling.mean_in.device
        return Trainee(site, self._config, scaling, self._generator, device)

    def _write(self) -> None:
        assert self._directory is not None
        buffer_tensors, buffer_notes = self._buffer.state()
        tensors = {f"buffer.{name}": value for name, value in buffer_tensors.items()}
        for site, trainee in zip(self._sites, self._trainees, strict=True):
            tensors |= {f"{site.layer}.{name}": value for name, value in trainee.state().items()}
        notes = {
            "config": self._config.to_json(),
            "buffer": buffer_notes,
            "history": self._history,
            "sums": {str(layer): sums for layer, sums in self._sums.items()},
            "sites": [[site.named_in, site.named_out] for site in self._sites],
            "seconds": self._seconds,
            "positions": self._step * self._config.batch_size,
        }
        tensors["generator"] = self._generator.get_state()
        write_checkpoint(self._directory, self._step, tensors, notes, self._config.keep_checkpoints)

    def _restore(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        for site, trainee in zip(self._sites, self._trainees, strict=True):
            trainee.restore(_part(tensors, f"{site.layer}."))
        self._buffer.restore(_part(tensors, "buffer."), notes["buffer"], self._device)
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


def _peek(tokens: Any, config: TrainingConfig) -> tuple[Tensor, Any]:
    """The first batch, to see that the sites fire, and a source that still has it."""
    stream = TokenStream(tokens, config.forward_rows, config.seed)
    first = stream.take()
    return first[:1], chain([first], tokens) if isinstance(tokens, Iterator) else tokens


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
