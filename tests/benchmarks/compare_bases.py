"""Are neurons a sparse basis? Bases compared under one measure, and what each method costs.

    python -m tests.benchmarks.compare_bases [--model demo-gelu] [--figure docs/images/compare_demo-gelu.png]

On a demo model: the four agreement tasks, nouns of the evaluation pairs not among those of the attribution pairs, and
the bases neurons, MLP outputs and, where the package has them for the model, SAEs and transcoders. On `stories260K`
(`--model PATH`, the folder that holds it): four pronoun templates, names disjoint. Prints markdown: the nodes that each
basis and method needs, factors against neurons with 95 % bands over words, forwards, backwards and seconds by method.
The figure needs chromium.
"""

import argparse
import logging
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch

import tl_neuron_circuits as tnc
from tests.families import HookedTransformer
from tests.real_models import load_stories260K
from tests.stories_tasks import PRONOUN_TEMPLATES, pronoun_pairs
from tl_neuron_circuits.bases import Dictionaries, MLPOutputs, Neurons
from tl_neuron_circuits.bases._site import Basis
from tl_neuron_circuits.demo._models import DEMO_MODELS
from tl_neuron_circuits.tasks import PromptPair, PromptPairs

METHODS = ("relp", "gradient", "integrated_gradients", "random")
LEVELS = (0.5, 0.8)
Tasks = dict[str, PromptPairs]


def stories_pairs(template: str, part: Any) -> PromptPairs:
    """Pronoun pairs, labeled by contrast, over which bands are drawn."""
    pairs = pronoun_pairs(template, part)
    return PromptPairs.from_pairs([PromptPair(*pair[:4], str(row // 2)) for row, pair in enumerate(pairs)])


def model_and_tasks(name: str, n_pairs: int) -> tuple[Any, Tasks, Tasks]:
    """The model, and its tasks for attribution and for evaluation."""
    if name not in DEMO_MODELS:
        model = load_stories260K(Path(name), "TransformerBridge" if HookedTransformer is None else "HookedTransformer")
        model.cfg.model_name = "stories260K"
        chosen = {template: PRONOUN_TEMPLATES[place] for template, place in zip(STORIES, (0, 2, 3, 8), strict=True)}
        parts = [{t: stories_pairs(text, part) for t, text in chosen.items()} for part in ("attribution", "evaluation")]
        return model, *parts
    train, test = {}, {}
    for kind in ("simple", "nounpp", "rc", "within_rc"):
        pairs = tnc.tasks.subject_verb_agreement(kind, n=2 * n_pairs)
        train[kind], test[kind] = pairs.split(0.5, by="label")
    return tnc.load_demo_model(name), train, test


STORIES = ("saw a ball", "went to the park", "had a ball", "a kid named")


def bases_of(name: str) -> list[Basis]:
    """Neurons, MLP outputs, and the dictionaries that the package has for this model."""
    found: list[Basis] = [Neurons(), MLPOutputs()]
    if name == "demo-gelu":
        for kind in ("sae", "transcoder"):
            try:
                found.append(Dictionaries(tnc.load_demo_dictionaries(kind), name=kind))
            except tnc.NeuronCircuitsError as error:
                print(f"no {kind}s: {error}")
    return found


def markdown(table: pd.DataFrame) -> str:
    rows = [
        list(table.columns),
        ["---"] * len(table.columns),
        *(map(shown, row) for row in table.itertuples(index=False)),
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def shown(cell: Any) -> str:
    return (
        f"{cell:.3g}"
        if isinstance(cell, float) and abs(cell) < 100
        else f"{cell:,.0f}"
        if isinstance(cell, float)
        else str(cell)
    )


def geometric(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def sizes_table(found: tnc.Comparison) -> pd.DataFrame:
    """One row a basis and method: nodes needed (geometric mean over tasks), area, variance left unexplained."""
    summary = found.summary(LEVELS)
    rows = []
    for (basis, method), group in summary.groupby(["basis", "method"], sort=False):
        row: dict[str, Any] = {"basis": basis, "method": method, "nodes": int(group["n_nodes"].mean())}
        row |= {f"nodes at {level:g}": geometric(group[f"size_at_{level:g}"]) for level in LEVELS}
        row |= {"log area": float(group["log_area"].mean()), "unexplained": float(group["unexplained"].mean())}
        rows.append(row)
    return pd.DataFrame(rows)


def factors_table(found: tnc.Comparison) -> pd.DataFrame:
    """How many times the nodes of neurons each other basis needs, by RelP, task by task."""
    rows = []
    for basis in dict.fromkeys(key.basis for key in found.curves):
        for level in LEVELS:
            if basis == "neurons":
                continue
            ratios = {
                task: found.ratio(basis, "neurons", method="relp", level=level, task=task) for task in found.tasks
            }
            cells = {task: f"{v:.2f} [{low:.2f}, {high:.2f}]" for task, (v, low, high) in ratios.items()}
            mean = geometric(value for value, _, _ in ratios.values())
            rows.append({"basis": basis, "faithfulness": level, **cells, "geometric mean": mean})
    return pd.DataFrame(rows)


def cost_table(model: Any, pairs: PromptPairs, basis: Basis) -> pd.DataFrame:
    """Forwards, backwards and CPU seconds of one attribution in one batch, and the seconds as a ratio to RelP's."""
    rows = []
    for method in ("relp", "gradient", "integrated_gradients", "integrated_gradients_inputs"):
        forwards: list[int] = []
        handle = model.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        with mock.patch.object(torch.autograd, "grad", wraps=torch.autograd.grad) as backward:
            start = time.process_time()
            tnc.attribute(model, pairs, method=method, basis=basis, batch_size=64)
            seconds = time.process_time() - start
        handle.remove()
        rows.append({"method": method, "forwards": len(forwards), "backwards": backward.call_count, "CPU s": seconds})
    table = pd.DataFrame(rows)
    return table.assign(**{"x RelP": table["CPU s"] / table["CPU s"][0]})


def write_png(figure: Any, path: Path, width: int = 1150, height: int = 500) -> None:
    """Screenshot of the figure by headless chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("no chromium: no figure")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.update_layout(width=width - 20, height=height - 20)
        figure.write_html(page, config={"displayModeBar": False})
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
        options += [
            f"--window-size={width},{height}",
            f"--user-data-dir={folder}/profile",
            f"--screenshot={path.resolve()}",
        ]
        subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-gelu", help="demo-gelu, demo-swiglu, or the folder of stories260K")
    parser.add_argument("--pairs", type=int, default=64, help="pairs a task and part")
    parser.add_argument("--figure", type=Path, help="write the figure as PNG")
    parser.add_argument("--directory", type=Path, help="keep the comparison, or go on from it")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
    model, train, test = model_and_tasks(options.model, options.pairs)
    bases = bases_of(options.model)
    start, cpu = time.perf_counter(), time.process_time()
    found = tnc.compare(model, train, test, bases=bases, methods=METHODS, directory=options.directory)
    took = f"{time.perf_counter() - start:.0f} s ({time.process_time() - cpu:.0f} CPU s)"
    counts = [len(pairs) for pairs in test.values()]
    print(f"{found!r}: {len(found.curves)} curves in {took}, {torch.get_num_threads()} threads, ", end="")
    print(f"{min(counts)} to {max(counts)} held-out pairs a task\n")
    print(f"Nodes needed (geometric mean over {len(found.tasks)} tasks):\n\n{markdown(sizes_table(found))}\n")
    if len(bases) > 1:
        print(f"Nodes of a basis over those of neurons, by RelP:\n\n{markdown(factors_table(found))}\n")
    cost_table(model, next(iter(train.values())), Neurons())  # the first calls of a process are slow
    print(
        f"Cost of one attribution to neurons:\n\n{markdown(cost_table(model, next(iter(train.values())), Neurons()))}\n"
    )
    print(found.headline())
    if options.figure:
        write_png(found.plot(), options.figure)


if __name__ == "__main__":
    main()
