"""Circuits that are known, and how well scores of edges find them.

    AUROC      probability that a true edge scores above another possible one (|score|; ties count half)
    SHD        edges wrongly there + edges wrongly missing: the structural Hamming distance; order is given, so no edge
               can point the wrong way. The empty graph's SHD is the number of true edges: a method above it is worse
               than no answer
    threshold  edges with |score| above it, as a share of the case's largest |score|; chosen on the other cases, never
               on the one that is judged

Source: Gupta et al. 2024, arXiv 2407.14494 (AUROC); Yin et al. 2026 (SHD); METHODS 3.3, 5.7.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from .. import _html
from .._auroc import auroc
from .._errors import SettingsError
from ._component_edges import EdgeScores

Edge = tuple[str, str]
Scores = EdgeScores | pd.DataFrame | Mapping[Edge, float]


@dataclass(frozen=True, repr=False)
class GroundTruth:
    """The true edges of a model, among all that its order of components allows.

    Raises:
        SettingsError: a true edge is not possible, or there is no possible one.

    Example:
        >>> from tl_neuron_circuits.components import GroundTruth
        >>> truth = GroundTruth("two", frozenset({("a", "b")}), frozenset({("a", "b"), ("a", "c")}))
        >>> truth, truth.empty_shd
        (GroundTruth(two: 1 of 2 possible edges), 1)
    """

    name: str
    edges: frozenset[Edge]
    possible: frozenset[Edge]

    def __post_init__(self) -> None:
        """Check that true edges are possible."""
        strange = sorted(self.edges - self.possible)
        if strange or not self.possible:
            raise SettingsError(
                f"{self.name}: expected true edges among the possible ones; {strange[:3]} are not. "
                "Name edges of the same components."
            )

    @classmethod
    def from_tracr(
        cls,
        path: str | Path,
        *,
        granularity: Literal["components", "neurons"] = "components",
        constant: Sequence[str] = ("one",),
    ) -> "GroundTruth":
        """The circuit of a compiled model: `ground_truth.json` (residual directions, neurons) and its weights.

        A component reads and writes named directions of the residual stream; there is an edge where one writes what
        the other reads.

        Args:
            path: the folder with `ground_truth.json`, `config.json` and `model.safetensors`.
            granularity: MLPs as one node, or one node per neuron ("L0/N3").
            constant: residual directions that carry no information.

        Raises:
            FileFormatError: a file is missing or of another form.

        Example:
            >>> import torch
            >>> import json
            >>> from pathlib import Path
            >>> from safetensors.torch import save_file
            >>> import tl_neuron_circuits as tnc
            >>> folder = Path("compiled")  # without layers: the logits read what the embedding writes
            >>> folder.mkdir()
            >>> config = {"d_model": 2, "n_heads": 1, "d_mlp": 1}
            >>> labels = {"residual_labels": ["token", "one"], "layers": []}
            >>> weights = {"embed.W_E": torch.ones(3, 2), "unembed.W_U": torch.ones(2, 3)}
            >>> for name, content in (("config", config), ("ground_truth", labels)):
            ...     _ = (folder / f"{name}.json").write_text(json.dumps(content))
            >>> save_file(weights, folder / "model.safetensors")
            >>> sorted(tnc.components.GroundTruth.from_tracr(folder).edges)
            [('embedding', 'logits')]
        """
        from ._ground_truth_readers import read_tracr

        return cls(*read_tracr(path, granularity, constant))

    @classmethod
    def from_interpbench(cls, name: str, edges: Iterable[Sequence[Any]], n_layers: int, n_heads: int) -> "GroundTruth":
        """A case of InterpBench from the content of its `edges.pkl`, at the granularity of heads and MLPs.

        This package reads no pickles: load the file with InterpBench's own code, in which its nodes are classes, and
        pass the list here (or pairs of node names that you kept as JSON). Nodes are named by hook and index, such as
        "blocks.0.attn.hook_result[3]"; q, k and v of a head count as the head, as its authors ask.

        Args:
            name: of the case.
            edges: pairs of nodes; `str(node)` is read.
            n_layers: of the case's model.
            n_heads: of the case's model.

        Raises:
            SettingsError: a node of an unknown form, or beyond the model.

        Source: Gupta et al. 2024, arXiv 2407.14494; its model card on granularity.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> head = "blocks.0.attn.hook_result[1]"
            >>> edges = [("hook_embed", head), (head, "blocks.0.hook_resid_post")]
            >>> truth = tnc.components.GroundTruth.from_interpbench("case", edges, n_layers=1, n_heads=2)
            >>> sorted(truth.edges)
            [('L0/H1', 'logits'), ('embedding', 'L0/H1')]
        """
        from ._ground_truth_readers import read_interpbench

        return cls(*read_interpbench(name, edges, n_layers, n_heads))

    @property
    def empty_shd(self) -> int:
        """The SHD of the empty graph: what a method must beat."""
        return len(self.edges)

    def auroc(self, scores: Scores) -> float:
        """AUROC of |score|; an edge without a score counts as zero. nan where all possible edges are true, or none.

        Args:
            scores: `EdgeScores`, a table with source, target and score (or weight), or {(source, target): score}.

        Raises:
            SettingsError: a score for an edge that is not possible, or one that is not a number.

        Example:
            >>> from tl_neuron_circuits.components import GroundTruth
            >>> truth = GroundTruth("two", frozenset({("a", "b")}), frozenset({("a", "b"), ("a", "c")}))
            >>> truth.auroc({("a", "b"): 2.0, ("a", "c"): -1.0})
            1.0
        """
        size, true = _aligned(self, scores)
        return float(auroc(torch.from_numpy(size)[:, None], torch.from_numpy(true)[:, None]))

    def precision_recall(self, scores: Scores) -> pd.DataFrame:
        """One row per distinct |score|, largest first, of the edges with at least it: n_edges, precision, recall, shd.

        Raises:
            SettingsError: as in `auroc`.

        Example:
            >>> from tl_neuron_circuits.components import GroundTruth
            >>> truth = GroundTruth("two", frozenset({("a", "b")}), frozenset({("a", "b"), ("a", "c")}))
            >>> truth.precision_recall({("a", "b"): 2.0, ("a", "c"): -1.0})
               threshold  n_edges  precision  recall  shd
            0        2.0        1        1.0     1.0    0
            1        1.0        2        0.5     1.0    1
        """
        size, true = _aligned(self, scores)
        rows = []
        for threshold in np.unique(size)[::-1]:
            there = size >= threshold
            hits = int((there & true).sum())
            rows.append(
                {
                    "threshold": threshold,
                    "n_edges": int(there.sum()),
                    "precision": hits / int(there.sum()),
                    "recall": hits / max(1, int(true.sum())),
                    "shd": int((there != true).sum()),
                }
            )
        return pd.DataFrame(rows)

    def average_precision(self, scores: Scores) -> float:
        """Average precision: the area under the steps of precision over recall.

        Raises:
            SettingsError: as in `auroc`.

        Example:
            >>> from tl_neuron_circuits.components import GroundTruth
            >>> truth = GroundTruth("two", frozenset({("a", "b")}), frozenset({("a", "b"), ("a", "c")}))
            >>> truth.average_precision({("a", "b"): 1.0, ("a", "c"): -2.0})
            0.5
        """
        curve = self.precision_recall(scores)
        return float((curve["precision"] * curve["recall"].diff().fillna(curve["recall"])).sum())

    def shd(self, edges: Collection[Edge]) -> int:
        """Return the structural Hamming distance: edges wrongly there plus edges wrongly missing.

        Raises:
            SettingsError: an edge that is not possible.

        Example:
            >>> from tl_neuron_circuits.components import GroundTruth
            >>> truth = GroundTruth("two", frozenset({("a", "b")}), frozenset({("a", "b"), ("a", "c")}))
            >>> truth.shd([("a", "c")])
            2
        """
        chosen = frozenset(edges)
        _require_possible(self, chosen)
        return len(chosen ^ self.edges)

    def to_dataframe(self) -> pd.DataFrame:
        """Columns source, target, true: one row per possible edge."""
        rows = [(source, target, (source, target) in self.edges) for source, target in sorted(self.possible)]
        return pd.DataFrame(rows, columns=["source", "target", "true"])

    def __repr__(self) -> str:
        return f"GroundTruth({self.name}: {len(self.edges)} of {len(self.possible)} possible edges)"

    def _repr_html_(self) -> str:
        true = pd.DataFrame(sorted(self.edges), columns=["source", "target"])
        return _html.block(repr(self), _html.table(true))


def judge_edges(cases: Sequence[tuple[GroundTruth, Scores]]) -> pd.DataFrame:
    """One row per case: AUROC, average precision; SHD, precision and recall at a threshold chosen on the other cases.

    The threshold is the one of least mean SHD over the others, as a share of each case's largest |score|; with several
    as good, the middle of their range. `shd_best` is the least SHD at any threshold of the case itself: what a perfect
    choice of the threshold would give. `shd_empty` is the empty graph's.

    Raises:
        SettingsError: fewer than two cases, or as in `GroundTruth.auroc`.

    Example:
        >>> from tl_neuron_circuits.components import GroundTruth, judge_edges
        >>> truth = GroundTruth("one", frozenset({("a", "b")}), frozenset({("a", "b"), ("a", "c")}))
        >>> judge_edges([(truth, {("a", "b"): 1.0})] * 2)["shd"].tolist()
        [0, 0]
    """
    if len(cases) < 2:
        raise SettingsError(
            f"the threshold is chosen on the other cases, so at least two are needed; got {len(cases)}."
        )
    aligned = [_relative(*_aligned(truth, scores)) for truth, scores in cases]
    levels = np.unique(np.concatenate([size for size, _ in aligned] + [[0.0, 1.0]]))
    middles = np.concatenate([(levels[:-1] + levels[1:]) / 2, [1.5]])  # the last leaves the graph empty
    distances = np.stack([_distances(size, true, middles) for size, true in aligned])
    rows = []
    for k, ((truth, scores), (size, true)) in enumerate(zip(cases, aligned, strict=True)):
        others = np.delete(distances, k, 0).mean(0)
        good = middles[others <= others.min() + 1e-9]
        threshold = float(good[len(good) // 2])
        there = size > threshold
        hits = int((there & true).sum())
        rows.append(
            {
                "case": truth.name,
                "auroc": truth.auroc(scores),
                "average_precision": truth.average_precision(scores),
                "shd": int((there != true).sum()),
                "shd_best": int(distances[k].min()),
                "shd_empty": truth.empty_shd,
                "precision": hits / int(there.sum()) if there.any() else float("nan"),
                "recall": hits / max(1, len(truth.edges)),
                "threshold": threshold,
                "n_edges": int(there.sum()),
                "n_true": len(truth.edges),
                "n_possible": len(truth.possible),
            }
        )
    return pd.DataFrame(rows)


def _distances(size: np.ndarray, true: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """SHD at every threshold."""
    there = size[None] > thresholds[:, None]
    return (there != true[None]).sum(1)


def _relative(size: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return size / max(float(size.max()), np.finfo(float).tiny), true


def _aligned(truth: GroundTruth, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """|score| and truth of every possible edge, in one order."""
    known = _as_mapping(scores)
    _require_possible(truth, frozenset(known))
    order = sorted(truth.possible)
    size = np.abs(np.array([known.get(edge, 0.0) for edge in order], dtype=float))
    if not np.isfinite(size).all():
        wrong = [edge for edge, value in zip(order, size, strict=True) if not np.isfinite(value)]
        raise SettingsError(f"{truth.name}: expected a number for every edge; {wrong[:3]} have none.")
    return size, np.array([edge in truth.edges for edge in order])


def _as_mapping(scores: Scores) -> Mapping[Edge, float]:
    if isinstance(scores, Mapping):
        return scores
    table: Any = scores.to_dataframe() if isinstance(scores, EdgeScores) else scores
    column = next((name for name in ("score", "weight") if name in table.columns), None)
    if column is None or not {"source", "target"} <= set(table.columns):
        raise SettingsError(f"expected columns source, target and score (or weight); got {list(table.columns)}.")
    return dict(zip(zip(table["source"], table["target"], strict=True), table[column].astype(float), strict=True))


def _require_possible(truth: GroundTruth, edges: frozenset[Edge]) -> None:
    strange = sorted(edges - truth.possible)
    if strange:
        nodes = sorted({node for edge in truth.possible for node in edge})
        raise SettingsError(
            f"{truth.name}: {len(strange)} edges, the first {strange[0]}, are not among the possible ones; its nodes "
            f"are {nodes[:8]}{'...' if len(nodes) > 8 else ''}. Score the same components."
        )
