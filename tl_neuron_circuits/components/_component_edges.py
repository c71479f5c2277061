"""`component_edges`: score every edge between a model's components (embedding, heads, MLPs, logits).

One sign for all methods but ACDC: (clean - corrupt) times the effect, so positive supports the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from .. import _html
from .._errors import NumericalError, PairsError, SettingsError
from .._files import read_directory, versions, write_directory
from .._typing import checked
from ..models._protocol import TransformerLensModel
from ..propagation.rules import ALL_RULES
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._gradients import gradient_scores
from ._graph import AttentionUnit, ComponentGraph, component_graph
from ._patching import Divergence, acdc, metric_with_edges, patch_edges
from ._runs import output_weights, streams

EdgeMethod = Literal["eap", "eap_ig_inputs", "relp", "patching", "acdc", "random"]
SCHEMA = 1


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """One number an edge: `scores[i, j]` from component i to j, nan where there is no edge.

    `kept` is the circuit of a method that chooses one (ACDC), else None.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> edges = attribution.component_edges(model, pairs, method="eap", attention="layers")
        >>> edges.top(3)["target"].tolist()
        ['L0/attention', 'logits', 'L2/attention']
        >>> edges.save("edges")
        >>> len(attribution.EdgeScores.load("edges")) == len(edges)
        True
    """

    names: tuple[str, ...]
    scores: Float[Tensor, "source target"]
    settings: Mapping[str, Any]
    kept: Bool[Tensor, "source target"] | None = None

    def __len__(self) -> int:
        """How many edges there are."""
        return int((~self.scores.isnan()).sum())

    def to_dataframe(self) -> pd.DataFrame:
        """Columns source, target, score (and kept), largest |score| first."""
        source, target = (~self.scores.isnan()).nonzero(as_tuple=True)
        score = self.scores[source, target].double().numpy()
        frame = pd.DataFrame(
            {
                "source": [self.names[k] for k in source.tolist()],
                "target": [self.names[k] for k in target.tolist()],
                "score": score,
            }
        )
        if self.kept is not None:
            frame["kept"] = self.kept[source, target].numpy()
        return frame.iloc[np.argsort(-np.abs(score), kind="stable")].reset_index(drop=True)

    def top(self, k: int) -> pd.DataFrame:
        """The `k` edges with the largest |score|."""
        return self.to_dataframe().head(k)

    def save(self, path: str | Path) -> None:
        """Write a directory with `edge_scores.safetensors` and `edge_scores.json`.

        Raises:
            FileFormatError: the path is something else than a directory of ours.
        """
        tensors = {"scores": self.scores.contiguous()} | ({} if self.kept is None else {"kept": self.kept.contiguous()})
        write_directory(
            path, "edge_scores", SCHEMA, tensors, {"names": list(self.names), "settings": dict(self.settings)}
        )

    @classmethod
    def load(cls, path: str | Path) -> "EdgeScores":
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing, truncated, foreign, or of another schema.
        """
        tensors, notes = read_directory(path, "edge_scores", SCHEMA, required=("names", "settings"))
        return cls(tuple(notes["names"]), tensors["scores"], notes["settings"], tensors.get("kept"))

    def __repr__(self) -> str:
        s = self.settings
        return f"EdgeScores({s['method']} of {s['metric']} on {s['model']}, {len(self)} edges, {s['n_pairs']} pairs)"

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.to_dataframe(), bars=("score",)))


@checked
def component_edges(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    *,
    method: EdgeMethod = "relp",
    metric: Metric = logit_difference,
    attention: AttentionUnit = "heads",
    rules: Sequence[str] | None = None,
    steps: int = 5,
    threshold: float = 0.01,
    divergence: Divergence = "kl",
    batch_size: int = 32,
    prepend_bos: bool | None = None,
    seed: int = 0,
    verbose: bool = False,
) -> EdgeScores:
    """Score every edge between components by its support for `metric`, averaged over pairs.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: prompts with corrupt prompts of the same length.
        method: "eap", "eap_ig_inputs", "relp" (gradients); "patching" (exact, one edge at a time); "acdc" (greedy; its
            scores are divergences and `kept` its circuit); "random".
        metric: from logits and batch to one number a prompt.
        attention: heads as single components, or attention layers.
        rules: for "relp"; all four unless given.
        steps: for "eap_ig_inputs".
        threshold: for "acdc": edges whose cut moves the output by less are cut.
        divergence: for "acdc": KL of the next-token distribution, or |change of the metric|.
        batch_size: prompts in one pass. "patching" and "acdc" multiply the rows by edges and heads.
        prepend_bos: None means the model's default.
        seed: for "random".
        verbose: show progress.

    Returns:
        Scores on the CPU, in float32 (float64 for float64 models).

    Raises:
        UnsupportedModelError: hook points are missing, or the residual stream is no sum of these components.
        PairsError: no corrupt prompts, or of another length.
        NumericalError: scores that are not finite.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> edges = tnc.attribution.component_edges(model, pairs, method="eap")
        >>> len(edges.top(3))
        3
    """
    if steps < 1 or batch_size < 1:
        raise SettingsError(f"expected steps and batch_size of at least 1; got {steps} and {batch_size}.")
    tokens = _paired(model, pairs, prepend_bos)
    graph = component_graph(model, attention)
    weights = output_weights(model, graph)
    kept, used = None, ()
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(len(graph), len(graph), generator=generator) * len(tokens)
    elif method == "acdc":
        batches = list(tokens.batches(batch_size))
        kept, scores = acdc(model, graph, batches, metric, weights, threshold, divergence, verbose)
        scores = scores * len(tokens)
    else:
        used = tuple((ALL_RULES if rules is None else rules) if method == "relp" else ())
        count = steps if method == "eap_ig_inputs" else 1
        scores = torch.zeros(len(graph), len(graph))
        with tqdm(total=len(tokens), desc=method, disable=not verbose, unit="pair") as bar:
            for batch in tokens.batches(batch_size):
                if method == "patching":
                    part = patch_edges(model, graph, batch, metric, weights, rows=32 * batch_size, verbose=verbose)
                else:
                    part = gradient_scores(model, graph, batch, metric, weights, used, count)
                scores = scores.to(torch.promote_types(scores.dtype, part.dtype)) + part.cpu()
                bar.update(len(batch))
    settings = {
        "method": method, "metric": metric_name(metric), "attention": attention, "rules": list(used), "steps": steps,
        "threshold": threshold, "divergence": divergence, "seed": seed, "n_pairs": len(tokens),
        "model": str(getattr(model.cfg, "model_name", "unknown")), "pairs_hash": tokens.hash, "versions": versions(),
    }  # fmt: skip
    return _result(graph, scores / len(tokens), kept, settings)


@checked
def metric_of_edges(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    kept: Bool[Tensor, "mask source target"],
    *,
    metric: Metric = logit_difference,
    attention: AttentionUnit = "heads",
    batch_size: int = 32,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "mask pair"]:
    """The metric of every pair with only the kept edges live, the others carrying the corrupt run's writes.

    `kept[k]` is over the components of `component_graph(model, attention)`; all edges kept is the model itself, none is
    close to the corrupt run.

    Raises:
        UnsupportedModelError: the residual stream is no sum of these components.
        PairsError: no corrupt prompts, or of another length.
    """
    tokens = _paired(model, pairs, prepend_bos)
    graph = component_graph(model, attention)
    weights = output_weights(model, graph)
    out = torch.zeros(len(kept), len(tokens), dtype=torch.float64)
    for batch in tokens.batches(batch_size):
        clean, corrupt = streams(model, graph, batch, weights), streams(model, graph, batch.on_corrupt(), weights)
        for k, mask in enumerate(kept):
            values = metric_with_edges(model, graph, batch, metric, mask[None], clean, corrupt, weights)
            out[k, batch.index.cpu()] = values[0].double().cpu()
    return out


def _paired(model: Any, pairs: PromptPairs | TokenizedPairs, prepend_bos: bool | None) -> TokenizedPairs:
    tokens = tokenize(model, pairs, prepend_bos=prepend_bos)
    if tokens.corrupt is None:
        raise PairsError("edges compare clean with corrupt prompts, and these pairs have none. Give corrupt=.")
    for index, (clean, corrupt) in enumerate(zip(tokens.clean, tokens.corrupt, strict=True)):
        if len(clean) != len(corrupt):
            raise PairsError(
                f"pair {index}: clean has {len(clean)} tokens and corrupt {len(corrupt)}; writes are compared position "
                "by position. Choose prompts of equal token length."
            )
    return tokens


def _result(graph: ComponentGraph, scores: Tensor, kept: Tensor | None, settings: Mapping[str, Any]) -> EdgeScores:
    if not bool(torch.isfinite(scores[graph.edges]).all()):
        raise NumericalError("expected finite scores of edges; got others. Run the model in float32 or float64.")
    scores = torch.where(graph.edges, scores, torch.nan)
    return EdgeScores(tuple(graph.names), scores, settings, kept)
