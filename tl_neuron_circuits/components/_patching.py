"""Exact patching of edges, and ACDC's greedy pruning by it.

    patching:  score(u -> v) = m(clean) - m(clean, where v reads u's write of the corrupt run)
    ACDC:      from the logits backwards, every edge in turn is cut for good unless that moves the output by more than a
               threshold; cut edges carry the corrupt run's writes

Sign of patching: positive supports the answer. ACDC's score is the rise of the divergence when the edge was tried, so
kept edges score above the threshold; it is not signed.
Cost: patching, one forward row an edge, prompt and head of a layer; ACDC the same, one edge after the other.
Source: Vig et al. 2020; Conmy et al. 2023, arXiv 2304.14997; METHODS 5.5.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from ..bases._runs import logits_of
from ..models._protocol import TransformerLensModel
from ..tasks._metrics import Metric, measure
from ..tasks._tokenized import Batch
from ._graph import ComponentGraph
from ._runs import Streams, run_with_edges, streams

Divergence = Literal["kl", "metric"]


def patch_edges(
    model: TransformerLensModel,
    graph: ComponentGraph,
    batch: Batch,
    metric: Metric,
    weights: Mapping[int, Tensor],
    rows: int,
    verbose: bool = False,
) -> Float[Tensor, "source target"]:
    """Scores of every edge, summed over the batch."""
    clean, corrupt = streams(model, graph, batch, weights), streams(model, graph, batch.on_corrupt(), weights)
    with torch.no_grad():
        start = measure(metric, logits_of(model, batch.clean), batch)
    edges = graph.edges.nonzero()
    scores = torch.zeros(len(graph), len(graph), dtype=start.dtype, device=start.device)
    at_once = max(1, rows // (len(batch) * max(1, graph.n_heads)))
    for chunk in tqdm(edges.split(at_once), desc="patched edges", disable=not verbose, leave=False):
        kept = torch.ones(len(chunk), len(graph), len(graph), dtype=torch.bool)
        kept[torch.arange(len(chunk)), chunk[:, 0], chunk[:, 1]] = False
        changed = metric_with_edges(model, graph, batch, metric, kept, clean, corrupt, weights)
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
    weights: Mapping[int, Tensor],
) -> Float[Tensor, "mask batch"]:
    """The metric with only the kept edges live."""
    logits = run_with_edges(model, graph, batch, kept, clean, corrupt, weights)
    with torch.no_grad():
        return torch.stack([measure(metric, one, batch) for one in logits])


def acdc(
    model: TransformerLensModel,
    graph: ComponentGraph,
    batches: Sequence[Batch],
    metric: Metric,
    weights: Mapping[int, Tensor],
    threshold: float,
    divergence: Divergence,
    verbose: bool = False,
) -> tuple[Bool[Tensor, "source target"], Float[Tensor, "source target"]]:
    """The edges that are left, and by how much each moved the output when it was tried."""
    runs = [(b, streams(model, graph, b, weights), streams(model, graph, b.on_corrupt(), weights)) for b in batches]
    with torch.no_grad():
        whole = [logits_of(model, batch.clean) for batch in batches]

    def distance(kept: Tensor) -> float:
        total, count = 0.0, 0
        for (batch, clean, corrupt), original in zip(runs, whole, strict=True):
            logits = run_with_edges(model, graph, batch, kept[None], clean, corrupt, weights)[0]
            total += float(_distance(original, logits, batch, metric, divergence).sum())
            count += len(batch)
        return total / count

    kept = graph.edges.clone()
    scores = torch.zeros(len(graph), len(graph))
    now = distance(kept)
    for source, target in tqdm(list(_backwards(graph)), desc="acdc", disable=not verbose, leave=False):
        kept[source, target] = False
        then = distance(kept)
        scores[source, target] = then - now
        if then - now < threshold:
            now = then
        else:
            kept[source, target] = True
    return kept, scores


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
