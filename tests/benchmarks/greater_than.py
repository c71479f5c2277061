"""Greater-than on `demo-gelu`: MLP neurons against transcoder features, ranked and kept, layer by layer.

    python -m tests.benchmarks.greater_than [--folder docs/images]

The best n units of one layer (or of all) stay, the rest is zero at all positions; features stand for the whole MLP, so
what the transcoder misses is gone too. Units are ranked on one half of the events, by the variance of their activation
at the last token or by |RelP| against zero, and judged on the other half by the probability of the later years minus
that of the others. Prints markdown; the figure needs chromium. Source: Dunefsky et al. 2024; METHODS.md 4.4.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

import tl_neuron_circuits as tnc
from tests.benchmarks.compare_bases import markdown, write_png
from tl_neuron_circuits.bases import Dictionaries, HeadOutputs, MLPOutputs, Neurons
from tl_neuron_circuits.bases._site import Basis
from tl_neuron_circuits.nodes import activation_variance
from tl_neuron_circuits.plots._style import PALETTE, finish

SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
RANKINGS = ("variance", "RelP")
SHOWN = {"neurons": PALETTE[0], "features": PALETTE[1]}


class Task:
    """The model, its pairs for ranking and for judging, and the metric."""

    def __init__(self, n_pairs: int) -> None:
        self.model = tnc.load_demo_model("demo-gelu")
        pairs = tnc.tasks.greater_than(n_pairs)
        self.metric = tnc.tasks.ProbabilityDifference.for_years(self.model, pairs)
        self.train, self.test = pairs.split(0.5, by="label")

    def curve(
        self, basis: Basis, ranking: str, sizes: Sequence[int] | None = None, ablation: Any = "zero"
    ) -> tnc.SparsityCurve:
        """The metric with the best units kept; by default at all sizes, all units last."""
        if ranking == "variance":
            scores = activation_variance(self.model, self.train, basis=basis)
        else:
            common = {"metric": self.metric, "positions": "sum", "baseline": "zero"}
            scores = tnc.attribute(self.model, self.train, basis=basis, **common)
        units = sum(len(values) for values in scores.values.values())
        chosen = [size for size in SIZES if size < units] + [units] if sizes is None else sizes
        return tnc.evaluate(
            self.model, self.test, scores, sizes=chosen, metric=self.metric, ablation=ablation, error_nodes="ablate",
            completeness=False,
        )  # fmt: skip

    def ablated(self, basis: Basis) -> float:
        """The metric with every component of a basis zero."""
        return self.curve(basis, "variance", [0]).metric_empty

    def by_start_year(self) -> pd.DataFrame:
        """The metric by the decades of the start year, on the pairs for judging."""
        tokens = tnc.tasks.tokenize(self.model, self.test)
        values = torch.empty(len(self.test))
        for batch in tokens.batches(64):
            with torch.no_grad():
                values[batch.index] = self.metric(self.model(batch.clean), batch).float()
        starts = torch.tensor([int(wrong) for wrong in self.test.wrong_answer or ()])
        rows = []
        for low in range(0, 100, 20):
            here = (starts >= low) & (starts < low + 20)
            if here.any():
                rows.append(
                    {
                        "start year": f"{low} to {low + 19}",
                        "prompts": int(here.sum()),
                        "metric": f"{values[here].mean():.3f}",
                    }
                )
        return pd.DataFrame(rows)


def places(model: Any) -> dict[str, tuple[Sequence[int] | None, list[Any]]]:
    """By name: the layers, and their transcoders."""
    transcoders = tnc.load_demo_dictionaries("transcoder")
    one = {f"layer {n}": ([n], [transcoders[n]]) for n in range(int(model.cfg.n_layers))}
    return {**one, "all layers": (None, transcoders)}


def measure(task: Task) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What ablations leave, a row a place; and the metric by place, unit, ranking and size."""
    references, rows = [], []
    for place, (layers, transcoders) in places(task.model).items():
        bases = {"neurons": Neurons(layers), "features": Dictionaries(transcoders)}
        for unit, basis in bases.items():
            for ranking in RANKINGS:
                curve = task.curve(basis, ranking)
                values = curve.kept.double().mean(1).tolist()
                shared = {"place": place, "unit": unit, "ranking": ranking}
                rows += [{**shared, "n": n, "metric": value} for n, value in zip(curve.sizes, values, strict=True)]
        replaced = next(row["metric"] for row in reversed(rows) if row["unit"] == "features")
        references.append(
            {
                "place": place,
                "original": curve.metric_full,
                "MLP replaced": replaced,
                "MLP zero": task.ablated(MLPOutputs(layers)),
                "attention zero": task.ablated(HeadOutputs(layers)),
            }
        )
    return pd.DataFrame(references), pd.DataFrame(rows)


def mean_table(task: Task) -> pd.DataFrame:
    """All layers, the rest at its mean over the corrupt prompts: a row a unit and ranking."""
    bases = {"neurons": Neurons(), "features": Dictionaries(tnc.load_demo_dictionaries("transcoder"))}
    rows = []
    for unit, basis in bases.items():
        for ranking in RANKINGS:
            curve = task.curve(basis, ranking, ablation="mean")
            values = curve.kept.double().mean(1).tolist()
            cells = {str(n): f"{value:.3f}" for n, value in zip(curve.sizes[:-1], values[:-1], strict=True)}
            rows.append({"unit": unit, "ranking": ranking, **cells, "all": f"{values[-1]:.3f}"})
    return pd.DataFrame(rows)


def curves_table(rows: pd.DataFrame, ranking: str) -> pd.DataFrame:
    """A row a place and unit, a column a size; "all" is the largest."""
    out = []
    for (place, unit), group in rows[rows["ranking"] == ranking].groupby(["place", "unit"], sort=False):
        values = dict(zip(group["n"], group["metric"], strict=True))
        cells = {str(n): f"{values[n]:.3f}" if n in values else "" for n in SIZES}
        out.append({"place": place, "unit": unit, **cells, "all": f"{values[max(values)]:.3f}"})
    return pd.DataFrame(out)


def figure_of(references: pd.DataFrame, rows: pd.DataFrame) -> go.Figure:
    """A panel a place: the metric over the number of units, with the references as horizontal lines."""
    names = list(references["place"])
    figure = make_subplots(cols=len(names), shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.02)
    for column, (place, reference) in enumerate(zip(names, references.to_dict("records"), strict=True), 1):
        for (unit, ranking), group in rows[rows["place"] == place].groupby(["unit", "ranking"], sort=False):
            figure.add_scatter(
                x=[max(n, 0.5) for n in group["n"]], y=group["metric"], name=f"{unit} by {ranking}",
                mode="lines+markers",
                line={"color": SHOWN[str(unit)], "dash": "solid" if ranking == "variance" else "dot"},
                marker={"size": 5}, legendgroup=f"{unit} {ranking}", showlegend=column == 1, row=1, col=column,
            )  # fmt: skip
        for name, dash in (("original", "solid"), ("MLP replaced", "dash"), ("MLP zero", "dot")):
            figure.add_scatter(
                x=[0.5, 3000], y=[reference[name]] * 2, name=name, mode="lines", legendgroup=name,
                showlegend=column == 1,
                line={"color": "#555", "dash": dash, "width": 1}, row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(type="log", title="units kept")
    figure.update_yaxes(title="p(later years) - p(others)", col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.2}, margin={"r": 20})
    return finish(
        figure,
        "Greater-than: units kept, the rest zero",
        "demo-gelu · ranked on other events than judged on · left edge: none kept",
    )


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="write figure and JSON there")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
    torch.set_num_threads(1)
    begin, task = time.process_time(), Task(options.pairs)
    references, rows = measure(task)
    print(f"{len(task.train)} prompts to rank on, {len(task.test)} to judge on.\n\n{markdown(task.by_start_year())}\n")
    print(f"What is left without a layer's MLP or attention:\n\n{markdown(references.round(3))}\n")
    for ranking in RANKINGS:
        print(f"Units kept, by {ranking}:\n\n{markdown(curves_table(rows, ranking))}\n")
    print(f"All layers, the rest at its mean:\n\n{markdown(mean_table(task))}\n")
    bases = [Neurons(), Dictionaries(tnc.load_demo_dictionaries("transcoder"))]
    found = tnc.compare(
        task.model, task.train, task.test, bases=bases, methods=["relp"], metric=task.metric,
        sizes=[10, 30, 100, 300, 1000, 3000],
    )  # fmt: skip
    print(f"compare, mean ablation, positions kept:\n\n{markdown(found.summary((0.5, 0.8)))}\n")
    print(f"{time.process_time() - begin:.0f} CPU s.")
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        notes = {"references": references.to_dict("records"), "curves": rows.to_dict("records")}
        (options.folder / "greater_than.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        write_png(figure_of(references, rows), options.folder / "greater_than.png", width=1000)


if __name__ == "__main__":
    main()
