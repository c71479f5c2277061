"""Faithfulness by the number of edges: edges ranked by RelP's attribution, by raw weight, and at random.

    python -m tests.benchmarks.edge_curves [--model demo-gelu] [--nodes 150] [--figure docs/images/edges_demo-gelu.png]

A circuit is traced on pairs (the four agreement tasks, or four pronoun templates of `stories260K` with `--model PATH`),
then a growing share of its edges between neurons and to logits is judged on pairs of other words, under mean ablation.
Two protocols: "nodes" keeps the neurons that the edges leave connected (METHODS 1.5), "edges" keeps or cuts the edges
themselves by path patching. Every column is a mean over tasks; random orders are drawn `--seeds` times. 1 is the model
itself; the last row, all edges, is the circuit. The figure needs chromium.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

import tl_neuron_circuits as tnc
from tests.benchmarks.compare_bases import model_and_tasks, write_png
from tl_neuron_circuits import Circuit, PromptPairs
from tl_neuron_circuits.evaluation import evaluate_edges
from tl_neuron_circuits.evaluation._edge_curve import ranked_edges, surviving
from tl_neuron_circuits.plots._style import PALETTE

PERCENT = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def reordered(circuit: Circuit, ranking: str, seed: int) -> Circuit:
    """The circuit with its edges in another order; the nodes stay."""
    if ranking == "random":
        return replace(circuit, edges=circuit.edges.sample(frac=1, random_state=seed, ignore_index=True))
    column = {"RelP": "attribution", "weight": "weight"}[ranking]
    order = np.argsort(-circuit.edges[column].abs().to_numpy(), kind="stable")
    return replace(circuit, edges=circuit.edges.iloc[order].reset_index(drop=True))


def curves(model: Any, circuit: Circuit, pairs: PromptPairs, ranking: str, seed: int) -> pd.DataFrame:
    """One row a share of the edges."""
    ordered = reordered(circuit, ranking, seed)
    edges = ranked_edges(ordered)
    sizes = sorted({max(1, round(len(edges) * percent / 100)) for percent in PERCENT})
    nodes, paths = (evaluate_edges(model, pairs, ordered, sizes=sizes, protocol=p) for p in ("nodes", "edges"))
    return pd.DataFrame(
        {
            "ranking": ranking, "percent": PERCENT[-len(sizes) :], "edges": sizes,
            "neurons left": [len(surviving(ordered, edges.head(size))) for size in sizes],
            "nodes": nodes.faithfulness, "nodes, completeness": nodes.completeness,
            "paths": paths.faithfulness, "paths, completeness": paths.completeness,
        }
    )  # fmt: skip


def figure(table: pd.DataFrame, model: str) -> go.Figure:
    """Faithfulness against the number of edges, path patching."""
    out = go.Figure()
    for color, (ranking, part) in zip(PALETTE, table.groupby("ranking", sort=False), strict=False):
        for column, dash in (("paths", "solid"), ("paths, completeness", "dash")):
            name, line = f"{ranking}, {'kept' if dash == 'solid' else 'cut'}", {"dash": dash, "color": color}
            out.add_scatter(x=part["edges"], y=part[column], name=name, mode="lines+markers", line=line)
    out.update_xaxes(type="log", title="edges kept, or cut (path patching)")
    out.update_yaxes(title="share of the behavior")
    out.update_layout(title=f"Circuits with few edges, {model}", template="plotly_white", width=900, height=480)
    return out


def main() -> None:
    """Print the table of one model as markdown."""
    parser = argparse.ArgumentParser(description="Faithfulness by the number of edges")
    parser.add_argument("--model", default="demo-gelu")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--figure", default=None)
    options = parser.parse_args()
    start = time.process_time()
    model, train, test = model_and_tasks(options.model, options.pairs)
    rows = []
    for task, pairs in train.items():
        circuit = tnc.trace(model, pairs, nodes=options.nodes)
        for ranking, seeds in (("RelP", 1), ("weight", 1), ("random", options.seeds)):
            rows += [curves(model, circuit, test[task], ranking, seed).assign(task=task) for seed in range(seeds)]
    every = pd.concat(rows, ignore_index=True)
    table = every.groupby(["ranking", "percent"], sort=False).mean(numeric_only=True).reset_index()
    cells = [
        [ranking, f"{percent:g}%", f"{edges:,.0f}", f"{left:.0f}", *(f"{value:.2f}" for value in rest)]
        for ranking, percent, edges, left, *rest in table.to_numpy()
    ]
    for line in (list(table.columns), ["---"] * table.shape[1], *cells):
        print(f"| {' | '.join(line)} |")
    print(f"{time.process_time() - start:.0f} CPU seconds")
    if options.figure:
        write_png(figure(table, str(model.cfg.model_name)), Path(options.figure), 900, 480)


if __name__ == "__main__":
    main()
