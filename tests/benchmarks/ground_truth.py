"""CircuitLasso and the other edge methods against known circuits, in one run: the tables of docs/results-lasso.md.

    python -m tests.benchmarks.ground_truth [--seeds 3] [--pairs 64] [--out rows.csv] [--update-docs]

Cases: the planted circuits of `tests/planted`, and every compiled program of `../shared/models` (where that folder is).
Nodes are heads and MLPs, or modules (a layer's attention as one). A compiled program's edges are those where one
component writes what the other reads; "with effect" are those of them whose exact patching moves some output of 16
pairs that no method sees. A seed draws the prompts: CircuitLasso sees 256 clean ones (or as many as its row says), the
others `--pairs` pairs, exact patching 16.

Rankings are cut at a threshold chosen on the other cases of the same kind, nodes, truth and seed, for every method
alike. The literal pattern is the edges with a weight that is not zero, without a threshold, at a penalty chosen on the
other cases. "setting chosen" takes, for every case, the observation, penalty and ranking that are best on the others.
`--update-docs` writes docs/ground_truth.json and, from it, the tables between the markers of docs/results-lasso.md.
"""

import argparse
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tests.planted.load import load_planted, planted_seeds
from tests.real_models import load_hooked_form
from tl_neuron_circuits.components import GroundTruth, component_edges, component_graph, judge_edges
from tl_neuron_circuits.lasso import CircuitLasso, Components, Share
from tl_neuron_circuits.lasso._circuit_lasso import _smallest_empty
from tl_neuron_circuits.lasso._edges import list_nodes, tables
from tl_neuron_circuits.lasso._statistics import standardize
from tl_neuron_circuits.tasks import TokenizedPairs
from tl_neuron_circuits.tasks._tokenized import Batch

ROOT = Path(__file__).parents[2]
SHARED = next((p for p in (ROOT.parent / "shared" / "models", Path("/work/shared/models")) if p.is_dir()), None)
PAGE, RESULTS = ROOT / "docs" / "results-lasso.md", ROOT / "docs" / "ground_truth.json"
PENALTIES = (0.9, 0.7, 0.5, 0.3, 0.1, 0.05, 0.02)  # shares of what leaves no edge
RANKED_AT = (0.05, 0.02)
PAPER = {"CircuitLasso": 16.3, "EAP": 33.7, "EAP-IG": 49.1}  # seconds a case on an A100: Yin et al. 2026
LASSOS: dict[str, dict[str, Any]] = {
    "same": {"prompts": 256, "regressors": "same"},
    "pooled, 1,024 prompts": {"prompts": 1024, "regressors": "pooled"},
    "pooled, 1,024 prompts, noise .3": {"prompts": 1024, "regressors": "pooled", "noise": 0.3},
}
SCORED = {
    "EAP": "eap", "EAP-IG": "eap_ig_inputs(steps=5)", "RelP": "relp",
    "RelP without attention": "relp(rules=ln+identity+half)",
    "exact patching": "patching", "random": "random",
}  # fmt: skip
CHOSEN = "CircuitLasso, setting chosen"
MAIN = {  # column of the main table: row of the measurements
    "empty graph": "",
    "lasso, literal": "CircuitLasso (same), literal pattern",
    "lasso, weights": "CircuitLasso (same, .05)",
    "lasso, noise": "CircuitLasso (pooled, 1,024 prompts, noise .3, .02), reach",
    "lasso, chosen": CHOSEN,
    "EAP": "EAP",
    "EAP-IG": "EAP-IG",
    "RelP": "RelP",
    "patching": "exact patching",
}
Judged = list[tuple[GroundTruth, Any]]


class Case:
    """A model, how to draw pairs and a metric for it, and its true edges by nodes and truth."""

    def __init__(self, truth: GroundTruth, model: Any, draw: Callable[[int, int], tuple[TokenizedPairs, Any]]) -> None:
        self.name, self.edges, self.model, self.draw = truth.name, truth.edges, model, draw

    @cache  # noqa: B019
    def truths(self, nodes: Any) -> dict[str, GroundTruth]:
        """The program's edges, and those of them that have an effect."""
        graph = component_graph(self.model, nodes)
        possible = frozenset((graph.names[i], graph.names[j]) for i, j in graph.edges.nonzero().tolist())
        edges = self.edges if nodes == "heads" else {(in_modules(a), in_modules(b)) for a, b in self.edges}
        effect = self._effect(nodes)
        alive = {edge for edge in edges if effect[edge] > 1e-4 * max(effect.values())}
        sets = {"program": frozenset(edges), "effect": frozenset(alive)}
        return {truth: GroundTruth(self.name, true, possible) for truth, true in sets.items()}

    def _effect(self, nodes: Any) -> dict[tuple[str, str], float]:
        """Root mean squared change of the logits when an edge is patched, over prompts that no method sees."""
        pairs, _ = self.draw(16, 10_000)
        with torch.no_grad():
            clean = self.model(torch.stack(list(pairs.clean)))

        def likeness(logits: Tensor, batch: Batch) -> Tensor:
            return -(logits - clean[batch.index]).square().flatten(1).mean(1)

        scores = component_edges(
            self.model, pairs, method="patching", metric=likeness, attention=nodes, batch_size=64
        ).to_dataframe()
        return {(row.source, row.target): max(0.0, row.score) ** 0.5 for row in scores.itertuples()}


def in_modules(name: str) -> str:
    return re.sub(r"/H\d+$", "/attention", name)


def planted_cases() -> Iterator[Case]:
    for seed in planted_seeds():
        planted = load_planted(seed)

        def draw(n: int, seed: int, planted: Any = planted) -> tuple[TokenizedPairs, Any]:
            pairs = planted.pairs(n, seed)
            return pairs, planted.metric(pairs)

        yield Case(planted.truth, planted.model, draw)


def all_outputs(logits: Tensor, batch: Batch) -> Tensor:
    """A number that depends on every output of a compiled model."""
    weights = torch.linspace(0.5, 2, logits.shape[1] * logits.shape[2]).reshape(logits.shape[1:])
    return (logits.square() * weights).sum((1, 2))


def compiled_cases() -> Iterator[Case]:
    for path in sorted(SHARED.glob("tracr_*")) if SHARED is not None else ():
        model = load_hooked_form(path)

        def draw(n: int, seed: int, model: Any = model) -> tuple[TokenizedPairs, Any]:
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(1, model.cfg.d_vocab, (2 * n, model.cfg.n_ctx), generator=generator)
            tokens[:, 0] = 0
            answers = torch.arange(n) % model.cfg.d_vocab_out
            return TokenizedPairs.from_tokens(tokens[:n], answers, tokens[n:]), all_outputs

        yield Case(GroundTruth.from_tracr(path), model, draw)


def observe(case: Case, nodes: Any, seed: int, kind: str, prompts: int, **settings: Any) -> tuple[Any, Any]:
    """A CircuitLasso and its observations."""
    pairs, metric = case.draw(prompts, seed)
    given = {"blocks": 4, "seed": seed, "skip_positions": 0, "nodes": Components(attention=nodes)}
    readout = "logits" if kind == "compiled" else None
    lasso = CircuitLasso(**given, **settings, penalty=Share(RANKED_AT[0]), shares=(0.3,), readout=readout)
    return lasso, lasso.observe(case.model, pairs, metric=metric, batch_size=256)


def edges_by_penalty(lasso: CircuitLasso, observed: Any) -> Iterator[tuple[float, pd.DataFrame]]:
    """(share, edges) down the path of penalties, each solved from the last."""
    parts = zip(observed.regressions, observed.total(), strict=True)
    most = max(_smallest_empty(r, standardize(s, lasso.floor)) for r, s in parts)
    nodes = list_nodes(observed.sites, observed.regressions)
    for share, fits in zip(PENALTIES, lasso._fit_path(observed, [s * most for s in PENALTIES]), strict=True):
        yield share, tables(fits, nodes)[1]


def rankings_of(case: Case, nodes: Any, seed: int, kind: str, options: argparse.Namespace) -> Iterator[tuple]:
    """(name, scores) of every method; the literal patterns are named by their penalty."""
    for name, settings in LASSOS.items():
        for share, edges in edges_by_penalty(*observe(case, nodes, seed, kind, **settings)):
            ends = list(zip(edges["source"], edges["target"], strict=True))
            yield f"CircuitLasso ({name}), literal pattern at {share}", dict.fromkeys(ends, 1.0)
            if share in RANKED_AT:
                for ending, column in (("", "weight"), (", reach", "reach")):
                    scores = dict(zip(ends, edges[column], strict=True))
                    yield f"CircuitLasso ({name}, {share:g})".replace("0.", ".") + ending, scores
    for name, method in SCORED.items():
        pairs, metric = case.draw(16 if name == "exact patching" else options.pairs, seed)
        given = {"method": method, "metric": metric, "attention": nodes, "batch_size": 64}
        yield name, component_edges(case.model, pairs, **given)


def measure(kind: str, cases: list[Case], nodes: str, seed: int, options: argparse.Namespace) -> pd.DataFrame:
    """One row per truth, method and case."""
    scores: dict[str, list] = {}
    for case in cases:
        for name, found in rankings_of(case, nodes, seed, kind, options):
            scores.setdefault(name, []).append(found)
        print(kind, nodes, seed, case.name, flush=True)
    rows = []
    for truth in ("program", "effect"):
        given = {"kind": kind, "nodes": nodes, "truth": truth, "seed": seed}
        rows += [table.assign(**given) for table in judged([case.truths(nodes)[truth] for case in cases], scores)]
    return pd.concat(rows, ignore_index=True)


def judged(truths: list[GroundTruth], scores: dict[str, list]) -> Iterator[pd.DataFrame]:
    """Every method's row per case; then literal patterns, and settings, chosen on the other cases."""
    literal: dict[str, list[pd.DataFrame]] = {}
    rankings = []
    for name, found in scores.items():
        whole, _, share = name.partition(" at ")
        if share:
            pairs = zip(truths, found, strict=True)
            rows = [{"case": t.name, "shd": t.shd(s), "shd_empty": t.empty_shd, "n_edges": len(s)} for t, s in pairs]
            table = pd.DataFrame(rows).assign(method=name)
            literal.setdefault(whole, []).append(table)
        else:
            table = judge_edges(list(zip(truths, found, strict=True))).assign(method=name)
            rankings += [table] if name.startswith("CircuitLasso") else []
        yield table
    for name, patterns in literal.items():
        best = pd.concat([table["shd"] for table in patterns], axis=1).min(axis=1)
        yield chosen_on_others(patterns).assign(method=name, shd_best=best)
    patterns = [table for path in literal.values() for table in path]
    yield chosen_on_others(rankings + patterns).assign(method=CHOSEN)


def chosen_on_others(choices: list[pd.DataFrame]) -> pd.DataFrame:
    """For every case the row of that table whose mean SHD on the other cases is least."""
    distances = pd.concat([table["shd"] for table in choices], axis=1)
    rows = []
    for case in distances.index:
        best = int(distances.drop(case).mean().to_numpy().argmin())
        rows.append(choices[best].loc[[case]])
    return pd.concat(rows)


def times(kind: str, cases: list[Case], options: argparse.Namespace, prompts: int = 1024) -> list[dict[str, Any]]:
    """CPU seconds a case at the same number of prompts for all, mean over cases and draws; edges between heads."""
    rows: list[tuple[str, float]] = []
    for seed in range(options.seeds):
        for case in cases:
            for regressors in ("same", "pooled"):
                start = time.process_time()
                lasso, observed = observe(case, "heads", seed, kind, prompts, regressors=regressors)
                rows.append((f"CircuitLasso ({regressors}), observing", time.process_time() - start))
                lasso.solve(observed)
                rows.append((f"CircuitLasso ({regressors})", time.process_time() - start))
            pairs, metric = case.draw(prompts, seed)
            for name in ("EAP", "EAP-IG"):
                start = time.process_time()
                component_edges(case.model, pairs, method=SCORED[name], metric=metric, batch_size=256)
                rows.append((name, time.process_time() - start))
    means = pd.DataFrame(rows, columns=["method", "seconds"]).groupby("method")["seconds"].mean()
    return [{"kind": kind, "method": str(name), "seconds": round(float(s), 4)} for name, s in means.items()]


def summarized(table: pd.DataFrame, timed: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """What docs/ground_truth.json holds: means over cases, then mean and spread over draws."""
    key = ["kind", "nodes", "truth", "method"]
    columns = ["shd", "shd_best", "shd_empty", "auroc", "average_precision", "n_edges"]
    by_seed = table.groupby([*key, "seed"], sort=False)[columns].mean()
    mean, spread = (getattr(by_seed.groupby(key, sort=False), name)() for name in ("mean", "std"))
    rows = []
    for place in mean.index:
        row = dict(zip(key, place, strict=True))
        if " at " in row["method"] and (row["nodes"], row["truth"]) != ("heads", "program"):
            continue  # no table shows them
        for column in columns:
            if pd.notna(mean.loc[place, column]):
                row[column] = round(float(mean.loc[place, column]), 4)
                row[f"{column}_std"] = round(float(spread.loc[place, column]), 4)
        rows.append(row)
    against = []
    program = table[(table["truth"] == "program") & (table["nodes"] == "heads")]
    wide = program.pivot_table(index=["kind", "case"], columns="method", values="shd")
    for name in dict.fromkeys(MAIN.values()):
        if name and name != "EAP-IG":
            for kind, part in wide.groupby(level=0):
                gap = part[name] - part["EAP-IG"]
                counts = {
                    "lower": int((gap < -1e-9).sum()),
                    "equal": int((gap.abs() <= 1e-9).sum()),
                    "higher": int((gap > 1e-9).sum()),
                }
                against.append({"kind": kind, "method": name, **counts})
    counts = {kind: int(part["case"].nunique()) for kind, part in table.groupby("kind")}
    return {
        "settings": {"draws": options.seeds, "pairs": options.pairs, "cases": counts},
        "rows": rows,
        "times": timed,
        "against": against,
    }


def written(results: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/results-lasso.md, by the name of their markers."""
    rows = {(r["kind"], r["nodes"], r["truth"], r["method"]): r for r in results["rows"]}

    def best(row: dict[str, Any]) -> str:
        return f"{row['shd']:.2f} ({row['shd_best']:.2f})"

    def spread(row: dict[str, Any], column: str, digits: int) -> str:
        return "" if column not in row else f"{row[column]:.{digits}f}±{row[f'{column}_std']:.{digits}f}"

    main = ["| circuits, true edges | | " + " | ".join(MAIN) + " |", "| --- " * (2 + len(MAIN)) + "|"]
    for kind in ("compiled", "planted"):
        for truth, meant in (("program", "all"), ("effect", "with effect")):
            if kind == "planted" and truth == "effect":
                continue  # the same edges
            found = [rows[kind, "heads", truth, method or "EAP"] for method in MAIN.values()]
            cells = [best(row) if method else f"{row['shd_empty']:.2f}"
                     for row, method in zip(found, MAIN.values(), strict=True)]  # fmt: skip
            main.append(f"| {kind}, {meant} | SHD (best) | " + " | ".join(cells) + " |")
            cells = [f"{row['auroc']:.3f}" if method and "auroc" in row else ""
                     for row, method in zip(found, MAIN.values(), strict=True)]  # fmt: skip
            main.append("| | AUROC | " + " | ".join(cells) + " |")
    every = ["| | " + " | ".join(f"{k}: {label}" for k in ("compiled", "planted") for label in ("SHD", "AUROC")) + " |"]
    every.append("| --- " * 5 + "|")
    names = [r["method"] for r in results["rows"] if r["kind"] == "planted" and r["nodes"] == "heads"]
    for name in dict.fromkeys(names):
        if " at " not in name:
            cells = [
                spread(rows[kind, "heads", "program", name], column, digits)
                for kind in ("compiled", "planted") for column, digits in (("shd", 2), ("auroc", 3))
            ]  # fmt: skip
            said = name.replace("CircuitLasso", "lasso").replace(", 1,024 prompts", "")
            every.append(f"| {said} | " + " | ".join(cells) + " |")
    took = {(r["kind"], r["method"]): r["seconds"] for r in results["times"]}
    columns = ("CircuitLasso (same)", "CircuitLasso (pooled)", "EAP", "EAP-IG")
    clock = ["| | lasso | lasso, pooled | EAP | EAP-IG | EAP / lasso | EAP-IG / lasso |", "| --- " * 7 + "|"]
    for kind in ("compiled", "planted"):
        lasso, pooled, eap, eap_ig = (took[kind, name] for name in columns)
        numbers = [lasso, pooled, eap, eap_ig, eap / lasso, eap_ig / lasso]
        clock.append(f"| {kind}, CPU s | " + " | ".join(f"{n:.2f}" for n in numbers) + " |")
    lasso, eap, eap_ig = PAPER.values()
    clock.append(
        f"| the paper, s on an A100 | {lasso} | | {eap} | {eap_ig} | {eap / lasso:.2f} | {eap_ig / lasso:.2f} |"
    )
    page = {"main": main, "times": clock, "every": every}
    return {name: "\n".join(lines) for name, lines in page.items()}


def marked(page: str, made: dict[str, str]) -> str:
    """The page with each table between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    for name, table in made.items():
        begin, end = f"<!-- ground truth: {name} -->\n", f"\n<!-- end of ground truth: {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"expected one pair of markers for the table {name!r} in {PAGE.name}.")
        before, rest = page.split(begin)
        page = before + begin + table + end + rest.split(end)[1]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=64, help="for the other methods")
    parser.add_argument("--out", type=Path, default=None, help="all rows as CSV")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--update-docs", action="store_true")
    parser.add_argument("--from-json", action="store_true", help="measure nothing: tables of docs/ground_truth.json")
    options = parser.parse_args()
    if options.from_json:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
        torch.set_num_threads(1)
        measured, timed = [], []
        for kind, made in (("planted", planted_cases), ("compiled", compiled_cases)):
            cases = list(made())
            timed += times(kind, cases, options) if cases else []
            for nodes in ("heads", "layers") if cases else ():
                measured += [measure(kind, cases, nodes, seed, options) for seed in range(options.seeds)]
        table = pd.concat(measured, ignore_index=True)
        if options.out is not None:
            table.to_csv(options.out, index=False)
        results = summarized(table, timed, options)
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(written(results).values()))
    if options.update_docs:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(marked(PAGE.read_text(encoding="utf-8"), written(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
