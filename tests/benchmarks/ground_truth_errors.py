"""Why CircuitLasso errs on the planted circuits: which edges are wrong, and what could not be told from observation.

    python -m tests.benchmarks.ground_truth_errors [--prompts 1024]

Four measurements on all planted cases, one draw of prompts.
1. Wrong edges by kind, at thresholds chosen on the other cases. "Idle" components are outside the circuit but hold some
   token; "along a chain" joins two nodes of one chain that are not neighbors; "across" joins two chains.
2. How much of each chain node's variance its true parents explain, and how much all other earlier components do
   without them (least squares, mean over units): where both are 1, no regression can tell who the parents are.
3. The same circuits with squares of every unit as further sources (nonlinear regressors), and without them.
4. The same circuits with idle components silenced (their writes are zero).
"""

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import Tensor

from tests.planted.circuits import PlantedCase
from tests.planted.load import Planted, load_planted, planted_seeds
from tl_neuron_circuits.components import component_edges, judge_edges
from tl_neuron_circuits.lasso import CircuitLasso, Share
from tl_neuron_circuits.lasso._observations import Observations
from tl_neuron_circuits.lasso._statistics import standardize

Edge = tuple[str, str]


def kind_of(case: PlantedCase, edge: Edge) -> str:
    """What is wrong about an edge that should not be there."""
    active = set().union(*(chain.nodes for chain in case.chains))
    if edge[1] not in active:
        return "into idle"
    if edge[0] not in active:
        return "from idle"
    return "along a chain" if any(set(edge) <= set(chain.nodes) for chain in case.chains) else "across"


def errors(planted: list[Planted], scores: list[dict[Edge, float]]) -> dict[str, float]:
    """Mean SHD, and how many wrong edges of each kind, by case."""
    judged = judge_edges([(p.truth, s) for p, s in zip(planted, scores, strict=True)])
    counts: Counter[str] = Counter()
    for p, found, row in zip(planted, scores, judged.itertuples(), strict=True):
        most = max(abs(value) for value in found.values())
        there = {edge for edge, value in found.items() if abs(value) / most > row.threshold}
        counts.update(kind_of(p.case, edge) for edge in there - p.truth.edges)
        counts["missing"] += len(p.truth.edges - there)
    means = {kind: counts[kind] / len(planted) for kind in ("into idle", "from idle", "along a chain", "across")}
    return {"shd": judged["shd"].mean(), "auroc": judged["auroc"].mean(), **means, "missing": counts["missing"] / 12}


def by_lasso(
    p: Planted, prompts: int, noise: float, share: float, regressors: Any = "pooled"
) -> tuple[dict[Edge, float], Observations]:
    pairs = p.pairs(prompts, 0)
    lasso = CircuitLasso(
        regressors=regressors, penalty=Share(share), shares=(0.3,), blocks=4, skip_positions=0, noise=noise
    )
    seen = lasso.observe(p.model, pairs, metric=p.metric(pairs), batch_size=256)
    edges = lasso.solve(seen).edges
    return dict(zip(zip(edges["source"], edges["target"], strict=True), edges["reach"], strict=True)), seen


@contextmanager
def with_squares() -> Iterator[None]:
    """In place of the pooled columns of regressors="pooled": squares at the same position, for every target."""

    def squares(now: Tensor, bidirectional: bool) -> Tensor:
        centered = now - now.mean((0, 1))
        return centered.square()

    def allowed(watch: Any, sources: Any, targets: Any) -> Tensor:
        stage = torch.tensor([site.stage for site in watch.sites])
        return stage[sources.site][:, None] < stage[targets.site]

    with (
        mock.patch("tl_neuron_circuits.lasso._observations._pooled", squares),
        mock.patch("tl_neuron_circuits.lasso._observations._allowed", allowed),
    ):
        yield


def explained_by(seen: Observations, case: PlantedCase) -> pd.DataFrame:
    """R2 of every node of a chain from its parents, and from all other earlier components without them."""
    names = [site.name for site in seen.sites]
    rows = []
    for regression, total in zip(seen.regressions, seen.total(), strict=True):
        problem = standardize(total)
        owner = [names[k] if k < len(names) else "logits" for k in regression.targets.site.tolist()]
        source = [names[k] for k in regression.sources.site.tolist()]
        for target in dict.fromkeys(owner):
            parents = {a for a, b in case.edges if b == target}
            if not parents or (target == "logits") != (len(owner) == owner.count("logits")):
                continue
            columns = torch.tensor([name == target for name in owner]).nonzero().flatten()
            allowed = regression.allowed[:, columns[0]]
            mine = torch.tensor([name in parents for name in source]) & allowed
            rows.append(
                {
                    "case": case.name,
                    "node": target,
                    "parents": r2(problem.gram, problem.cross[:, columns], mine),
                    "others": r2(problem.gram, problem.cross[:, columns], allowed & ~mine),
                    "all": r2(problem.gram, problem.cross[:, columns], allowed),
                }
            )
    return pd.DataFrame(rows)


def r2(gram: Tensor, cross: Tensor, sources: Tensor) -> float:
    """Of least squares on these sources, mean over the targets' columns (standardized: variance 1)."""
    if not bool(sources.any()):
        return 0.0
    system = gram[sources][:, sources].clone()
    system.diagonal().add_(1e-6)
    return float((cross[sources] * torch.linalg.solve(system, cross[sources])).sum(0).mean())


def silence(p: Planted) -> None:
    """Zero what idle components write."""
    active = set().union(*(chain.nodes for chain in p.case.chains))
    with torch.no_grad():
        for layer in range(p.case.n_layers):
            if f"L{layer}/MLP" not in active:
                p.model.blocks[layer].mlp.W_out.zero_()
            for head in range(p.case.n_heads):
                if f"L{layer}/H{head}" not in active:
                    p.model.blocks[layer].attn.W_O[head].zero_()
                    p.model.blocks[layer].attn.W_V[head].zero_()


def show(name: str, values: Iterable[tuple[str, float]]) -> None:
    print(f"{name:42}", "  ".join(f"{key} {value:.2f}" for key, value in values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1024)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    torch.set_num_threads(1)
    planted = [load_planted(seed) for seed in planted_seeds()]
    start = time.process_time()
    for noise in (0.0, 0.3):
        found = [by_lasso(p, options.prompts, noise, 0.02) for p in planted]
        show(f"CircuitLasso, pooled, reach, noise {noise}", errors(planted, [scores for scores, _ in found]).items())
        table = pd.concat([explained_by(seen, p.case) for (_, seen), p in zip(found, planted, strict=True)])
        numbers = table[["parents", "others", "all"]].mean().items()
        as_good = float((table["others"] >= table["parents"] - 0.02).mean())
        show(f"R2 of chain nodes, noise {noise}", [*((str(k), v) for k, v in numbers), ("others as good", as_good)])
    for noise in (0.0, 0.3):
        found = [by_lasso(p, options.prompts, noise, 0.02, regressors="same")[0] for p in planted]
        show(f"CircuitLasso, same position, noise {noise}", errors(planted, found).items())
        with with_squares():
            found = [by_lasso(p, options.prompts, noise, 0.02)[0] for p in planted]
        show(f"the same with squares, noise {noise}", errors(planted, found).items())
    gradient = []
    for p in planted:
        pairs = p.pairs(64, 0)
        table = component_edges(p.model, pairs, method="eap_ig_inputs", metric=p.metric(pairs)).to_dataframe()
        gradient.append(dict(zip(zip(table["source"], table["target"], strict=True), table["score"], strict=True)))
    show("EAP-IG (5 steps)", errors(planted, gradient).items())
    for p in planted:
        silence(p)
    found = [by_lasso(p, options.prompts, 0.0, 0.02)[0] for p in planted]
    show("CircuitLasso, idle components silenced", errors(planted, found).items())
    print(f"{time.process_time() - start:.0f} CPU s")


if __name__ == "__main__":
    main()
