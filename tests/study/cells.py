"""Cells of the study: one set of scores, and one curve, per file; what is there is not computed again."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tl_neuron_circuits as tnc
from tests.study.cases import SIZES, Known, load, parts_of, planted, tracr, words_of
from tests.study.methods import (
    CHEAP,
    ENTRIES,
    FROM_RELP,
    FROM_ZERO,
    SCREENED,
    STEPS,
    UNIFORM,
    Entry,
    score,
)
from tl_neuron_circuits import NodeScores
from tl_neuron_circuits._files import write_text

CROSSED = {"RelP": ("abs", "signed"), "AtP": ("signed",), "IG over inputs": ("signed",), "mask gradient": ("signed",)}
"""Methods, and rankings, that are learned with one ablation and judged with the other."""
KNOWN_METHODS = (*CHEAP, "IG", "AtP, second order", FROM_ZERO[1], FROM_RELP[1], "exact patching")


@dataclass(frozen=True)
class Cell:
    """Scores by `method` under `learned`, ranked by `ranking`, judged under `judged`, on one part of the pairs."""

    model: str
    task: str
    method: str
    learned: str
    ranking: str
    judged: str
    part: str = "judge"

    @property
    def path(self) -> Path:
        name = f"{ENTRIES[self.method].key}.{self.learned}.{self.ranking}.{self.judged}.{self.part}.json"
        return Path("curves") / self.model / self.task / name


def plan(models: list[str], tasks: list[str]) -> Iterator[Cell]:
    """All cells. A stop at any time leaves whole comparisons: a method is done for all tasks before the next, a stage
    for all models, and SmolLM2, which the primary endpoint is of, comes first in each.
    """
    for stage in (_cheap, _learned_short, _crossed_short, _dear, _learned_long, _crossed_long, _rest):
        for model in models:
            yield from stage(model, tasks)


def _cheap(model: str, tasks: list[str]) -> Iterator[Cell]:
    for name in CHEAP:
        yield from _equal(model, tasks, name)


def _learned_short(model: str, tasks: list[str]) -> Iterator[Cell]:
    for name in FROM_ZERO[:2]:
        yield from _equal(model, tasks, name)


def _crossed_short(model: str, tasks: list[str]) -> Iterator[Cell]:
    for name in ("RelP", "IG over inputs", FROM_ZERO[1], "random"):
        yield from _crossed(model, tasks, "corrupt", name)
    for name in ("RelP", "AtP"):  # IG over inputs has no mean to begin from: a mean is of nodes, not of prompts
        yield from _crossed(model, tasks, "mean", name)


def _dear(model: str, tasks: list[str]) -> Iterator[Cell]:
    for name in (SCREENED, FROM_RELP[0], FROM_RELP[1], "IG"):
        yield from _equal(model, tasks, name)


def _learned_long(model: str, tasks: list[str]) -> Iterator[Cell]:
    yield from _equal(model, tasks, FROM_ZERO[2])
    for task in tasks:
        for name in FROM_ZERO:
            yield Cell(model, task, name, "corrupt", "signed", "corrupt", "develop")


def _crossed_long(model: str, tasks: list[str]) -> Iterator[Cell]:
    yield from _crossed(model, tasks, "mean", FROM_ZERO[1])
    yield from _crossed(model, tasks, "corrupt", "AtP")
    for learned in ("corrupt", "mean"):
        yield from _crossed(model, tasks, learned, "mask gradient")


def _rest(model: str, tasks: list[str]) -> Iterator[Cell]:
    for name in (*UNIFORM[:2], "AtP, second order", FROM_RELP[2], UNIFORM[2]):
        yield from _equal(model, tasks, name)
    if model != "smollm2" and "nounpp" in tasks:  # every neuron at every position: days on SmolLM2
        yield from _equal(model, ["nounpp"], "exact patching")


def _equal(model: str, tasks: list[str], name: str) -> Iterator[Cell]:
    for ranking in ENTRIES[name].rankings:
        for task in tasks:
            yield Cell(model, task, name, "corrupt", ranking, "corrupt")


def _crossed(model: str, tasks: list[str], learned: str, name: str) -> Iterator[Cell]:
    for ranking in CROSSED.get(name, ENTRIES[name].rankings):
        for judged in ("mean", "corrupt") if learned == "mean" else ("mean",):
            for task in tasks:
                yield Cell(model, task, name, learned, ranking, judged)


def run(cell: Cell, folder: Path) -> bool:
    """Compute a cell unless it is there; whether it was computed."""
    path = folder / cell.path
    if path.exists():
        return False
    started = time.process_time()
    pairs = getattr(parts_of(cell.model, cell.task), cell.part)
    model = load(cell.model)
    scores, notes = scored(cell, folder)
    curve = tnc.evaluate(
        model,
        pairs,
        scores,
        sizes=SIZES[cell.model],
        ablation=cell.judged,  # pyright: ignore[reportArgumentType]
        ranking=cell.ranking,  # pyright: ignore[reportArgumentType]
    )
    rows = {name: [_rounded(row) for row in getattr(curve, name).tolist()] for name in ("kept", "removed")}
    found = {
        **notes, "sizes": list(curve.sizes), "total": curve.total, **rows, "full": _rounded(curve.full.tolist()),
        "empty": _rounded(curve.empty.tolist()), "words": [list(words_of(pair, cell.task)) for pair in pairs],
        "seconds_judging": time.process_time() - started,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found))
    return True


def scored(cell: Cell, folder: Path) -> tuple[NodeScores, dict[str, float]]:
    """The scores of a cell, and what they cost."""
    entry = ENTRIES[cell.method]
    place = folder / "scores" / cell.model / cell.task / f"{entry.key}.{cell.learned}"
    notes = place.with_name(place.name + ".json")
    if notes.exists():
        return NodeScores.load(place), json.loads(notes.read_text())
    started = time.process_time()
    resume = place.with_name(f"{_run_of(entry)}.{cell.learned}.run") if "learned" in entry.name else None
    scores, cost = score(
        entry, load(cell.model), parts_of(cell.model, cell.task).learn, baseline=cell.learned, resume=resume
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    scores.save(place)
    found = {"cost": cost, "seconds": time.process_time() - started}
    write_text(notes, json.dumps(found))
    return scores, found


def _run_of(entry: Entry) -> str:
    """Checkpoints of one run share its folder."""
    name = entry.key
    for steps in STEPS:
        name = name.replace(f"-{steps}-steps", "")
    return name


def run_known(folder: Path, kinds: tuple[str, ...]) -> Iterator[str]:
    """Area under the ROC curve of every method on models whose circuit is known."""
    from tests.planted.load import planted_seeds
    from tests.real_models import TRACR_PROGRAMS

    cases = [("planted", seed) for seed in planted_seeds()] if "planted" in kinds else []
    cases += [("tracr", name) for name in TRACR_PROGRAMS] if "tracr" in kinds else []
    for kind, which in cases:
        path = folder / "known" / f"{kind}-{which}.json"
        if path.exists():
            continue
        known = planted(which) if kind == "planted" else tracr(which)  # pyright: ignore[reportArgumentType]
        areas = {name: judge_known(ENTRIES[name], known) for name in KNOWN_METHODS}
        path.parent.mkdir(parents=True, exist_ok=True)
        counts = {"parts": len(known.truth), "true": sum(known.truth.values())}
        write_text(path, json.dumps({"kind": kind, "name": known.name, **counts, "auroc": areas}))
        yield f"{kind} {which}: {areas}"


def run_reliability(folder: Path, n_pairs: int = 8) -> None:
    """First and second order, exact patching and the trapezoid of every (layer, position) group on nounpp."""
    path = folder / "reliability_nounpp.json"
    if path.exists():
        return
    pairs = parts_of("smollm2", "nounpp").learn[:n_pairs]
    found = tnc.reliability(load("smollm2"), pairs, exact=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, found.to_dataframe().to_json(orient="records"))


def judge_known(entry: Entry, known: Known) -> dict[str, float]:
    """By ranking: how often a part of the circuit ranks above another part, each as high as its best node."""
    settings = {"metric": known.metric, "basis": list(known.bases)}
    try:
        scores, _ = score(entry, known.model, known.pairs, baseline="corrupt", resume=None, **settings)
    except tnc.SettingsError as error:  # the page says which and why
        return {"refused": str(error)[:200]}  # pyright: ignore[reportReturnType]
    table = scores.to_dataframe()
    table["part"] = [known.part_of(label) for label in table["label"]]
    found = {}
    for ranking in entry.rankings:
        best = (table["score"].abs() if ranking == "abs" else table["score"]).groupby(table["part"]).max()
        values = np.array([best[name] for name in known.truth])
        found[ranking] = area_under_roc(values, np.array(list(known.truth.values())))
    return found


def area_under_roc(values: np.ndarray, true: np.ndarray) -> float:
    """Share of (true, false) couples in which the true one is higher; ties count one half. nan without a false one."""
    if true.all() or not true.any():
        return float("nan")
    difference = values[true][:, None] - values[~true][None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def describe(cell: Cell, found: Any) -> str:
    """One line for the log."""
    how = f"[{cell.learned}, {cell.ranking}] judged {cell.judged} {cell.part}"
    return f"{cell.model} {cell.task} {cell.method} {how}: {found}"
