"""Faithfulness by the number of edges of a circuit.

The best edges between nodes (neurons or features), and from nodes to logits, are kept by |attribution|; edges of
embeddings, errors, biases and remainders are not ranked. Two protocols, on the scale of `evaluate` (1 the original
model, 0 every node ablated):

- "nodes": a node survives with at least one kept edge in (from a node, an error or an embedding) and one out; the
  surviving nodes are kept and all others ablated, errors of dictionaries too. No edge is ablated as such.
  Arora et al. 2026; METHODS 1.5.
- "edges": the edges themselves are kept, or cut, by path patching. Of neurons only.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from .._errors import SettingsError
from .._files import versions
from .._processes import Processes
from .._typing import checked
from ..bases._site import basis_sites
from ..circuits._circuit import Circuit
from ..interventions._ablation import Ablation, Kept
from ..interventions._edge_ablation import Edge, EdgeMode, run_with_edges
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ..nodes._scores import NodeScores
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs
from ._ablated_runs import Ablated, Baselines, Evaluation, Read
from ._curve import EdgeCurve, stack
from ._evaluate import _check, _check_range

logger = logging.getLogger(__name__)


@holding
@checked
def evaluate_edges(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    circuit: Circuit,
    *,
    sizes: Sequence[int] | None = None,
    protocol: Literal["nodes", "edges"] = "nodes",
    ablation: Ablation = "mean",
    metric: Metric = logit_difference,
    batch_size: int | Literal["auto"] = 8,
    seed: int = 0,
    verbose: bool | None = None,
) -> EdgeCurve:
    """Faithfulness and completeness of the best edges of `circuit`, at several numbers of edges.

    Args:
        model: the model that was traced.
        pairs: held-out pairs of the circuit's token length.
        circuit: single neurons or features with positions, from `trace`. For edges between components:
            `components.metric_of_edges`.
        sizes: numbers of edges; METHODS' percentages of all edges unless given.
        protocol: "nodes" keeps the neurons that the edges leave connected; "edges" keeps or cuts the edges by path
            patching.
        ablation: as in `evaluate`.
        metric: as in `evaluate`.
        seed: as in `evaluate`.
        batch_size: prompts in one pass; with "edges" a pass has one row per target and prompt. "auto" as in `evaluate`.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        An `EdgeCurve`: sizes are numbers of edges, out of `n_edges`.

    Raises:
        SettingsError: supernodes, summed positions, features with protocol "edges" or without their dictionaries, or a
            size out of range.
        PairsError: pairs of another length, or without the corrupt prompts that the ablation needs.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits.evaluation import evaluate_edges
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=4)
        >>> curve = evaluate_edges(model, pairs, tnc.trace(model, pairs, nodes=20), sizes=[10, 40])
        >>> list(curve.sizes)
        [10, 40]
    """
    scores = circuit.to_scores()
    if scores.positions != "keep":
        raise SettingsError("expected a circuit with positions; this one's were summed. Evaluate it before that.")
    if protocol == "edges" and (circuit.nodes["kind"] == "feature").any():
        raise SettingsError("path patching is between neurons; for features of dictionaries use protocol='nodes'.")
    if scores.basis is None:
        raise SettingsError("this circuit was loaded without its dictionaries: Circuit.load(path, basis=...).")
    tokens = tokenize(model, pairs)
    _check(tokens, scores, ablation, None)
    edges = ranked_edges(circuit)
    sizes = _sizes(sizes, len(edges))
    nodes = circuit.nodes.set_index("node")
    alive = [nodes.loc[sorted(surviving(circuit, edges.head(size)))] for size in sizes]
    masks = [_masks(scores, those) for those in alive]
    chosen = [as_edges(nodes, edges.head(size)) for size in sizes] if protocol == "edges" else []

    def probe(run: Evaluation) -> object:
        return _patched(run, model, chosen[-1:]) if chosen else run.metrics([lambda: masks[-1]])

    ablated = Ablated(model, basis_sites(model, scores.basis), metric, ablation, seed)
    run = Evaluation(ablated, tokens, batch_size, Processes(), probe, shown=verbose)
    sets: list[Kept | None] = [None, _masks(scores, nodes.iloc[:0])]
    if protocol == "nodes":
        sets += [*masks, *({key: ~keep for key, keep in mask.items()} for mask in masks)]
    full, empty, *curves = run.metrics([lambda mask=mask: mask for mask in sets])
    curves = curves or _patched(run, model, chosen)
    predicted = [float(those["score"].sum()) for those in alive]
    _check_range(full, empty, ablation)
    settings = {
        **{key: scores.settings[key] for key in ("method", "method_options", "positions", "model")},
        "basis": scores.settings["basis"], "protocol": protocol, "ablation": ablation, "ranking": "abs",
        "metric": metric_name(metric), "attribution_hash": scores.settings["pairs_hash"], "pairs_hash": tokens.hash,
        "variance_unexplained": {}, "seed": seed, "batch_size": run.batch_size, "versions": versions(),
    }  # fmt: skip
    groups = None if tokens.labels is None else tuple(tokens.labels)
    curve = EdgeCurve(
        tuple(sizes),
        stack(curves[: len(sizes)]),
        stack(curves[len(sizes) :]),
        full,
        empty,
        torch.tensor(predicted),
        len(edges),
        settings,
        groups,
    )
    for note in curve.notes:
        logger.warning(note)
    return curve


def ranked_edges(circuit: Circuit) -> pd.DataFrame:
    """Edges from neurons or features, largest |attribution| first."""
    kind = circuit.nodes.set_index("node")["kind"]
    return circuit.edges[kind[circuit.edges["source"]].isin(("neuron", "feature")).to_numpy()].reset_index(drop=True)


def surviving(circuit: Circuit, kept: pd.DataFrame) -> set[str]:
    """Nodes with a kept edge out and an edge in, from an embedding or an error or along a kept edge."""
    kind = circuit.nodes.set_index("node")["kind"]
    from_ends = circuit.edges[kind[circuit.edges["source"]].isin(("embedding", "error")).to_numpy()]
    return set(kept["source"]) & (set(kept["target"]) | set(from_ends["target"]))


def as_edges(nodes: pd.DataFrame, edges: pd.DataFrame) -> list[Edge]:
    """Places of sources and targets; edges to any logit lead to the output."""
    places = {name: (row["layer"], row["position"], row["unit"]) for name, row in nodes.to_dict("index").items()}
    logits = set(nodes.index[nodes["kind"] == "logit"])
    pairs = zip(edges["source"], edges["target"], strict=True)
    return [(places[source], None if target in logits else places[target]) for source, target in pairs]


def _patched(run: Evaluation, model: TransformerLensModel, chosen: list[list[Edge]]) -> list[Tensor]:
    """The metric of every prompt with only these edges, for each list of them, and then without them."""
    modes: tuple[EdgeMode, ...] = ("keep", "cut")

    def runs(batch: Batch, base: Baselines, read: Read) -> list[Tensor]:
        values = {hook: None if part is None else part.nodes for hook, part in base.items()}
        patched = functools.partial(run_with_edges, model, batch.clean, attention_mask=batch.attention_mask)
        return [read(patched(edges, values, mode=mode), batch) for mode in modes for edges in chosen]

    return run.measured(runs, 2 * len(chosen))


def _masks(like: NodeScores, alive: pd.DataFrame) -> Kept:
    """Masks that keep these nodes and nothing else."""
    masks = {(hook, kind): torch.zeros_like(block, dtype=torch.bool) for hook, kind, block in like.blocks()}
    hooks = {labels.layer: hook for hook, labels in like.sites.items()}
    for row in alive.to_dict("records"):
        masks[hooks[row["layer"]], "node"][row["position"], row["unit"]] = True
    return masks


def _sizes(sizes: Sequence[int] | None, n_edges: int) -> list[int]:
    if sizes is None:
        percentages = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 70, 100)
        return sorted({max(1, round(n_edges * percentage / 100)) for percentage in percentages})
    wrong = [size for size in sizes if not 0 <= size <= n_edges]
    if wrong or not sizes:
        raise SettingsError(f"expected sizes between 0 and the number of edges, {n_edges:,}; got {wrong or 'none'}.")
    return sorted(set(sizes))
