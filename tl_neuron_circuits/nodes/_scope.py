"""What every method is asked: whose nodes, for which metric, compared with what, and how scores are added up.

    score(n) = (a_clean - a_baseline) * d metric / d a        summed over a batch; positive supports the answer

The clean run is the one gradients are taken on, or the corrupt one with `direction="denoising"`; the change stays
"clean minus baseline" either way.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .._memory import Halving
from .._processes import Processes
from ..bases._runs import (
    Values,
    answers_only,
    capture,
    list_reads,
    mean_parts,
    require_fired,
    run_logits,
    run_values,
    take_apart,
)
from ..bases._site import Parts, Site
from ..models._protocol import TransformerLensModel
from ..models._threads import hooked
from ..propagation._gradients import gradients_by_name
from ..propagation._relp import relp
from ..tasks._metrics import Metric, measure
from ..tasks._tokenized import Batch

Baseline = Literal["corrupt", "zero", "mean"]
Direction = Literal["noising", "denoising"]
Blocks = dict[tuple[str, str], Tensor]
"""Scores summed over a batch, by (hook, kind); kinds are "node", "error" and "skip"."""
Means = Mapping[tuple[str, int], Parts]
"""Mean parts by hook and prompt length."""
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scope:
    """The question that `attribute` puts to a method, one batch at a time."""

    model: TransformerLensModel
    sites: tuple[Site, ...]
    metric: Metric
    baseline: Baseline
    direction: Direction
    positions: Literal["keep", "sum"]
    units: Literal["keep", "sum"]

    @property
    def sign(self) -> float:
        """-1 where the run that gradients are taken on is the corrupt one."""
        return 1.0 if self.direction == "noising" else -1.0

    def first_run(self, batch: Batch) -> Batch:
        """The run that gradients are taken on, or that is patched, as the clean prompts of a batch."""
        return batch if self.direction == "noising" else batch.on_corrupt()

    def baseline_parts(self, batch: Batch, means: Means | None) -> Mapping[str, Parts | None]:
        """What each node of the first run is compared with, by hook; None is zero."""
        if self.baseline == "corrupt":
            second = batch.on_corrupt() if self.direction == "noising" else batch
            return take_apart(self.sites, run_values(self.model, second, list_reads(self.sites)))
        if self.baseline == "zero" or means is None:
            return dict.fromkeys((site.hook for site in self.sites), None)
        n, length = batch.clean.shape
        return {site.hook: means[site.hook, length].map(lambda t: t.expand(n, *t.shape[1:])) for site in self.sites}

    def values(self, batch: Batch) -> Values:
        """What every site reads, without a graph."""
        return run_values(self.model, batch, list_reads(self.sites))

    def change_times(self, values: Values, baselines: Mapping[str, Parts | None], gradients: Gradients) -> Blocks:
        """(a - a_baseline) * gradient of every node, summed over the batch."""
        blocks: Blocks = {}
        for site in self.sites:
            parts, baseline, gradient = site.take_apart(values), baselines[site.hook], gradients[site.hook]
            change = parts.nodes if baseline is None else parts.nodes - baseline.nodes
            per_prompt = self.sign * change.float() * site.node_gradient(gradients).float()
            blocks[site.hook, "node"] = self.add_up(per_prompt, "node")
            for kind, vector in parts.vectors.items():
                change = vector if baseline is None else vector - baseline.vectors[kind]
                product = change.float() * site.vector_gradient(gradient).float()
                blocks[site.hook, kind] = self.add_up(self.sign * product.sum(-1), kind)
        return blocks

    def add_up(self, per_prompt: Tensor, kind: str) -> Tensor:
        """Over the batch, over positions where they are summed, and over units where these are."""
        if kind == "node" and self.units == "sum":
            per_prompt = per_prompt.sum(-1, keepdim=True)
        return per_prompt.sum((0, 1) if self.positions == "sum" else 0)


def gradients_at(
    model: TransformerLensModel,
    batch: Batch,
    sites: Iterable[Site],
    metric: Metric,
    rules: str | tuple[str, ...],
    stabilizer: float | None = None,
    hooks: Iterable[tuple[str, Any]] = (),
    check: bool = True,
) -> tuple[Values, Values]:
    """One forward and one backward under `rules`: what every site reads, and the metric's gradient at every site.

    `hooks` are forward hooks that run before values are captured; `check` as in `relp`.
    """
    sites = tuple(sites)
    names = list_reads(sites)
    store: Values = {}
    reading = [*hooks, *(capture(store, name) for name in names)]
    with relp(model, rules, stabilizer=stabilizer, check=check):
        with answers_only(model, batch, metric) as narrowed, hooked(model, reading):
            logits = run_logits(model, batch.clean, batch.attention_mask)
        require_fired(store, names, model)
        total = measure(metric, logits, narrowed).sum()
        del logits
        gradients = gradients_by_name(total, {site.hook: store[site.hook] for site in sites})
    return {name: value.detach() for name, value in store.items()}, gradients


def shared_means(
    model: TransformerLensModel,
    sites: Iterable[Site],
    batches: Iterable[Batch],
    processes: Processes,
    halving: Halving | None = None,
) -> Means:
    """`mean_parts` over the batches of all processes together; with `halving` in pieces that memory holds."""
    counts: dict[int, int] = {}
    sites = tuple(sites)
    batches = batches if halving is None else tuple(batches)

    def own(size: int | None = None) -> Means:
        counts.clear()
        return mean_parts(model, sites, counted(size))

    def counted(size: int | None) -> Iterator[Batch]:
        for batch in (piece for whole in batches for piece in ([whole] if size is None else whole.split(size))):
            counts[batch.clean.shape[1]] = counts.get(batch.clean.shape[1], 0) + len(batch)
            yield batch

    means = own() if halving is None else halving.whole(own)
    if processes.count == 1:
        return means
    sums: dict[tuple[str, int, str], Tensor] = {}
    for (hook, length), parts in means.items():
        sums |= {
            (hook, length, name): tensor * counts[length]
            for name, tensor in {"node": parts.nodes, **parts.vectors}.items()
        }
    totals: dict[int, int] = {}
    for found in processes.gather(counts):
        totals |= {length: totals.get(length, 0) + n for length, n in found.items()}
    whole: dict[tuple[str, int], dict[str, Tensor]] = {}
    for (hook, length, name), block in processes.total(sums).items():
        whole.setdefault((hook, length), {})[name] = block / totals[length]
    return {key: Parts(blocks.pop("node"), blocks) for key, blocks in whole.items()}
