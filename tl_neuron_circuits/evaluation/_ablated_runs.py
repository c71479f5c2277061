"""The metric of pairs with nodes ablated: what a curve is made of."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._processes import Processes
from ..attribution import shared_means
from ..bases import Parts, Site, logits_of, reads_of, run_values, take_apart
from ..interventions import Ablation, Kept, ablation_hooks
from ..models import TransformerLensModel
from ..tasks import Batch, Metric, TokenisedPairs, measure


class Evaluation:
    """This process' share of the pairs, in batches with their ablation values, on one model."""

    def __init__(
        self,
        model: TransformerLensModel,
        sites: tuple[Site, ...],
        metric: Metric,
        tokens: TokenisedPairs,
        ablation: Ablation,
        batch_size: int,
        seed: int,
        processes: Processes,
    ) -> None:
        self._model, self._sites, self._metric, self._n = model, sites, metric, len(tokens)
        self._processes = processes
        self._batches = list(tokens.batches(batch_size))
        if ablation != "resample":  # which takes values from other prompts, so every process needs all
            self._batches = list(processes.share(self._batches))
        self._bases = self._baselines(ablation, torch.Generator().manual_seed(seed))
        if ablation == "resample":
            self._batches = list(processes.share(self._batches))
            self._bases = list(processes.share(self._bases))

    @property
    def n_pairs(self) -> int:
        return self._n

    @property
    def batches(self) -> list[tuple[Batch, Mapping[str, Parts | None]]]:
        return list(zip(self._batches, self._bases, strict=True))

    def metric(self, kept: Kept | None, bar: tqdm) -> Tensor:
        """The metric of every prompt with only `kept` live; the original model's for None. Others' prompts: 0."""
        out = torch.zeros(self._n)
        for batch, base in zip(self._batches, self._bases, strict=True):
            hooks = [] if kept is None else ablation_hooks(self._sites, kept, base)
            with torch.no_grad(), self._model.hooks(fwd_hooks=hooks):
                logits = logits_of(self._model, batch.clean, batch.attention_mask)
                out[batch.index.cpu()] = measure(self._metric, logits, batch).float().cpu()
        bar.update()
        return out

    def gathered(self, metrics: Sequence[Tensor]) -> list[Tensor]:
        """Metrics of all processes' prompts, from what `metric` gave here."""
        return list(self._processes.total(dict(enumerate(metrics))).values())

    def _baselines(self, ablation: Ablation, generator: torch.Generator) -> list[Mapping[str, Parts | None]]:
        if ablation == "zero":
            return [dict.fromkeys(site.hook for site in self._sites)] * len(self._batches)
        if ablation == "mean":
            corrupt = (batch.on_corrupt() for batch in self._batches)
            means = shared_means(self._model, self._sites, corrupt, self._processes)
            return [{s.hook: means[s.hook, b.clean.shape[1]] for s in self._sites} for b in self._batches]
        own = [self._corrupt_parts(batch) for batch in self._batches]
        return [{**parts} for parts in own] if ablation == "corrupt" else self._shuffled(own, generator)

    def _corrupt_parts(self, batch: Batch) -> Mapping[str, Parts]:
        return take_apart(self._sites, run_values(self._model, batch.on_corrupt(), reads_of(self._sites)))

    def _shuffled(self, own: list[Mapping[str, Parts]], generator: torch.Generator) -> list[Mapping[str, Parts | None]]:
        """Each prompt gets the values of another prompt of its length, by a random cycle through them."""
        out: list[Mapping[str, Parts | None]] = [{} for _ in own]
        lengths = [batch.clean.shape[1] for batch in self._batches]
        for length in set(lengths):
            members = [i for i, other in enumerate(lengths) if other == length]
            sizes = [len(self._batches[i]) for i in members]
            order = torch.randperm(sum(sizes), generator=generator)
            source = torch.empty_like(order)
            source[order] = order.roll(1)
            for site in self._sites:
                nodes = torch.cat([own[i][site.hook].nodes for i in members])[
                    source.to(own[members[0]][site.hook].nodes.device)
                ]
                vectors = {
                    name: torch.cat([own[i][site.hook].vectors[name] for i in members])[source.to(nodes.device)]
                    for name in site.vectors
                }
                split = {name: vector.split(sizes) for name, vector in vectors.items()}
                for place, (i, part) in enumerate(zip(members, nodes.split(sizes), strict=True)):
                    out[i] = {**out[i], site.hook: Parts(part, {name: v[place] for name, v in split.items()})}
        return out
