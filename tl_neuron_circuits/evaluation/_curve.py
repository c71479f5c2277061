r"""`SparsityCurve`: faithfulness and completeness of the best nodes, by how many they are.

    faithfulness(C) = (F(C) - F(0)) / (F(M) - F(0))        ideal 1; more than 1 occurs
    completeness(C) = (F(M \\ C) - F(0)) / (F(M) - F(0))    ideal 0

F is the mean metric of the original model with every node outside the set ablated; M is all nodes, and F(M) the model
itself. Nodes of the set stay live. Faithfulness is a ratio of means that a few pairs can carry, and above 1 where a
circuit overshoots the model; what pairs decide is beside it, among those that the model itself gets right:

    accuracy(C) = share with metric > 0 when only C is live         the circuit still prefers the answer
    flips(C)    = share with metric < 0 when C is ablated           without C the model prefers the wrong one
    compactness = mean of the areas under both over log size        1: a single node does and undoes all

Source: Marks et al. 2025, arXiv 2403.19647; Arora et al. 2026, arXiv 2601.22594 and 2609.25518; METHODS 1.4, 5.8, 5.11.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .. import _html
from .._errors import FileFormatError, SettingsError
from .._files import formed, read_directory, require_shapes, write_directory
from .._typing import checked
from ._bootstrap import band, draw_weights, gap_band, ratios

SCHEMA = 3
C = TypeVar("C", bound="Curve")
_TENSORS = ("kept", "removed", "full", "empty", "predicted")
_NO_TIE = ("answer_logit", "answer_log_probability")
"""Metrics whose zero does not stand between the answer and another one."""
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class CurveNotes(msgspec.Struct, forbid_unknown_fields=True):
    """What a file says of a curve beside its tensors."""

    sizes: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]
    total: Annotated[int, msgspec.Meta(ge=1)]
    settings: dict[str, Any]
    groups: list[str] | None


class _Settings(msgspec.Struct):
    """What a curve needs of its settings."""

    basis: str
    method: str
    ablation: str


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """Metrics per prompt for every size, so that bands can be drawn from the same numbers."""

    sizes: tuple[int, ...]
    kept: Float[Tensor, "size pair"]
    """Metric of each prompt with only the best nodes live."""
    removed: Float[Tensor, "size pair"]
    """Metric of each prompt with the best nodes ablated."""
    full: Float[Tensor, " pair"]
    """Metric of each prompt in the original model."""
    empty: Float[Tensor, " pair"]
    """Metric of each prompt with every node ablated."""
    predicted: Float[Tensor, " size"]
    """Sum of the best nodes' scores: what the method expects `full - removed` to be."""
    total: int
    """How many nodes, or edges, there are."""
    settings: Mapping[str, Any]
    groups: tuple[str, ...] | None = None
    """The lexical item of each pair, for bands."""

    KIND: ClassVar[str] = "curve"
    COUNTED: ClassVar[str] = "nodes"

    @property
    def metric_full(self) -> float:
        """F(M): the original model's mean metric."""
        return float(self.full.mean())

    @property
    def metric_empty(self) -> float:
        """F(0): the mean metric with every node ablated."""
        return float(self.empty.mean())

    @property
    def faithfulness(self) -> np.ndarray:
        """One number per size."""
        return self._normalized(self.kept)

    @property
    def completeness(self) -> np.ndarray:
        """One number per size."""
        return self._normalized(self.removed)

    @property
    def accuracy(self) -> np.ndarray:
        """Share of the pairs that the model gets right and the best nodes alone too; nan if zero is not a tie."""
        return self._share(self.kept > 0)

    @property
    def flips(self) -> np.ndarray:
        """Share of the pairs that the model gets right and, without the best nodes, wrong."""
        return self._share((self.removed < 0).double().masked_fill(self.removed.isnan(), torch.nan))

    @property
    def overshoot(self) -> float:
        """How far faithfulness exceeds 1 at its largest; 0 where it never does. To CPR it is merit, to CMD error."""
        return max(0.0, float(np.max(self.faithfulness)) - 1.0)

    @property
    def compactness(self) -> float:
        """Mean of the areas under `accuracy` and `flips` over log size, 1 node to all; nan without completeness."""
        none = self._share(self.empty[None] > 0)[0], 0.0
        last = (1.0, self._share(self.empty[None] < 0)[0])
        if self.settings.get("error_nodes") == "ablate":  # then all nodes are not the model
            last = (self.accuracy[-1], self.flips[-1])
        both = zip((self.accuracy, self.flips), none, last, strict=True)
        areas = [log_area(self.sizes, values, self.total, first, end) for values, first, end in both]
        return float(np.mean(areas))

    @property
    def notes(self) -> list[str]:
        """What to know before quoting a ratio: both divide by F(M) - F(0), which the pairs may not tell from 0."""
        low, high = gap_band(self, draw_weights(self.groups, len(self.full), 1000, 0))
        if low > 0:
            return []
        gap = f"F(M) - F(0) is {self.metric_full - self.metric_empty:.3g} [{low:.3g}, {high:.3g}]"
        remedy = "those that the model gets right: pairs.where_model_is_right(model)"
        if high < 0:
            return [
                f"{gap}: without its nodes the model does better, so a faithfulness of 1 is as bad as the model. "
                f"Use {remedy}."
            ]
        return [
            f"{gap}: on these pairs the model may do no better than without its nodes, and faithfulness and "
            f"completeness, which divide by this, have bands without bounds. Use more pairs, or {remedy}."
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns size, fraction (of all nodes), faithfulness, completeness, accuracy, flips."""
        sizes = np.array(self.sizes)
        return pd.DataFrame(
            {
                "size": sizes,
                "fraction": sizes / self.total,
                "faithfulness": self.faithfulness,
                "completeness": self.completeness,
                "accuracy": self.accuracy,
                "flips": self.flips,
            }
        )

    def size_at(self, level: float) -> float:
        """The size from which faithfulness stays at `level` or above, log-interpolated; inf where it never does."""
        return size_at(self.sizes, self.faithfulness, level)

    @checked
    def size_within(self, tolerance: float = 0.2) -> float:
        """The size from which |1 - faithfulness| stays within `tolerance`, log-interpolated; inf where it never does.

        Unlike `size_at`, overshoot does not count as success. As far as sizes were measured.
        """
        return size_within(self.sizes, self.faithfulness, tolerance)

    @checked
    def overshoot_area(self, largest: int | None = None, *, signed: bool = False) -> float:
        """Mean over log size of how far faithfulness exceeds 1, from 1 node to `largest` (by default all).

        With `signed`, of faithfulness - 1 itself: what falls short of 1 counts against what exceeds it, so that 0 is a
        curve that is right on average. Sizes and ends as in `log_area`.
        """
        return self._log_mean(lambda f: f - 1 if signed else np.maximum(f - 1, 0), largest)

    @checked
    def error_area(self, largest: int | None = None) -> float:
        """Mean over log size of min(1, |1 - faithfulness|): 0 does what the model does from 1 node on.

        Both what is missing and overshoot are errors. Sizes and ends as in `log_area`.
        """
        return self._log_mean(_error, largest)

    @checked
    def contrast(
        self,
        other: "Curve",
        *,
        measure: Literal["error_area", "log_area", "overshoot_area"] = "error_area",
        largest: int | None = None,
        clusters: Sequence[str] | None = None,
        among: Sequence[str] | None = None,
        draws: int = 2000,
        seed: int = 0,
    ) -> pd.Series:
        """This curve's `measure` minus another's on the same pairs, with a 95% bootstrap interval over clusters.

        Both curves see the same draws of clusters, so what pairs have in common does not widen the interval.

        Args:
            other: a curve on the same pairs, such as of another basis, method or ranking.
            measure: the method that is compared.
            largest: as in that method; the smaller of the two totals unless given.
            clusters: one label per pair: pairs of one label are drawn together. The pairs' labels unless given.
            among: all clusters that are drawn from, where contrasts on other pairs are to have the same draws.
            draws: resamples of the clusters; `.attrs["draws"]` of the result has the difference in each.
            seed: of the draws.

        Returns:
            difference, low, high (the middle 95% of the draws), clusters (how many there are).

        Raises:
            SettingsError: the curves are not of the same pairs, or clusters are not one label per pair.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=16)
            >>> curves = [tnc.evaluate(model, pairs, tnc.attribute(model, pairs, method=m), sizes=[10, 100, 1000])
            ...           for m in ("relp", "random")]
            >>> found = curves[0].contrast(curves[1])
            >>> bool(found["high"] < 0)  # RelP's error is smaller, whatever nouns are drawn
            True
        """
        of_pairs = ("pairs_hash", "metric", "ablation")
        differ = [key for key in of_pairs if self.settings.get(key) != other.settings.get(key)]
        if differ or len(self.full) != len(other.full):
            raise SettingsError(
                f"expected two curves of the same pairs, metric and ablation; they differ in {differ or ['pairs']}. "
                "Evaluate both on the same pairs."
            )
        labels = self.groups if clusters is None else tuple(clusters)
        if labels is not None and len(labels) != len(self.full):
            raise SettingsError(f"expected one cluster per pair, {len(self.full)} in all; got {len(labels)}.")
        if among is not None and (lacking := sorted(set(labels or ()) - set(among))):
            raise SettingsError(f"expected all clusters of the pairs in among=; {lacking[:5]} are not.")
        largest = min(self.total, other.total) if largest is None else largest
        weights = np.r_[np.ones((1, len(self.full))), draw_weights(labels, len(self.full), draws, seed, among)]
        each = [curve._measures(measure, weights, largest) for curve in (self, other)]
        difference, drawn = (each[0] - each[1])[0], (each[0] - each[1])[1:]
        low, high = band(drawn[:, None])
        found = {"difference": difference, "low": low[0], "high": high[0]}
        series = pd.Series({**found, "clusters": len(set(labels)) if labels is not None else len(self.full)})
        series.attrs["draws"] = drawn.tolist()
        return series

    def _measures(self, measure: str, weights: np.ndarray, largest: int) -> np.ndarray:
        """One of the areas, with pairs counted by each row of `weights`."""
        change = {"error_area": _error, "overshoot_area": lambda f: np.maximum(f - 1, 0), "log_area": lambda f: f}
        return np.array([self._log_mean(change[measure], largest, f) for f in ratios(self, weights)[0]])

    def _log_mean(
        self, change: Callable[[np.ndarray], np.ndarray], largest: int | None, faithfulness: np.ndarray | None = None
    ) -> float:
        """Mean of a function of faithfulness over log size, linear in log size between the sizes of `_points`."""
        sizes, values = self._points(faithfulness)
        end = float(np.log(max(largest or self.total, 2)))
        x, y = np.log(sizes[sizes > 0]), change(values[sizes > 0])
        x, y = (x, y) if x[0] == 0 else (np.r_[0.0, x], np.r_[change(np.zeros(1)), y])
        grid = np.r_[x[x < end], end]
        return area(np.interp(grid, x, y), grid) / end

    @checked
    def log_area(self, largest: int | None = None) -> float:
        """Mean faithfulness over log(size), from 1 node to `largest` (by default all), on absolute counts.

        Where 1 is not among the sizes, faithfulness rises from 0 there; beyond all nodes it stays where it is.
        """
        return self._log_mean(lambda f: f, largest)

    @property
    def cpr(self) -> float:
        """Area under faithfulness over MIB's fractions of all nodes, higher is better; MIB ranks by signed score.

        This is the leaderboard's normalization; `mib` has that of MIB's paper too.
        """
        return self.mib()[0]

    @property
    def cmd(self) -> float:
        """Area under |1 - faithfulness| over MIB's fractions, lower is better; MIB ranks by |score|."""
        return self.mib()[1]

    def mib(self, normalization: Literal["percentages", "counts"] = "percentages") -> tuple[float, float]:
        """CPR and CMD under one of MIB's two normalizations, whose numbers must not be mixed.

        Args:
            normalization: "percentages", the leaderboard's: at fixed fractions of all nodes, linear between measured
                sizes (their code truncates fraction times number). "counts", the paper's: at the measured sizes, over
                the largest of them; it depends on which sizes were measured.
        """
        if normalization == "percentages":
            x, faithfulness = np.array(MIB_FRACTIONS), self._at_fractions()
        else:
            x, faithfulness = np.array(self.sizes) / max(self.sizes[-1], 1), self.faithfulness
        return area(faithfulness, x), area(np.abs(1 - faithfulness), x)

    def mib_areas(self, *, truncate: bool = False) -> tuple[float, float]:
        """CPR and CMD; with `truncate` as MIB's code has them, of `int(p * N)` nodes at the fraction p.

        Its circuits are of the size rounded down, where ours interpolate to p * N itself: for small N that makes up to
        .002. METHODS 5.11.
        """
        at = self._at_fractions(truncate=truncate)
        return area(at, MIB_FRACTIONS), area(np.abs(1 - at), MIB_FRACTIONS)

    def save(self, path: str | Path) -> None:
        """Write a directory with one safetensors file, settings in its header; an existing one is replaced at once.

        Raises:
            FileFormatError: the path exists and is not a saved curve.
            SaveError: it could not be written; what was saved there before is as it was.
        """
        write_directory(path, self.KIND, SCHEMA, *self.to_file())

    @classmethod
    def load(cls: type[C], path: str | Path) -> C:
        """Read what `save` wrote.

        Raises:
            FileFormatError: missing, truncated, foreign, or of another schema.
        """
        return cls.from_file(*read_directory(path, cls.KIND, SCHEMA, CurveNotes), path)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and notes of a file."""
        groups = None if self.groups is None else list(self.groups)
        notes = {"sizes": list(self.sizes), "total": self.total, "settings": dict(self.settings), "groups": groups}
        return {name: getattr(self, name) for name in _TENSORS}, notes

    @classmethod
    def from_file(cls: type[C], tensors: Mapping[str, Tensor], notes: CurveNotes, path: str | Path) -> C:
        """The curve of a file's tensors and notes.

        Raises:
            FileFormatError: they do not fit together.
        """
        formed(notes.settings, _Settings, path)
        sizes, pairs = len(notes.sizes), tensors["full"].numel() if "full" in tensors else 0
        both, each = (sizes, pairs), (pairs,)
        shapes = {"kept": both, "removed": both, "full": each, "empty": each, "predicted": (sizes,)}
        require_shapes(path, tensors, shapes)
        groups = None if notes.groups is None else tuple(notes.groups)
        fits = groups is None or len(groups) == pairs
        if not fits or sorted(notes.sizes) != notes.sizes or notes.sizes[-1] > notes.total:
            raise FileFormatError(
                f"the sizes or groups in {path} do not fit its {pairs} pairs and {notes.total} nodes or edges. "
                "Save it again."
            )
        if bad := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
            raise FileFormatError(f"expected numbers with fractions as {bad} in {path}. Save it again.")
        return cls(
            sizes=tuple(notes.sizes), total=notes.total, settings=notes.settings, groups=groups,
            kept=tensors["kept"], removed=tensors["removed"], full=tensors["full"], empty=tensors["empty"],
            predicted=tensors["predicted"],
        )  # fmt: skip

    def plot(self) -> Any:
        """A plotly figure of faithfulness and completeness, side by side."""
        from ..plots._curves import plot_curves

        return plot_curves([self])

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"{type(self).__name__}({s['basis']} by {s['method']}, {len(self.sizes)} sizes of {self.total:,} "
            f"{self.COUNTED}, "
            f"{len(self.full)} pairs, ablation {s['ablation']}, F(full)={self.metric_full:.3f}, "
            f"F(empty)={self.metric_empty:.3f}"
            + (f", faithfulness up to {1 + self.overshoot:.2f}" if self.overshoot > 0.05 else "")
            + (", see its notes" if self.notes else "")
            + ")"
        )

    def _repr_html_(self) -> str:
        table = _html.table(self.to_dataframe(), bars=("faithfulness", "completeness"), rows=60)
        return _html.block(repr(self), *map(_html.note, self.notes), table)

    def _share(self, pairs: Tensor) -> np.ndarray:
        """Share of the pairs that the model gets right; nan where it gets none, or where zero is not a tie."""
        right = self.full > 0
        if not right.any() or self.settings.get("metric") in _NO_TIE:
            return np.full(len(pairs), np.nan)
        return pairs.double()[:, right].mean(1).numpy()

    def _normalized(self, metric: Tensor) -> np.ndarray:
        low = self.empty.double().mean()
        return ((metric.double().mean(1) - low) / (self.full.double().mean() - low)).numpy()

    def _at_fractions(self, *, truncate: bool = False) -> np.ndarray:
        """Faithfulness at MIB's fractions, linear between measured sizes."""
        sizes, faithfulness = self._points()
        wanted = np.array(MIB_FRACTIONS) * self.total
        return np.interp(np.floor(wanted) if truncate else wanted, sizes, faithfulness)

    def _points(self, faithfulness: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sizes and faithfulness, completed by what is known unmeasured: none gives 0, and all give 1.

        Unless errors are ablated: then all give what the largest size gives.
        """
        sizes, values = (
            [float(size) for size in self.sizes],
            list(self.faithfulness if faithfulness is None else faithfulness),
        )
        if sizes[0] > 0:
            sizes, values = [0.0, *sizes], [0.0, *values]
        if sizes[-1] < self.total:
            last = values[-1] if self.settings.get("error_nodes") == "ablate" else 1.0
            sizes, values = [*sizes, float(self.total)], [*values, last]
        return np.array(sizes), np.array(values)


@dataclass(frozen=True, eq=False, repr=False)
class SparsityCurve(Curve):
    """Faithfulness and completeness by how many nodes are kept or ablated.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> curve = tnc.evaluate(model, pairs, tnc.attribute(model, pairs), sizes=[10, 100, 1000])
        >>> curve.to_dataframe()["size"].tolist(), curve.faithfulness.shape
        ([10, 100, 1000], (3,))
        >>> bool(curve.faithfulness[-1] > 0.9 > curve.faithfulness[0])
        True
        >>> curve.save("curve")
        >>> tnc.SparsityCurve.load("curve").sizes
        (10, 100, 1000)
    """

    @property
    def n_nodes(self) -> int:
        """All nodes."""
        return self.total


@dataclass(frozen=True, eq=False, repr=False)
class EdgeCurve(Curve):
    """Faithfulness and completeness by how many edges of a circuit are kept or cut.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
        >>> circuit = tnc.trace(model, pairs, nodes=20)
        >>> curve = tnc.evaluation.evaluate_edges(model, pairs, circuit, sizes=[10, 40])
        >>> curve.sizes, curve.n_edges >= 40
        ((10, 40), True)
    """

    KIND: ClassVar[str] = "edge_curve"
    COUNTED: ClassVar[str] = "edges"

    @property
    def n_edges(self) -> int:
        """All edges that were ranked."""
        return self.total


def area(y: np.ndarray, x: Sequence[float] | np.ndarray) -> float:
    """Area by trapezoids (NumPy renamed its own function between versions 1 and 2)."""
    return float((np.diff(np.asarray(x)) * (y[1:] + y[:-1]) / 2).sum())


def log_area(sizes: Sequence[int], values: np.ndarray, total: int, none: float, all_nodes: float) -> float:
    """Mean of the values over log(size) from 1 to `total`; at sizes that were not measured, from `none` to all."""
    x, y = np.asarray(sizes, dtype=float), np.asarray(values, dtype=float)
    x, y = x[x > 0], y[np.asarray(sizes) > 0]
    if not len(x) or x[0] > 1:
        x, y = np.r_[1.0, x], np.r_[none, y]
    if x[-1] < total:
        x, y = np.r_[x, float(total)], np.r_[y, all_nodes]
    return area(y, np.log(x)) / max(np.log(total), np.log(2.0))


def _error(faithfulness: np.ndarray) -> np.ndarray:
    return np.minimum(1.0, np.abs(1 - faithfulness))


def size_within(sizes: Sequence[int], faithfulness: np.ndarray, tolerance: float) -> float:
    """The size from which |1 - faithfulness| stays within `tolerance`, log-interpolated; inf where it never does."""
    within = np.abs(1 - faithfulness) <= tolerance
    return _size_from(sizes, faithfulness, within, lambda last: 1 - tolerance if last < 1 else 1 + tolerance)


def size_at(sizes: Sequence[int], faithfulness: np.ndarray, level: float) -> float:
    """The size from which faithfulness stays at `level` or above, log-interpolated; inf where it never does."""
    return _size_from(sizes, faithfulness, faithfulness >= level, lambda _: level)


def _size_from(
    sizes: Sequence[int], faithfulness: np.ndarray, reached: np.ndarray, bound: Callable[[float], float]
) -> float:
    """Where faithfulness last crosses the bound that the last size with `reached` false has still to cross."""
    x = np.log(np.maximum(np.asarray(sizes, dtype=float), 0.5))
    outside = np.flatnonzero(~reached)
    if len(outside) == 0:
        return float(sizes[0])
    last = int(outside[-1])
    if last == len(sizes) - 1:
        return float("inf")
    low, high = faithfulness[last], faithfulness[last + 1]
    share = (bound(low) - low) / (high - low) if np.isfinite(low) else 1.0
    return float(np.exp(x[last] + share * (x[last + 1] - x[last])))


def stack(rows: list[Tensor]) -> Tensor:
    """One row per size, on the CPU in float32."""
    return torch.stack([row.float().cpu() for row in rows])
