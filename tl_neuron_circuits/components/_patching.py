"""Exact patching of edges: the truth that gradient methods estimate.

    score(u -> v) = m(clean) - m(clean, where v reads u's write of the corrupt run)

Sign: positive supports the answer. Cost: one forward row per edge, prompt and head of a layer.
Source: Vig et al. 2020; METHODS 5.5.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._progress import progress
from ..bases._runs import run_logits
from ..models._protocol import TransformerLensModel
from ..tasks._metrics import Metric, measure
from ..tasks._tokenized import Batch
from ._graph import ComponentGraph
from ._method import EdgeMethod, EdgeQuestion, EdgeSums
from ._streams import Streams, paired_streams, run_with_edges

_ROWS = 32  # forward rows per prompt of `batch_size`


@dataclass(frozen=True)
class Patching(EdgeMethod):
    """Every edge patched by itself.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.components.Patching().label
        'patching'
    """

    name: ClassVar[str] = "patching"

    def score(self, question: EdgeQuestion) -> EdgeSums:
        """The fall of the metric for every edge."""
        graph = question.graph
        scores = torch.zeros(len(graph), len(graph), dtype=torch.float32)
        for batch in question.batches(self.label):
            part = self._score_batch(question, batch)
            scores = scores.to(torch.promote_types(scores.dtype, part.dtype)) + part.cpu()
        return EdgeSums(scores)

    def _score_batch(self, question: EdgeQuestion, batch: Batch) -> Float[Tensor, "source target"]:
        model, graph, metric = question.model, question.graph, question.metric
        clean, corrupt = paired_streams(model, graph, batch)
        with torch.no_grad():
            start = measure(metric, run_logits(model, batch.clean), batch)
        edges = graph.edges.nonzero()
        scores = torch.zeros(len(graph), len(graph), dtype=start.dtype, device=start.device)
        at_once = max(1, _ROWS * question.batch_size // (len(batch) * max(1, graph.n_heads)))
        for chunk in progress(edges.split(at_once), desc="patched edges", verbose=question.verbose):
            kept = torch.ones(len(chunk), len(graph), len(graph), dtype=torch.bool)
            kept[torch.arange(len(chunk)), chunk[:, 0], chunk[:, 1]] = False
            changed = metric_with_edges(model, graph, batch, metric, kept, clean, corrupt)
            scores[chunk[:, 0], chunk[:, 1]] = (start - changed).sum(1)
        return scores


def metric_with_edges(
    model: TransformerLensModel,
    graph: ComponentGraph,
    batch: Batch,
    metric: Metric,
    kept: Bool[Tensor, "mask source target"],
    clean: Streams,
    corrupt: Streams,
) -> Float[Tensor, "mask batch"]:
    """The metric with only the kept edges live."""
    logits = run_with_edges(model, graph, batch, kept, clean, corrupt)
    with torch.no_grad():
        return torch.stack([measure(metric, rows, batch) for rows in logits])
