"""`Comparison`: sparsity curves of several bases and methods on the same pairs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd

from .. import _html
from .._errors import FileFormatError, SettingsError
from .._files import formed, read_directory, write_directory
from ._bootstrap import band, draw_weights, ratios
from ._curve import CurveNotes, SparsityCurve, size_at

SCHEMA = 3
FILE = "comparison.safetensors"


class CurveKey(NamedTuple):
    """What a curve is of."""

    task: str
    basis: str
    method: str


class _Settings(msgspec.Struct):
    """What a comparison needs of its settings."""

    model: str
    bootstrap: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    curves: list[tuple[CurveKey, CurveNotes]]
    settings: dict[str, Any]
    mib: list[tuple[CurveKey, tuple[float, float]]]
    unexplained: list[tuple[CurveKey, float]]


_POOR = 0.25
"""Unexplained variance of a dictionary above which the headline says so."""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Curves by (task, basis, method), evaluated on the same pairs within a task.

    `mib` holds CPR (signed ranking) and CMD (|score| ranking) on MIB's grid where they were asked for, `unexplained`
    the mean fraction of variance that a basis leaves unexplained.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> bases = [tnc.bases.Neurons()]
        >>> comparison = tnc.compare(model, pairs, pairs, bases=bases, methods=["relp"], sizes=[10, 300])
        >>> comparison.to_dataframe()[["basis", "method", "size"]]
             basis method  size
        0  neurons   relp    10
        1  neurons   relp   300
        >>> comparison.save("comparison")
        >>> tnc.Comparison.load("comparison").tasks
        ['task']
    """

    curves: Mapping[CurveKey, SparsityCurve]
    settings: Mapping[str, Any]
    mib: Mapping[CurveKey, tuple[float, float]] = field(default_factory=dict)
    unexplained: Mapping[CurveKey, float] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        """The tasks, in order."""
        return list(dict.fromkeys(key.task for key in self.curves))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per task, basis, method and size, with 95% bands over lexical items (columns `*_low`, `*_high`)."""
        frames = []
        for key, curve in self.curves.items():
            frame = curve.to_dataframe()
            both = ratios(curve, self._weights(curve))
            for name, values in zip(("faithfulness", "completeness"), both, strict=True):
                frame[f"{name}_low"], frame[f"{name}_high"] = band(values)
            frames.append(frame.assign(task=key.task, basis=key.basis, method=key.method))
        table = pd.concat(frames, ignore_index=True)
        first = ["task", "basis", "method"]
        return table.reindex(columns=[*first, *(column for column in table if column not in first)])

    def summary(self, levels: tuple[float, ...] = (0.5, 0.8)) -> pd.DataFrame:
        """One row per curve: F(full), F(empty), nodes, log area of absolute counts, compactness, overshoot (largest
        faithfulness - 1), size at levels, CPR and CMD (MIB's fixed percentages), FVU.
        """
        rows = []
        largest = {t: max(c.n_nodes for k, c in self.curves.items() if k.task == t) for t in self.tasks}
        for key, curve in self.curves.items():
            cpr, cmd = self.mib.get(key, (float("nan"), float("nan")))
            rows.append(
                {
                    **key._asdict(), "metric_full": curve.metric_full, "metric_empty": curve.metric_empty,
                    "n_nodes": curve.n_nodes, "log_area": curve.log_area(largest[key.task]),
                    "compactness": curve.compactness, "overshoot": curve.overshoot,
                    **{f"size_at_{level:g}": curve.size_at(level) for level in levels},
                    "cpr": cpr, "cmd": cmd, "unexplained": self.unexplained.get(key, float("nan")),
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def ratio(
        self,
        basis: str,
        other: str,
        *,
        method: str | None = None,
        other_method: str | None = None,
        level: float = 0.8,
        task: str | None = None,
    ) -> tuple[float, float, float]:
        """How many times the nodes of `other` does `basis` need at `level` of faithfulness: value, low, high (95%).

        The two curves are drawn together over lexical items. A curve that does not stay above the level counts as inf,
        so the ratio may be inf, 0, or nan where neither does; draws in which neither does are left out of the band.
        `method` is the first that was compared unless given, `task` likewise, and `other_method` is `method`.

        Raises:
            SettingsError: there is no such curve.
        """
        task, method = task or self.tasks[0], method or next(iter(self.curves)).method
        curves = [self._curve(task, basis, method), self._curve(task, other, other_method or method)]
        weights = self._weights(curves[0])
        point = [curve.size_at(level) for curve in curves]
        draws = [[size_at(c.sizes, f, level) for f in ratios(c, weights)[0]] for c in curves]
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.array(draws[0]) / np.array(draws[1])
            value = np.array(point[0]) / np.array(point[1])
        values = values[~np.isnan(values)]
        low, high = np.percentile(values, [2.5, 97.5], method="nearest") if len(values) else (np.nan, np.nan)
        return float(value), float(low), float(high)

    @property
    def notes(self) -> list[str]:
        """What to know before quoting a ratio, as of each curve; what holds of all methods of a basis once."""
        found = {}
        for key, curve in self.curves.items():
            several = [key.task] if len(self.tasks) > 1 else []
            found |= dict.fromkeys(f"{', '.join([*several, key.basis])}: {note}" for note in curve.notes)
        return list(found)

    def headline(self, *, level: float = 0.8) -> str:
        """How the first basis compares with each other one, by the first method, task by task; alone, what it needs."""
        method = next(iter(self.curves)).method
        bases = list(dict.fromkeys(key.basis for key in self.curves))
        sentences = []
        for task, other in itertools.product(self.tasks, bases[1:]):
            one = bases[0]
            where = f"on {task}, " if len(self.tasks) > 1 else ""
            never = [b for b in (one, other) if not np.isfinite(self._curve(task, b, method).size_at(level))]
            if never:
                sentences.append(
                    f"{where}the faithfulness of {' and '.join(never)} does not stay above {level:g} at the sizes tried"
                )
                continue
            value, low, high = self.ratio(one, other, method=method, level=level, task=task)
            times = f"{value:.3g} x [{low:.3g}, {high:.3g}]"
            sentences.append(f"{where}at faithfulness {level:g} {one} need {times} the nodes of {other}")
        if len(bases) == 1:
            for task in self.tasks:
                size = self._curve(task, bases[0], method).size_at(level)
                where = f"on {task}, " if len(self.tasks) > 1 else ""
                sentences.append(
                    f"{where}{bases[0]} reach faithfulness {level:g} with {size:,.3g} nodes"
                    if np.isfinite(size)
                    else f"{where}the faithfulness of {bases[0]} does not stay above {level:g} at the sizes tried"
                )
        for basis in bases:
            missed = max((share for key, share in self.unexplained.items() if key.basis == basis), default=0.0)
            if missed > _POOR:
                sentences.append(
                    f"with {basis}, {missed:.0%} of the variance stays unexplained: error nodes, which count as "
                    "nodes, may do the work"
                )
        return "; ".join(sentences) + f" (scored by {method}; 95% over lexical items)."

    def save(self, path: str | Path) -> None:
        """Write a directory with `comparison.safetensors`, all curves in it; an existing one is replaced at once.

        Raises:
            FileFormatError: the path exists and is not a saved comparison.
            SaveError: it could not be written; what was saved there before is as it was.
        """
        tensors, curves = {}, []
        for place, (key, curve) in enumerate(self.curves.items()):
            own, notes = curve.to_file()
            tensors |= {f"{place}/{name}": tensor for name, tensor in own.items()}
            curves.append([list(key), notes])
        notes = {
            "curves": curves,
            "settings": dict(self.settings),
            "mib": [[list(key), list(values)] for key, values in self.mib.items()],
            "unexplained": [[list(key), value] for key, value in self.unexplained.items()],
        }
        write_directory(path, "comparison", SCHEMA, tensors, notes)

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Read what `save`, or a finished `compare(..., directory=path)`, wrote.

        Raises:
            FileFormatError: missing, truncated, foreign, or of another schema.
        """
        if (Path(path) / "index" / "comparison.json").exists():
            raise FileFormatError(
                f"{path} was written by a version of this package that saved one folder per curve. Compare again, into "
                "another directory."
            )
        tensors, notes = read_directory(path, "comparison", SCHEMA, _Notes)
        formed(notes.settings, _Settings, path)
        curves = {}
        for place, (key, own) in enumerate(notes.curves):
            prefix = f"{place}/"
            part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            curves[key] = SparsityCurve.from_file(part, own, path)
        return cls(curves, notes.settings, dict(notes.mib), dict(notes.unexplained))

    def plot(self, task: str | None = None) -> Any:
        """A plotly figure: faithfulness and completeness against the number of nodes, one color a basis, one dash a
        method.

        Several tasks are averaged over a common grid of sizes, as in Arora et al.; `task` shows one, with bands.
        """
        from ..plots._curves import plot_comparison

        return plot_comparison(self, task)

    def plot_trust(self, task: str | None = None) -> Any:
        """A plotly figure: the summed scores of the best nodes against the measured drop of the metric without them."""
        from ..plots._curves import plot_trust

        return plot_trust(self, task)

    def __repr__(self) -> str:
        bases = list(dict.fromkeys(key.basis for key in self.curves))
        methods = list(dict.fromkeys(key.method for key in self.curves))
        return f"Comparison({self.settings['model']}, tasks {self.tasks}, bases {bases}, methods {methods})"

    def _repr_html_(self) -> str:
        table = self.summary().dropna(axis="columns", how="all")
        notes = [self.headline(), *self.notes]
        if len(self.tasks) == 1:  # then every curve has the same ends
            notes.append(f"F(full) = {table['metric_full'][0]:.3g}, F(empty) = {table['metric_empty'][0]:.3g}")
            table = table.drop(columns=["task", "metric_full", "metric_empty"])
        return _html.block(repr(self), *map(_html.note, notes), _html.table(table, bars=("log_area",), rows=60))

    def _curve(self, task: str, basis: str, method: str) -> SparsityCurve:
        key = CurveKey(task, basis, method)
        if key not in self.curves:
            raise SettingsError(f"expected one of the curves {[tuple(k) for k in self.curves]}; got {tuple(key)}.")
        return self.curves[key]

    def _weights(self, curve: SparsityCurve) -> np.ndarray:
        return draw_weights(curve.groups, len(curve.full), self.settings["bootstrap"], self.settings["seed"])
