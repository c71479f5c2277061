"""Methods beside each other on the real stories260K: pronoun templates, held-out names, both directions.

    python -m tests.benchmarks.stories260K [--patching]

Prints a markdown table: for each method the sum over 20, 50, 100, 200, 400 neurons of faithfulness + (1 - completeness)
(ideal 10), how many templates it wins against AtP, the mean of |1 - faithfulness| + |completeness| (ideal 0), and the
agreement of its single-node scores with exact patching of every neuron (Pearson, Spearman). Mean ablation, positions
kept: a node is a neuron at a position.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.real_models import BACKENDS, load_stories260K
from tests.stories_tasks import PRONOUN_TEMPLATES, pronoun_pairs
from tl_neuron_circuits.evaluation import SparsityCurve, compare_with_patching, evaluate
from tl_neuron_circuits.nodes import NodeScores, attribute

PATCHED = 2  # contrasts for exact patching of every neuron, both directions of each
SIZES = (20, 50, 100, 200, 400)
TEMPLATES = PRONOUN_TEMPLATES[:8]
METHODS: Mapping[str, Mapping[str, Any]] = {
    "RelP": {"method": "relp"},
    "RelP without attention": {"method": "relp(rules=ln+identity+half)"},
    "AtP": {"method": "gradient"},
    "IG-10": {"method": "integrated_gradients"},
    "IG-10 over inputs": {"method": "integrated_gradients_inputs"},
    "activation difference": {"method": "activation_difference"},
    "random": {"method": "random"},
}


def scores_of(model: Any, template: str, settings: Mapping[str, Any], n_contrasts: int) -> NodeScores:
    """Attribute with the names of the attribution part."""
    return attribute(model, pronoun_pairs(template, "attribution", n_contrasts), **settings)


def curve_of(model: Any, template: str, scores: NodeScores, n_contrasts: int) -> SparsityCurve:
    """Evaluate with the names of the evaluation part."""
    return evaluate(model, pronoun_pairs(template, "evaluation", n_contrasts), scores, sizes=SIZES)


def merit(curve: SparsityCurve) -> float:
    """Faithfulness + (1 - completeness), summed over the sizes."""
    return float((curve.faithfulness + 1 - curve.completeness).sum())


def distance(curve: SparsityCurve) -> float:
    """|1 - faithfulness| + |completeness|, averaged over the sizes."""
    return float((abs(1 - curve.faithfulness) + abs(curve.completeness)).mean())


def table(model: Any, templates: Sequence[str], n_contrasts: int, patching: bool) -> str:
    """Run every method on every template."""
    merits: dict[str, list[float]] = {name: [] for name in METHODS}
    distances: dict[str, list[float]] = {name: [] for name in METHODS}
    pearson: dict[str, list[float]] = {name: [] for name in METHODS}
    spearman: dict[str, list[float]] = {name: [] for name in METHODS}
    for template in templates:
        exact = scores_of(model, template, {"method": "patching"}, PATCHED) if patching else None
        for name, settings in METHODS.items():
            curve = curve_of(model, template, scores_of(model, template, settings, n_contrasts), n_contrasts)
            merits[name].append(merit(curve))
            distances[name].append(distance(curve))
            if exact is not None:
                found = compare_with_patching(scores_of(model, template, settings, PATCHED), exact)
                pearson[name].append(found.pearson)
                spearman[name].append(found.spearman)
        print(f"{template}: " + ", ".join(f"{n} {m[-1]:.2f}" for n, m in merits.items()), file=sys.stderr, flush=True)
    head = "| method | merit (of 10) | beats AtP on | distance | Pearson with patching | Spearman with patching |"
    rows = [head, "|---|---|---|---|---|---|"]
    for name in METHODS:
        wins = sum(a > b for a, b in zip(merits[name], merits["AtP"], strict=True))
        cells = [mean_and_spread(merits[name]), "" if name == "AtP" else f"{wins} of {len(templates)}"]
        cells += [mean_and_spread(values) for values in (distances[name], pearson[name], spearman[name])]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean over templates and its standard deviation."""
    if not values or any(value != value for value in values):
        return "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def main() -> None:
    """Print the table of both model classes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patching", action="store_true", help="also measure agreement with exact patching (minutes)")
    parser.add_argument("--contrasts", type=int, default=12)
    arguments = parser.parse_args()
    folder = Path(__file__).resolve().parents[3] / "shared" / "models"
    torch.set_num_threads(1)
    for number, backend in enumerate(BACKENDS):
        model = load_stories260K(folder, backend)
        print(f"\n{backend}, {len(TEMPLATES)} templates, {2 * arguments.contrasts} prompts for each part:\n")
        print(table(model, TEMPLATES, arguments.contrasts, arguments.patching and number == 0), flush=True)


if __name__ == "__main__":
    main()
