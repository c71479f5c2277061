"""What a node is compared with: its value on the corrupt prompt, zero, or its mean over the clean prompts."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from .._memory import Halving
from .._processes import Processes
from ..bases._runs import mean_parts, reads_of, run_values, take_apart
from ..bases._site import Parts, Site
from ..models._protocol import TransformerLensModel
from ..tasks._tokenized import Batch
from ._setting import Setting

Means = Mapping[tuple[str, int], Parts]
"""Mean parts by hook and prompt length."""


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


def base_parts(setting: Setting, batch: Batch, means: Means | None) -> Mapping[str, Parts | None]:
    """The other run's parts, by hook; None is zero."""
    if setting.baseline == "corrupt":
        there = batch.on_corrupt() if setting.direction == "noising" else batch
        return take_apart(setting.sites, run_values(setting.model, there, reads_of(setting.sites)))
    if means is None:
        return dict.fromkeys((site.hook for site in setting.sites), None)
    n, length = batch.clean.shape
    return {s.hook: means[s.hook, length].map(lambda t: t.expand(n, *t.shape[1:])) for s in setting.sites}
