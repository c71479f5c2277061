"""One attribution over all pairs: batch by batch, by one process or several, from the start or where it stopped."""

import dataclasses
from typing import Any

from tqdm.auto import tqdm

from .._memory import Halving
from .._processes import Processes
from ..bases._runs import reads_of, run_values, take_apart
from ..tasks._tokenized import Batch, TokenizedPairs
from . import _integrated_gradients, _patching, _relp
from ._baseline import Means, base_parts, shared_means
from ._partial import Partial
from ._setting import Runs, Setting
from ._total import Total


@dataclasses.dataclass
class Run:
    """What goes over the pairs."""

    setting: Setting
    tokens: TokenizedPairs
    batches: Halving
    chosen: Any
    seed: int
    processes: Processes
    verbose: bool

    def total(self, partial: Partial | None) -> Total:
        """The sums over all pairs, of all processes."""
        total, done = Total(self.setting, self.seed), 0
        planned = self.processes.fair(self.batches.size, len(self.tokens))
        self.batches.size = planned
        if partial is not None and (found := partial.read(total)) is not None:
            done, planned, self.batches.size = found
        means = self._means(planned)
        own = self.processes.share(self.tokens.batches(planned))
        shown = self.verbose and self.processes.first
        number = 0
        with tqdm(total=len(self.tokens), desc=self.setting.method, disable=not shown, unit="pair") as bar:
            for number, batch in enumerate(own, 1):
                if number > done:
                    self._add(batch, means, total)
                    if partial is not None:
                        partial.write(total, number, planned, self.batches.size)
                bar.update(min(len(batch) * self.processes.count, len(self.tokens) - bar.n))
        if partial is not None and number > done:
            partial.write(total, number, planned, self.batches.size, last=True)
        total.reduce(self.processes)
        self.batches.size = min(self.processes.gather(self.batches.size))
        return total

    def _means(self, batch_size: int) -> Means | None:
        if self.setting.baseline != "mean":
            return None
        batches = self.processes.share(self.tokens.batches(batch_size))
        return shared_means(self.setting.model, self.setting.sites, batches, self.processes)

    def _add(self, batch: Batch, means: Means | None, total: Total) -> None:
        if not self.batches.allowed:
            self._score(batch, means, total)
            return
        for part in self.batches.over(batch, lambda piece: self._score(piece, means, Total(self.setting, self.seed))):
            total.merge(part)

    def _score(self, batch: Batch, means: Means | None, total: Total) -> Total:
        rows = 8 * self.batches.size
        score(self.setting, batch, means, self.chosen, total, rows=rows, verbose=self.verbose and self.processes.first)
        return total


def score(
    setting: Setting, batch: Batch, means: Means | None, chosen: Any, total: Total, *, rows: int, verbose: bool
) -> None:
    """Add one batch to the total. `here` is the run that gradients are taken on, or that is patched."""
    here = batch if setting.direction == "noising" else batch.on_corrupt()
    method, gradients = setting.method, None
    if method in ("relp", "gradient"):
        values, gradients = _relp.propagate(setting, here)
    else:
        values = run_values(setting.model, here, reads_of(setting.sites))
    total.add_variance(values)
    runs = Runs(take_apart(setting.sites, values), base_parts(setting, batch, means))
    if method == "patching":
        total.add_scores(_patching.patch(setting, here, runs, chosen, rows, verbose))
    elif method in ("activation_difference", "random"):
        total.add_differences(runs)
    else:
        if method == "integrated_gradients":
            gradients = _integrated_gradients.per_site(setting, here, runs, values)
        elif method == "integrated_gradients_inputs":
            gradients = _integrated_gradients.along_inputs(setting, here)
        assert gradients is not None
        total.add(runs, gradients)
