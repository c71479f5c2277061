"""The metric of pairs with nodes ablated: what a curve is made of.

All runs of a batch follow each other, with hooks that are put in once and the batch's ablation values computed once; so
memory holds one batch, however many pairs and sizes there are.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .._memory import Halving, available_memory, first_batch, growth
from .._meter import Meter
from .._processes import Processes
from .._progress import Bar, progress
from ..bases._runs import answers_only, list_reads, run_values, take_apart
from ..bases._site import Parts, Site
from ..interventions._ablation import Ablation, AblationSwitch, Kept
from ..models._protocol import TransformerLensModel
from ..models._threads import hooked
from ..nodes._scope import shared_means
from ..tasks._metrics import Metric, measure
from ..tasks._tokenized import Batch, TokenizedPairs
from ._shared_prefix import SharedPrefix, after, kept_after

logger = logging.getLogger(__name__)
Baselines = Mapping[str, Parts | None]
Read = Callable[[Tensor, Batch], Tensor]
"""From logits, and the batch that they are of, to the metric of each row."""
NodeSet = Callable[[], Kept | None]
"""The nodes to keep, made when they are needed; None: all, that is the original model."""
BatchSize = int | Literal["auto"]


@dataclass(frozen=True)
class Ablated:
    """A model whose nodes outside a set take values of corrupt prompts, and the metric that is read there."""

    model: TransformerLensModel
    sites: tuple[Site, ...]
    metric: Metric
    ablation: Ablation
    seed: int = 0
    reference: TokenizedPairs | None = None
    """Pairs over whose corrupt prompts means are taken; those judged unless given."""


class Evaluation:
    """This process' share of the pairs.

    A batch size of "auto" begins with what holds the work of `probe`, and halves where memory runs out all the same.
    """

    def __init__(
        self,
        ablated: Ablated,
        tokens: TokenizedPairs,
        batch_size: BatchSize,
        processes: Processes,
        probe: "Callable[[Evaluation], object]",
        *,
        shown: bool | None = False,
    ) -> None:
        self._ablated, self._tokens, self._processes, self._shown = ablated, tokens, processes, shown
        size = _fitting(ablated, tokens, processes, probe) if batch_size == "auto" else batch_size
        self._halving = Halving(processes.fair(size, len(tokens)), allowed=batch_size == "auto")
        self._batches = list(processes.share(tokens.batches(self._halving.size)))
        self._means = self._mean_values() if ablated.ablation == "mean" else {}
        self._prefix = SharedPrefix(ablated.model, tokens, ablated.ablation, ablated.metric, ablated.reference)
        self._sources = self._shuffled() if ablated.ablation == "resample" else None

    @property
    def batch_size(self) -> int:
        """Prompts in one pass, as memory held them in the end; the fewest of all processes."""
        return min(self._processes.gather(self._halving.size))

    def metrics(self, sets: Sequence[NodeSet]) -> list[Tensor]:
        """The metric of every prompt with only these nodes live, one tensor per set."""
        model, sites = self._ablated.model, self._ablated.sites

        def runs(batch: Batch, base: Baselines, read: Read) -> list[Tensor]:
            found = []
            with self._prefix.runs(batch, len(sets)) as (start, rest, forward):
                switch = AblationSwitch(sites, after(base, start))
                with answers_only(model, rest, self._ablated.metric) as seen, hooked(model, switch.hooks):
                    for chosen in sets:
                        switch.keep(kept_after(chosen(), start))
                        found.append(read(forward(), seen))
            return found

        return self.measured(runs, len(sets))

    def measured(self, runs: Callable[[Batch, Baselines, Read], list[Tensor]], n: int) -> list[Tensor]:
        """The metric of every prompt in n runs, of all processes' prompts; `runs` makes them for one batch."""
        out = torch.zeros(n, len(self._tokens), dtype=torch.float32)
        total = n * sum(len(batch) for batch in self._batches)
        with torch.no_grad(), progress(total=total, desc="evaluate", verbose=self._shown, unit="prompt") as bar:
            for batch in self._batches:
                for attempt in self._halving.pieces(batch):
                    with attempt as piece:
                        out[:, piece.index.cpu()] = self._measured(runs, piece, bar).cpu()
        return list(self._processes.total({"metrics": out})["metrics"])

    def _measured(self, runs: Callable[..., list[Tensor]], batch: Batch, bar: Bar) -> Tensor:
        before = bar.n

        def read(logits: Tensor, seen: Batch) -> Tensor:
            found = measure(self._ablated.metric, logits, seen).float()
            bar.update(len(batch))
            return found

        try:
            return torch.stack(runs(batch, self._baselines(batch), read))
        except BaseException:
            bar.update(before - bar.n)
            raise

    def _baselines(self, batch: Batch) -> Baselines:
        ablation, sites = self._ablated.ablation, self._ablated.sites
        if ablation == "zero":
            return dict.fromkeys(site.hook for site in sites)
        if ablation == "mean":
            return {site.hook: self._means[site.hook, batch.clean.shape[1]] for site in sites}
        corrupt = batch.on_corrupt()
        if self._sources is not None:
            prompts, others = self._tokens.corrupt or (), [self._sources[row] for row in batch.index.tolist()]
            corrupt = replace(corrupt, clean=torch.stack([prompts[row] for row in others]))
        return take_apart(sites, run_values(self._ablated.model, corrupt, list_reads(sites)))

    def _mean_values(self) -> Mapping[tuple[str, int], Parts]:
        reference = self._ablated.reference
        size = self._halving.size
        batches = self._batches if reference is None else list(self._processes.share(reference.batches(size)))
        corrupt = [batch.on_corrupt() for batch in batches]
        return shared_means(self._ablated.model, self._ablated.sites, corrupt, self._processes, self._halving)

    def _shuffled(self) -> dict[int, int]:
        """For each prompt another one of its length, by a random cycle through them."""
        generator = torch.Generator().manual_seed(self._ablated.seed)
        lengths, sources = self._tokens.lengths, {}
        for length in set(sorted(lengths)):
            members = [row for row, other in enumerate(lengths) if other == length]
            order = torch.randperm(len(members), generator=generator).tolist()
            for place, row in enumerate(order):
                sources[members[row]] = members[order[place - 1]]
        return sources


def _fitting(
    ablated: Ablated, tokens: TokenizedPairs, processes: Processes, probe: Callable[[Evaluation], object]
) -> int:
    """The batch size that "auto" begins with, from what the longest prompt takes once and twice."""

    def peak(n: int) -> int:
        with Meter() as meter:
            probe(Evaluation(ablated, tokens.longest(n), n, Processes(), probe))
        return meter.peak

    available = available_memory(ablated.model)
    fixed, each = growth(peak, available, len(tokens))
    size = min(processes.gather(first_batch(fixed, each, available, len(tokens))))
    logger.info("batch_size='auto' begins with %d: %.3g GB and %.3g GB a prompt", size, fixed / 1e9, each / 1e9)
    return size
