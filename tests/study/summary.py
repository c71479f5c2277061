"""From cells to tables: means, paired intervals over words, and what follows from them."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.study.cases import MODELS, TASKS
from tests.study.cells import CROSSED, Cell
from tests.study.methods import ENTRIES, FROM_ZERO, SCREENED
from tl_neuron_circuits import NodeScores
from tl_neuron_circuits.evaluation._curve import log_area

DRAWS, LEVEL = 2000, 0.95
DEFAULT = ("RelP", "abs")
STOPPED = "learned, stopped on development pairs"
Key = tuple[str, str]
"""A method's name, and how its scores are ranked."""


def compactness_of_pairs(found: Mapping[str, Any]) -> np.ndarray:
    """Each right pair's share of the curve's compactness: it is their mean, since areas are linear."""
    kept, removed, full, empty = (np.array(found[name]) for name in ("kept", "removed", "full", "empty"))
    sizes, total = found["sizes"], found["total"]
    values = []
    for pair in np.flatnonzero(full > 0):
        alone = log_area(sizes, kept[:, pair] > 0, total, float(empty[pair] > 0), 1.0)
        without = log_area(sizes, removed[:, pair] < 0, total, 0.0, float(empty[pair] < 0))
        values.append((alone + without) / 2)
    return np.array(values)


def weights_of(found: Mapping[str, Any], seed: int) -> np.ndarray:
    """[draw, right pair]: the product of its words' Poisson weights, so that pairs of one word come together."""
    words = [tuple(row) for row, full in zip(found["words"], found["full"], strict=True) if full > 0]
    names = sorted({word for row in words for word in row})
    drawn = np.random.default_rng(seed).poisson(1.0, (DRAWS, len(names)))
    place = {name: index for index, name in enumerate(names)}
    return np.stack([np.prod([drawn[:, place[word]] for word in row], axis=0) for row in words], axis=1).astype(float)


class Results:
    """The cells that are there, read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._weights: dict[tuple[str, str], np.ndarray] = {}

    @cache  # noqa: B019
    def curve(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's curve; of the stopped mask that of the checkpoint which development pairs like best."""
        if cell.method == STOPPED:
            return self._stopped(cell)
        path = self._folder / cell.path
        return json.loads(path.read_text()) if path.exists() else None

    def _stopped(self, cell: Cell) -> dict[str, Any] | None:
        looks = [
            self.curve(Cell(cell.model, cell.task, name, "corrupt", "signed", "corrupt", "develop"))
            for name in FROM_ZERO
        ]
        if None in looks or cell.learned != "corrupt":
            return None
        best = int(np.argmax([compactness_of_pairs(look).mean() for look in looks if look is not None]))
        found = self.curve(Cell(cell.model, cell.task, FROM_ZERO[best], "corrupt", "signed", cell.judged))
        last = looks[-1]
        return None if found is None or last is None else found | {"cost": last["cost"], "chosen": FROM_ZERO[best]}

    def draws(self, model: str, key: Key, learned: str, judged: str, task: str) -> np.ndarray | None:
        """Compactness of the pairs, and of every draw of words: [1 + draw]."""
        found = self.curve(Cell(model, task, key[0], learned, key[1], judged))
        if found is None:
            return None
        values = compactness_of_pairs(found)
        weights = weights_of(found, seed=TASKS.index(task))
        with np.errstate(invalid="ignore"):
            drawn = weights @ values / weights.sum(1)
        return np.r_[values.mean(), drawn]

    def endpoint(self, model: str, key: Key, learned: str = "corrupt", judged: str = "corrupt") -> np.ndarray | None:
        """The mean over tasks, and of every draw; None unless all tasks are there."""
        tasks = [self.draws(model, key, learned, judged, task) for task in TASKS]
        return None if any(task is None for task in tasks) else np.mean([task for task in tasks if task is not None], 0)

    def cost(self, model: str, key: Key, learned: str = "corrupt") -> float:
        """Forward passes per pair, the mean over tasks that are there."""
        cells = [self.curve(Cell(model, task, key[0], learned, key[1], "corrupt")) for task in TASKS]
        return float(np.mean([cell["cost"] for cell in cells if cell is not None]))


def interval(draws: np.ndarray) -> list[float]:
    """The value, and its lower and upper end."""
    tail = (1 - LEVEL) / 2 * 100
    return [float(draws[0]), *(float(end) for end in np.nanpercentile(draws[1:], [tail, 100 - tail]))]


def keys() -> list[Key]:
    """Every method under each of its rankings, and the stopped mask."""
    found = [(name, ranking) for name, entry in ENTRIES.items() for ranking in entry.rankings]
    last = max(place for place, (name, _) in enumerate(found) if name in FROM_ZERO) + 1
    return [*found[:last], (STOPPED, "signed"), *found[last:]]


def equal_table(results: Results, model: str) -> list[dict[str, Any]]:
    """One row per method and ranking, scored and judged with interchange."""
    rows, default = [], results.endpoint(model, DEFAULT)
    for key in keys():
        tasks = {task: results.draws(model, key, "corrupt", "corrupt", task) for task in TASKS}
        if all(task is None for task in tasks.values()):
            continue
        whole = results.endpoint(model, key)
        row: dict[str, Any] = {"method": key[0], "ranking": key[1], "cost": results.cost(model, key)}
        row["tasks"] = {task: None if found is None else interval(found) for task, found in tasks.items()}
        row["endpoint"] = None if whole is None else interval(whole)
        compared = whole is not None and default is not None and key != DEFAULT
        row["difference"] = interval(whole - default) if compared else None  # pyright: ignore[reportOptionalOperand]
        row["curve"] = curve_means(results, model, key)
        rows.append(row)
    return rows


def curve_means(results: Results, model: str, key: Key) -> dict[str, Any]:
    """Faithfulness and completeness by size, overshoot and the area of |1 - faithfulness|, as means over tasks."""
    sums: dict[str, list[Any]] = {}
    for task in TASKS:
        found = results.curve(Cell(model, task, key[0], "corrupt", key[1], "corrupt"))
        if found is None:
            continue
        kept, removed, full, empty = (np.array(found[name]) for name in ("kept", "removed", "full", "empty"))
        span = full.mean() - empty.mean()
        faithfulness, completeness = ((x.mean(1) - empty.mean()) / span for x in (kept, removed))
        sums.setdefault("faithfulness", []).append(faithfulness)
        sums.setdefault("completeness", []).append(completeness)
        sums.setdefault("overshoot", []).append(max(0.0, float(faithfulness.max()) - 1))
        error = log_area(found["sizes"], np.abs(1 - faithfulness), found["total"], 1.0, 0.0)
        sums.setdefault("log area of |1 - faithfulness|", []).append(error)
        sums["sizes"] = [found["sizes"]]
    return {name: np.mean(values, 0).tolist() for name, values in sums.items()}


def crossed_table(results: Results, model: str) -> list[dict[str, Any]]:
    """Endpoints by (learned with, judged with), and the difference to the default under the same two."""
    rows = []
    names = {**CROSSED, **{name: ("signed",) for name in FROM_ZERO}, "random": ("abs",)}
    for name, rankings in names.items():
        for ranking in rankings:
            row: dict[str, Any] = {"method": name, "ranking": ranking}
            for learned in ("corrupt", "mean"):
                for judged in ("corrupt", "mean"):
                    found = results.endpoint(model, (name, ranking), learned, judged)
                    base = results.endpoint(model, DEFAULT, learned, judged)
                    both = found is not None and base is not None and (name, ranking) != DEFAULT
                    row[f"{learned}/{judged}"] = None if found is None else interval(found)
                    row[f"{learned}/{judged} difference"] = interval(found - base) if both else None  # pyright: ignore[reportOptionalOperand]
            if any(
                row[f"{a}/{b}"]
                for a in ("corrupt", "mean")
                for b in ("corrupt", "mean")
                if (a, b) != ("corrupt", "corrupt")
            ):
                rows.append(row)
    return rows


def recommend(results: Results, model: str = "smollm2") -> list[dict[str, Any]]:
    """From the default upwards in price: a method that is better than the one before, by a paired interval above 0.

    Methods that cost no more than the one before may take its place as well.
    """
    found = {key: results.endpoint(model, key) for key in keys()}
    costs = {key: results.cost(model, key) for key, value in found.items() if value is not None}
    current, steps = DEFAULT, []
    if found[DEFAULT] is None:
        return []
    for limit in sorted({round(cost * 1.02, 2) for cost in costs.values()}):
        better = []
        for key, cost in costs.items():
            if cost > limit or limit < costs[DEFAULT]:
                continue
            difference = interval(found[key] - found[current])  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
            if difference[1] > 0:
                better.append((found[key][0], key, difference))  # pyright: ignore[reportOptionalSubscript]
        if better:
            _, key, difference = max(better)
            steps.append({"over": list(current), "method": list(key), "cost": costs[key], "difference": difference})
            current = key
    return steps


def known_table(folder: Path) -> dict[str, Any]:
    """Mean area under the ROC curve by kind of known circuit and method."""
    rows: dict[str, dict[str, dict[str, list[float]]]] = {}
    parts: dict[str, list[Any]] = {}
    for path in sorted((folder / "known").glob("*.json")):
        found = json.loads(path.read_text())
        parts.setdefault(found["kind"], []).append([found["name"], found["parts"], found["true"]])
        for name, areas in found["auroc"].items():
            for ranking, value in areas.items():
                if isinstance(value, float) and np.isfinite(value):
                    rows.setdefault(found["kind"], {}).setdefault(f"{name}|{ranking}", {}).setdefault("all", []).append(
                        value
                    )
    table: dict[str, dict[str, list[float]]] = {}
    for kind, found in rows.items():
        most = max(len(values["all"]) for values in found.values())
        for name, values in found.items():
            if len(values["all"]) == most:  # of all cases
                table.setdefault(kind, {})[name] = [float(np.mean(values["all"])), float(np.min(values["all"])), most]
    return {"auroc": table, "cases": parts}


def fdr_table(folder: Path) -> dict[str, Any] | None:
    """Empirical beside nominal rates, the mean over chains (or programs) that name a node; and frequencies."""
    path = folder / "known_stability.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    rates = []
    for kind in ("planted", "tracr"):
        for null in ("signs", "pairs"):
            for rate in found[kind][0]["rates"][null]:
                rows = [row["rates"][null][rate] for row in found[kind]]
                named = [row for row in rows if row["named"]]
                known: dict[str, Any] = {"kind": kind, "null": null, "nominal": float(rate)}
                known["nodes"], known["cases"] = float(np.median([row["named"] for row in rows])), len(named)
                for name in ("outside", "outside_mass"):
                    known[name] = float(np.mean([row[name] for row in named]))
                for name in ("without_effect", "effects_named"):
                    means = {x: [row[name][x] for row in named if row[name][x] is not None] for x in named[0][name]}
                    known[name] = {x: float(np.mean(values)) for x, values in means.items()}
                rates.append(known)
    mean = lambda rows, name: float(np.mean([row[name] for row in rows if row[name] is not None]))  # noqa: E731
    names = ("true_share_of_draws", "false_share_of_draws", "mean_true", "mean_false", "core", "core_true")
    frequencies = {kind: {name: mean(found[kind], name) for name in names} for kind in ("planted", "tracr")}
    cases = {kind: len(found[kind]) for kind in ("planted", "tracr")}
    return {"rates": rates, "frequencies": frequencies, "cases": cases}


def reliability_table(folder: Path) -> list[dict[str, float]] | None:
    """Mean |estimate - exact| of groups by decile of the ratio, and the mean size of the exact effect."""
    path = folder / "reliability_nounpp.json"
    if not path.exists():
        return None
    groups = [row for row in json.loads(path.read_text()) if row["ratio"] is not None]
    groups.sort(key=lambda row: row["ratio"])
    rows = []
    for part in np.array_split(np.arange(len(groups)), 10):
        some = [groups[index] for index in part]
        error = lambda name, some=some: float(np.mean([abs(row[name] - row["exact"]) for row in some]))  # noqa: E731
        names = ("first_order", "corrected", "trapezoid")
        ratios = [row["ratio"] for row in some]
        size = float(np.mean([abs(row["exact"]) for row in some]))
        ends = {"low": min(ratios), "high": max(ratios), "groups": len(some), "exact": size}
        rows.append(ends | {name: error(name) for name in names})
    return rows


def screened_table(folder: Path) -> dict[str, dict[str, float]]:
    """By task what exact patching says of RelP's best 100 on SmolLM2: other signs, sizes more than twice off, and the
    correlation of score and effect.
    """
    table = {}
    for task in TASKS:
        place = folder / "scores" / "smollm2" / task
        paths = [place / f"{ENTRIES[name].key}.corrupt" for name in ("RelP", SCREENED)]
        if all(path.with_name(path.name + ".json").exists() for path in paths):
            relp, exact = (NodeScores.load(path).flat().numpy() for path in paths)
            best = np.argsort(-np.abs(relp), kind="stable")[:100]
            relp, exact = relp[best], exact[best]
            low, high = np.sort(np.abs([relp, exact]), axis=0)
            table[task] = {
                "other sign": int((np.sign(relp) != np.sign(exact)).sum()), "twice off": int((high > 2 * low).sum()),
                "correlation": float(np.corrcoef(relp, exact)[0, 1]),
            }  # fmt: skip
    return table


def summarize(folder: Path) -> dict[str, Any]:
    """Everything that the page shows, as JSON has it."""
    results = Results(folder)
    models = {}
    for model in MODELS:
        sets = [results.curve(Cell(model, task, *("RelP", "corrupt", "abs", "corrupt"))) for task in TASKS]
        counts = {
            t: [len(s["full"]), len({w for row in s["words"] for w in row})]
            for t, s in zip(TASKS, sets, strict=True)
            if s
        }
        models[model] = {
            "equal": equal_table(results, model),
            "crossed": crossed_table(results, model),
            "pairs": counts,
        }
    stopped = {
        task: (results.curve(Cell("smollm2", task, STOPPED, "corrupt", "signed", "corrupt")) or {}).get("chosen")
        for task in TASKS
    }
    return {
        "models": models, "recommended": recommend(results), "known": known_table(folder),
        "stability": fdr_table(folder), "reliability": reliability_table(folder), "stopped": stopped,
        "screened": screened_table(folder), "minutes": minutes(folder),
    }  # fmt: skip


def minutes(folder: Path) -> float:
    """CPU minutes of all cells, scores included; known circuits and reliability come on top."""
    return sum(json.loads(path.read_text())["seconds_judging"] for path in folder.glob("curves/*/*/*.json")) / 60
