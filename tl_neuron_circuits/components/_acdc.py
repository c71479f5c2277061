"""ACDC: greedy pruning of edges by exact patching.

From the logits backwards, every edge in turn is cut for good unless that moves the output by more than a threshold; cut
edges carry the corrupt run's writes. An edge's score is the rise of the divergence when it was tried, so kept edges
score above the threshold; it is not signed.
Cost: one forward per edge and batch, one edge after the other.
Source: Conmy et al. 2023, arXiv 2304.14997; METHODS 5.5.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._errors import SettingsError
from .._progress import progress
from ..bases._runs import run_logits
from ..tasks._metrics import Metric, measure
from ..tasks._tokenized import Batch
from ._graph import ComponentGraph
from ._method import EdgeMethod, EdgeQuestion, EdgeSums
from ._streams import paired_streams, run_with_edges

Divergence = Literal["kl", "metric"]


@dataclass(frozen=True)
class ACDC(EdgeMethod):
    """Cut edges that move the output by less than `threshold`.

    `divergence` is "kl", of the next-token distribution, or "metric", |change of the metric|.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.components.ACDC(threshold=0.1).label
        'acdc(threshold=0.1)'
    """

    name: ClassVar[str] = "acdc"
    threshold: float = 0.01
    divergence: Divergence = "kl"

    def score(self, question: EdgeQuestion) -> EdgeSums:
        """The edges that are left, and by how much each moved the output when it was tried."""
        if self.divergence not in ("kl", "metric"):
            raise SettingsError(f"expected divergence 'kl' or 'metric'; got {self.divergence!r}.")
        model, graph = question.model, question.graph
        batches = list(question.tokens.batches(question.batch_size))
        pairs = [paired_streams(model, graph, batch) for batch in batches]
        with torch.no_grad():
            whole = [run_logits(model, batch.clean) for batch in batches]

        def distance(kept: Tensor) -> float:
            total, count = 0.0, 0
            for batch, (clean, corrupt), original in zip(batches, pairs, whole, strict=True):
                logits = run_with_edges(model, graph, batch, kept[None], clean, corrupt)[0]
                total += float(_distance(original, logits, batch, question.metric, self.divergence).sum())
                count += len(batch)
            return total / count

        kept = graph.edges.clone()
        scores = torch.zeros(len(graph), len(graph), dtype=torch.float32)
        current = distance(kept)
        for source, target in progress(list(_backwards(graph)), desc="acdc", verbose=question.verbose):
            kept[source, target] = False
            without = distance(kept)
            scores[source, target] = without - current
            if without - current < self.threshold:
                current = without
            else:
                kept[source, target] = True
        return EdgeSums(scores * len(question.tokens), kept)


def _backwards(graph: ComponentGraph) -> Iterable[tuple[int, int]]:
    """Edges from the last target and its last source on."""
    for target in reversed(range(len(graph))):
        for source in reversed(graph.edges[:, target].nonzero().flatten().tolist()):
            yield source, target


def _distance(original: Tensor, logits: Tensor, batch: Batch, metric: Metric, divergence: Divergence) -> Tensor:
    """KL from the original to the new next-token distribution where the metric reads, or the metric's change."""
    with torch.no_grad():
        if divergence == "metric":
            return (measure(metric, original, batch) - measure(metric, logits, batch)).abs()
        rows = torch.arange(len(batch), device=logits.device)
        position = batch.position.to(logits.device)
        p, q = (side[rows, position].double().log_softmax(-1) for side in (original, logits))
        return (p.exp() * (p - q)).sum(-1)
