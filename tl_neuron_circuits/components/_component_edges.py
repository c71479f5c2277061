"""`component_edges`: score every edge between a model's components (embedding, heads, MLPs, logits).

One sign for all methods but ACDC: (clean - corrupt) times the effect, so positive supports the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _html
from .._errors import FileFormatError, NumericalError, SettingsError
from .._files import formed, read_directory, require_shapes, write_directory
from .._options import parse_options
from .._progress import show_batches
from .._typing import checked
from ..models._protocol import TransformerLensModel
from ..models._threads import holding
from ..tasks._metrics import Metric, logit_difference, metric_name
from ..tasks._pairs import PromptPairs
from ..tasks._provenance import provenance, require_corrupt
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._acdc import ACDC
from ._eap import EAP, EAPIGInputs, RelP
from ._graph import AttentionUnit, component_graph
from ._learned_mask import LearnedMask
from ._method import EdgeMethod, EdgeQuestion, Random
from ._mib import read_mib, write_mib
from ._patching import Patching, metric_with_edges
from ._streams import paired_streams

SCHEMA = 3


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    names: list[str]
    settings: dict[str, Any]


class _Settings(msgspec.Struct):
    """What scores need of their settings."""

    method: str
    metric: str
    model: str
    n_pairs: int


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """One number per edge: `scores[i, j]` from component i to j, nan where there is no edge.

    `kept` is the circuit of a method that chooses one (ACDC), else None.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> edges = tnc.components.component_edges(model, pairs, method="eap", attention="layers")
        >>> edges.top(3)["target"].tolist()
        ['L0/attention', 'logits', 'L2/attention']
        >>> edges.save("edges")
        >>> len(tnc.components.EdgeScores.load("edges")) == len(edges)
        True
    """

    names: tuple[str, ...]
    scores: Float[Tensor, "source target"]
    settings: Mapping[str, Any]
    kept: Bool[Tensor, "source target"] | None = None
    qkv: Float[Tensor, "3 source target"] | None = None
    """The scores of edges into heads by what reads them: q, k, v; zero for other targets. Their sum is `scores`."""

    def __len__(self) -> int:
        """How many edges there are."""
        return int((~self.scores.isnan()).sum())

    def to_dataframe(self) -> pd.DataFrame:
        """Columns source, target, score (and kept; q, k and v where they are split), largest |score| first."""
        source, target = (~self.scores.isnan()).nonzero(as_tuple=True)
        score = self.scores[source, target].double().numpy()
        frame = pd.DataFrame(
            {
                "source": [self.names[k] for k in source.tolist()],
                "target": [self.names[k] for k in target.tolist()],
                "score": score,
            }
        )
        if self.qkv is not None:
            frame = frame.assign(**{n: self.qkv[k, source, target].double().numpy() for k, n in enumerate("qkv")})
        if self.kept is not None:
            frame["kept"] = self.kept[source, target].numpy()
        return frame.iloc[np.argsort(-np.abs(score), kind="stable")].reset_index(drop=True)

    @checked
    def top(self, k: int) -> pd.DataFrame:
        """The `k` edges with the largest |score|."""
        return self.to_dataframe().head(k)

    def save(self, path: str | Path) -> None:
        """Write a directory with `edge_scores.safetensors`; an existing one is replaced at once.

        Raises:
            FileFormatError: the path exists and is not saved edge scores.
            SaveError: it could not be written; what was saved there before is as it was.
        """
        optional = {"kept": self.kept, "qkv": self.qkv}
        tensors = {"scores": self.scores} | {name: tensor for name, tensor in optional.items() if tensor is not None}
        write_directory(
            path, "edge_scores", SCHEMA, tensors, {"names": list(self.names), "settings": dict(self.settings)}
        )

    @classmethod
    def load(cls, path: str | Path) -> "EdgeScores":
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing, truncated, foreign, or of another schema.
        """
        tensors, notes = read_directory(path, "edge_scores", SCHEMA, _Notes)
        formed(notes.settings, _Settings, path)
        square = (len(notes.names), len(notes.names))
        shapes = {"scores": square, "kept": square, "qkv": (3, *square)}
        require_shapes(path, tensors, {name: shapes[name] for name in ("scores", *tensors) if name in shapes})
        kept, qkv = tensors.get("kept"), tensors.get("qkv")
        if not tensors["scores"].is_floating_point() or (kept is not None and kept.dtype != torch.bool):
            raise FileFormatError(f"expected scores, and whether edges are kept, in {path}. Save them again.")
        return cls(tuple(notes.names), tensors["scores"], notes.settings, kept, qkv)

    def to_mib(self, path: str | Path, *, n_edges: int | Literal["mib"] | None = None) -> None:
        """Write MIB's JSON: the score of every edge, q, k and v of heads apart, and a circuit where a size is given.

        Args:
            path: of the file; an existing one is replaced.
            n_edges: size of the circuit, by |score|, before edges on no path from input to logits are dropped; `counts`
                in the file says both numbers. "mib" writes a folder, as its submissions have one per task and model
                ("ioi_gpt2"), of the nine circuits of `int(p * N)` edges, "0.001.json" to "0.5.json".

        Raises:
            SettingsError: heads that are not split (`component_edges(split_qkv=True)`), or more edges than there are.
            FileFormatError: a folder that holds anything other than nine circuits.
            SaveError: it could not be written.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
            >>> edges = tnc.components.component_edges(model, pairs, method="eap", split_qkv=True)
            >>> edges.to_mib("importances.json", n_edges=100)
            >>> edges.to_mib("agreement_demo", n_edges="mib")
            >>> int(tnc.components.EdgeScores.from_mib("agreement_demo/0.5.json").kept.sum())
            159
        """
        write_mib(Path(path), self.names, self.scores, self.qkv, self.settings.get("d_model"), n_edges)

    @classmethod
    def from_mib(cls, path: str | Path) -> "EdgeScores":
        """Read MIB's JSON, of `to_mib` or of EAP-IG's code: the scores, and the circuit as `kept` where there is one.

        An edge into a head is kept where its q, k or v is. The file does not say method, metric, model or pairs.

        Raises:
            FileFormatError: missing, of another form, or its edges are not those of its layers and heads.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
            >>> edges = tnc.components.component_edges(model, pairs, method="eap", split_qkv=True)
            >>> edges.to_mib("importances.json")
            >>> bool((tnc.components.EdgeScores.from_mib("importances.json").qkv == edges.qkv).all())
            True
        """
        names, scores, qkv, kept, d_model = read_mib(Path(path))
        unknown = {"method": "mib", "metric": "unknown", "model": Path(path).name, "n_pairs": 0}
        return cls(names, scores, {**unknown, "attention": "heads", "d_model": d_model}, kept, qkv)

    def __repr__(self) -> str:
        s = self.settings
        return f"EdgeScores({s['method']} of {s['metric']} on {s['model']}, {len(self)} edges, {s['n_pairs']} pairs)"

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.to_dataframe(), bars=("score",)))


METHODS: dict[str, type[EdgeMethod]] = {
    method.name: method for method in (EAP, EAPIGInputs, RelP, Patching, ACDC, LearnedMask, Random)
}


@holding
@checked
def component_edges(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    *,
    method: str | EdgeMethod = "relp",
    metric: Metric = logit_difference,
    attention: AttentionUnit = "heads",
    split_qkv: bool = False,
    batch_size: int = 32,
    verbose: bool | None = None,
) -> EdgeScores:
    """Score every edge between components by its support for `metric`, averaged over pairs.

    Args:
        model: a HookedTransformer or TransformerBridge.
        pairs: prompts with corrupt prompts of the same length.
        method: "eap", "eap_ig_inputs", "relp" (gradients); "patching" (exact, one edge at a time); "acdc" (greedy; its
            scores are divergences and `kept` its circuit); "learned_mask" (its scores are an order); "random". Or one
            of these with options, as an object or as its label: `ACDC(threshold=0.1)`, "eap_ig_inputs(steps=10)".
        metric: from logits and batch to one number per prompt.
        attention: heads as single components, or attention layers.
        split_qkv: also score what reaches a head through its q, k and v alone (gradient methods, with heads).
        batch_size: prompts in one pass. "patching" and "acdc" multiply the rows by edges and heads.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        Scores on the CPU, in float32 (float64 for float64 models).

    Raises:
        UnsupportedModelError: hook points are missing, or the residual stream is not a sum of these components.
        PairsError: no corrupt prompts, or of another length.
        NumericalError: scores that are not finite.
        SettingsError: an unknown method or option.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> edges = tnc.components.component_edges(model, pairs, method="eap")
        >>> len(edges.top(3))
        3
    """
    if batch_size < 1:
        raise SettingsError(f"expected batch_size to be at least 1; got {batch_size}.")
    chosen = parse_options(method, METHODS, what="a method") if isinstance(method, str) else method
    tokens = _paired(model, pairs)
    graph = component_graph(model, attention)
    if split_qkv and (attention != "heads" or not isinstance(chosen, EAP | EAPIGInputs)):
        raise SettingsError(
            f"split_qkv=True is for gradients into single heads: method 'eap', 'eap_ig_inputs' or 'relp' with "
            f"attention='heads'; got {chosen.label!r} with {attention!r}."
        )
    question = EdgeQuestion(model, graph, tokens, metric, batch_size, verbose, split_qkv)
    sums = chosen.score(question)
    scores = sums.scores / len(tokens)
    if not bool(torch.isfinite(scores[graph.edges]).all()):
        raise NumericalError("edge scores contain NaN or inf. Run the model in float32 or float64.")
    settings = {
        "method": chosen.label, "method_options": chosen.to_json(), "metric": metric_name(metric),
        "attention": attention, "d_model": int(model.cfg.d_model), **provenance(model, tokens),
    }  # fmt: skip
    qkv = None if sums.qkv is None else torch.where(graph.edges, sums.qkv / len(tokens), 0.0)
    return EdgeScores(tuple(graph.names), torch.where(graph.edges, scores, torch.nan), settings, sums.kept, qkv)


@holding
@checked
def metric_of_edges(
    model: TransformerLensModel,
    pairs: PromptPairs | TokenizedPairs,
    kept: Bool[Tensor, "mask source target"],
    *,
    metric: Metric = logit_difference,
    attention: AttentionUnit = "heads",
    batch_size: int = 32,
    verbose: bool | None = None,
) -> Float[Tensor, "mask pair"]:
    """The metric of every pair with only the kept edges live, the others carrying the corrupt run's writes.

    `kept[k]` is over the components of `component_graph(model, attention)`; all edges kept is the model itself, none is
    close to the corrupt run. `verbose` as in `attribute`.

    Raises:
        UnsupportedModelError: the residual stream is not a sum of these components.
        PairsError: no corrupt prompts, or of another length.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
        >>> whole = tnc.components.component_graph(model, "layers").edges
        >>> tnc.components.metric_of_edges(model, pairs, whole[None], attention="layers").shape
        torch.Size([1, 4])
    """
    tokens = _paired(model, pairs)
    graph = component_graph(model, attention)
    out = torch.zeros(len(kept), len(tokens), dtype=torch.float64)
    for batch in show_batches(tokens.batches(batch_size), len(tokens), desc="metric of edges", verbose=verbose):
        clean, corrupt = paired_streams(model, graph, batch)
        for k, mask in enumerate(kept):
            values = metric_with_edges(model, graph, batch, metric, mask[None], clean, corrupt)
            out[k, batch.index.cpu()] = values[0].double().cpu()
    return out


def _paired(model: Any, pairs: PromptPairs | TokenizedPairs) -> TokenizedPairs:
    tokens = tokenize(model, pairs)
    require_corrupt(tokens, "a score of edges")
    return tokens
