"""Published lists of neurons, and how a circuit or scores agree with one.

A list is a CSV (or TSV) with columns `layer` and `unit` (or `neuron`), or `node` ("L12/N345"), and where it has them
`sign` (of the activation: 1, -1, "+", "-") and `label`. A neuron of a list with signs is found where the circuit has it
with that sign; positions do not matter.

    Jaccard = |found and listed| / |found or listed|
    p       = P(X >= overlap), X ~ hypergeometric: as many drawn as found, of the N neurons that could have been found

N counts the neurons of the layers that have nodes, twice where signs are compared. Listed neurons of other layers are
counted in `n_published` and never found. Source: Arora et al. 2026 publish such lists; the test is Fisher's, one-sided.
"""

from dataclasses import dataclass
from math import exp, lgamma
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import _html
from .._errors import FileFormatError, SettingsError
from .._typing import checked
from ..nodes._scores import NodeScores
from ._circuit import Circuit

_NAMES = {"neuron": "unit", "index": "unit", "description": "label"}
_SIGNS = {"+": 1, "-": -1, "1": 1, "-1": -1, "+1": 1, "1.0": 1, "-1.0": -1, "positive": 1, "negative": -1}


@dataclass(frozen=True, eq=False, repr=False)
class NeuronListComparison:
    """What `compare_with_neuron_list` returns.

    `table` has one row per listed neuron: layer, unit, sign (0 where the list has none), label, `found`, its `score`
    (the largest by size over positions; nan where it was not found) and `rank` among the neurons found, by |score|, 1
    the first.

    Example:
        >>> import pandas as pd
        >>> import tl_neuron_circuits as tnc
        >>> prompt = "The capital of the state containing Dallas is"
        >>> circuit = tnc.trace(tnc.load_demo_model(), prompt, " Austin", nodes=30)
        >>> listed = circuit.nodes.query("kind == 'neuron'")[["layer", "unit"]].head(5)
        >>> tnc.circuits.compare_with_neuron_list(circuit, listed).n_shared
        5
    """

    table: pd.DataFrame
    n_found: int
    """Different neurons of the circuit."""
    population: int
    """How many could have been found."""

    @property
    def n_published(self) -> int:
        """Neurons of the list."""
        return len(self.table)

    @property
    def n_shared(self) -> int:
        """Neurons of both."""
        return int(self.table["found"].sum())

    @property
    def jaccard(self) -> float:
        """Shared over all, 0 to 1."""
        return self.n_shared / (self.n_found + self.n_published - self.n_shared)

    @property
    def median_rank(self) -> float:
        """Of the shared neurons, among those found; nan without any."""
        return float(self.table.loc[self.table["found"], "rank"].median())

    @property
    def p_value(self) -> float:
        """The probability that as many neurons drawn at random share at least as many with the list."""
        listed = int(self.table["possible"].sum())
        return hypergeometric_tail(self.n_shared, self.population, listed, self.n_found)

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def __repr__(self) -> str:
        return (
            f"NeuronListComparison({self.n_shared} of {self.n_published} listed neurons among {self.n_found}, Jaccard "
            f"{self.jaccard:.3f}, p = {self.p_value:.2g})"
        )

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.table, bars=("score",)))


@checked
def compare_with_neuron_list(
    found: Circuit | NodeScores, published: str | Path | pd.DataFrame, *, top: int | None = None
) -> NeuronListComparison:
    """How many neurons of a published list a circuit, or the best nodes of scores, have: overlap, ranks and chance.

    Args:
        found: a circuit of neurons, or scores of them.
        published: a CSV or TSV file, or its table: columns layer and unit (or node, "L12/N345"), and where it has them
            sign and label.
        top: of scores, how many neurons count as found, by |score|.

    Raises:
        FileFormatError: no such file, or a table without these columns or with other values.
        SettingsError: no neurons in the circuit, or scores without `top`.

    Example:
        >>> import pandas as pd
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> scores = tnc.attribute(model, pairs, positions="sum")
        >>> listed = pd.DataFrame({"layer": [3, 3], "unit": [1, 2], "label": ["plural", "singular"]})
        >>> tnc.circuits.compare_with_neuron_list(scores, listed, top=50).population
        2048
    """
    table, signed = _read(published)
    neurons, widths = _of_circuit(found) if isinstance(found, Circuit) else _of_scores(found, top, signed=signed)
    keys = ["layer", "unit", "sign"] if signed else ["layer", "unit"]
    best = neurons.reindex(neurons["score"].abs().sort_values(ascending=False, kind="stable").index)
    best = best.drop_duplicates(keys).reset_index(drop=True)
    best["rank"] = np.arange(1, len(best) + 1)
    rows = table.merge(best[[*keys, "score", "rank"]], on=keys, how="left", validate="one_to_one")
    rows["found"] = rows["rank"].notna()
    rows["possible"] = [
        0 <= unit < widths.get(layer, 0) for layer, unit in zip(rows["layer"], rows["unit"], strict=True)
    ]
    population = sum(widths.values()) * (2 if signed else 1)
    return NeuronListComparison(rows, len(best), population)


def hypergeometric_tail(shared: int, population: int, marked: int, drawn: int) -> float:
    """P(X >= shared) for X marked ones among `drawn` of a population, without replacement."""
    log_choose = lambda n, k: lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)  # noqa: E731
    lowest, highest = max(shared, drawn + marked - population, 0), min(marked, drawn)
    whole = log_choose(population, drawn)
    terms = (log_choose(marked, k) + log_choose(population - marked, drawn - k) for k in range(lowest, highest + 1))
    return min(1.0, float(sum(exp(term - whole) for term in terms)))


def _read(published: str | Path | pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Columns layer, unit, sign and label of different neurons; whether the list has signs."""
    where = "the table" if isinstance(published, pd.DataFrame) else str(published)
    if isinstance(published, pd.DataFrame):
        raw = published.copy()
    else:
        try:
            raw = pd.read_csv(published, sep=None, engine="python", dtype=str, skipinitialspace=True)
        except (OSError, ValueError, pd.errors.ParserError) as error:  # UnicodeDecodeError is a ValueError
            raise FileFormatError(f"expected a CSV of neurons at {published}; cannot read it ({error}).") from error
    raw.columns = [_NAMES.get(str(name).strip().lower(), str(name).strip().lower()) for name in raw.columns]
    if "node" in raw and not {"layer", "unit"} <= set(raw.columns):
        parts = raw["node"].astype(str).str.extract(r"^L(\d+)/N(\d+)(?:@\d+)?$")
        raw = raw.assign(layer=parts[0], unit=parts[1])
    if not {"layer", "unit"} <= set(raw.columns):
        raise FileFormatError(f"expected columns layer and unit (or node) in {where}; got {list(raw.columns)}.")
    numbers = {name: pd.to_numeric(raw[name], errors="coerce") for name in ("layer", "unit")}
    whole = [values.notna() & (values >= 0) & (values == values.round()) for values in numbers.values()]
    bad = ~(whole[0] & whole[1])
    if bad.any() or raw.empty:
        row = int(np.argmax(bad.to_numpy())) if len(raw) else 0
        raise FileFormatError(
            f"expected a layer and a unit, whole numbers, in every row of {where}; row {row} has others."
        )
    table = pd.DataFrame({name: values.astype("int64") for name, values in numbers.items()})
    signed = "sign" in raw.columns and bool(raw["sign"].notna().all())
    table["sign"] = raw["sign"].astype(str).str.strip().str.lower().map(_SIGNS) if signed else 0
    if table["sign"].isna().any():
        raise FileFormatError(
            f"expected signs 1 or -1 (+ or -) in {where}; got {sorted(set(raw['sign'].astype(str)))[:5]}."
        )
    table["sign"] = table["sign"].astype("int64")
    table["label"] = raw["label"].fillna("").astype(str) if "label" in raw.columns else ""
    return table.drop_duplicates(["layer", "unit", "sign"]).reset_index(drop=True), signed


def _of_circuit(circuit: Circuit) -> tuple[pd.DataFrame, dict[int, int]]:
    neurons = circuit.nodes[circuit.nodes["kind"] == "neuron"]
    if neurons.empty:
        raise SettingsError("expected a circuit of neurons; this one has none. Lists name neurons, not features.")
    widths = {site["layer"]: site["width"] for site in circuit.settings.get("sites", []) if site["letter"] == "N"}
    return neurons[["layer", "unit", "sign", "score"]], widths


def _of_scores(scores: NodeScores, top: int | None, *, signed: bool) -> tuple[pd.DataFrame, dict[int, int]]:
    if top is None:
        raise SettingsError("scores rank every neuron: say with top= how many count as found.")
    if signed:
        raise SettingsError("scores have no sign of activation; compare a circuit, or drop the list's column sign.")
    rows, widths = [], {}
    for hook, labels in scores.sites.items():
        if labels.letter != "N":
            raise SettingsError(f"expected scores of neurons; {hook} has others. Use basis=bases.Neurons().")
        values = scores.values[hook].cpu()
        best = (
            values
            if values.dim() == 1
            else values.gather(0, values.abs().nan_to_num(-1).max(0, keepdim=True).indices)[0]
        )
        widths[labels.layer] = len(best)
        frame = {
            "layer": labels.layer,
            "unit": torch.arange(len(best)).numpy(),
            "sign": 0,
            "score": best.double().numpy(),
        }
        rows.append(pd.DataFrame(frame))
    frame = pd.concat(rows, ignore_index=True).dropna(subset=["score"])
    if not 1 <= top <= len(frame):
        raise SettingsError(f"expected top between 1 and the {len(frame):,} neurons that have a score; got {top}.")
    return frame.loc[frame["score"].abs().sort_values(ascending=False, kind="stable").index[:top]], widths
